"""Appending days: the result is what preparing all days at once gives, to the byte."""

import filecmp
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.prepare.plan import make_plan
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Columns, DataConfig, Feature, Split, Table
from twotower.errors import UserError

MANY = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GIVEN = Split(kind="given", column="split")
QUERY = [
    Feature(name="history", kind="history", table="item_id", length=3, column="earlier"),
    Feature(name="user_id", kind="id"),
    Feature(name="city", kind="id"),
    Feature(name="device", kind="id"),
    Feature(name="words", kind="ids", length=3),
    Feature(name="dwell", kind="number"),
    Feature(name="mood", kind="vector", width=2),
]
ITEM = [
    Feature(name="item_id", kind="id"),
    Feature(name="tags", kind="ids", length=3),
    Feature(name="price", kind="number"),
]


@st.composite
def days(draw):
    """Days of events: later ones have later times, and users, items and words of their own."""
    out, number = [], draw(st.integers(2, 4))
    for day in range(number):
        size = draw(st.integers(4, 14))
        choice = lambda n, size=size: draw(  # noqa: E731
            st.lists(st.integers(0, n - 1), min_size=size, max_size=size)
        )
        words = draw(
            st.lists(st.lists(st.integers(0, 3 + day), max_size=4), min_size=size, max_size=size)
        )
        out.append({
            "user_id": [f"u{u}" for u in choice(4 + 2 * day)],
            "item_id": [i * 7 for i in choice(5 + 3 * day)],
            "timestamp": [day * 100 + t for t in choice(20)],
            "split": [["train", "train", "validation", "test"][s] for s in choice(4)],
            "device": [[None, "web", "app", f"new {day}"][d] for d in choice(4)],
            "words": [[f"w{w}" for w in ws] for ws in words],
            "dwell": [d / 3 if d else None for d in choice(9)],
            "mood": [[m / 7, 1.0] if m else None for m in choice(5)],
            "earlier": [[i * 7 for i in range(e)] for e in choice(4)],
        })  # fmt: skip
    return out


USERS = {"user_id": [f"u{u}" for u in range(9)], "city": [None, "x", "y"] * 3}
ITEMS = {
    "item_id": [i * 7 for i in range(12)],
    "tags": [[f"t{i % 5}", "all"] if i % 4 else None for i in range(12)],
    "price": [i / 3 if i % 5 else None for i in range(12)],
}
SCHEMA = {"words": pa.list_(pa.string()), "earlier": pa.list_(pa.int64()), "device": pa.string(),
          "mood": pa.list_(pa.float32()), "dwell": pa.float64()}  # fmt: skip


def write_day(folder: Path, number: int, day: dict) -> None:
    arrays = {n: pa.array(v, SCHEMA.get(n)) for n, v in day.items()}
    pq.write_table(pa.table(arrays), folder / "log" / f"day{number}.parquet")


def set_up(tmp_path: Path, **changes) -> tuple[Path, DataConfig]:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    (folder / "log").mkdir(parents=True)
    pq.write_table(pa.table(USERS), folder / "users.parquet")
    pq.write_table(pa.table(ITEMS), folder / "items.parquet")
    config = DataConfig(
        root=str(folder), interactions="log", users="users.parquet", items="items.parquet",
        query=QUERY, item=ITEM, split=Split(validation=0.2, test=0.2),
        tables={"words": Table(min_count=2), "item_id": Table(pinned=[700, 7])},
    )  # fmt: skip
    return folder, replace(config, **changes)


def prepared(config: DataConfig, target: Path, previous: PreparedDataset | None) -> PreparedDataset:
    target.mkdir()
    prepare(config, target, previous)
    return PreparedDataset(target)


def assert_same_bytes(a: Path, b: Path) -> None:
    names = sorted(str(f.relative_to(a)) for f in a.rglob("*") if f.is_file())
    assert names == sorted(str(f.relative_to(b)) for f in b.rglob("*") if f.is_file())
    _, different, errors = filecmp.cmpfiles(a, b, names, shallow=False)
    assert not different
    assert not errors


