"""The report of an evaluation: metrics with intervals, their decay, and what a comparison needs.

    evaluation/
      metrics.json      metrics and 95% intervals by model, slices, decay, what was judged
      queries.parquet   the towers' metrics at the monitor's cut-off, and answers, a row a query
      evaluation.png

Shape legend: `Q` queries, `N` items, `D` width, `K` results.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries
from twotower.files import write_json
from twotower.towers.catalogue import catalogue_vectors
from twotower.train.config import QUERIES, EvaluateConfig
from twotower.train.evaluation.answers import (
    answer,
    answer_by_cooccurrence,
    answer_by_popularity,
    judged_queries,
)
from twotower.train.evaluation.bootstrap import F64, I64, Ratio, Ratios, intervals, values
from twotower.train.evaluation.metrics import (
    ACCURACY,
    Metrics,
    accuracy,
    beyond_accuracy,
    score_answers,
    slice_sizes,
)
from twotower.train.evaluation.outcomes import judge_heads
from twotower.train.heads import Heads
from twotower.train.plots import plot_evaluation

TOWERS = "two towers"
DAY_US = 86_400_000_000
BUCKETS = 5
# Fewer queries than this say nothing of their own.
BUCKET_QUERIES = 50


def write_report(directory: Path, report: dict[str, Any], queries: pa.Table, k: int) -> None:
    """Write a report, its queries and its picture into a directory."""
    write_json(directory / "metrics.json", report)
    pq.write_table(queries, directory / QUERIES, compression="zstd")
    plot_evaluation(report, k, directory / "evaluation.png")


def evaluate_towers(
    model: Any, builder: BatchBuilder, queries: Queries, ks: list[int], batch_size: int,
    device: torch.device,
) -> Metrics:  # fmt: skip
    """Return accuracy and coverage of a `TwoTower` on `queries`."""
    item_ND = catalogue_vectors(model.item_vectors, builder, device, batch_size)
    answers = answer(model.query_vectors, item_ND, builder, queries, max(ks), batch_size)
    return score_answers(answers, queries, builder.data, ks)


def compare_with_baselines(
    model: Any,
    data: PreparedDataset,
    config: EvaluateConfig,
    seed: int,
    heads: Heads | None = None,
) -> tuple[dict[str, Any], pa.Table]:
    """Return the test metrics of the towers, their heads' included, and of two baselines.

    Returns:
        The report: `split`; `queries`, their number; `users`, theirs; `slices`, the size of each;
        `decay`, buckets of time; `judged`, what a comparison must agree on; `results`, model ->
        metric -> value; `intervals`, the same with low and high. And a row a query, as
        `query_table`.

    Raises:
        UserError: as `judged_queries`.
    """
    queries = judged_queries(data, 2, config, seed)
    k, size = max(config.k), config.batch_size
    builder = BatchBuilder(data)
    item_ND = catalogue_vectors(model.item_vectors, builder, torch.device("cpu"), size)
    answers = {
        TOWERS: answer(model.query_vectors, item_ND, builder, queries, k, size),
        "popularity": answer_by_popularity(data, queries, k, size),
        "co-occurrence": answer_by_cooccurrence(data, queries, k, size),
    }
    users, user_Q = np.unique(data.event_columns["user"][queries.event], return_inverse=True)
    at = config.monitor_k
    days = days_since_training(data, queries)
    buckets = [] if days is None else equal_buckets(days)
    ratios: dict[str, Ratios] = {}
    for name, rows in answers.items():
        found = {
            **accuracy(rows, queries, data, config.k),
            **beyond_accuracy(rows, queries, data, config.k, user_Q, item_ND),
        }
        ratios[name] = found | _by_bucket(found, buckets, days, at)
    # Of all models at once: every user is drawn as often for each.
    joined = {(name, m): pair for name, of in ratios.items() for m, pair in of.items()}
    bounds = intervals(joined, user_Q, seed)
    report: dict[str, Any] = {
        "split": "test",
        "queries": len(queries.event),
        "users": len(users),
        "slices": slice_sizes(queries, data),
        "decay": buckets,
        "judged": _judged(data, config, seed),
        "results": {name: values(of) for name, of in ratios.items()},
        "intervals": {
            name: {m: list(bounds[name, m]) for m in of if (name, m) in bounds}
            for name, of in ratios.items()
        },
    }
    if heads is not None:
        cpu = torch.device("cpu")
        report["results"][TOWERS] |= judge_heads(heads, model, data, 2, config, seed, cpu)
    return report, query_table(data, queries, answers[TOWERS][:, :at], ratios[TOWERS], at)


def days_since_training(data: PreparedDataset, queries: Queries) -> F64 | None:
    """Return the days (Q,) from the last training event; None where the split is not in time."""
    time = data.event_columns["time"]
    train = data.section(0)
    cut = time[train.start : train.stop].max()
    days: F64 = (time[queries.event] - cut) / DAY_US
    return None if days.min() < 0 else days


def equal_buckets(days: F64) -> list[dict[str, Any]]:
    """Return at most five spans of time with as many queries each, as far as ties allow.

    Returns:
        `name`; `from_days`, `to_days`, first and last query in it; `queries`, their number. None
        where all are of one moment, or too few to part.
    """
    order = np.sort(days)
    number = min(BUCKETS, len(order) // BUCKET_QUERIES)
    places = [len(order) * i // number for i in range(number)]
    starts = np.unique(np.searchsorted(order, order[places]))
    if len(starts) < 2:
        return []
    ends = np.append(starts[1:], len(order))
    # As few digits as tell the spans apart.
    digits = next(d for d in range(16) if len({f"{x:.{d}f}" for x in order[starts]}) == len(starts))
    return [
        {
            "name": f"day {order[a]:.{digits}f}-{order[b - 1]:.{digits}f}",
            "from_days": float(order[a]), "to_days": float(order[b - 1]), "queries": int(b - a),
        }
        for a, b in zip(starts, ends, strict=True)
    ]  # fmt: skip


def _by_bucket(
    found: Ratios, buckets: list[dict[str, Any]], days: F64 | None, k: int
) -> dict[str, Ratio]:
    """Return recall and NDCG of each span of time."""
    out = {}
    for bucket in buckets:
        assert days is not None
        inside = (days >= bucket["from_days"]) & (days <= bucket["to_days"])
        for metric in (f"recall@{k}", f"ndcg@{k}"):
            numerator, denominator = found[metric]
            out[f"{metric}/{bucket['name']}"] = numerator * inside, denominator * inside
    return out


def _judged(data: PreparedDataset, config: EvaluateConfig, seed: int) -> dict[str, Any]:
    """Return what two evaluations must have in common to be compared, in words."""
    split, test = data.config.split, data.section(2)
    time = data.event_columns["time"][test.start : test.stop]
    defaults = type(split)()
    settings = {
        key: value for key, value in vars(split).items()
        if key == "kind" or value != getattr(defaults, key)
    }  # fmt: skip
    return {
        "k": config.monitor_k,
        "split": " ".join(f"{key}={value}" for key, value in settings.items()),
        "test_events": len(test),
        "first_test_event": _moment(time.min()),
        "last_test_event": _moment(time.max()),
        "items": len(data.items),
        "max_queries": config.max_queries,
        "seed": seed,
    }


def _moment(time_us: int) -> str:
    return datetime.fromtimestamp(int(time_us) / 1e6, timezone.utc).isoformat(timespec="seconds")


def query_table(
    data: PreparedDataset, queries: Queries, answers: I64, ratios: Ratios, k: int
) -> pa.Table:
    """Return a row a query: user, time, relevant and answered items, and accuracy at k.

    Ids are the log's own, so that the table can be read beside it, and beside that of a model
    whose catalogue has other rows.
    """
    c, ids = data.event_columns, data.items["id"].combine_chunks()
    there = answers >= 0
    answered = np.concatenate([[0], np.cumsum(there.sum(1))])
    lists = {
        "relevant": (queries.relevant, queries.relevant_offset),
        "answers": (answers[there], answered),
    }
    columns = {
        "user": data.users["id"].take(pa.array(c["user"][queries.event])),
        "time": pa.array(c["time"][queries.event], pa.timestamp("us", "UTC")),
    }
    for name, (rows, offsets) in lists.items():
        items = ids.take(pa.array(rows))
        columns[name] = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), items)
    for metric in (*ACCURACY, "novelty", "arp"):
        columns[f"{metric}@{k}"] = pa.array(ratios[f"{metric}@{k}"][0])
    bias = ratios[f"popularity_bias@{k}"][1]
    return pa.table({**columns, "taken_popularity": pa.array(bias)})
