"""The gateway of a job: JSON over HTTP in front of its server, and what it knows of users.

    twotower load-store --config JOB.yaml    <run_dir>/gateway/defaults.json, and the store
    twotower gateway --config JOB.yaml

Loads no torch.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
from jsonargparse import Namespace

from twotower.data.prepared import PreparedDataset
from twotower.data.schema import PAD_INT64
from twotower.errors import UserError, did_you_mean
from twotower.job import Job
from twotower.serve.gateway.config import MEMORY
from twotower.serve.gateway.defaults import Defaults
from twotower.serving import served_url
from twotower.show import console, facts

# Of a store that is filled, not asked: a batch of 500 users may take a while.
LOAD_TIMEOUT_S = 30.0


def gateway(job: Job, _: Namespace) -> None:
    """Answer JSON requests until SIGTERM or Ctrl-C."""
    from twotower.serve.gateway.run import run_gateway

    servers = job.gateway.triton or [served_url(job, "--gateway.triton=[HOST:PORT]")]

    feast = job.gateway.feast

    def ready(url: str, schema: Any) -> None:
        facts("gateway", {
            "answers at": url, "documentation": f"{url}/docs",
            "model": f"version {schema.version} at {', '.join(servers)}",
            "store": job.gateway.store.rpartition("@")[2],
            "features": f"{feast.service} of {feast.url}" if feast.url else "of the store",
        })  # fmt: skip

    run_gateway(
        job.gateway, name=job.name, folder=job.path("gateway"), servers=servers,
        start_s=job.serve.load_timeout_s, tls=job.serve.tls.client(), ready=ready,
    )  # fmt: skip
    console.print("[bold]gateway[/bold]: stopped")


def load_store(job: Job, _: Namespace) -> None:
    """Write the defaults, and every user of the prepared dataset to the store."""
    from twotower.serve.gateway.store import StoreUnavailable, write_users

    data, config, folder = PreparedDataset(job.path("prepared")), job.gateway, job.path("gateway")
    defaults = make_defaults(data, config.segment_by, config.popular)
    records = user_records(data, config.history_length)
    with console.status("writing the users"):
        if config.store == MEMORY:
            count, place = write_users(folder / "users.jsonl", records), str(folder / "users.jsonl")
        else:
            place = config.store.rpartition("@")[2]
            try:
                count = asyncio.run(_fill(job, _dtype(data.items), records))
            except StoreUnavailable as error:
                raise UserError(f"gateway.store: {place} does not answer ({error})") from None
    defaults.write(folder / "defaults.json")
    facts("load-store", {
        "users": f"{count:,} in {place}", "defaults": folder / "defaults.json",
        "popular items": f"{len(defaults.popular):,}, in {len(defaults.segments)} segments",
    })  # fmt: skip


async def _fill(job: Job, item_id_dtype: str, records: Iterator[tuple[Any, Any]]) -> int:
    from twotower.serve.gateway.store import RedisStore

    store = RedisStore(
        job.gateway.store, job.name, item_id_dtype, job.gateway.history_length, LOAD_TIMEOUT_S
    )
    try:
        return await store.put(records)
    finally:
        await store.close()


def user_records(data: PreparedDataset, length: int) -> Iterator[tuple[Any, Any]]:
    """Yield every user's id and `Record`, as of the newest event, with the newest `length` items.

    The features are those that `twotower recommend` asks with.
    """
    from twotower.serve.gateway.store import Record

    ids, items = data.users["id"].to_pylist(), data.items["id"].to_pylist()
    timed = bool(data.config.timed_histories())
    own = _own_features(data)
    nothing = np.empty(0, np.int64)
    ends = np.append(data.history_from[1:], len(data.timeline))
    starts = np.maximum(data.history_from, ends - length)
    for row, user in enumerate(ids):
        line = slice(starts[row], ends[row])
        raw = data.raw_query(row, data.last_event_of(row), nothing)
        taken = [items[i] for i in data.timeline[line].tolist()]
        times: list[int | None] = [None] * len(taken)
        if timed:
            seconds = data.timeline_seconds[line].tolist()
            times = [None if t == PAD_INT64 else t for t in seconds]
        yield user, Record({name: raw[name] for name in own}, taken, times)


def make_defaults(data: PreparedDataset, segment_by: str | None, count: int) -> Defaults:
    """Return what the gateway answers with where it knows nothing better.

    Args:
        data: the prepared dataset, of which all events count.
        segment_by: query feature of kind id, from the users table.
        count: most items of each list.

    Raises:
        UserError: where `segment_by` is no such feature.
    """
    query, users = data.config.query, data.event_columns["user"]
    raw = data.raw_query(None, None, np.empty(0, np.int64))
    user_features = [
        f.name for f in query
        if f.kind == "id" and f.source_column == data.config.columns.user
    ]  # fmt: skip
    items = data.event_columns["item"]
    segments: dict[str, list[Any]] = {}
    if segment_by is not None:
        fit = [f.name for f in query if f.kind == "id" and f.source == "users"]
        if segment_by not in fit:
            raise UserError(
                f"gateway.segment_by: '{segment_by}' is no query feature of kind id from the users "
                f"table{did_you_mean(segment_by, fit)}"
            )
        values = data.users[f"raw.{segment_by}"].combine_chunks().dictionary_encode()
        codes = values.indices.fill_null(-1).to_numpy()[users]
        for code, value in enumerate(values.dictionary.to_pylist()):
            segments[str(value)] = _popular(data, items[codes == code], count)
    return Defaults(
        user_id_dtype=_dtype(data.users), user_features=user_features,
        features={name: raw[name] for name in _own_features(data)}, segment_by=segment_by,
        popular=_popular(data, items, count), segments=segments,
    )  # fmt: skip


def _own_features(data: PreparedDataset) -> list[str]:
    return [f.name for f in data.config.query if f.kind != "history"]


def _dtype(table: Any) -> str:
    return "string" if str(table["id"].type) in ("string", "large_string") else "int64"


def _popular(data: PreparedDataset, items: Any, count: int) -> list[Any]:
    """Return the ids of the rows that occur most, the lower row first where two are equal."""
    counts = np.bincount(items, minlength=len(data.items))
    best = np.argsort(-counts, kind="stable")[:count]
    ids: list[Any] = data.items["id"].take(best[counts[best] > 0]).to_pylist()
    return ids
