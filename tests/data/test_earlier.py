"""What came before the log as training events, and outcomes that judge without being trained on."""

import os
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.batches import BatchBuilder
from twotower.data.inspect.config import InspectConfig
from twotower.data.inspect.inspection import inspect_log
from twotower.data.prepare.plan import make_plan
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.queries import split_queries
from twotower.data.schema import Columns, DataConfig, Earlier, Feature, Split
from twotower.errors import UserError

from ..conftest import EVENTS, HISTORY, ITEM
from .logs import meaning, prepared

MANY = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EARLIER = Earlier(location="earlier.parquet", column="watched")
LISTS = st.dictionaries(
    st.integers(1, 6), st.lists(st.sampled_from("abcdefg"), max_size=80), max_size=6
)


def write(folder, lists, events=EVENTS) -> None:
    pq.write_table(pa.table(events), folder / "log.parquet")
    table = {"user_id": pa.array(list(lists), pa.int64()),
             "watched": pa.array(list(lists.values()), pa.list_(pa.string()))}  # fmt: skip
    pq.write_table(pa.table(table), folder / "earlier.parquet")


def whole_history(data: PreparedDataset) -> dict[int, list[str]]:
    items = data.items["id"].to_pylist()
    return {
        user: [items[i] for i in data.timeline_of(row)]
        for row, user in enumerate(data.users["id"].to_pylist())
    }


@MANY
@given(lists=LISTS, share=st.sampled_from([0.1, 0.4]))
def test_earlier_items_are_training_events_before_the_logs_first(tmp_path, lists, share) -> None:
    write(tmp_path, lists)
    split = Split(validation=0.1, test=share)
    alone = prepared(tmp_path, "log.parquet", split=split)
    data = prepared(tmp_path, "log.parquet", split=split, earlier=EARLIER)
    added = sum(map(len, lists.values()))
    before, after = (d.summary["counts"] for d in (alone, data))
    assert after["train_events"] == before["train_events"] + added
    # The split of the log itself does not move, whatever came before.
    for name in ("validation_events", "test_events"):
        assert after[name] == before[name]
    own = whole_history(alone)
    histories = whole_history(data)
    for user in histories:
        assert histories[user] == lists.get(user, []) + own.get(user, [])
    c, items = data.event_columns, data.items["id"].to_pylist()
    for row in data.section(0):
        history = data.timeline[data.history_from[c["user"][row]] : c["history_to"][row]]
        user = data.users["id"][int(c["user"][row])].as_py()
        so_far = [items[i] for i in history]
        assert so_far == histories[user][: len(so_far)], "nothing of the future"
        if c["time"][row] < 10_000_000:
            assert histories[user][len(so_far)] == items[c["item"][row]]
    assert data.train_count.sum() == after["train_events"]


def test_earlier_items_have_no_context_and_full_weight(tmp_path) -> None:
    size = len(EVENTS["user_id"])
    vector = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(2 * size, np.float32)), 2)
    events = EVENTS | {
        "device": ["tv"] * size, "tags": [["x", "y"]] * size, "age": [2.0] * size,
        "text": vector, "w": [0.5] * size,
    }  # fmt: skip
    write(tmp_path, {1: ["e", "a"], 9: ["f"]}, events)
    query = [
        HISTORY, Feature(name="device", kind="id"), Feature(name="tags", kind="ids"),
        Feature(name="age", kind="number"), Feature(name="text", kind="vector", width=2),
    ]  # fmt: skip
    data = prepared(
        tmp_path, "log.parquet", query=query, earlier=EARLIER, columns=Columns(weight="w")
    )
    rows = [r for r in data.section(0) if data.event_columns["time"][r] < 10_000_000]
    assert len(rows) == 3
    events = data.events.take(rows)
    assert events["context.device"].to_pylist() == [-1, -1, -1]
    assert events["context.tags"].to_pylist() == [[], [], []]
    assert np.isnan(events["context.age"].to_numpy()).all()
    assert events["context.text"].to_pylist() == [[0, 0]] * 3
    assert events["weight"].to_pylist() == [1, 1, 1]


def test_appending_a_day_is_preparing_all_at_once_with_earlier_items_too(tmp_path) -> None:
    write(tmp_path, {1: ["e", "a", "e"], 2: ["c"], 7: ["b", "d"]})
    day = {"user_id": [1, 7, 8], "item_id": ["g", "a", "a"], "timestamp": [200, 201, 202]}
    folder = tmp_path / "log"
    folder.mkdir()
    (tmp_path / "log.parquet").rename(folder / "1.parquet")
    split = Split(validation_from="1970-01-01T00:00:31", test_from="1970-01-01T00:01:30")
    changes = {"earlier": EARLIER, "split": split}
    first = prepared(tmp_path, "log", **changes)
    pq.write_table(pa.table(day), folder / "2.parquet")
    config = replace(first.config, query=[HISTORY], item=[ITEM])
    assert make_plan(config, first).kind == "append"
    (tmp_path / "appended").mkdir()
    prepare(config, tmp_path / "appended", first)
    assert meaning(PreparedDataset(tmp_path / "appended")) == meaning(
        prepared(tmp_path, "log", **changes)
    )
    os.utime(tmp_path / "earlier.parquet", (1, 1))
    assert make_plan(config, first).kind == "all", "what came before has changed"


