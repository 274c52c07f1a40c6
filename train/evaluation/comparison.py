"""Two evaluations compared on the same queries: which model is better, and is it chance?

    twotower compare RUN_A RUN_B

What makes a user hard is hard for both models, so the difference on the same users is known far
better than either value: it is resampled and permuted by user, see
`twotower.train.evaluation.bootstrap`. Diversity is left out: each model has measured it by its own
vectors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.errors import UserError
from twotower.train.config import QUERIES
from twotower.train.evaluation.bootstrap import I64, Ratios, differences, values
from twotower.train.evaluation.metrics import ACCURACY, spread

# What tells two tests apart, in the order in which it is said.
MUST_AGREE = {
    "k": "another k (evaluate.monitor)", "split": "another split (data.split)",
    "test_events": "other test events", "first_test_event": "another first test event",
    "last_test_event": "another last test event", "items": "another number of items",
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """What a comparison has found.

    Attributes:
        queries: that both have judged.
        users: whose they are.
        before: metric -> value of the first run on them.
        differences: metric -> second less first, low and high end of its interval, p-value.
        notes: what a reader should know.
    """

    queries: int
    users: int
    before: dict[str, float]
    differences: dict[str, tuple[float, float, float, float]]
    notes: list[str]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it was written."""

    path: Path
    judged: dict[str, Any]
    queries: pa.Table


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation at a run_dir or at an evaluation's own folder.

    Raises:
        UserError: when there is none, or it is damaged or older than comparisons.
    """
    folder = path / "evaluation" if (path / "evaluation").is_dir() else path
    remedy = "run `twotower evaluate` with its job"
    if not folder.is_dir() or not (folder / "metrics.json").is_file():
        raise UserError(f"{path}: holds no evaluation: give a run_dir of a job, or {remedy} first")
    if not (folder / QUERIES).is_file():
        raise UserError(f"{folder}: has no {QUERIES}, which a comparison reads: {remedy} again")
    try:
        judged = json.loads((folder / "metrics.json").read_text())["judged"]
        queries = pq.read_table(folder / QUERIES)
        k = judged["k"]
        needed = {"user", "time", "relevant", "answers", f"recall@{k}"}
        if missing := needed - set(queries.column_names):
            raise KeyError(sorted(missing)[0])
    except (ValueError, KeyError, TypeError, pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: damaged ({reason}): remove it and {remedy} again") from None
    return Evaluation(folder, judged, queries)


def compare_runs(a: Path, b: Path) -> Comparison:
    """Compare two evaluations on the queries that both have judged.

    Raises:
        UserError: when they judged different tests, saying in what; also as `read_evaluation`.
    """
    runs = read_evaluation(a), read_evaluation(b)
    first, second = runs
    places = _common_queries(first, second)
    tables = [run.queries.take(pa.array(rows)) for run, rows in zip(runs, places, strict=True)]
    if not tables[0]["relevant"].equals(tables[1]["relevant"]):
        raise _refusal(first, second, ["other items that were relevant to the same queries"])
    user_Q = _codes(tables[0]["user"])
    ratios = _ratios(tables, user_Q, first.judged["k"], first.judged["items"])
    notes, queries = [], len(user_Q)
    for run in runs:
        if run.queries.num_rows > queries:
            notes.append(
                f"{run.path} judged {run.queries.num_rows:,} queries, a sample by its seed and "
                f"evaluate.max_queries; {queries:,} are in both"
            )
    return Comparison(
        queries, len(np.unique(user_Q)), values(ratios[0]), differences(ratios, user_Q, 0), notes
    )


def _refusal(a: Evaluation, b: Evaluation, reasons: list[str]) -> UserError:
    return UserError(
        f"{a.path} and {b.path} judged different tests: {'; '.join(reasons)}: evaluate both with "
        "the same log, data.split and evaluate.monitor"
    )


def _common_queries(a: Evaluation, b: Evaluation) -> tuple[I64, I64]:
    """Return the rows of the queries that both judged, in the same order."""
    differ = [
        f"{text}: {a.judged.get(key)} against {b.judged.get(key)}"
        for key, text in MUST_AGREE.items()
        if a.judged.get(key) != b.judged.get(key)
    ]
    # The same queries may come of a split that was said in other words.
    if set(differ) - {d for d in differ if d.startswith(MUST_AGREE["split"])}:
        raise _refusal(a, b, differ)
    if a.queries["user"].type != b.queries["user"].type:
        raise _refusal(a, b, ["another log: user ids are of another type"])
    key = ["user", "time"]
    left, right = (
        run.queries.select(key).append_column(name, pa.array(np.arange(run.queries.num_rows)))
        for run, name in ((a, "a"), (b, "b"))
    )
    both = left.join(right, key, join_type="inner").sort_by("a")
    sampled = any(a.judged.get(key) != b.judged.get(key) for key in ("max_queries", "seed"))
    alone = max(a.queries.num_rows, b.queries.num_rows) - both.num_rows
    if alone and (differ or not sampled or not both.num_rows):
        raise _refusal(a, b, [*differ, f"another log: {alone:,} queries that only one judged"])
    return both["a"].to_numpy(), both["b"].to_numpy()


def _codes(column: pa.ChunkedArray) -> I64:
    """Number the values of a column from 0."""
    encoded = pc.dictionary_encode(column.combine_chunks())
    codes: I64 = np.asarray(encoded.indices).astype(np.int64)
    return codes


def _ratios(
    tables: list[pa.Table], user_Q: I64, k: int, items: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return every metric at k of both runs, the answers of both numbered alike."""
    one = np.ones(len(user_Q))
    answers = [table["answers"].combine_chunks() for table in tables]
    code = _codes(pa.chunked_array([x.flatten() for x in answers]))
    found: list[Ratios] = []
    for table, lists, rows in zip(
        tables, answers, np.split(code, [len(answers[0].flatten())]), strict=True
    ):
        lengths = np.asarray(pc.list_value_length(lists))
        padded = np.full((len(one), k), -1)
        padded[np.arange(k) < lengths[:, None]] = rows
        metrics = {
            f"{m}@{k}": (table[f"{m}@{k}"].to_numpy(), one) for m in (*ACCURACY, "novelty", "arp")
        }
        taken = table["taken_popularity"].to_numpy()
        bias = {f"popularity_bias@{k}": (metrics[f"arp@{k}"][0], taken)}
        found.append(metrics | bias | spread(padded, user_Q, items, k))
    return dict(found[0]), dict(found[1])
