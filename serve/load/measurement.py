"""What a load test found: latencies from the intended arrival, failures, and the server's batches.

A latency begins when the request was due, not when it was sent, so that a stall of the server
counts for all requests that came meanwhile (no coordinated omission). A request that failed counts
as one whose answer never comes: failing fast improves no percentile.

Shape legend: `R` requests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from twotower.serve.load.arrivals import F64
from twotower.serve.load.asker import KINDS, Record
from twotower.serve.load.config import BEYOND

# Name -> the share of requests within it, in thousandths.
PERCENTILES = {"p50": 500, "p90": 900, "p99": 990, "p99.9": 999}
# A client process that uses more of its core than this, or sends later than this share of the
# 99th percentile, is a part of what it measures.
BUSY = 0.85
LATE_SHARE = 0.25
# A server that answers less of what it is asked falls behind.
KEEPS_UP = 0.98

Statistics = dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one load found."""

    asked_rate: float | None
    """Requests a second that were due; None in a closed loop."""
    clients: int | None
    """Requests under way at any time in a closed loop; None in an open one."""
    seconds: float
    """Time that was measured."""
    requests: int
    """Requests that were due in it."""
    answered_rate: float
    """Answers a second in it."""
    latency_ms: dict[str, float | None]
    """p50, p90, p99 and p99.9; None of too few requests, or when so many failed."""
    max_ms: float | None
    """The slowest answer."""
    errors: dict[str, int]
    """Kind of failure -> requests."""
    late_ms: float
    """99th percentile of how much later than due the client sent, a part of the latencies."""
    client_busy: float
    """Share of a core that the busiest client process used."""
    batches: dict[int, int]
    """Batch size -> how often the server ran it."""
    queue_ms: float | None
    """Mean time of a request in the server's queue."""
    compute_ms: float | None
    """Mean time of a request in the model, with its batch."""

    @property
    def client_bound(self) -> bool:
        """Whether the client itself slowed what it measured."""
        p99 = self.latency_ms["p99"] or self.latency_ms["p50"]
        late = p99 is not None and self.late_ms > max(1.0, LATE_SHARE * p99)
        return late or self.client_busy > BUSY

    @property
    def keeps_up(self) -> bool:
        """Whether the server answered what it was asked in the time."""
        return self.asked_rate is None or self.answered_rate >= KEEPS_UP * self.asked_rate

    @property
    def mean_batch(self) -> float | None:
        """Mean rows of a run of the model."""
        return mean_size(self.batches)


def mean_size(batches: dict[int, int]) -> float | None:
    """Return the mean of batch sizes, from size -> number; None of no batch."""
    runs = sum(batches.values())
    return sum(size * n for size, n in batches.items()) / runs if runs else None


def percentile(ascending: F64, thousandths: int) -> float | None:
    """Return the value (R,) that this share of all is within, None of too few, or when infinite.

    At least `BEYOND` requests must lie beyond it.
    """
    n = len(ascending)
    if n * (1000 - thousandths) < BEYOND * 1000:
        return None
    value = float(ascending[math.ceil(n * thousandths / 1000) - 1])
    return value if math.isfinite(value) else None


def summarise(
    records: list[Record], start: float, seconds: float, *, asked_rate: float | None,
    clients: int | None, before: Statistics, after: Statistics,
) -> Measurement:  # fmt: skip
    """Return what the client processes saw of the requests due from `start` on, for `seconds`.

    Args:
        records: of all processes.
        start: of the time that counts, on the monotonic clock.
        seconds: its length.
        asked_rate: of an open loop.
        clients: of a closed loop.
        before: the server's statistics at the start; None where it gave none.
        after: at the end.
    """
    due, sent, done, kind = (
        np.concatenate([getattr(r, name) for r in records])
        for name in ("due", "sent", "done", "kind")
    )
    counted = (due >= start) & (due < start + seconds)
    answered = (kind == 0) & (done >= start) & (done < start + seconds)
    ok = kind[counted] == 0
    latency = np.sort(np.where(ok, 1000 * (done - due)[counted], np.inf))
    late = np.sort(1000 * (sent - due)[counted])
    return Measurement(
        asked_rate=asked_rate, clients=clients, seconds=seconds, requests=int(counted.sum()),
        answered_rate=float(answered.sum() / seconds),
        latency_ms={name: percentile(latency, t) for name, t in PERCENTILES.items()},
        max_ms=float(latency[: ok.sum()][-1]) if ok.any() else None,
        errors={
            name: n for i, name in enumerate(KINDS) if i and (n := int((kind[counted] == i).sum()))
        },
        late_ms=float(late[math.ceil(0.99 * len(late)) - 1]) if len(late) else 0.0,
        client_busy=max(r.busy for r in records),
        **server_side(before, after),
    )  # fmt: skip


def server_side(before: Statistics, after: Statistics) -> dict[str, Any]:
    """Return the batches that ran between two statistics of the server, and where time went."""
    unknown: dict[str, Any] = {"batches": {}, "queue_ms": None, "compute_ms": None}
    if before is None or after is None:
        return unknown
    was, now = _runs(before), _runs(after)
    runs = {size: now[size] - was.get(size, 0) for size in sorted(now)}
    if min(runs.values(), default=0) < 0 or was.keys() - now.keys():
        return unknown  # the model was loaded anew, and counts from 0
    return {
        "batches": {size: n for size, n in runs.items() if n},
        "queue_ms": _mean_ms(before, after, "queue"),
        "compute_ms": _mean_ms(before, after, "compute_input", "compute_infer", "compute_output"),
    }


def _runs(statistics: dict[str, Any]) -> dict[int, int]:
    """Return batch size -> runs, over all versions of the model."""
    runs: dict[int, int] = {}
    for model in statistics["model_stats"]:
        for batch in model.get("batch_stats", []):
            size = int(batch["batch_size"])
            runs[size] = runs.get(size, 0) + _number(batch["compute_infer"], "count")
    return runs


def _mean_ms(before: dict[str, Any], after: dict[str, Any], *parts: str) -> float | None:
    """Return the mean of a request's time in some parts of its way."""

    def spent(statistics: dict[str, Any], name: str) -> int:
        return sum(
            _number(model["inference_stats"][part], name)
            for model in statistics["model_stats"] for part in parts
        )  # fmt: skip

    count = (spent(after, "count") - spent(before, "count")) / len(parts)
    return (spent(after, "ns") - spent(before, "ns")) / count / 1e6 if count else None


def _number(values: dict[str, Any], name: str) -> int:
    # JSON's form of protobuf leaves out what is 0, and writes 64 bits as text.
    return int(values.get(name, 0))