def day_by_day(folder: Path, config: DataConfig, log: list[dict]) -> list[PreparedDataset]:
    out: list[PreparedDataset] = []
    for number, day in enumerate(log):
        write_day(folder, number, day)
        previous = out[-1] if out else None
        if previous is not None:
            assert make_plan(config, previous).kind == "append"
        out.append(prepared(config, folder / f"after{number}", previous))
    return out


def splits_hold(log: list[dict], kind: str) -> bool:
    """Whether the first day alone has what a split needs."""
    first = log[0]
    if len(set(first["user_id"])) < 2 or len(set(first["item_id"])) < 2:
        return False
    if kind == "given":
        trained = [s == "train" for s in first["split"]]
    else:
        times = sorted(first["timestamp"])
        n = len(times)
        cuts = [times[round(n * (1 - share))] for share in (0.4, 0.2)]
        trained = [t < cuts[0] for t in first["timestamp"]]
        if max(times) < cuts[1]:
            return False
    numbers = any(d is not None and t for d, t in zip(first["dwell"], trained, strict=True))
    price = dict(zip(ITEMS["item_id"], ITEMS["price"], strict=True))
    priced = any(t and price.get(i) is not None
                 for i, t in zip(first["item_id"], trained, strict=True))  # fmt: skip
    tests = kind != "given" or "test" in first["split"]
    return any(trained) and numbers and priced and tests


@pytest.mark.parametrize("kind", ["temporal", "given"])
@MANY
@given(log=days())
def test_days_appended_one_by_one_equal_all_days_at_once(tmp_path, kind, log) -> None:
    if not splits_hold(log, kind):
        return
    changes = {"split": GIVEN} if kind == "given" else {}
    folder, config = set_up(tmp_path, **changes)
    steps = day_by_day(folder, config, log)
    at_once = prepared(config, folder / "at_once", None)
    assert_same_bytes(steps[-1].path, at_once.path)
    for earlier, later in pairwise(steps):
        for name, vocabulary in earlier.encoder.vocabularies.items():
            grown = later.encoder.vocabularies[name].keys
            assert grown.slice(0, len(vocabulary.keys)).equals(vocabulary.keys), "no id moves"


DAYS = [
    {
        "user_id": [f"u{(i + d) % 5}" for i in range(20)],
        "item_id": [7 * ((i * i + d) % (6 + d)) for i in range(20)],
        "timestamp": [100 * d + i for i in range(20)],
        "split": ["train"] * 20,
        "device": ["web", "app"] * 10,
        "words": [["w0", f"w{i % 3}"] for i in range(20)],
        "dwell": [float(i) for i in range(20)],
        "mood": [[1.0, 2.0]] * 20,
        "earlier": [[]] * 20,
    }
    for d in range(3)
]


def test_old_days_may_be_removed_once_they_are_prepared(tmp_path) -> None:
    folder, config = set_up(tmp_path)
    write_day(folder, 0, DAYS[0])
    first = prepared(config, folder / "first", None)
    (folder / "log" / "day0.parquet").rename(folder / "day0.parquet")
    write_day(folder, 1, DAYS[1])
    second = prepared(config, folder / "second", first)
    assert second.summary["counts"]["events"] == 40
    assert make_plan(config, second).kind == "nothing"
    shutil.move(folder / "day0.parquet", folder / "log" / "day0.parquet")
    assert_same_bytes(second.path, prepared(config, folder / "at_once", None).path)


def test_what_would_lose_events_is_refused(tmp_path) -> None:
    folder, config = set_up(tmp_path)
    write_day(folder, 0, DAYS[0])
    first = prepared(config, folder / "first", None)
    (folder / "log" / "day0.parquet").unlink()
    write_day(folder, 1, DAYS[1])
    with pytest.raises(UserError, match=r"no longer there.*the schema changed.*would lose them"):
        make_plan(replace(config, item=ITEM[:1]), first)


