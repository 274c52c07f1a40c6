"""What `quality.py` compares the towers with: popularity, co-occurrence, ALS, EASE and SASRec.

All learn from the training events alone, with repeated pairs of a user and an item counted once,
and answer the same queries as the towers: from the history of each, without what is in it. A query
without a history is answered by popularity. ALS and EASE choose their settings on validation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sasrec import fit_sasrec

from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries
from twotower.train.evaluation import (
    answer_by_cooccurrence,
    answer_by_popularity,
    score_answers,
)
from twotower.train.evaluation.bootstrap import Ratios, differences, intervals
from twotower.train.evaluation.metrics import accuracy

I64 = npt.NDArray[np.int64]
# From queries and a cut-off to the items answered (Q, K).
Answer = Callable[[Queries, int], I64]
BLOCK = 1024
# Where the search for settings begins is the middle one of each.
ALS_GRID = {
    "factors": (16, 32, 64, 128, 256), "regularization": (0.1, 1.0, 10.0, 100.0, 1000.0),
    "alpha": (0.5, 1.0, 5.0, 20.0, 60.0),
}  # fmt: skip
EASE_GRID = {"regularization": (5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)}


def training_matrix(data: PreparedDataset) -> sp.csr_matrix:
    """Return which items (N) each user (U) took in training, as ones."""
    c, train = data.event_columns, data.section(0)
    pairs = c["user"][: train.stop], c["item"][: train.stop]
    shape = (len(data.users), len(data.items))
    taken = sp.csr_matrix((np.ones(train.stop, np.float32), pairs), shape)
    taken.data[:] = 1
    return taken


def histories(queries: Queries, items: int) -> sp.csr_matrix:
    """Return which items (N) the history of each query (Q) holds, as ones."""
    ones = np.ones(len(queries.seen), np.float32)
    shape = (len(queries.event), items)
    out = sp.csr_matrix((ones, queries.seen, queries.seen_offset), shape, copy=True)
    out.sum_duplicates()
    out.data[:] = 1
    return out


def fit_als(taken: sp.csr_matrix, **settings: Any) -> Answer:
    """Return the answers of implicit ALS (Hu, Koren and Volinsky 2008), by `implicit`.

    A query's vector is solved for from its whole history, validation and earlier test events
    included, as the towers read it too.
    """
    from implicit.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(iterations=15, random_state=0, num_threads=2, **settings)
    model.fit(taken, show_progress=False)

    def answer(queries: Queries, k: int) -> I64:
        history = histories(queries, taken.shape[1])
        rows, _ = model.recommend(
            np.arange(history.shape[0]), history, N=k, recalculate_user=True,
            filter_already_liked_items=True,
        )  # fmt: skip
        return np.asarray(rows, np.int64)

    return answer


def fit_ease(taken: sp.csr_matrix, regularization: float) -> Answer:
    """Return the answers of EASE (Steck 2019): a linear model of items on items, in closed form."""
    known = np.flatnonzero(np.asarray(taken.sum(0)).ravel())
    taken_by = taken[:, known].astype(np.float64)
    users, items = taken_by.shape
    if users < items:
        # The same inverse, through the smaller side (Woodbury's identity).
        small = np.linalg.inv((taken_by @ taken_by.T).toarray() + regularization * np.eye(users))
        inverse = -(taken_by.T @ (small @ taken_by)) / regularization
        inverse[np.diag_indices(items)] += 1 / regularization
    else:
        gram = (taken_by.T @ taken_by).toarray()
        inverse = np.linalg.inv(gram + regularization * np.eye(items))
    weight = (inverse / -np.diag(inverse)).astype(np.float32)
    weight[np.diag_indices(items)] = 0

    def answer(queries: Queries, k: int) -> I64:
        history = histories(queries, taken.shape[1])[:, known]
        return np.concatenate([
            known[_best(block @ weight, block, k)] for block in _blocks(history)
        ])  # fmt: skip

    return answer


def _blocks(matrix: sp.csr_matrix) -> Iterator[sp.csr_matrix]:
    for start in range(0, matrix.shape[0], BLOCK):
        yield matrix[start : start + BLOCK]


def _best(score: npt.NDArray[Any], history: sp.csr_matrix, k: int) -> I64:
    """Return the k best columns of each row, those of the history left out."""
    score[history.nonzero()] = -np.inf
    top = np.argpartition(-score, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(score, top, 1), axis=1, kind="stable")
    return np.take_along_axis(top, order, 1)


def recall_and_ndcg(rows: I64, queries: Queries, data: PreparedDataset, k: int) -> Ratios:
    """Return both of answers (Q, K), by query."""
    found = accuracy(rows, queries, data, [k])
    return {name: found[name] for name in (f"recall@{k}", f"ndcg@{k}")}


@dataclass(frozen=True)
class Judge:
    """What answers are worth.

    Attributes:
        data: the dataset.
        queries: that are answered.
        k: cut-off.
        plain: `recall_and_ndcg` of the model that others are compared with.
    """

    data: PreparedDataset
    queries: Queries
    k: int
    plain: Ratios

    def row(self, rows: I64) -> dict[str, Any]:
        """Return metrics, and of recall and NDCG 95% intervals over users.

        `effects` are what they are above those of the plain model, the ends of that one's interval,
        and its p-value: on the same users, which tells far more than the intervals of the two.
        """
        users = self.data.event_columns["user"][self.queries.event]
        user_Q = np.unique(users, return_inverse=True)[1]
        found = recall_and_ndcg(rows, self.queries, self.data, self.k)
        return {
            "metrics": score_answers(rows, self.queries, self.data, [self.k]),
            "intervals": intervals(found, user_Q, seed=0),
            "effects": differences((self.plain, found), user_Q, seed=0),
        }


def baselines(
    judge: Judge, validation: Queries, sasrec: dict[str, Any] | None
) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return each baseline's name and what measures its row of the table.

    Args:
        judge: of the rows.
        validation: queries that settings, and SASRec's best epoch, are chosen by, by their NDCG.
        sasrec: settings of SASRec; without them it is left out.
    """
    data, k = judge.data, judge.k
    taken, size = training_matrix(data), 2048

    def answers(answer: Answer, queries: Queries) -> I64:
        rows = answer(queries, k)
        new = np.diff(queries.seen_offset) == 0
        if new.any():
            rows[new] = answer_by_popularity(data, queries, k, size)[new]
        return rows

    def ndcg(queries: Queries, answer: Answer) -> float:
        return score_answers(answers(answer, queries), queries, data, [k])[f"ndcg@{k}"]

    def row(fit: Callable[[], Answer], **more: Any) -> dict[str, Any]:
        started = time.monotonic()
        rows = answers(fit(), judge.queries)
        return {"seconds": round(time.monotonic() - started, 1), **judge.row(rows), **more}

    def simple(answer: Callable[..., I64]) -> dict[str, Any]:
        return row(lambda: lambda queries, k: answer(data, queries, k, size))

    def searched(fit: Callable[..., Answer], grid: dict[str, tuple[float, ...]]) -> dict[str, Any]:
        best, tried = climb(grid, lambda settings: ndcg(validation, fit(taken, **settings)))
        return row(lambda: fit(taken, **best), settings=best, tried=tried)

    out: dict[str, Callable[[], dict[str, Any]]] = {
        "popularity": lambda: simple(answer_by_popularity),
        "co-occurrence": lambda: simple(answer_by_cooccurrence),
        "ALS": lambda: searched(fit_als, ALS_GRID),
        "EASE": lambda: searched(fit_ease, EASE_GRID),
    }
    if sasrec is not None:
        out["SASRec"] = lambda: row(
            lambda: fit_sasrec(data, partial(ndcg, validation), **sasrec), settings=sasrec
        )
    return out


def climb(
    grid: dict[str, tuple[float, ...]], judge: Callable[[dict[str, float]], float]
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the settings from which no step to a neighbour is better, and all that were tried.

    Args:
        grid: setting -> its values, ascending.
        judge: what is to be highest.
    """
    known: dict[tuple[int, ...], float] = {}

    def settings(place: tuple[int, ...]) -> dict[str, float]:
        return {name: grid[name][i] for name, i in zip(grid, place, strict=True)}

    def value(place: tuple[int, ...]) -> float:
        if place not in known:
            known[place] = judge(settings(place))
        return known[place]

    place, before = tuple(len(values) // 2 for values in grid.values()), None
    while place != before:
        before = place
        for axis, values in enumerate(grid.values()):
            for step in (-1, 1):
                while 0 <= place[axis] + step < len(values):
                    next_ = (*place[:axis], place[axis] + step, *place[axis + 1 :])
                    if value(next_) <= value(place):
                        break
                    place = next_
    tried = [{**settings(p), "validation": round(v, 5)} for p, v in known.items()]
    return settings(place), tried
