"""Lists of negatives: what is drawn, how often, and that none knows what is held out."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.listed import NEAREST_SKIPPED, Lists, Mined, Skipped, listed
from twotower.data.loader import ExtraItems, TrainLoader
from twotower.data.prepare.plan import make_plan
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Columns, DataConfig, Split
from twotower.errors import UserError

from ..conftest import HISTORY, ITEM
from .logs import meaning

LIKED = Columns(label="liked", positive_from=1)
SPLITS = {
    "temporal": Split(validation=0.2, test=0.2),
    "leave_last_out": Split(kind="leave_last_out"),
    "given": Split(kind="given", column="split"),
}


def random_log(seed: int, events: int = 400) -> dict[str, list]:
    """Return a log in which two of three events are skipped, and some share a moment."""
    rng = np.random.default_rng(seed)
    return {
        "user_id": rng.integers(0, 5, events).tolist(),
        "item_id": rng.integers(0, 25, events).tolist(),
        "timestamp": rng.integers(0, 150, events).tolist(),
        "liked": (rng.random(events) < 1 / 3).astype(int).tolist(),
        "split": rng.choice(["train", "validation", "test"], events, p=[0.6, 0.2, 0.2]).tolist(),
    }


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=9), number=st.integers(0, 30))
@settings(deadline=None)
def test_a_step_draws_equally_from_every_list(lengths, number) -> None:
    items = np.arange(sum(lengths))
    lists = Lists(items, np.array(lengths))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    drawn = lists.draw(number, np.random.default_rng(0))
    assert len(drawn) == number
    times = np.bincount(owner[drawn[drawn >= 0]], minlength=len(lengths))
    for length, count in zip(lengths, times, strict=True):
        least = number // len(lengths) if length else 0
        assert least <= count <= least + bool(length)
    known = listed([(lists, number)])
    expected = known.of(torch.from_numpy(items)).numpy()
    np.testing.assert_allclose(
        expected, [number / len(lengths) / lengths[query] for query in owner]
    )
    assert known.of(torch.tensor([-1, 10**9])).tolist() == [0, 0]


def test_items_are_drawn_as_often_as_is_said() -> None:
    lists = Lists(np.array([3, 5, 3, 7, 8, 3]), np.array([2, 0, 1, 3]))
    known, rng = listed([(lists, 10), (lists, 2)]), np.random.default_rng(0)
    drawn = [lists.draw(number, rng) for _ in range(4000) for number in (10, 2)]
    drawn = np.concatenate(drawn)
    for item in (3, 5, 7, 8):
        said = float(known.of(torch.tensor([item])))
        assert abs((drawn == item).sum() / 4000 / said - 1) < 0.05


@given(seed=st.integers(0, 2**31), kind=st.sampled_from(sorted(SPLITS)))
@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_query_lists_what_its_user_skipped_before_and_nothing_held_out(make, seed, kind) -> None:
    log = random_log(seed)
    data = make(log, columns=LIKED, split=SPLITS[kind])
    users, known = data.users["id"].to_pylist(), data.items["id"].to_pylist()
    skipped = defaultdict(list)
    for user, item, time, liked, split in zip(*log.values(), strict=True):
        if not liked and item in known and (kind != "given" or split == "train"):
            skipped[user].append((time * 1_000_000, item))
    rows = np.array(data.section(0))
    found = Skipped(data).lists(rows)
    lists = np.split(found.items, np.cumsum(found.lengths)[:-1])
    c = data.event_columns
    for row, items in zip(rows, lists, strict=True):
        user, own, time = users[c["user"][row]], known[c["item"][row]], c["time"][row]
        before = sorted(pair for pair in skipped[user] if pair[0] <= time)
        nearest = [item for _, item in before[-NEAREST_SKIPPED:] if item != own]
        assert [known[i] for i in items] == nearest
    if kind == "temporal":
        assert c["time"][rows].max() < data.summary["time"]["validation"][0]


def test_what_is_skipped_makes_no_user_no_item_and_no_count(make) -> None:
    log = random_log(1)
    log["item_id"][:40] = [900 + i for i in range(40)]
    log["liked"][:40] = [0] * 40
    kept = [n for n, liked in enumerate(log["liked"]) if liked]
    positives = {name: [values[n] for n in kept] for name, values in log.items()}
    with_skipped, without = (make(log, columns=LIKED), make(positives))
    for table in ("users", "items", "events"):
        assert getattr(with_skipped, table).equals(getattr(without, table))
    counts = with_skipped.summary["counts"]
    assert counts["dropped_by_label"] == 400 - len(kept)
    assert 0 < counts["skipped"] <= 400 - len(kept) - 40


def test_a_label_that_is_missing_says_nothing(make) -> None:
    log = random_log(2)
    some = make(log, columns=LIKED).summary["counts"]["skipped"]
    log["liked"] = [
        None if not liked and n < 200 else liked for n, liked in enumerate(log["liked"])
    ]
    assert make(log, columns=LIKED).summary["counts"]["skipped"] < some


def test_appending_is_preparing_all_at_once(tmp_path) -> None:
    log = random_log(3)
    order = np.argsort(log["timestamp"], kind="stable")
    parts = {
        "1": [n for n in order if log["timestamp"][n] < 100],
        "2": [n for n in order if log["timestamp"][n] >= 100],
    }
    (tmp_path / "log").mkdir()
    config = DataConfig(
        root=str(tmp_path), interactions="log", query=[HISTORY], item=[ITEM], columns=LIKED,
        split=Split(validation_from="1970-01-01T00:01:20", test_from="1970-01-01T00:01:30"),
    )  # fmt: skip
    found: list[PreparedDataset] = []
    for name, rows in parts.items():
        table = pa.table({n: [values[i] for i in rows] for n, values in log.items()})
        pq.write_table(table, tmp_path / "log" / f"{name}.parquet")
        if found:
            assert make_plan(config, found[0]).kind == "append"
        for number, previous in enumerate([found[0], None] if found else [None]):
            folder = tmp_path / f"{name}.{number}"
            folder.mkdir()
            prepare(config, folder, previous)
            found.append(PreparedDataset(folder))
    _, appended, whole = found
    assert meaning(appended) == meaning(whole)
    for name, values in whole.skipped_columns.items():
        np.testing.assert_array_equal(appended.skipped_columns[name], values)


def test_further_items_are_drawn_from_the_lists_whatever_the_ranks(make) -> None:
    data = make(random_log(4), columns=LIKED)
    extra = ExtraItems(uniform=3, skipped=9)

    def steps(ranks: int) -> list[tuple[list[int], list[int], list[float]]]:
        loaders = [
            TrainLoader(data, 8, seed=3, rank=rank, ranks=ranks, extra=lambda _: extra)
            for rank in range(ranks)
        ]
        out = []
        for batches in zip(*loaders, strict=True):
            items = [i for b in batches for i in b.item_N[len(b.weight_B) :].tolist()]
            assert len({tuple(b.listed.id_K.tolist()) for b in batches}) == 1
            known = batches[0].listed
            out.append((items[:12], known.id_K.tolist(), known.expected_K.tolist()))
        return out

    alone = steps(1)
    assert steps(3) == alone
    for items, ids, expected in alone:
        assert set(items[3:]) - {-1} <= set(ids)
        assert sum(expected) <= 9 + 1e-9


class Band:
    """A miner that lists the events' own numbers, and says what it was asked."""

    every = 3

    def __init__(self, items: int) -> None:
        self.items, self.asked = items, []

    def __call__(self, epoch, step, rows):
        self.asked.append((epoch, step, len(rows)))
        return (rows[:, None] % self.items).astype(np.int32)


