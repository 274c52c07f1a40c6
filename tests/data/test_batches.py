"""Batches: the right lists and numbers of their events."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.batches import BatchBuilder, id_keys
from twotower.data.prepared import PreparedDataset, gather


@pytest.fixture(scope="module")
def data(finished_run) -> PreparedDataset:
    return PreparedDataset(finished_run.run_dir / "prepared")


def test_a_batch_holds_the_lists_of_its_events(data) -> None:
    rows = np.array([5, 900, 17, 2000])
    batch = BatchBuilder(data, seen=True).events(rows)
    c = data.event_columns
    items = data.items
    history_rows = items["history.history"].to_pylist()
    devices = data.context("device")["feature"].to_pylist()
    lists = {key: batch.ids[key].to_dense() for key in id_keys(data.config)}
    for place, row in enumerate(rows):
        user, item = int(c["user"][row]), int(c["item"][row])
        timeline = data.timeline[data.history_from[user] : c["history_to"][row]][-50:]
        expected = {
            "query.country": [data.users["feature.country"][user].as_py()],
            "query.history": [history_rows[i] for i in timeline],
            "query.device": [devices[int(data.events["context.device"][int(row)].as_py())]],
            "item.item_id": [items["feature.item_id"][item].as_py()],
            "item.tags": items["feature.tags"][item].as_py(),
        }
        for key, value in expected.items():
            assert lists[key][place].tolist() == value
        assert batch.item_N[place] == item
        taken = data.timeline[data.history_from[user] : c["history_to"][row]]
        own = batch.seen.query_S == place
        assert batch.seen.item_S[own].tolist() == taken.tolist()
        np.testing.assert_array_equal(
            batch.dense["item.text"][place].numpy(), items["feature.text"][item].as_py()
        )


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("own", [True, False])
def test_fillers_have_no_ids_and_no_weight_and_further_items_no_queries(data, rows, own) -> None:
    builder, further = BatchBuilder(data), np.array([2, -1, 0, 1, 1, 2])
    batch, items = builder.events(np.arange(rows)), builder.items(np.array([2, 0, 1, 1, 2]))
    padded = builder.events(np.arange(rows), 5, extra=further, own=own)
    first = [*batch.item_N.tolist(), *[-1] * (5 - rows)] if own else []
    assert padded.item_N.tolist() == first + further.tolist()
    positive = range(5) if own else [*batch.item_N.tolist(), *[0] * (5 - rows)]
    assert padded.positive_B.tolist() == list(positive)
    assert padded.weight_B.tolist() == [*batch.weight_B.tolist(), *[0.0] * (5 - rows)]
    for key in id_keys(data.config):
        found = [v.tolist() for v in padded.ids[key].to_dense()]
        whole = [v.tolist() for v in batch.ids[key].to_dense()][:rows]
        whole += [[]] * (5 - rows)
        if key.startswith("query"):
            assert found == whole + [[]] * (len(found) - 5)
            continue
        one, *others = (v.tolist() for v in items.ids[key].to_dense())
        items_N = len(padded.item_N)  # items of histories' entries come behind them
        assert found[:items_N] == (whole if own else []) + [one, [], *others]
    for key, values in padded.dense.items():
        if key.startswith("query"):
            assert torch.equal(values[:rows], batch.dense[key])
            assert not values[rows:].any()
            assert len(values) == 5
        else:
            values = values[: len(padded.item_N)]
            assert torch.equal(values[-6:][[0, 2, 3, 4, 5]], items.dense[key])


@given(st.data())
@settings(deadline=None)
def test_slices_are_gathered_one_after_another(data) -> None:
    values = np.array(data.draw(st.lists(st.integers(0, 99), max_size=40)), np.int32)
    bound = st.integers(0, len(values))
    slices = [
        sorted(data.draw(st.tuples(bound, bound))) for _ in range(data.draw(st.integers(0, 9)))
    ]
    starts, ends = np.array(slices, np.int64).reshape(-1, 2).T
    got, lengths = gather(values, starts, ends)
    assert got.tolist() == [v for a, b in slices for v in values[a:b]]
    assert lengths.tolist() == [b - a for a, b in slices]
