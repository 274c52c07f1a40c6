"""The commands about a bundle itself: `twotower index`, `twotower verify`, `render` and `bundle`.

    twotower index BUNDLE --compare [--k 100] [--json]
    twotower index BUNDLE --update ITEMS.parquet [--remove ID,...]
    twotower verify BUNDLE                       see `twotower.verification`
    twotower render BUNDLE --output DIR [--target gpu]
    twotower bundle inspect BUNDLE

BUNDLE is a bundle's directory, a folder of bundles or a run_dir, of which the newest is taken.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape

from twotower.errors import UserError
from twotower.export.bundle import Bundle, find_bundle, read_bundle
from twotower.export.manifest import SIDES, Manifest
from twotower.export.signature import SIGNATURE
from twotower.files import atomic_directory
from twotower.serve.config import TARGETS, serve_config
from twotower.serving import id_list
from twotower.show import console, facts, long_work, table

# Of the metrics, the file has all.
SHOWN = re.compile(r"(recall|ndcg)@\d+")
BUNDLE = "Bundle, folder of bundles, or run_dir of a job; of several the newest."
SIGNED = "PEM file of the ed25519 public key by which the bundle must be signed."


def add_index_arguments(parser: Any) -> None:
    """Add the arguments of `twotower index`."""
    parser.add_argument("path", type=str, help=BUNDLE)
    parser.add_argument(
        "--compare", action="store_true",
        help="Show what every kind of index would cost and lose on this bundle's vectors.",
    )  # fmt: skip
    parser.add_argument(
        "-k", "--k", type=int, default=None, help="compare: results; 100 or all items without it."
    )
    parser.add_argument("--json", action="store_true", help="compare: print JSON, not a table.")
    parser.add_argument(
        "--update", type=str, default=None,
        help="Parquet table of items to add, or whose features have changed: makes a new bundle "
        "version from the same towers.",
    )  # fmt: skip
    parser.add_argument(
        "--remove", type=str, default="", help="Item ids to take out: --remove=[a,b]."
    )
    parser.add_argument(
        "--sign-with", type=str, default=None,
        help="PEM file of the ed25519 private key that signs the new version.",
    )  # fmt: skip
    parser.add_argument("--require-signature", type=str, default=None, help=SIGNED)


def add_verify_arguments(parser: Any) -> None:
    """Add the arguments of `twotower verify`."""
    parser.add_argument("path", type=str, help=BUNDLE)
    parser.add_argument(
        "--url", type=str, default=None,
        help="gRPC address of a Triton server to ask; without it, one is started for this.",
    )  # fmt: skip
    parser.add_argument("--no-server", action="store_true", help="Ask ONNX Runtime alone.")
    parser.add_argument(
        "--tolerance", type=float, default=None,
        help="Largest score difference that is none; the export's without it.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON, not a table.")
    parser.add_argument("--require-signature", type=str, default=None, help=SIGNED)


def add_render_arguments(parser: Any) -> None:
    """Add the arguments of `twotower render`."""
    parser.add_argument("path", type=str, help=BUNDLE)
    parser.add_argument("--output", type=str, required=True, help="Folder of the repository.")
    parser.add_argument(
        "--target", choices=TARGETS, default="gpu",
        help="gpu: for NVIDIA's container, with towers in TensorRT or ONNX Runtime; cpu: for "
        "`twotower serve`.",
    )  # fmt: skip
    for side in SIDES:
        parser.add_argument(
            f"--{side}-plan", type=str, default=None,
            help=f"gpu: engine of the {side} tower that the bundle's build_engine.py made; ONNX "
            "Runtime runs the tower without.",
        )  # fmt: skip
    parser.add_argument("--require-signature", type=str, default=None, help=SIGNED)


def render(options: Any) -> int:
    """Write a bundle as a model repository, with the settings `serve` of its job; the exit code."""
    from twotower.serve.repository import render_repository
    from twotower.serve.runtime import find_runtime

    plans = {side: Path(plan) for side in SIDES if (plan := options[f"{side}_plan"])}
    for plan in plans.values():
        if options.target == "cpu" or not plan.is_file():
            why = "the target cpu has no engines" if options.target == "cpu" else "no such file"
            raise UserError(f"twotower render: {plan}: {why}")
    bundle = read_bundle(find_bundle(Path(options.path)), signed_by=options.require_signature)
    config = serve_config(bundle.job().get("serve", {}))
    config.validate()
    environment = find_runtime().path if options.target == "cpu" else None
    with atomic_directory(Path(options.output)) as partial:
        render_repository(bundle, partial, config, environment, options.target, plans)
    models = sorted(p.name for p in Path(options.output).iterdir())
    facts(f"model repository, {options.target}", {
        "bundle": f"{bundle.path}, version {bundle.manifest.version}",
        "models": ", ".join(models),
        "repository": options.output,
        "start": f"twotower serve {options.output}" if options.target == "cpu" else
        f"tritonserver --model-repository={options.output} --disable-auto-complete-config",
    })  # fmt: skip
    return 0


def add_bundle_commands(parent: Any, parser_class: Any) -> None:
    """Add the commands of `twotower bundle`."""
    commands = parent.add_subcommands(required=True, dest="command")
    text = "Say what a bundle holds, where its bytes go, and whether it is whole."
    parser = parser_class(description=text, exit_on_error=False)
    parser.add_argument("path", type=str, help=BUNDLE)
    parser.add_argument("--require-signature", type=str, default=None, help=SIGNED)
    commands.add_subcommand("inspect", parser, help=text)


def index(options: Any) -> int:
    """Compare indexes of a bundle, or update its items; returns the exit code."""
    # Namespace.update is a method.
    path, update = find_bundle(Path(options.path)), options["update"]
    if options.compare == bool(update or options.remove):
        raise UserError("twotower index: say either --compare, or --update and --remove")
    with console.status("reading the bundle"):
        bundle = read_bundle(path, signed_by=options.require_signature)
    if options.compare:
        _compare(bundle, options.k, options.json)
    else:
        _update(bundle, update, options)
    return 0


def _compare(bundle: Bundle, k: int | None, as_json: bool) -> None:
    from twotower.export.compare import BATCHES, THREADS, compare_indexes
    from twotower.export.update import index_settings

    m = bundle.manifest
    k = min(100, m.num_items) if k is None else k
    with long_work("index") as report:
        costs = compare_indexes(bundle, index_settings(bundle), k, report)
    if as_json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
        return
    columns = ["kind", ">width", f">recall@{k}", ">bytes an item", ">build",
               *(f">ms, {size}" for size in BATCHES)]  # fmt: skip
    rows = [
        [c.kind, c.width, f"{c.recall:.4f}", f"{c.bytes_an_item:,.0f}", f"{c.build_s:.1f} s",
         *(f"{c.latency_ms[size]:.2f}" for size in BATCHES)]
        for c in costs
    ]  # fmt: skip
    table(f"{m.num_items:,} items, {len(bundle.golden())} golden queries", columns, rows)
    console.print(
        f"ms: median of a search for 1 and for 64 queries on {THREADS} threads. Beside every kind "
        f"but exact of width {m.dim}, the whole vectors ({4 * m.dim} bytes an item) stay on disk."
    )


def _update(bundle: Bundle, update: str | None, options: Any) -> None:
    from twotower.export.update import update_bundle

    m = bundle.manifest
    remove: list[Any] = id_list(options.remove)
    if m.item_id_dtype == "int64":
        try:
            remove = [int(i) for i in remove]
        except ValueError:
            raise UserError(
                f"--remove: '{options.remove}' is no list of ids: the bundle has integer ids"
            ) from None
    with long_work("index") as report:
        items = None if update is None else Path(update)
        made = update_bundle(bundle, items, remove, options.sign_with, report)
    facts("index", {
        "bundle": made.path, "version": f"{made.manifest.version}, with the towers of {m.version}",
        "items": f"{made.manifest.num_items:,}, before {m.num_items:,}",
        "index": _index_text(made),
    })  # fmt: skip


def inspect(options: Any) -> int:
    """Print what a bundle holds; returns 2 when it is damaged."""
    chosen = options[options.command]
    path = find_bundle(Path(chosen.path))
    bundle, state = read_bundle(path, verify=False), "every file is as it was written"
    try:
        with console.status("reading every file"):
            read_bundle(path, signed_by=chosen.require_signature)
    except UserError as error:
        state = f"REFUSED: {error}"
    m = bundle.manifest
    sizes = {name: (path / name).stat().st_size for name in m.files}
    total = sum(sizes.values())
    rows = [
        [name, f"{size / 1e6:,.2f} MB", f"{size / total:.0%}", f"{size / m.num_items:,.0f}",
         m.files[name][:16]]
        for name, size in sorted(sizes.items(), key=lambda entry: -entry[1])
    ]  # fmt: skip
    columns = ["file", ">size", ">share", ">bytes an item", "SHA-256"]
    table(escape(str(path)), columns, rows)
    facts("bundle inspect", {
        "name": m.name,
        "version": f"{m.version}" + (f", with the towers of {m.base}" if m.base else ""),
        "items": f"{m.num_items:,}, vectors of {m.dim}", "index": _index_text(bundle),
        "query": ", ".join(f"{s.name} ({s.kind})" for s in m.query),
        "item": ", ".join(f"{s.name} ({s.kind})" for s in m.item),
        "metrics": ", ".join(
            f"{name} {value:.4f}" for name, value in m.metrics.items() if SHOWN.fullmatch(name)
        ) or "-",
        "parity": ", ".join(f"{name} {value:.1e}" for name, value in m.parity.items()),
        "made by": ", ".join(f"{name} {v}" for name, v in m.versions.items()),
        "pruned": pruned_text(m),
        "signature": SIGNATURE if (path / SIGNATURE).exists() else "none",
        "size": f"{total / 1e6:,.1f} MB in {len(sizes)} files", "whole": state,
    })  # fmt: skip
    return 2 if state.startswith("REFUSED") else 0


def pruned_text(m: Manifest) -> str:
    """Return what `export.prune_vocab` left out of a bundle."""
    if not m.pruned:
        return "nothing"
    tables = ", ".join(f"{rows:,} of {name}" for name, rows in m.pruned.items())
    return f"{sum(m.pruned.values()):,} rows ({tables}), {m.pruned_bytes / 1e6:,.1f} MB of tables"


def _index_text(bundle: Bundle) -> str:
    m = bundle.manifest
    if m.index.is_exact(m.dim):
        return "exact"
    return (
        f"{m.index.kind} of width {m.index.width}, {m.index.rescore} candidates a result rescored, "
        f"recall {m.index.recall:.4f}"
    )
