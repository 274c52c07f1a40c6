"""Whole histories as examples: each training item once, predicted from what came before it."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.batches import BatchBuilder
from twotower.data.loader import ExtraItems, TrainLoader
from twotower.data.schema import Feature, Split
from twotower.data.sequences import Windows
from twotower.errors import UserError

LENGTH = 4


def history(**more) -> Feature:
    options = {"table": "item_id", "length": LENGTH, "pooling": "transformer", **more}
    return Feature(name="history", kind="history", **options)


USER = Feature(name="user_id", kind="id")


@st.composite
def logs(draw) -> dict[str, list]:
    """Users with few and with many events, each at a time of its own, in any order."""
    sizes = draw(st.lists(st.integers(3, 3 * LENGTH + 2), min_size=2, max_size=5))
    users = draw(st.permutations([u for u, size in enumerate(sizes) for _ in range(size)]))
    items = draw(st.lists(st.integers(0, 6), min_size=len(users), max_size=len(users)))
    items[:2] = [0, 1]
    return {"user_id": users, "item_id": items, "timestamp": list(range(len(users)))}


def expected_pairs(log: dict[str, list]) -> list[tuple[int, tuple[int, ...], int]]:
    """Return (user, what a query sees, its positive), by the definition."""
    pairs = []
    for user in set(log["user_id"]):
        items = [i for u, i in zip(log["user_id"], log["item_id"], strict=True) if u == user]
        items = items[:-2]  # the last two are held out
        stop = len(items)
        while stop > 1:
            start = max(1, stop - LENGTH)
            pairs += [
                (user, tuple(items[start - 1 : target]), items[target])
                for target in range(start, stop)
            ]
            stop = start
    return sorted(pairs)


def expected_taken(log: dict[str, list]) -> list[tuple]:
    """Return the pairs with all that the user had taken before, in and before the window, and when
    the positive was taken."""
    pairs = []
    for user in set(log["user_id"]):
        times = [t for u, t in zip(log["user_id"], log["timestamp"], strict=True) if u == user][:-2]
        items = [log["item_id"][t] for t in times]
        for target in range(1, len(items)):
            # Windows are counted from the end, of LENGTH targets each.
            start = len(items) - (-(-(len(items) - target) // LENGTH)) * LENGTH
            seen = tuple(items[max(0, start - 1) : target])
            pairs.append(
                (user, seen, items[target], sorted(items[:target]), times[target] * 1_000_000)
            )
    return sorted(pairs)


@given(log=logs(), batch_size=st.integers(2, 9), ranks=st.integers(1, 2), uniform=st.integers(0, 3))
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_entry_predicts_the_next_one_and_sees_no_later(
    make, log, batch_size, ranks, uniform
) -> None:
    data = make(log, query=[history(), USER], split=Split(kind="leave_last_out"))
    if len(Windows(BatchBuilder(data))) < ranks:
        return
    loaders = [
        TrainLoader(
            data, batch_size, seed=1, rank=rank, ranks=ranks, every_position=True,
            extra=lambda _: ExtraItems(uniform=uniform), seen=True, times=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    item_of = dict(enumerate(data.items["id"].to_pylist()))
    row_to_item = dict(
        zip(data.items["history.history"].to_pylist(), item_of.values(), strict=True)
    )
    row_to_user = dict(
        zip(data.users["feature.user_id"].to_pylist(), data.users["id"].to_pylist(), strict=True)
    )
    found, taken = [], []
    for batches in zip(*loaders, strict=True):
        assert len({(b.ids.stride(), len(b.item_N)) for b in batches}) == 1
        items = np.concatenate([b.item_N.numpy() for b in batches])
        if not uniform:
            assert len(np.unique(items[items >= 0])) == (items >= 0).sum(), "each item once"
        for b in batches:
            entries = b.ids["query.history"].to_dense()
            users = b.ids["query.user_id"].to_dense()
            for query, (place, positive) in enumerate(
                zip(b.entries.place_B.tolist(), b.positive_B.tolist(), strict=True)
            ):
                row, entry = divmod(place, b.entries.longest)
                seen = tuple(row_to_item[r] for r in entries[row].tolist()[: entry + 1])
                found.append((row_to_user[int(users[row])], seen, item_of[int(items[positive])]))
                before = b.seen.item_S[b.seen.query_S == query].tolist()
                time = int(b.time_B[query])
                taken.append((*found[-1], sorted(item_of[i] for i in before), time))
    assert sorted(found) == expected_pairs(log)
    assert sorted(taken) == expected_taken(log)
    counts = np.zeros(len(item_of), int)
    for _, _, item in found:
        counts[list(item_of.values()).index(item)] += 1
    assert loaders[0].positive_counts().tolist() == counts.tolist()
    windows = Windows(BatchBuilder(data))
    rows = np.arange(len(windows))[::-1]
    events, c = windows.events(rows), data.event_columns
    assert c["item"][events].tolist() == windows.targets(rows).tolist()
    users = np.repeat(windows.user_W[rows], (windows.end_W - windows.start_W)[rows])
    assert c["user"][events].tolist() == users.tolist()
    assert len(np.unique(events)) == len(events)
    assert (events < data.section(0).stop).all()


LOG = {
    "user_id": [1] * 6 + [2] * 6, "item_id": list("abcdefbcdefa"), "timestamp": [*range(12)],
    "device": ["web"] * 12, "split": ["train"] * 4 + ["test"] + ["train"] + ["train"] * 6,
}  # fmt: skip


def test_order_is_needed_to_say_what_comes_next(make) -> None:
    log = LOG | {"split": ["train"] * 5 + ["test"] + ["train"] * 5 + ["test"]}
    data = make(log, query=[history()], split=Split(kind="given", column="split"), ordered=False)
    with pytest.raises(UserError, match=r"train\.every_position .* data.ordered is false"):
        TrainLoader(data, 4, seed=0, every_position=True)


@given(st.data())
@settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_without_an_order_a_history_holds_the_others_and_never_the_target(make, data) -> None:
    sizes = data.draw(st.lists(st.integers(2, 9), min_size=2, max_size=4))
    users = [u for u, size in enumerate(sizes) for _ in range(size)]
    items = data.draw(st.lists(st.integers(0, 6), min_size=len(users), max_size=len(users)))
    items[:2] = [0, 1]
    ends = np.cumsum(sizes) - 1
    split = ["test" if i in ends else "train" for i in range(len(users))]
    log = {"user_id": users, "item_id": items, "timestamp": [*range(len(users))], "split": split}
    made = make(
        log, query=[history(pooling="mean", length=50), USER], ordered=False,
        split=Split(kind="given", column="split"),
    )  # fmt: skip
    c, n = made.event_columns, made.section(0).stop
    batch = BatchBuilder(made).events(np.arange(n))
    rows = made.items["history.history"].to_pylist()
    for place, entries in enumerate(batch.ids["query.history"].to_dense()):
        own, user = int(c["item"][place]), c["user"][place]
        others = [int(i) for i in c["item"][:n][c["user"][:n] == user] if i != own]
        assert sorted(entries.tolist()) == sorted(rows[i] for i in others)
    late = ["test", "train", *split[2:]]
    broken = make(log | {"split": late}, query=[history(pooling="mean")], ordered=False,
                  split=Split(kind="given", column="split"))  # fmt: skip
    with pytest.raises(UserError, match=r"data.ordered is false, but \d users have training"):
        TrainLoader(broken, 4, seed=0)


@pytest.mark.parametrize(
    ("query", "split", "message"),
    [
        ([USER], "leave_last_out", "needs one history in data.query whose pooling is attention or"),
        ([history(pooling="mean")], "leave_last_out", "needs one history .* got 0"),
        ([history(), Feature(name="device", kind="id")], "leave_last_out",
         "feature 'device' is of the event"),
        ([history(), Feature(name="other", kind="history", table="item_id")], "leave_last_out",
         "history 'other' is pooled by mean, which would show an entry what came after"),
        ([history()], "given", "user 1 is one of 1 with some after held-out ones"),
    ],
)  # fmt: skip
def test_what_entries_cannot_have_is_refused(make, query, split, message) -> None:
    data = make(LOG, query=query, split=Split(kind=split, column="split"))
    with pytest.raises(UserError, match=f"train.every_position.*{message}"):
        TrainLoader(data, 4, seed=0, every_position=True)
