"""The command `twotower load`: what latencies a served bundle has at given rates.

    twotower load --config JOB.yaml [--rates=[100,200]] [--url HOST:PORT] [--json]

Requests are those of the log's newest events, or the bundle's golden queries where there is no
prepared dataset. Asked is the server at --url, the job's running one, or one that is started for
this. Loads no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, get_type_hints

import numpy as np
from docstring_parser import parse_from_object
from jsonargparse import Namespace

from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.export.bundle import latest_bundle, read_bundle
from twotower.files import atomic_directory, write_json
from twotower.job import Job
from twotower.serve.client import RecommendClient
from twotower.serve.hold import server_pid
from twotower.serve.load.asker import Request, Target
from twotower.serve.load.config import LoadConfig
from twotower.serve.load.generator import LoadGenerator
from twotower.serve.load.measurement import PERCENTILES, Measurement
from twotower.serve.load.perf_analyzer import find_perf_analyzer, run_perf_analyzer
from twotower.serve.load.report import failures, number, render
from twotower.serve.server import answerable
from twotower.serve.supervisor import passing_server
from twotower.serve.transport import is_local
from twotower.serving import request_of, served_url
from twotower.show import console, long_work, table

# Without given rates: shares of what a closed loop of so many clients gets answered.
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
CLIENTS = 32
PROBE_S = 3.0

Config = TypeVar("Config")


def add_options(parser: Any, config: Any) -> None:
    """Add a configuration's fields as options that are written as the others of commands are."""
    hints = get_type_hints(config)
    # The parser reads a class's own fields alone.
    described = [p for base in config.__mro__[-2::-1] for p in parse_from_object(base).params]
    texts = {p.arg_name: p.description for p in described}
    for f in fields(config):
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        parser.add_argument(
            f"--{f.name.replace('_', '-')}", type=hints[f.name], default=default,
            help=texts[f.name],
        )  # fmt: skip


