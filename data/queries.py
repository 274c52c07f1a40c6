"""The queries that a split is judged by.

A query is a user at one moment of the split: the history holds the items strictly before, what was
taken at that moment is relevant, and items seen before are neither answered nor relevant.

Shape legend: `Q` queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.data.prepared import PreparedDataset, gather

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Queries:
    """The queries of a split.

    Attributes:
        event: row of the event that stands for each query (Q,).
        relevant: item rows, query after query.
        relevant_offset: where each query's relevant items begin (Q + 1).
        seen: item rows that may not be answered, query after query.
        seen_offset: where each query's seen items begin (Q + 1).
    """

    event: I64
    relevant: I64
    relevant_offset: I64
    seen: I64
    seen_offset: I64


def split_queries(data: PreparedDataset, split: int, max_queries: int, seed: int) -> Queries:
    """Return the queries of split 1 (validation) or 2 (test), a seeded sample if there are more."""
    c = data.event_columns
    section = data.section(split)
    rows = np.arange(section.start, section.stop)
    user, time = c["user"][section.start : section.stop], c["time"][section.start : section.stop]
    first = np.ones(len(rows), bool)
    first[1:] = (np.diff(user) != 0) | (np.diff(time) != 0)
    start = np.flatnonzero(first)
    if len(start) > max_queries:
        chosen = np.random.default_rng(seed).choice(len(start), max_queries, replace=False)
        pick = np.sort(chosen)
    else:
        pick = np.arange(len(start))
    end = np.append(start[1:], len(rows))[pick]
    event = rows[start[pick]]
    relevant, counts = gather(c["item"], section.start + start[pick], section.start + end)
    seen, seen_counts = gather(
        data.timeline,
        data.history_from[c["user"][event].astype(np.int64)],
        c["history_to"][event],
    )
    seen, n = seen.astype(np.int64), len(data.items)
    relevant = relevant.astype(np.int64)
    owner = np.repeat(np.arange(len(event)), counts)
    seen_owner = np.repeat(np.arange(len(event)), seen_counts)
    # A repeated item counts once, and not at all when it was seen before.
    pairs = np.setdiff1d(owner * n + relevant, seen_owner * n + seen)
    counts = np.bincount(pairs // n, minlength=len(event))
    asked = counts > 0
    seen, seen_counts = gather(
        seen, (np.cumsum(seen_counts) - seen_counts)[asked], np.cumsum(seen_counts)[asked]
    )
    return Queries(
        event[asked], pairs % n, _offsets(counts[asked]), seen, _offsets(seen_counts)
    )  # fmt: skip


def _offsets(counts: I64) -> I64:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