@pytest.mark.parametrize("workers", [0, 2])
def test_lists_are_asked_for_when_their_steps_begin_and_for_their_queries(make, workers) -> None:
    data = make(random_log(5), columns=LIKED)
    loader = TrainLoader(data, 8, seed=3, workers=workers, extra=lambda _: ExtraItems(mined=16))
    loader.miner = miner = Band(len(data.items))
    rows, place, taken = loader.batches.rows(0, 0, loader.length), 0, 0
    after_four = 0
    for batch in loader:
        size = int(batch.weight_B.sum())
        assert len(miner.asked) == taken // 3 + 1, "not before the steps ahead of them are done"
        own = set((rows[place : place + size] % miner.items).tolist())
        assert set(batch.listed.id_K[:-1].tolist()) == own
        assert set(batch.item_N[size:].tolist()) == own
        place, taken = place + size, taken + 1
        after_four = place if taken == 4 else after_four
    assert sum(number for *_, number in miner.asked) == loader.length
    again = TrainLoader(data, 8, seed=3, extra=lambda _: ExtraItems(mined=16))
    again.miner = Band(len(data.items))
    again.load_state_dict({"epoch": 0, "place": after_four})
    assert len(list(again)) == len(loader) - 4
    assert again.miner.asked == miner.asked[1:], "for the whole of the steps that it is amid"


def test_a_mined_list_may_be_short() -> None:
    mined = Mined(10, np.array([[4, 5], [6, -1], [-1, -1]], np.int32))
    lists = mined.lists(11, 13)
    assert (lists.items.tolist(), lists.lengths.tolist()) == ([6], [1, 0])


@pytest.mark.parametrize(
    ("columns", "liked", "message"),
    [
        (Columns(), 0, r"has no skipped events: name data\.columns\.label and positive_from"),
        (replace(LIKED, train_on="all"), 0, "with train_on: positives, or set it to 0"),
        (LIKED, 1, r"has a label below data\.columns\.positive_from \(1\)"),
    ],
)
def test_a_source_without_data_is_refused(make, columns, liked, message) -> None:
    log = random_log(6)
    log["liked"] = [liked or value for value in log["liked"]]
    data = make(log, columns=columns)
    with pytest.raises(UserError, match=message):
        TrainLoader(data, 8, seed=0, extra=lambda _: ExtraItems(skipped=3))
