"""Outcome columns: kept with their events, through an append, and refused where they are wrong."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.prepare.plan import make_plan
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Columns, DataConfig, Split
from twotower.errors import UserError

from ..conftest import EVENTS, HISTORY, ITEM


def write(folder: Path, name: str, start: int, liked: list, seconds: list) -> None:
    events = EVENTS | {"timestamp": [start + t for t in EVENTS["timestamp"]]}
    pq.write_table(pa.table(events | {"liked": liked, "seconds": seconds}), folder / name)


def config_of(folder: Path, outcomes: list[str]) -> DataConfig:
    return DataConfig(
        root=str(folder), interactions="*.parquet", query=[HISTORY], item=[ITEM],
        columns=Columns(outcomes=outcomes),
        split=Split(validation_from="1970-01-01T00:16:50", test_from="1970-01-01T00:17:00"),
    )  # fmt: skip


def test_outcomes_survive_an_append(tmp_path) -> None:
    config = config_of(tmp_path, ["seconds", "liked"])
    first, target = tmp_path / "first", tmp_path / "second"
    for folder in (first, target):
        folder.mkdir()
    write(tmp_path, "1.parquet", 0, [True, False, None] * 3 + [True], [1.5] * 9 + [None])
    write(tmp_path, "2.parquet", 950, [False] * 10, [float(i) for i in range(10)])
    prepare(config, first)
    write(tmp_path, "3.parquet", 1100, [None] * 5 + [True] * 5, [7.0] * 10)
    previous = PreparedDataset(first)
    assert make_plan(config, previous).kind == "append"
    prepare(config, target, previous)
    data = PreparedDataset(target)
    expected = {}
    for name in ("1", "2", "3"):
        for row in pq.read_table(tmp_path / f"{name}.parquet").to_pylist():
            key = row["user_id"], row["item_id"], row["timestamp"]
            expected[key] = (row["seconds"], row["liked"])
    users, items, c = data.users["id"].to_pylist(), data.items["id"].to_pylist(), data.event_columns
    assert len(data.events) == len(expected) == 30
    for row in range(30):
        key = users[c["user"][row]], items[c["item"][row]], int(c["time"][row] // 1_000_000)
        for name, value in zip(("seconds", "liked"), expected[key], strict=True):
            kept = data.outcome(name)[row]
            assert np.isnan(kept) if value is None else kept == np.float32(value)


@pytest.mark.parametrize(
    ("outcomes", "words"),
    [(["like"], r"has no column 'like' \(.*data\.columns\.outcomes\); did you mean 'liked'"),
     (["item_id"], "column 'item_id': holds string, expected numbers"),
     (["seconds"], "column 'seconds': row 2: not a finite number"),
     (["liked", "liked"], r"data\.columns\.outcomes: 'liked' stands twice")],
)  # fmt: skip
def test_outcomes_that_cannot_be_kept_are_refused(outcomes, words, tmp_path) -> None:
    write(tmp_path, "1.parquet", 0, [True] * 10, [1.0, float("inf")] + [2.0] * 8)
    (tmp_path / "prepared").mkdir()
    with pytest.raises(UserError, match=words):
        prepare(config_of(tmp_path, outcomes), tmp_path / "prepared")