def add_load_arguments(parser: Any) -> None:
    """Add the arguments of `twotower load`."""
    add_options(parser, LoadConfig)
    parser.add_argument(
        "--url", type=str, default=None,
        help="Triton's gRPC address; without it the job's running server, or one that is started.",
    )  # fmt: skip
    parser.add_argument(
        "--perf-analyzer", action="store_true",
        help="Ask the same by NVIDIA's perf_analyzer too, where it is installed.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="Print JSON, not a table.")


def read_options(config_class: type[Config], options: Namespace) -> Config:
    """Return the configuration that a command's options make."""
    names = [f.name for f in fields(config_class)]  # type: ignore[arg-type]
    return config_class(**{name: options[name] for name in names})


def load(job: Job, options: Namespace) -> None:
    """Measure a server's latencies at each rate, show them, and write the report."""
    config = read_options(LoadConfig, options)
    config.validate()
    if options.perf_analyzer:
        find_perf_analyzer()
    requests, origin = traffic(job, config.requests)
    with _server(job, options.url) as (url, proxy, whose):
        target = Target(
            url=url, proxy=proxy, deadline_s=config.deadline_ms / 1000, k=config.k,
            requests=requests, tls=job.serve.tls.client(),
        )  # fmt: skip
        with RecommendClient(url, proxy=proxy, tls=target.tls) as client:
            schema = client.schema()
        found = _measure(target, config, job.seed)
        theirs, notes = [], _notes(found, url)
        if options.perf_analyzer:
            rates = [m.asked_rate for m in found if m.asked_rate]
            with console.status("perf_analyzer asks"), TemporaryDirectory() as work:
                try:
                    theirs = run_perf_analyzer(target, schema, rates, config, Path(work))
                except UserError as error:  # what was measured is shown all the same
                    notes.append(str(error))
    about = {
        "server": f"{whose} at {url}, version {schema.version}, {schema.num_items:,} items",
        "requests": f"{len(requests):,} of {origin}, k={config.k or schema.default_k}",
        "load": f"{config.arrivals} arrivals, {config.seconds:g} s a rate after "
                f"{config.warmup_seconds:g} s, deadline {config.deadline_ms:g} ms",
    }  # fmt: skip
    target_dir = job.path("load")
    report = {
        "name": job.name, "about": about, "config": asdict(config),
        "measurements": [
            asdict(m) | {"mean_batch": m.mean_batch, "client_bound": m.client_bound} for m in found
        ],
        "perf_analyzer": theirs, "notes": notes,
    }  # fmt: skip
    with atomic_directory(target_dir) as partial:
        write_json(partial / "load.json", report)
        page = render(f"{job.name}: latency under load", about, found, notes)
        (partial / "index.html").write_text(page, encoding="utf-8")
    if options.json:
        print(json.dumps(report, indent=2))
        return
    _show(about, found, theirs, notes)
    console.print(f"page: {target_dir / 'index.html'}", markup=False)


def traffic(job: Job, most: int) -> tuple[list[Request], str]:
    """Return requests, and where they come from.

    A user comes as often as among the newest events, of the test split where there is one, with
    the history and features of now, and without the items seen, as `twotower recommend` asks.

    Raises:
        UserError: when there is neither a prepared dataset nor a bundle.
    """
    prepared = job.path("prepared")
    if not (prepared / "prepared.json").exists():
        golden = answerable(read_bundle(latest_bundle(job.path("bundles"))))[:most]
        return [(g.features, g.exclude) for g in golden], "the bundle's golden queries"
    data = PreparedDataset(prepared)
    newest = next(s for split in (2, 1, 0) if len(s := _rows(data, split)))
    chosen = np.random.default_rng(job.seed).choice(newest, min(most, len(newest)), replace=False)
    users = data.event_columns["user"][chosen].tolist()
    asked = {user: request_of(data, data.users["id"][user].as_py()) for user in set(users)}
    return [asked[user] for user in users], "the log's newest events"


def _rows(data: PreparedDataset, split: int) -> Any:
    section = data.section(split)
    return np.arange(section.start, section.stop)


@contextmanager
def _server(job: Job, url: str | None) -> Iterator[tuple[str, bool, str]]:
    """Yield the gRPC address, whether a proxy is heeded, and whose server it is."""
    if url is not None:
        yield url, True, "the server"
    elif server_pid(job.path("server")) is not None:
        yield served_url(job, "--url HOST:PORT"), False, "the job's running server"
    else:
        bundle = read_bundle(
            latest_bundle(job.path("bundles")), signed_by=job.serve.require_signature
        )
        with passing_server(bundle, job.serve) as server:
            yield server.grpc_url, False, "a server of its own"


def _measure(target: Target, config: LoadConfig, seed: int) -> list[Measurement]:
    found: list[Measurement] = []
    with (
        long_work("load") as report,
        LoadGenerator(target, config.processes, seed) as generator,
    ):
        rates = sorted(config.rates)
        if not rates:
            report("what the server can", 0.0)
            probe = generator.closed_loop(CLIENTS, PROBE_S, warmup_seconds=1.0)
            rates = sorted({round_rate(probe.answered_rate * share) for share in SHARES})
        for i, rate in enumerate(rates):
            report(f"{rate:,g} requests a second", i / len(rates))
            found.append(
                generator.open_loop(
                    rate, config.seconds, warmup_seconds=config.warmup_seconds,
                    arrivals=config.arrivals,
                )
            )  # fmt: skip
    return found


def round_rate(rate: float) -> float:
    """Return a rate with two digits, at least 1."""
    return max(1.0, float(f"{rate:.1e}"))


def _notes(found: list[Measurement], url: str) -> list[str]:
    notes = [
        "A latency begins when its request was due, not when it was sent; a request that failed "
        "counts as one that is never answered. A percentile that too few requests lie beyond is -."
    ]
    if is_local(url):
        notes.append(
            f"The client and the server share the {os.cpu_count()} cores of this machine: beside "
            "a client elsewhere, the server would do better."
        )
    behind = [m for m in found if not m.keeps_up]
    if behind:
        notes.append(
            f"From {number(behind[0].asked_rate, 0)} a second on, the server falls behind: "
            f"it answers {number(max(m.answered_rate for m in found), 0)} a second at most."
        )
    notes += [
        f"At {number(m.asked_rate, 0)} a second {failures(m)}." for m in found if m.errors
    ]  # fmt: skip
    notes += [
        f"At {number(m.asked_rate, 0)} a second the client itself is a part of what was measured: "
        f"1 of 100 requests was sent more than {number(m.late_ms)} ms after it was due, and its "
        f"busiest process used {m.client_busy:.0%} of a core."
        for m in found if m.client_bound
    ]  # fmt: skip
    return notes


def _show(
    about: dict[str, str], found: list[Measurement], theirs: list[dict[str, Any]],
    notes: list[str],
) -> None:  # fmt: skip
    for name, text in about.items():
        console.print(f"{name}: {text}", markup=False)
    columns = [">asked/s", ">answered", *(f">{name}" for name in PERCENTILES), ">max", ">failed"]
    rows = [
        [number(m.asked_rate, 0), number(m.answered_rate, 0),
         *(number(m.latency_ms[name]) for name in PERCENTILES), number(m.max_ms),
         f"{sum(m.errors.values()):,}"]
        for m in found
    ]  # fmt: skip
    table("load: ms from the intended arrival", columns, rows)
    if theirs:
        rows = [
            [number(m["asked_rate"], 0), number(m["answered_rate"], 0),
             *(number(m["latency_ms"][name]) for name in PERCENTILES), number(m["max_ms"])]
            for m in theirs
        ]  # fmt: skip
        table("perf_analyzer: ms from the sending", columns[:-1], rows)
    for note in notes:
        console.print(f"[dim]-[/dim] {note}")
