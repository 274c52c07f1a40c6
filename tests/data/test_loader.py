"""The loader: every event once an epoch, for any ranks and workers, and again after a pause."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.batches import id_keys
from twotower.data.loader import ExtraItems, TrainLoader
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Feature, Split
from twotower.data.shuffle import Shuffle
from twotower.data.table import Table
from twotower.errors import UserError

EVENTS = 103


@pytest.fixture
def data(make) -> PreparedDataset:
    """A dataset whose training events each have an item of their own."""
    number = np.arange(EVENTS + 1)
    log = {"user_id": number % 9, "item_id": number, "timestamp": number,
           "split": ["train"] * EVENTS + ["test"]}  # fmt: skip
    return make(log, split=Split(kind="given", column="split"))


@given(
    length=st.one_of(st.integers(1, 300), st.integers(1, 70_000)),
    seed=st.integers(-(2**63), 2**63 - 1), epoch=st.integers(0, 2**31),
)  # fmt: skip
@settings(deadline=None)
def test_a_shuffle_holds_every_row_once(length, seed, epoch) -> None:
    order = Shuffle(length, seed, epoch)(np.arange(length))
    np.testing.assert_array_equal(np.sort(order), np.arange(length))


def test_a_shuffle_looks_random() -> None:
    length, parts = 200_003, 50
    order = Shuffle(length, 0, 0)(np.arange(length))
    for other in (np.arange(length), np.roll(order, 1), Shuffle(length, 0, 1)(np.arange(length)),
                  Shuffle(length, 1, 0)(np.arange(length))):  # fmt: skip
        # The correlation of random orders has a deviation of 1 / sqrt(length): 5 of them.
        assert abs(np.corrcoef(order, other)[0, 1]) < 5 / length**0.5
    counts = np.stack([
        np.bincount(part * parts // length, minlength=parts)
        for part in np.array_split(order, 100)
    ])  # fmt: skip
    expected = length / 100 / parts
    # Chi-square over its degrees of freedom, whose deviation is sqrt(2 / dof).
    dof = 99 * (parts - 1)
    assert abs(((counts - expected) ** 2 / expected).sum() / dof - 1) < 5 * (2 / dof) ** 0.5


def epoch_of(data, number=0, **options) -> list[list[int]]:
    loader = TrainLoader(data, options.pop("batch_size", 8), seed=3, **options)
    loader.set_epoch(number)
    return [b.item_N.tolist() for b in loader]


@given(batch_size=st.integers(1, 120), ranks=st.integers(1, 9), taken=st.integers(0, 20))
# The dataset is only read.
@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_ranks_share_an_epoch(data, batch_size, ranks, taken) -> None:
    shares = []
    for rank in range(ranks):
        loader = TrainLoader(data, batch_size, seed=3, rank=rank, ranks=ranks)
        batches = list(loader)
        for batch in batches:
            assert batch.weight_B.tolist() == [float(item >= 0) for item in batch.item_N.tolist()]
        shares.append([b.item_N.tolist() for b in batches])
        assert len(shares[-1]) == len(loader), "all ranks take the same number of steps"
    for step in zip(*shares, strict=True):
        assert len({len(batch) for batch in step}) == 1, "sharded look-ups need one size"
        assert sum(item < 0 for batch in step for item in batch) < ranks, "fillers"
    shares = [[[e for e in batch if e >= 0] for batch in share] for share in shares]
    events = [e for share in shares for batch in share for e in batch]
    assert sorted(events) == list(range(EVENTS)), "each event once"
    whole = [sum(map(len, step)) for step in zip(*shares, strict=True)]
    assert max(whole) <= batch_size
    assert max(whole) - min(whole) <= 1, "no small rest"
    # A run that goes on with one process takes what the others had left.
    before = [e for share in shares for batch in share[:taken] for e in batch]
    single = TrainLoader(data, batch_size, seed=3)
    single.load_state_dict({"epoch": 0, "place": len(before)})
    after = [e for batch in single for e in batch.item_N.tolist()]
    assert sorted(before + after) == list(range(EVENTS))


def further_items(data, ranks: int, extra: ExtraItems, epoch: int = 0) -> list[list[int]]:
    """Return what all ranks' batches of each step hold beside the events' own items."""
    loaders = [
        TrainLoader(data, 8, seed=-3, rank=rank, ranks=ranks, extra=lambda _: extra)
        for rank in range(ranks)
    ]
    steps = []
    for loader in loaders:
        loader.set_epoch(epoch)
    for batches in zip(*loaders, strict=True):
        assert len({len(batch.item_N) for batch in batches}) == 1
        parts = [b.item_N if extra.catalogue else b.item_N[len(b.weight_B) :] for b in batches]
        steps.append([item for part in parts for item in part.tolist() if item >= 0])
    return steps


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_event_counts_half_after_each_half_life(data, ranks) -> None:
    days = 1e-4
    item, time = (data.event_columns[name][: data.section(0).stop] for name in ("item", "time"))
    seen = {}
    for rank in range(ranks):
        for batch in TrainLoader(data, 8, seed=3, rank=rank, ranks=ranks, half_life_days=days):
            seen |= dict(zip(batch.item_N.tolist(), batch.weight_B.tolist(), strict=True))
    assert seen.pop(-1, 0) == 0, "fillers"
    assert sorted(seen) == sorted(item)
    age_days = (time.max() - time) / 86_400e6
    np.testing.assert_allclose([seen[i] for i in item], 0.5 ** (age_days / days), rtol=1e-5)
    assert min(seen.values()) < 0.1 < max(seen.values()) == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_query_has_the_time_of_its_event_and_an_item_that_of_its_first(make, ranks) -> None:
    rng = np.random.default_rng(0)
    events = EVENTS + 1
    log = {
        "user_id": np.arange(events) % 9, "item_id": rng.integers(0, 20, events),
        "timestamp": rng.permutation(events), "split": ["train"] * EVENTS + ["test"],
    }  # fmt: skip
    data = make(log, split=Split(kind="given", column="split"))
    item, time = (data.event_columns[name][: data.section(0).stop] for name in ("item", "time"))
    found = []
    for rank in range(ranks):
        loader = TrainLoader(data, 8, seed=3, rank=rank, ranks=ranks, times=True)
        for batch in loader:
            found += zip(batch.item_N.tolist(), batch.time_B.tolist(), strict=True)
        assert loader.first_times.tolist() == [
            min(time[item == i], default=np.iinfo(np.int64).max) for i in range(len(data.items))
        ]
    found = [(i, t) for i, t in found if i >= 0]
    assert sorted(found) == sorted(zip(item.tolist(), time.tolist(), strict=True))
    assert TrainLoader(data, 8, seed=3).first_times is None


def test_further_items_are_those_of_the_step_whatever_the_ranks(data) -> None:
    items, seven = len(data.items), ExtraItems(uniform=7)
    alone = further_items(data, 1, seven)
    assert all(len(step) == 7 for step in alone)
    assert alone[0] != alone[1]
    assert further_items(data, 1, seven, epoch=1) != alone
    for ranks in (2, 3):
        assert further_items(data, ranks, seven) == alone
    drawn = np.concatenate(further_items(data, 1, ExtraItems(uniform=2000)))
    counts = np.bincount(drawn, minlength=items)
    assert counts.min() > 0.6 * counts.mean(), "every item alike"


def test_hidden_ids_are_those_of_new_items_and_the_rest_is_as_it_was(make) -> None:
    number = np.arange(600)
    log = {"user_id": number % 20, "item_id": number % 50, "timestamp": number}
    items = {"item_id": list(range(50)), "kind": [i % 3 for i in range(50)]}
    item = [Feature(name="item_id", kind="id"), Feature(name="kind", kind="id")]
    data = make(log, items=items, item=item)
    plain, hiding = (list(TrainLoader(data, 64, seed=3, id_dropout=share)) for share in (0.0, 0.25))
    again = list(TrainLoader(data, 64, seed=3, id_dropout=0.25))
    rows = data.config.table("item_id").oov_rows
    hidden = 0
    for before, after, twice in zip(plain, hiding, again, strict=True):
        assert after.item_N.equal(before.item_N)
        for key in id_keys(data.config):
            was, now = before.ids[key].values(), after.ids[key].values()
            assert twice.ids[key].values().equal(now), "seeded by the step"
            if key != "item.item_id":
                assert now.equal(was), key
                continue
            changed = now != was
            hidden += int(changed.sum())
            assert (now[changed] < rows).all()
            assert (was >= rows).all()
    share = hidden / sum(len(b.item_N) for b in plain)
    assert 0.15 < share < 0.35


def test_hiding_ids_that_are_not_there_is_refused(make) -> None:
    log = {"user_id": [1, 2] * 5, "item_id": [3, 4] * 5, "timestamp": list(range(10))}
    items = {"item_id": [3, 4], "kind": ["a", "b"]}
    without = make(log, items=items, item=[Feature(name="kind", kind="id")])
    with pytest.raises(UserError, match=r"no feature of data\.item is the item's own id"):
        TrainLoader(without, 4, seed=0, id_dropout=0.5)
    slots = make(log, items=items, tables={"item_id": Table(slots=50)})
    with pytest.raises(UserError, match="table 'item_id' has dynamic ids"):
        TrainLoader(slots, 4, seed=0, id_dropout=0.5)


def test_the_catalogue_stands_for_the_events_items(data) -> None:
    whole, items = ExtraItems(catalogue=True), list(range(len(data.items)))
    for ranks in (1, 2, 3):
        assert further_items(data, ranks, whole) == [items] * len(TrainLoader(data, 8, seed=3))
    batches = zip(TrainLoader(data, 8, seed=3, extra=lambda _: whole), epoch_of(data), strict=True)
    assert all(batch.positive_B.tolist() == own for batch, own in batches)


def test_the_order_depends_on_seed_and_epoch_alone(data) -> None:
    first = epoch_of(data, 1)
    assert epoch_of(data, 0) != first
    assert epoch_of(data, 1) == first
    assert [b.item_N.tolist() for b in TrainLoader(data, 8, seed=4)] != epoch_of(data, 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_is_the_same_for_any_number_of_workers(data, workers) -> None:
    expected = list(TrainLoader(data, 8, seed=3))
    got = list(TrainLoader(data, 8, seed=3, workers=workers))
    assert len(got) == len(expected)
    for a, b in zip(expected, got, strict=True):
        assert a.item_N.equal(b.item_N)
        assert a.weight_B.equal(b.weight_B)
        assert a.ids.keys() == b.ids.keys()
        assert a.ids.values().equal(b.ids.values())
        assert a.ids.lengths().equal(b.ids.lengths())


@pytest.mark.parametrize("place", [0, 1, 7, 13])
@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (1, 3)])
def test_a_loader_goes_on_at_the_exact_next_batch(data, place, workers) -> None:
    loader = TrainLoader(data, 8, seed=3, workers=workers[0])
    loader.set_epoch(2)
    # Workers have built more batches than were taken.
    list(islice(loader, place))
    resumed = TrainLoader(data, 8, seed=3, workers=workers[1])
    resumed.load_state_dict(loader.state_dict())
    assert [b.item_N.tolist() for b in resumed] == epoch_of(data, 2)[place:]


def test_more_ranks_than_events_are_refused(data) -> None:
    with pytest.raises(UserError, match="103 training events do not suffice for 104 processes"):
        TrainLoader(data, 8, seed=3, ranks=104)


@pytest.mark.gpu
def test_pinned_batches_reach_a_gpu_unchanged(data) -> None:
    import torch

    device = torch.device("cuda")
    plain = list(TrainLoader(data, 8, seed=3))
    pinned = list(TrainLoader(data, 8, seed=3, workers=1, pin_memory=True))
    for a, b in zip(plain, pinned, strict=True):
        assert b.item_N.is_pinned()
        assert b.ids.values().is_pinned()
        there = b.to(device, non_blocking=True)
        torch.cuda.synchronize()
        assert there.ids.values().cpu().equal(a.ids.values())
        assert there.item_N.cpu().equal(a.item_N)