LABELLED = EVENTS | {"liked": [1, 0, 1, 1, 1, 0, 1, 0, 0, 1]}
ALL = Columns(label="liked", positive_from=1, train_on="all")
CUT = "1970-01-01T00:01:30"
LATE = Split(validation_from=CUT, test_from=CUT)


def test_only_positive_events_are_judged_and_the_others_stand_in_histories(make) -> None:
    # From second 90: user 1 likes c, 2 sees d, 3 sees d and then likes e.
    data = make(LABELLED, columns=ALL, split=LATE)
    counts = data.summary["counts"]
    assert (counts["train_events"], counts["test_events"], counts["dropped_by_label"]) == (6, 2, 2)
    items, users = data.items["id"].to_pylist(), data.users["id"].to_pylist()
    q = split_queries(data, 2, 100, 0)
    seen = {
        users[data.event_columns["user"][event]]: (
            [items[i] for i in q.seen[q.seen_offset[n] : q.seen_offset[n + 1]]],
            [items[i] for i in q.relevant[q.relevant_offset[n] : q.relevant_offset[n + 1]]],
        )
        for n, event in enumerate(q.event)
    }
    assert seen == {1: (["a", "b"], ["c"]), 3: (["b", "a", "d"], ["e"])}
    positives = make(LABELLED, columns=replace(ALL, train_on="positives"), split=LATE)
    assert positives.summary["counts"]["train_events"] == 4


def test_what_came_before_the_log_is_of_the_first_span(tmp_path) -> None:
    seconds = [60 + row // 4 for row in range(600)]
    events = {
        "user_id": [1 + row % 4 for row in range(600)],
        "item_id": ["abcdef"[row % 6] for row in range(600)],
        "timestamp": [float(s) for s in seconds],
    }
    write(tmp_path, {user: list("abcde" * 6) for user in (1, 2, 9)}, events)
    timed = replace(HISTORY, length=40, pooling="timed_sum")
    data = prepared(tmp_path, "log.parquet", query=[timed], earlier=EARLIER, split=Split(test=0.2))
    starts = data.encoder.span_starts
    assert len(starts) > 20, "the log's events share the others"
    assert min(starts) >= 60
    rows = [
        row for row in data.section(0)
        if data.event_columns["time"][row] // 1_000_000 in (60, 150)
        and data.users["id"][int(data.event_columns["user"][row])].as_py() == 1
    ]  # fmt: skip
    first, later = BatchBuilder(data).queries(np.array(rows)).dense["query.history_times"].tolist()
    assert first == [0] * 30 + [len(starts)] * 10, "padding is of the newest"
    assert len(set(later)) > 10
    assert later == sorted(later)


def test_inspection_counts_what_preparing_splits(tmp_path) -> None:
    write(tmp_path, {1: ["e", "a"], 7: ["b"]}, LABELLED)
    config = DataConfig(
        root=str(tmp_path), interactions="log.parquet", query=[HISTORY], item=[ITEM],
        earlier=EARLIER, columns=ALL, split=LATE,
    )  # fmt: skip
    parts = inspect_log(config, InspectConfig(), tmp_path / "scratch")["split"]["parts"]
    counts = prepared(
        tmp_path, "log.parquet", earlier=EARLIER, columns=ALL, split=LATE
    ).summary["counts"]  # fmt: skip
    for name in ("train", "test"):
        assert parts[name]["events"] == counts[f"{name}_events"]


WRONG = {
    "twice": ({}, {"user_id": [1, 1], "watched": [["a"], ["b"]]}, r"1 stands in row 1 and again"),
    "no list": ({}, {"user_id": [1], "watched": [3]}, r"column 'watched': .* expected a list"),
    "no column": ({}, {"user_id": [1], "wached": [["a"]]}, r"no column 'watched' .*'wached'"),
    "numbers": ({}, {"user_id": [1], "watched": [[3]]}, r"holds (string|int64) ids, but"),
    "a history of its own": (
        {"query": [replace(HISTORY, column="watched")]}, {"user_id": [1], "watched": [["a"]]},
        r"data.earlier and a history's `column`",
    ),
    "all of nothing": (
        {"columns": Columns(train_on="all")}, {"user_id": [1], "watched": [["a"]]},
        r"train_on is all, .* set that",
    ),
    "the last two": (
        {"columns": ALL, "split": Split(kind="leave_last_out")},
        {"user_id": [1], "watched": [["a"]]}, r"train_on: all needs validation and test",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_what_cannot_be_is_one_line(tmp_path, case) -> None:
    changes, table, message = WRONG[case]
    write(tmp_path, {}, LABELLED)
    pq.write_table(pa.table(table), tmp_path / "earlier.parquet")
    with pytest.raises(UserError, match=message) as found:
        prepared(tmp_path, "log.parquet", earlier=EARLIER, **changes)
    assert "\n" not in str(found.value)


def test_a_table_of_earlier_items_needs_its_location(tmp_path, twotower) -> None:
    job = ["--data.interactions=log.parquet", "--data.earlier.column=watched", "--name=a",
           "--run_dir=run"]  # fmt: skip
    done = twotower("prepare", *job, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "twotower: error: data.earlier also needs location"
