"""Intervals that cover, p-values that mean what they say, and what lies beyond accuracy."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.queries import Queries
from twotower.train.evaluation.bootstrap import differences, intervals, values
from twotower.train.evaluation.metrics import beyond_accuracy, spread
from twotower.train.evaluation.report import equal_buckets

from ..conftest import EVENTS


def hits(rng: np.random.Generator, users: int, level: float, spread: float):
    """Queries that hit or not, 1 to 6 a user, whose users each have a level of their own."""
    user = np.repeat(np.arange(users), rng.integers(1, 7, users))
    own = rng.beta(level * spread, (1 - level) * spread, users)
    hit = (rng.random(len(user)) < own[user]).astype(float)
    return {"recall@20": (hit, np.ones(len(user)))}, user


@pytest.mark.parametrize(("level", "spread"), [(0.3, 1.0), (0.1, 2.0), (0.5, 50.0)])
def test_an_interval_covers_the_truth_as_often_as_it_says(level: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    inside, by_query = [], []
    for trial in range(300):
        ratios, user = hits(rng, 120, level, spread)
        for whose, found in ((user, inside), (np.arange(len(user)), by_query)):
            low, high = intervals(ratios, whose, trial, resamples=400)["recall@20"]
            found.append(low <= level <= high)
    # Four standard errors of 300 trials at 95%, and a percent for so few users.
    assert 0.89 <= np.mean(inside) <= 1
    if spread <= 1:
        assert np.mean(by_query) < np.mean(inside) - 0.05, "queries of a user are alike"


def test_intervals_are_seeded_and_leave_out_what_nothing_asked() -> None:
    ratios, user = hits(np.random.default_rng(1), 50, 0.4, 2.0)
    nothing = np.zeros(len(user))
    ratios |= {"recall@20/cold": (nothing, nothing), "recall@20/new users": (nothing, nothing)}
    ratios["recall@20/new users"] = (nothing, np.eye(1, len(user))[0])
    first = intervals(ratios, user, 3)
    assert first == intervals(ratios, user, 3)
    assert first != intervals(ratios, user, 4)
    assert set(first) == set(values(ratios)) == {"recall@20", "recall@20/new users"}
    assert first["recall@20/new users"] == (0, 0)


def test_a_comparison_finds_an_effect_that_is_there_and_none_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    found: dict[str, list[float]] = {"none": [], "there": []}
    covered = []
    for trial in range(120):
        user = np.repeat(np.arange(150), rng.integers(1, 7, 150))
        one, level = np.ones(len(user)), rng.beta(0.45, 1.05, 150)[user]
        hit, again = (rng.random((2, len(user))) < level).astype(float)
        ratios = {"recall@20": (hit, one)}
        # Another draw of the same levels, and one in which 15% of the queries became hits.
        better = np.where(rng.random(len(hit)) < 0.15, 1.0, hit)
        for name, other in (("none", again), ("there", better)):
            _, low, high, p = differences((ratios, {"recall@20": (other, one)}), user, trial)[
                "recall@20"
            ]
            found[name].append(p)
            if name == "there":
                covered.append(low <= 0.15 * 0.7 <= high)
    assert np.mean(np.array(found["none"]) < 0.05) <= 0.11
    assert np.mean(np.array(found["none"]) < 0.5) == pytest.approx(0.5, abs=0.15)
    assert np.mean(np.array(found["there"]) < 0.01) >= 0.95
    assert np.mean(covered) >= 0.88


def test_a_run_against_itself_differs_by_nothing() -> None:
    ratios, user = hits(np.random.default_rng(3), 40, 0.3, 2.0)
    assert differences((ratios, ratios), user, 0) == {"recall@20": (0, 0, 0, 1)}


LISTS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.integers(0, 6), max_size=3, unique=True)),
    min_size=4, max_size=12,
).filter(lambda rows: {u for u, _ in rows} == {0, 1, 2, 3} and any(x for _, x in rows))  # fmt: skip


def gini(shown: np.ndarray) -> float:
    pairs = sum(abs(a - b) for a, b in itertools.product(shown, shown))
    return float(pairs / (2 * len(shown) * shown.sum()))


@given(LISTS)
@settings(deadline=None, max_examples=60)
def test_coverage_and_gini_follow_their_definitions_and_the_jackknife(rows) -> None:
    user = np.array([u for u, _ in rows])
    answers = np.array([items + [-1] * (3 - len(items)) for _, items in rows])
    found = spread(answers, user, 7, 3)
    got = values(found)

    def coverage(kept: np.ndarray) -> float:
        return len(set(answers[kept].ravel().tolist()) - {-1}) / 7

    shown = np.bincount(answers[answers >= 0], minlength=7)
    assert got["coverage@3"] == pytest.approx(coverage(user >= 0))
    assert got["gini@3"] == pytest.approx(gini(shown))
    without = np.array([coverage(user != u) for u in range(4)])
    first = np.unique(user, return_index=True)[1]
    # A user's value lies as far from another's as the metric falls further without them.
    ours = found["coverage@3"][0][first]
    np.testing.assert_allclose(ours - ours.mean(), 4 * (without.mean() - without), atol=1e-12)


def test_the_gini_of_even_and_of_one_sided_exposure() -> None:
    even = np.arange(8).reshape(4, 2)
    assert values(spread(even, np.arange(4), 8, 2))["gini@2"] == pytest.approx(0)
    one = np.zeros((4, 1), int)
    assert values(spread(one, np.arange(4), 8, 1))["gini@1"] == pytest.approx(7 / 8)


def test_novelty_diversity_and_popularity_bias_follow_their_definitions(make) -> None:
    data = make(EVENTS)
    count = data.train_count
    vectors = torch.randn(len(data.items), 4, generator=torch.Generator().manual_seed(0))
    answers = np.array([[3, 0, 2], [1, 4, -1], [-1, -1, -1]])
    queries = Queries(
        event=np.arange(3), relevant=np.array([0, 1, 2, 0]), relevant_offset=np.array([0, 2, 3, 4]),
        seen=np.array([], int), seen_offset=np.zeros(4, int),
    )  # fmt: skip
    got = values(beyond_accuracy(answers, queries, data, [3], np.arange(3), vectors))
    lists = [[3, 0, 2], [1, 4]]
    share = (count + 1) / (count.sum() + len(count))
    unit = torch.nn.functional.normalize(vectors).numpy()
    apart = [
        np.mean([1 - unit[a] @ unit[b] for a, b in itertools.combinations(x, 2)]) for x in lists
    ]
    assert got["novelty@3"] == pytest.approx(np.mean([-np.log2(share[x]).mean() for x in lists]))
    assert got["diversity@3"] == pytest.approx(np.mean(apart), abs=1e-6)
    popular = np.array([count[x].mean() for x in lists])
    assert got["arp@3"] == pytest.approx(popular.mean())
    taken = (count[0] + count[1]) / 2 + count[2] + count[0]
    assert got["popularity_bias@3"] == pytest.approx(popular.sum() / taken)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=700), st.sampled_from([1.0, 1e-4]))
@settings(deadline=None, max_examples=60)
def test_buckets_of_time_hold_every_query_once_and_are_told_apart(moments, unit) -> None:
    days = np.array(moments) * unit
    buckets = equal_buckets(days)
    if not buckets:
        assert len(days) < 100 or len(set(moments)) < 400
        return
    assert len(buckets) <= 5
    assert len({b["name"] for b in buckets}) == len(buckets)
    assert sum(b["queries"] for b in buckets) == len(days)
    for bucket, after in itertools.pairwise(buckets):
        assert bucket["to_days"] < after["from_days"]
    for b in buckets:
        inside = (days >= b["from_days"]) & (days <= b["to_days"])
        assert inside.sum() == b["queries"]
