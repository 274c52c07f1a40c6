"""What the synthetic log is drawn from agrees with what was drawn, as best answers need."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from twotower.data.demo_log import FILES, DemoLogConfig, demo_truth, event_time, write_demo_log

CONFIG = {"users": 2000, "items": 160, "events": 30_000, "seed": 3}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A log's truth and events: user, time, item, and what its user had before."""
    config = DemoLogConfig(output=str(tmp_path_factory.mktemp("truth") / "log"), **CONFIG)
    write_demo_log(config)
    log = pq.read_table(f"{config.output}/{FILES[0]}")
    user = log["user_id"].to_numpy() - 1
    item = np.array([int(name.removeprefix("item-")) for name in log["item_id"].to_pylist()])
    had = np.zeros((config.users, config.items), bool)
    seen = np.zeros((len(user), config.items), bool)
    for event, (u, i) in enumerate(zip(user, item, strict=True)):
        seen[event] = had[u]
        had[u, i] = True
    return demo_truth(config), user, event_time(log["timestamp"].to_numpy()), item, seen


def test_a_large_draw_agrees_with_the_probabilities(drawn) -> None:
    truth, user, time, item, seen = drawn
    p = truth.probabilities(user, time)
    assert p.min() >= 0
    assert p.sum(1).max() <= 1 + 1e-9
    p = np.where(seen, 0, p)
    p /= p.sum(1, keepdims=True)
    # Standard scores of each item's count, in each half of the time: those of 320 fair draws stay
    # below 5 in all but one of 5,000 logs, and their mean square near 1.
    for half in (time <= 0.5, time > 0.5):
        expected, variance = p[half].sum(0), (p[half] * (1 - p[half])).sum(0)
        often = expected > 5
        score = (np.bincount(item[half], minlength=p.shape[1]) - expected)[often]
        score /= np.sqrt(variance[often])
        assert abs(score).max() < 5
        assert (score**2).mean() < 1.5
    # And of how likely the items taken were: what users like is told apart, not only items.
    chosen = p[np.arange(len(item)), item]
    mean, square = (p**2).sum(1), (p**3).sum(1)
    assert abs((chosen - mean).sum()) < 5 * np.sqrt((square - mean**2).sum())


def test_what_may_not_be_told_has_the_mean_of_its_kind(drawn) -> None:
    truth, user, time, _, _ = drawn
    known = np.ones(len(truth.sub_N), bool)
    for sub in range(truth.sub_N.max() + 1):
        known[np.flatnonzero(truth.sub_N == sub)[:2]] = False
    late = np.flatnonzero(time > 0.95)[:20]
    p = truth.probabilities(user[late], time[late], known)
    for row, sub in zip(p, truth.later_U3[user[late], 0], strict=True):
        assert len({*row[~known & (truth.sub_N == sub)]}) == 1
    whole = truth.probabilities(user[late], time[late])
    assert np.allclose(p.sum(1), whole.sum(1))
    everything = truth.probabilities(user[late], time[late], np.ones_like(known))
    assert np.array_equal(everything, whole)
