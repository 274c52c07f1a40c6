"""The serving steps of a job: start Triton on the newest bundle, and ask it.

Loads no torch: a user's features and history come from the prepared dataset, answers from Triton.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from jsonargparse import Namespace
from rich.markup import escape

from twotower.data.prepared import PreparedDataset
from twotower.data.queries import split_queries
from twotower.data.schema import PAD_INT64
from twotower.errors import UserError
from twotower.export.bundle import latest_bundle, read_bundle
from twotower.job import Job
from twotower.serve.client import RecommendClient
from twotower.serve.control import command
from twotower.serve.hold import passing_directory
from twotower.serve.request import Recommendation
from twotower.serve.runtime import setup_runtime
from twotower.serve.source import FOLDER, Source
from twotower.serve.supervisor import running_server, serve_forever
from twotower.show import console, table

SHOWN_USERS = 3
SHOWN_ITEMS = 10
SHOWN_HISTORY = 3


def setup_server() -> None:
    """Make the environment that the local Triton server runs in, unless it is there."""
    with console.status("preparing the local Triton server"):
        runtime = setup_runtime()
    console.print(f"Triton server ready in {runtime.path}")


def serve(job: Job, _: Namespace) -> None:
    """Serve the bundle of the last rollout, else the newest, until SIGTERM or Ctrl-C."""
    serve_forever(Source(job.path("bundles"), FOLDER), job.serve, job.path("server"))


def rollout(job: Job, options: Namespace) -> None:
    """Have the running server of the job take another bundle, or go back."""
    rollout_in(job.path("server"), options)


def rollout_in(work_dir: Path, options: Namespace) -> None:
    """Have the server that runs in `work_dir` take another bundle, or go back."""
    if options.back and options.to is not None:
        raise UserError("twotower rollout: say either --to, or --back")
    request = {"to": options.to, "back": options.back, "new_schema": options.new_schema}
    outcome = command(work_dir, request, console.print)
    console.print(f"[bold]rollout[/bold]: {escape(outcome)}")


def recommend(job: Job, options: Namespace) -> None:
    """Print one user's recommendations from the running server."""
    data = PreparedDataset(job.path("prepared"))
    user = _parse_id(options.user, data, "users")
    features, seen = request_of(data, user)
    if options.history is not None:
        seen = [_parse_id(i, data, "items") for i in id_list(options.history)]
        for f in data.config.histories():
            features[f.name] = seen[max(0, len(seen) - f.length) :]
            features.pop(f.times_name, None)
    exclude = seen + [_parse_id(i, data, "items") for i in id_list(options.exclude)]
    url = options.url or served_url(job, "--url HOST:PORT")
    with RecommendClient(url, proxy=options.url is not None, tls=job.serve.tls.client()) as client:
        answer = client.recommend(features, k=options.k, exclude=exclude)
    _print_answer(job, user, seen, answer)


def show_answers(job: Job) -> None:
    """Start a server on a free port, print three users' recommendations and stop it.

    It works in a directory of its own, so that a server of this job that runs goes on.
    """
    data = PreparedDataset(job.path("prepared"))
    bundle = latest_bundle(job.path("bundles"))
    queries = split_queries(data, 2, 1000, job.seed)
    rows = np.unique(data.event_columns["user"][queries.event])
    chosen = rows[np.linspace(0, len(rows) - 1, min(SHOWN_USERS, len(rows))).astype(int)]
    free = replace(job.serve, http_port=0, grpc_port=0, metrics_port=0)
    work_dir = job.path("server.check")
    with passing_directory(work_dir), running_server(bundle, free, work_dir) as server:
        console.print(f"Triton answers over gRPC at {server.grpc_url}")
        with RecommendClient(
            server.grpc_url, proxy=False, tls=server.config.tls.client()
        ) as client:
            k = min(SHOWN_ITEMS, client.schema().max_k)
            for row in chosen:
                user = data.users["id"][int(row)].as_py()
                features, seen = request_of(data, user)
                answer = client.recommend(features, k=k, exclude=seen)
                _print_answer(job, user, seen, answer)


def request_of(data: PreparedDataset, user: Any) -> tuple[dict[str, Any], list[Any]]:
    """Return a user's request as of the newest event, and every item the user has seen.

    An id that the log does not know gives a request of missing and average features, with the id
    itself where the model has a feature for it.
    """
    row = data.user_row(user)
    line = data.timeline_slice(row) if row is not None else slice(0, 0)
    history = data.timeline[line]
    seconds = data.timeline_seconds[line] if data.config.timed_histories() else None
    event = data.last_event_of(row) if row is not None else None
    features = data.raw_query(row, event, history, seconds)
    for f in data.config.query:
        if f.kind == "id" and f.source_column == data.config.columns.user:
            features[f.name] = user
    return features, data.items["id"].take(history).to_pylist()


def id_list(text: str) -> list[str]:
    """Read item ids from the command line: `[a,b]`, `a,b` or a JSON list.

    Every id stays as it was typed, since YAML would read 007 as 7 and no as False.
    """
    try:
        entries = json.loads(text, parse_int=str, parse_float=str)
    except ValueError:
        entries = None
    if isinstance(entries, list) and all(isinstance(e, str) for e in entries):
        return entries
    inner = re.sub(r"^\s*\[|\]\s*$", "", text)
    return [part for entry in inner.split(",") if (part := entry.strip().strip("'\""))]


def _parse_id(text: str, data: PreparedDataset, side: str) -> Any:
    """Read an id from the command line in the type that the log uses."""
    if str(getattr(data, side)["id"].type) == "string":
        return text
    try:
        number = int(text)
    except ValueError:
        raise UserError(f"'{text}' is not an id: the log's {side} have integer ids") from None
    if not PAD_INT64 < number < 2**63:
        raise UserError(f"'{text}' is not an id: it does not fit 64 bits")
    return number


def served_url(job: Job, instead: str) -> str:
    """Return the gRPC address of the job's running server.

    Raises:
        UserError: where none runs; `instead` is what could be given.
    """
    try:
        state = json.loads((job.path("server") / "server.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"no server of this job is running ({job.path('server')}): start "
            f"`twotower serve` with the same --config, or give {instead}"
        ) from None
    return f"{state['host']}:{state['grpc_port']}"


def _print_answer(job: Job, user: Any, seen: list[Any], answer: Recommendation) -> None:
    bundle = read_bundle(job.path("bundles") / str(answer.version), verify=False)
    items = pq.read_table(bundle.path / "items.parquet")
    row_of = {item: i for i, item in enumerate(items["id"].to_pylist())}
    shown = [n for n in items.column_names if n not in ("id", "train_count")]

    def describe(item: Any) -> list[str]:
        row = row_of.get(item)
        return ["" if row is None else str(items[n][row].as_py()) for n in shown]

    recent = ", ".join(
        " · ".join([str(item), *describe(item)[:1]]) for item in seen[-SHOWN_HISTORY:]
    )
    console.print(f"[bold]user {user}[/bold]: {len(seen)} items seen, newest {recent or 'none'}")
    table(
        f"version {answer.version} answers",
        [">#", "item", *shown, ">score"],
        [
            [n, str(item), *describe(item), f"{score:.4f}"]
            for n, (item, score) in enumerate(
                zip(answer.item_ids, answer.scores, strict=True), start=1
            )
        ],
    )