@pytest.mark.parametrize("again", [0, 1])
def test_a_day_out_of_order_or_twice_is_refused(tmp_path, again) -> None:
    folder, config = set_up(tmp_path)
    write_day(folder, 1, DAYS[1])
    first = prepared(config, folder / "first", None)
    write_day(folder, 2, DAYS[again])
    with pytest.raises(UserError, match=r"day2\.parquet: 20 new events are not after the newest"):
        prepared(config, folder / "second", first)


def test_a_full_vocabulary_keeps_its_ids_when_days_are_appended(tmp_path) -> None:
    folder, config = set_up(tmp_path, tables={"item_id": Table(max_size=4)})
    steps = day_by_day(folder, config, DAYS)
    keys = [d.encoder.vocabularies["item_id"].keys.to_pylist() for d in steps]
    assert keys[0] == keys[1] == keys[2]
    assert len(keys[0]) == 4
    counts = steps[2].encoder.vocabularies["item_id"].counts.to_pylist()
    rows = dict(zip(steps[2].items["id"].to_pylist(), steps[2].train_count, strict=True))
    assert counts == [rows[k] for k in keys[2]], "their counts go on"


@pytest.mark.parametrize(
    ("change", "kind"),
    [({"memory_gb": 1.0}, "nothing"), ({"item": ITEM[:1]}, "all"),
     ({"columns": Columns(weight="dwell")}, "all")],
)  # fmt: skip
def test_what_asks_for_another_preparation(tmp_path, change, kind) -> None:
    folder, config = set_up(tmp_path)
    write_day(folder, 0, DAYS[0])
    first = prepared(config, folder / "first", None)
    assert make_plan(replace(config, **change), first).kind == kind


def test_dates_of_a_split_may_move_on(tmp_path) -> None:
    dates = Split(validation_from="1970-01-01T00:00:12", test_from="1970-01-01T00:00:15")
    folder, config = set_up(tmp_path, split=dates)
    write_day(folder, 0, DAYS[0])
    first = prepared(config, folder / "first", None)
    write_day(folder, 1, DAYS[1])
    later = replace(
        config,
        split=Split(validation_from="1970-01-01T00:01:50", test_from="1970-01-01T00:01:55"),
    )
    second = prepared(later, folder / "second", first)
    assert second.summary["counts"]["train_events"] == 30
    assert_same_bytes(second.path, prepared(later, folder / "at_once", None).path)
    assert make_plan(config, second).kind == "all", "back to the earlier dates"


def test_times_are_split_as_if_sorted() -> None:
    from twotower.data.prepare.split import kth_time

    rng = np.random.default_rng(0)
    for spread in (1, 50, 10**13):
        time = rng.integers(0, spread, 1000)
        ordered = np.sort(time)
        for place in (0, 17, 500, 999):
            found = kth_time(lambda time=time: iter(np.array_split(time, 7)), place)
            assert found == ordered[place]


def test_days_appended_leave_the_keys_and_the_size_of_dynamic_ids(tmp_path) -> None:
    tables = {name: Table(slots=100) for name in ("item_id", "user_id", "words", "device", "tags")}
    folder, config = set_up(tmp_path, tables=tables)
    days = [day | {"user_id": [f"new {d}.{i % 5}" for i in range(20)]}
            for d, day in enumerate(DAYS)]  # fmt: skip
    steps = day_by_day(folder, config, days)
    assert_same_bytes(steps[-1].path, prepared(config, folder / "at_once", None).path)
    for step in steps:
        assert all(step.summary["tables"][name]["rows"] == 100 for name in tables)
    users, items = set(), set()
    for step in steps:
        known = step.users["id"].to_pylist(), step.items["id"].to_pylist()
        keys = [t[f"feature.{n}"].to_pylist() for t, n in (
            (step.users, "user_id"), (step.items, "item_id"),
        )]  # fmt: skip
        pairs = [set(zip(ids, of, strict=True)) for ids, of in zip(known, keys, strict=True)]
        assert users <= pairs[0], "no user's key changes"
        assert items <= pairs[1], "no item's key changes"
        users, items = pairs
    assert len(steps[0].users) < len(steps[1].users) < len(steps[2].users)
