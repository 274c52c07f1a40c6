"""Metrics against their definitions, query by query; queries against the log."""

import math

import numpy as np
import pytest

from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries, split_queries
from twotower.data.schema import Split
from twotower.errors import UserError
from twotower.train.callbacks import CatalogueValidation
from twotower.train.config import EvaluateConfig
from twotower.train.evaluation import (
    answer_by_cooccurrence,
    answer_by_popularity,
    judged_queries,
    popularity_slices,
    score_answers,
)

from ..conftest import EVENTS


@pytest.fixture(scope="module")
def data(finished_run) -> PreparedDataset:
    return PreparedDataset(finished_run.run_dir / "prepared")


@pytest.fixture(scope="module")
def queries(data) -> Queries:
    return split_queries(data, 2, 10_000, 0)


def parts(queries: Queries, i: int) -> tuple[set[int], set[int]]:
    relevant = queries.relevant[queries.relevant_offset[i] : queries.relevant_offset[i + 1]]
    seen = queries.seen[queries.seen_offset[i] : queries.seen_offset[i + 1]]
    return set(relevant.tolist()), set(seen.tolist())


def test_queries_are_the_moments_of_the_split(data, queries) -> None:
    c = data.event_columns
    expected: dict[tuple[int, int], set[int]] = {}
    for row in data.section(2):
        expected.setdefault((c["user"][row], c["time"][row]), set()).add(int(c["item"][row]))
    found = 0
    for i, event in enumerate(queries.event):
        moment = (c["user"][event], c["time"][event])
        relevant, seen = parts(queries, i)
        before = (c["user"] == moment[0]) & (c["time"] < moment[1])
        assert seen == set(c["item"][before].tolist())
        assert relevant == expected[moment] - seen
        found += 1
    assert found == sum(
        bool(items - set(c["item"][(c["user"] == u) & (c["time"] < t)].tolist()))
        for (u, t), items in expected.items()
    )


def test_repeated_items_are_neither_relevant_nor_answered(make) -> None:
    events = {k: [*v, v[0], v[0]] for k, v in EVENTS.items()}
    events["timestamp"][-2:] = [200, 200]  # user 1 takes `a` again, twice at once
    events["item_id"][-1] = "e"
    queries = split_queries(make(events), 2, 100, 0)
    relevant, seen = parts(queries, 0)
    assert len(relevant) == 1
    assert not relevant & seen


def test_more_answers_than_items_are_refused(make) -> None:
    config = EvaluateConfig(k=[2, 50], monitor="ndcg@2")
    with pytest.raises(UserError, match=r"evaluate\.k must be .* <= 5, .* got \[2, 50\].*to \[2\]"):
        CatalogueValidation(make(EVENTS), config, 0, heads=None)
    whole = EvaluateConfig(k=[5], monitor="ndcg@5")
    assert len(judged_queries(make(EVENTS), 2, whole, 0).event)


@pytest.mark.parametrize(
    ("split", "remedy"),
    [
        (Split(kind="given", column="split"), r"as test in data\.split\.column.*test_files"),
        (Split(kind="temporal", validation=0.2, test=0.2), r"raise data\.split\.test"),
    ],
)
def test_a_split_without_queries_is_explained(split, remedy, make) -> None:
    names = ["train"] * 8 + ["validation", "test"]
    events = {
        "user_id": [1, 1, 2, 2, 3, 3, 3, 1, 2, 2], "item_id": list("abbccdabcb"),
        "timestamp": list(range(10, 110, 10)), "split": names,
    }  # fmt: skip
    config = EvaluateConfig(k=[2], monitor="ndcg@2")
    with pytest.raises(UserError, match=f"the test split holds no query.*{remedy}"):
        judged_queries(make(events, split=split), 2, config, 0)


def test_metrics_follow_their_definitions(data, queries) -> None:
    rng = np.random.default_rng(0)
    n, k = len(data.items), 20
    answers = np.stack([rng.permutation(n)[:k] for _ in queries.event])
    for i in range(0, len(answers), 3):  # some hits, at known places
        answers[i, i % k] = next(iter(parts(queries, i)[0]))
    answers[5, 10:] = -1
    got = score_answers(answers, queries, data, [5, 20])
    for cut in (5, 20):
        totals = dict.fromkeys(("recall", "ndcg", "mrr", "hit_rate"), 0.0)
        for i, row in enumerate(answers):
            relevant = parts(queries, i)[0]
            hits = [item in relevant for item in row[:cut].tolist()]
            gain = sum(hit / math.log2(rank + 2) for rank, hit in enumerate(hits))
            ideal = sum(1 / math.log2(r + 2) for r in range(min(cut, len(relevant))))
            totals["recall"] += sum(hits) / len(relevant)
            totals["ndcg"] += gain / ideal
            totals["mrr"] += 1 / (hits.index(True) + 1) if any(hits) else 0
            totals["hit_rate"] += any(hits)
        for name, total in totals.items():
            assert got[f"{name}@{cut}"] == pytest.approx(total / len(answers))
        shown = set(answers[:, :cut].ravel().tolist()) - {-1}
        assert got[f"coverage@{cut}"] == pytest.approx(len(shown) / n)


def test_slices_divide_the_catalogue_and_their_recall_adds_up(data, queries) -> None:
    slices = popularity_slices(data.train_count)
    assert (sum(s.astype(int) for s in slices.values()) == 1).all()
    assert (data.train_count[slices["cold"]] == 0).all()
    head, torso = data.train_count[slices["head"]], data.train_count[slices["torso"]]
    assert head.min() >= torso.max()
    answers = answer_by_popularity(data, queries, 20, 512)
    metrics = score_answers(answers, queries, data, [20])
    pairs = {name: int(s[queries.relevant].sum()) for name, s in slices.items()}
    found = sum(metrics.get(f"recall@20/{name}", 0) * count for name, count in pairs.items())
    total = sum(len(parts(queries, i)[0] & set(row.tolist())) for i, row in enumerate(answers))
    assert found == pytest.approx(total)


def test_popularity_answers_the_most_taken_unseen_items(data, queries) -> None:
    answers = answer_by_popularity(data, queries, 10, 100)
    for i in range(0, len(answers), 37):
        _, seen = parts(queries, i)
        allowed = [c for item, c in enumerate(data.train_count) if item not in seen]
        assert data.train_count[answers[i]].tolist() == sorted(allowed, reverse=True)[:10]
        assert not set(answers[i].tolist()) & seen


def test_cooccurrence_answers_what_is_taken_with_the_history(data, queries) -> None:
    c, n = data.event_columns, len(data.items)
    train = data.section(0)
    assert 0 < len(train) < len(data.events)
    taken = np.zeros((len(data.users), n))
    taken[c["user"][: train.stop], c["item"][: train.stop]] = 1
    norm = np.maximum(np.linalg.norm(taken, axis=0), 1)
    cosine = (taken.T @ taken) / norm / norm[:, None]
    np.fill_diagonal(cosine, 0)
    answers = answer_by_cooccurrence(data, queries, 10, 100)
    for i in range(0, len(answers), 37):
        seen = queries.seen[queries.seen_offset[i] : queries.seen_offset[i + 1]]
        score = cosine[seen].sum(0)
        score[seen] = -np.inf
        np.testing.assert_allclose(
            score[answers[i]], np.sort(score)[::-1][:10], rtol=1e-5, atol=1e-7
        )
