"""Logs of unusual shape: sessions, one user with a million events, one item with a third of all."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Columns

from .logs import prepared


def shaped(folder: Path, user: Any, item: Any, time: Any, **changes: Any) -> PreparedDataset:
    table = pa.table({"user_id": user, "item_id": item, "timestamp": time})
    pq.write_table(table, folder / "log.parquet")
    return prepared(folder, "log.parquet", columns=Columns(timestamp_unit="us"), **changes)


def assert_right(
    data: PreparedDataset, user: np.ndarray, item: np.ndarray, time: np.ndarray
) -> None:
    """Check every event, its split and its history against the log, sorted by numpy."""
    order = np.lexsort((time, user))
    user, item, time = user[order], item[order], time[order]
    raw = np.asarray(data.items["id"])
    c = data.event_columns
    rows = np.lexsort((c["time"], c["user"]))
    np.testing.assert_array_equal(np.asarray(data.users["id"])[c["user"][rows]], user)
    np.testing.assert_array_equal(raw[c["item"][rows]], item)
    np.testing.assert_array_equal(c["time"][rows], time)
    # Without two events of a user at one moment, a history is all that comes before.
    np.testing.assert_array_equal(raw[data.timeline], item)
    np.testing.assert_array_equal(c["history_to"][rows], np.arange(len(user)))
    ordered = np.sort(time)
    cuts = [ordered[round(len(time) * share)] for share in (0.8, 0.9)]
    split = np.repeat([0, 1, 2], [len(data.section(s)) for s in range(3)])
    np.testing.assert_array_equal(
        split[rows], (time >= cuts[0]).astype(int) + (time >= cuts[1]).astype(int)
    )
    trained = item[time < cuts[0]]
    np.testing.assert_array_equal(data.train_count, [(trained == i).sum() for i in raw])


def test_sessions_every_user_has_one_to_three_events(tmp_path) -> None:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(40_000), rng.integers(1, 4, 40_000))
    item, time = rng.integers(0, 60, len(user)), rng.permutation(len(user))
    data = shaped(tmp_path, user, item, time)
    assert len(data.users) == 40_000
    assert len(data.items) == 60
    assert_right(data, user, item, time)


def test_one_user_has_a_million_events(tmp_path) -> None:
    rng = np.random.default_rng(1)
    user = np.concatenate([np.full(1_000_000, 7), rng.integers(0, 50, 20_000)])
    item, time = rng.integers(0, 100, len(user)), rng.permutation(len(user))
    data = shaped(tmp_path, user, item, time)
    assert data.events_of.max() >= 1_000_000
    assert_right(data, user, item, time)


def test_one_item_has_a_third_of_all_events(tmp_path) -> None:
    rng = np.random.default_rng(2)
    item = np.where(rng.random(90_000) < 1 / 3, 0, rng.integers(1, 500, 90_000))
    user, time = rng.integers(0, 3000, 90_000), rng.permutation(90_000)
    data = shaped(tmp_path, user, item, time)
    assert data.train_count[0] / data.train_count.sum() == pytest.approx(1 / 3, abs=0.01)
    assert_right(data, user, item, time)
    keys = data.encoder.vocabularies["item_id"]
    counts = dict(zip(keys.keys.to_pylist(), keys.counts.to_pylist(), strict=True))
    assert counts == dict(zip(data.items["id"].to_pylist(), data.train_count, strict=True))
