"""Batches: every event once an epoch, the right lists, and the same order after a pause."""

from itertools import islice

import numpy as np
import pytest

from twotower.data.batches import BatchBuilder, TrainLoader, id_keys
from twotower.data.prepared import PreparedDataset


@pytest.fixture(scope="module")
def data(finished_run) -> PreparedDataset:
    return PreparedDataset(finished_run.run_dir / "prepared")


def test_a_batch_holds_the_lists_of_its_events(data) -> None:
    rows = np.array([5, 900, 17, 2000])
    batch = BatchBuilder(data).events(rows)
    c = data.event_columns
    items = data.items
    history_rows = items["history.history"].to_pylist()
    devices = data.context("device")["feature"].to_pylist()
    lists = {key: batch.ids[key].to_dense() for key in id_keys(data.config)}
    for place, row in enumerate(rows):
        user, item = int(c["user"][row]), int(c["item"][row])
        timeline = data.timeline[data.history_from[user] : c["history_to"][row]][-50:]
        expected = {
            "query.user_id": [data.users["feature.user_id"][user].as_py()],
            "query.history": [history_rows[i] for i in timeline],
            "query.device": [devices[int(data.events["context.device"][int(row)].as_py())]],
            "item.item_id": [items["feature.item_id"][item].as_py()],
            "item.tags": items["feature.tags"][item].as_py(),
        }
        for key, value in expected.items():
            assert lists[key][place].tolist() == value
        assert batch.item_B[place] == item
        np.testing.assert_array_equal(
            batch.dense["item.text"][place].numpy(), items["feature.text"][item].as_py()
        )


def test_an_epoch_holds_each_training_event_at_most_once_and_nearly_all(data) -> None:
    loader = TrainLoader(data, 64, seed=3)
    items = np.concatenate([b.item_B.numpy() for b in loader])
    train = data.event_columns["item"][: data.section(0).stop]
    assert len(items) == len(loader) * 64
    assert len(train) - len(items) < 64
    counts = np.bincount(items, minlength=len(data.items))
    assert (counts <= np.bincount(train, minlength=len(data.items))).all()


def epoch(loader: TrainLoader, number: int) -> list[list[int]]:
    loader.set_epoch(number)
    return [b.item_B.tolist() for b in loader]


def test_the_order_depends_on_seed_and_epoch_alone(data) -> None:
    first = epoch(TrainLoader(data, 64, seed=3), 1)
    again = TrainLoader(data, 64, seed=3)
    assert epoch(again, 0) != first
    assert epoch(again, 1) == first
    assert epoch(TrainLoader(data, 64, seed=4), 1) != first


@pytest.mark.parametrize("place", [0, 1, 7])
def test_a_loader_goes_on_at_the_exact_next_batch(data, place) -> None:
    loader = TrainLoader(data, 64, seed=3)
    loader.set_epoch(2)
    list(islice(loader, place))
    resumed = TrainLoader(data, 64, seed=3)
    resumed.load_state_dict(loader.state_dict())
    rest = [b.item_B.tolist() for b in resumed]
    assert rest == epoch(TrainLoader(data, 64, seed=3), 2)[place:]
