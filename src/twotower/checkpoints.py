"""The commands `twotower checkpoint inspect|reshard|consolidate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from twotower.errors import UserError
from twotower.show import console, facts, table

COMMANDS = {
    "inspect": "Say what a checkpoint holds, and whether it is whole.",
    "reshard": "Write a checkpoint again for another number of ranks.",
    "consolidate": "Write the towers' tensors into one safetensors file.",
}


def add_commands(parent: Any, parser_class: Any) -> None:
    """Add the three commands to the parser of `checkpoint`."""
    commands = parent.add_subcommands(required=True, dest="command")
    for name, text in COMMANDS.items():
        parser = parser_class(description=text, exit_on_error=False)
        parser.add_argument(
            "path", type=str, help="Checkpoint, training directory, or run_dir of a job."
        )
        if name != "inspect":
            parser.add_argument("out", type=str, help="What to write; it must not exist.")
        if name == "reshard":
            parser.add_argument(
                "--ranks", type=int, required=True, help="Ranks that it is written for."
            )
        commands.add_subcommand(name, parser, help=text)


def run(options: Any) -> int:
    """Run one of the commands; returns the exit code."""
    from twotower.train.checkpoint.tools import consolidate, find_checkpoint, reshard

    chosen = options[options.command]
    source = find_checkpoint(Path(chosen.path))
    if options.command == "inspect":
        return inspect(source)
    target = Path(chosen.out)
    with console.status(f"{options.command}: {source}"):
        if options.command == "reshard":
            written = reshard(source, target, chosen.ranks)
            size, files = written.bytes, len(written.files)
        else:
            size, files = consolidate(source, target).bytes, 1
    facts(f"checkpoint {options.command}", {
        "read": source, "written to": target, "files": files, "size": f"{size / 1e6:,.1f} MB",
    })  # fmt: skip
    return 0


def inspect(source: Path) -> int:
    """Print what a checkpoint holds; returns 2 when it is damaged."""
    from twotower.train.checkpoint.manifest import MODEL, check_files, read_manifest, shape_text

    manifest = read_manifest(source)
    rows = []
    for path, t in sorted(manifest.tensors.items()):
        if path.startswith(MODEL):
            name = path.removeprefix(MODEL)
            states = [s.bytes for p, s in manifest.tensors.items() if f"/state/{name}/" in p]
            size, beside = f"{t.bytes / 1e6:,.2f} MB", f"{sum(states) / 1e6:,.2f} MB"
            rows.append([name, shape_text(t.shape), t.type, size, beside, len(t.chunks)])
    columns = ["tensor", ">shape", "type", ">size", ">optimizer", ">chunks"]
    table(f"{source}", columns, rows)
    loop = manifest.state.get("loop", {}) if isinstance(manifest.state, dict) else {}
    damage = "every file is as it was written"
    try:
        with console.status("reading every file"):
            check_files(source, manifest, manifest.files)
    except UserError as error:
        damage = f"DAMAGED: {error}"
    facts("checkpoint inspect", {
        "step": loop.get("global_step", "-"), "epoch": loop.get("epoch", "-"),
        "ranks that wrote it": manifest.ranks,
        "size": f"{manifest.bytes / 1e6:,.1f} MB in {len(manifest.files)} files",
        "written by": ", ".join(f"{name} {v}" for name, v in manifest.versions.items()),
        "whole": damage,
    })  # fmt: skip
    return 2 if damage.startswith("DAMAGED") else 0
