"""Preparation: what a history holds, how events are split, what the training period teaches."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.schema import Columns, Feature, Split
from twotower.data.table import Table
from twotower.errors import UserError

from ..conftest import EVENTS, HISTORY, ITEM

# The fixture writes each example to a folder of its own.
MANY = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
GIVEN = Split(kind="given", column="split")


@st.composite
def logs(draw):
    size = draw(st.integers(8, 40))
    text = draw(st.booleans())
    items = draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))
    return {
        "user_id": draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size)),
        "item_id": [f"item {i} é" for i in items] if text else items,
        "timestamp": draw(st.lists(st.integers(0, 12), min_size=size, max_size=size)),
        "split": draw(
            st.lists(st.sampled_from(["train", "validation", "test"]), min_size=size, max_size=size)
        ),
    }


def usable(log) -> bool:
    return (
        {"train", "test"} <= set(log["split"])
        and len(set(log["user_id"])) > 1
        and len(set(log["item_id"])) > 1
    )


@MANY
@given(log=logs().filter(usable))
def test_a_history_holds_the_users_items_strictly_before_and_nothing_else(make, log) -> None:
    data = make(log, split=GIVEN)
    order = {"train": 0, "validation": 1, "test": 2}
    events = [
        (u, i, order[s], t)
        for u, i, s, t in zip(*(log[c] for c in ("user_id", "item_id", "split", "timestamp")),
                              strict=True)
    ]  # fmt: skip
    c, ids = data.event_columns, data.items["id"].to_pylist()
    users = data.users["id"].to_pylist()
    seen = []
    for row in range(len(c["user"])):
        user, item = users[c["user"][row]], ids[c["item"][row]]
        split = next(s for s in range(3) if row in data.section(s))
        moment = (split, int(c["time"][row]) // 1_000_000)
        seen.append((user, item, *moment))
        history = data.timeline[data.history_from[c["user"][row]] : c["history_to"][row]]
        # A later split never reaches into an earlier one's history, whatever its time.
        before = [(s, t, i) for u, i, s, t in events if u == user and (s, t) < moment]
        assert sorted(ids[i] for i in history) == sorted(i for _, _, i in before)
        times = {}
        for s, t, i in before:
            times.setdefault(i, []).append((s, t))
        newest = max(((s, t) for s, t, _ in before), default=None)
        if newest is not None:
            assert newest in times[ids[history[-1]]], "the newest item comes last"
    assert sorted(seen) == sorted(events), "every event is kept"


@MANY
@given(log=logs().filter(usable))
def test_vocabularies_and_counts_come_from_training_alone(make, log) -> None:
    data = make(log, split=GIVEN)
    train = [i for i, s in zip(log["item_id"], log["split"], strict=True) if s == "train"]
    vocabulary = data.encoder.vocabularies["item_id"]
    assert dict(zip(vocabulary.keys.to_pylist(), vocabulary.counts.to_pylist(), strict=True)) == {
        i: train.count(i) for i in set(train)
    }
    catalogue = data.items["id"].to_pylist()
    assert catalogue == sorted(set(log["item_id"]), key=lambda i: i.encode() if train and
                               isinstance(i, str) else i)  # fmt: skip
    assert data.train_count.tolist() == [train.count(i) for i in catalogue]
    rows = data.items["feature.item_id"].to_numpy()
    for item, row in zip(catalogue, rows, strict=True):
        assert (row < vocabulary.oov_rows) == (item not in train)


def test_a_temporal_split_is_by_time_alone(make) -> None:
    data = make(EVENTS, split=Split(validation=0.2, test=0.2))
    times = {n: [t // 1_000_000 for t in span] for n, span in data.summary["time"].items()}
    assert times == {"train": [10, 35], "validation": [90, 92], "test": [95, 99]}


def test_a_temporal_split_at_dates(make) -> None:
    split = Split(validation_from="1970-01-01T00:01:30", test_from="1970-01-01T00:01:35+00:00")
    counts = make(EVENTS, split=split).summary["counts"]
    assert (counts["train_events"], counts["validation_events"], counts["test_events"]) == (6, 2, 2)


def test_leave_last_out_takes_each_users_last_two_events(make) -> None:
    data = make(EVENTS, split=Split(kind="leave_last_out"))
    c = data.event_columns
    for user in range(3):
        rows = np.flatnonzero(c["user"] == user)
        splits = [next(s for s in range(3) if row in data.section(s)) for row in rows]
        assert splits == [0] * (len(splits) - 2) + [1, 2]


def test_files_of_a_given_split(make, tmp_path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({k: v[:3] for k, v in EVENTS.items()}), tmp_path / "test.parquet")
    data = make(EVENTS, split=Split(kind="given", test_files=str(tmp_path / "test.parquet")))
    counts = data.summary["counts"]
    assert (counts["train_events"], counts["test_events"]) == (10, 3)


def test_earlier_items_of_the_users_table_come_before_the_logs(make) -> None:
    users = {"user_id": [1, 2], "earlier": [["x", "y"], None]}
    history = Feature(name="history", kind="history", table="item_id", length=9, column="earlier")
    data = make(EVENTS, users=users, query=[history])
    ids = data.items["id"].to_pylist()
    assert {"x", "y"} <= set(ids), "an earlier item can be recommended"
    assert [ids[i] for i in data.timeline_of(0)] == ["x", "y", "a", "b", "c"]
    assert [ids[i] for i in data.timeline_of(1)] == ["a", "c", "d"]
    assert "x" in data.encoder.vocabularies["item_id"].keys.to_pylist()
    assert data.train_count[ids.index("x")] == 0, "it was not sampled as a negative"


def test_earlier_items_of_the_log_are_those_of_the_first_event(make) -> None:
    events = EVENTS | {"earlier": [["x"], ["x", "a"], ["x", "a", "b"]] + [[]] * 7}
    history = Feature(name="history", kind="history", table="item_id", length=9, column="earlier")
    data = make(events, query=[history])
    ids = data.items["id"].to_pylist()
    assert [ids[i] for i in data.timeline_of(0)] == ["x", "a", "b", "c"]


def test_numbers_are_normalised_by_the_training_period(make) -> None:
    items = {"item_id": list("abcde"), "price": [1.0, 2.0, None, 4.0, 1000.0]}
    price = Feature(name="price", kind="number")
    data = make(EVENTS, items=items, item=[ITEM, price], split=Split(validation=0.1, test=0.1))
    # e is sold in the test period alone; the null is set to the mean.
    normaliser = data.encoder.normalisers["item.price"]
    assert normaliser.mean == pytest.approx(7 / 3)
    encoded = data.items["feature.price"].to_pylist()
    assert encoded[2] == 0.0
    assert encoded[:2] + encoded[3:4] == pytest.approx(
        [(p - 7 / 3) / normaliser.std for p in (1, 2, 4)], abs=1e-6
    )


def test_every_kind_is_encoded(make) -> None:
    users = {"user_id": [1, 2, 3], "age": [20, 30, None], "city": ["x", None, ""]}
    items = {
        "item_id": list("abcd"),
        "tags": ["p|q", "q", None, "r|p|q"],
        "title": ["A (1999)", "B (2001)", "C", "D (2003)"],
        "text": [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]],
    }
    data = make(
        EVENTS | {"device": ["web", "app"] * 5}, users=users, items=items,
        query=[HISTORY, Feature(name="user_id", kind="id"), Feature(name="age", kind="number"),
               Feature(name="city", kind="id"), Feature(name="device", kind="id")],
        item=[ITEM, Feature(name="tags", kind="ids", separator="|", length=2),
              Feature(name="year", kind="number", column="title", pattern=r"\((\d{4})\)$"),
              Feature(name="text", kind="vector", width=2)],
    )  # fmt: skip
    tags = data.encoder.vocabularies["tags"]
    assert set(tags.keys.to_pylist()) == {"p", "q", "r"}
    lengths = data.items["feature.tags"].combine_chunks().value_lengths().to_pylist()
    assert lengths == [2, 1, 0, 2, 0], "cut to two; none for a null and for an item without a row"
    assert data.items["feature.text"].to_pylist()[2] == [0.0, 0.0]
    assert data.items["feature.year"].to_pylist()[2] == 0.0
    assert data.users["feature.city"].to_pylist()[1:] == [-1, -1], "null and empty are missing"
    assert data.summary["counts"]["items_without_a_row"] == 1
    assert data.raw_query(0, data.last_event_of(0), data.timeline_of(0)) == {
        "history": ["a", "b", "c"], "user_id": 1, "age": 20.0, "city": "x", "device": "web",
    }  # fmt: skip


def test_rare_ids_and_a_full_table_go_to_the_out_of_vocabulary_rows(make) -> None:
    train_all = EVENTS | {"split": ["train"] * 9 + ["test"]}
    table = {"item_id": Table(min_count=2, max_size=2, oov_rows=3)}
    vocabulary = make(train_all, split=GIVEN, tables=table).encoder.vocabularies["item_id"]
    assert set(vocabulary.keys.to_pylist()) == {"a", "b"}, "the most frequent, ties by id"
    rows = vocabulary.lookup(pa.array(["a", "c", None, "zebra"]))
    assert rows[0] == 3
    assert 0 <= rows[1] < 3
    assert rows[2] == -1
    assert 0 <= rows[3] < 3


def test_events_below_the_label_are_left_out(make) -> None:
    columns = Columns(label="rating", positive_from=4)
    ratings = {"rating": [5, 1, 5, 5, 5, 5, 4, None, 5, 5]}
    data = make(EVENTS | ratings, columns=columns)
    assert data.summary["counts"]["dropped_by_label"] == 2
    assert len(data.events) == 8


def test_weights_reach_the_batches(make) -> None:
    from twotower.data.batches import BatchBuilder

    data = make(EVENTS | {"w": np.arange(10.0)}, columns=Columns(weight="w"))
    batch = BatchBuilder(data).events(np.arange(10))
    assert sorted(batch.weight_B.tolist()) == list(range(10))


def test_a_csv_with_times_in_words_and_a_folder_of_parquet_read_alike(make, tmp_path) -> None:
    import pyarrow.csv as csv
    import pyarrow.parquet as pq

    table = pa.table(EVENTS)
    words = table.set_column(
        2, "timestamp", table["timestamp"].cast(pa.timestamp("s")).cast(pa.string())
    )
    csv.write_csv(words, tmp_path / "log.csv")
    (tmp_path / "parts").mkdir()
    pq.write_table(table.slice(0, 4), tmp_path / "parts" / "1.parquet")
    pq.write_table(table.slice(4), tmp_path / "parts" / "2.parquet")
    expected = make(EVENTS).events
    for place in ("log.csv", "parts", "parts/*.parquet", f"file://{tmp_path}/parts"):
        location = place if "://" in place else str(tmp_path / place)
        assert make(EVENTS, interactions=location).events.equals(expected)


def test_a_feature_may_have_any_name(make) -> None:
    from twotower.data.batches import BatchBuilder

    names = ("id", "user", "item", "time", "split", "weight", "history_to", "history_from")
    context = {f"c_{n}": [f"{n} {i % 3}" for i in range(10)] for n in names}
    items = {"item_id": list("abcde"), "colour": ["x", "y", "z", "x", "y"]}
    data = make(
        EVENTS | context, items=items,
        query=[HISTORY, *(Feature(name=n, kind="id", column=f"c_{n}") for n in names)],
        item=[Feature(name="id", kind="id", column="item_id", table="item_id"),
              Feature(name="train_count", kind="id", column="colour")],
    )  # fmt: skip
    plain = make(EVENTS)
    for name in ("user", "item", "time", "history_to"):
        np.testing.assert_array_equal(data.event_columns[name], plain.event_columns[name])
    assert data.items["id"].to_pylist() == list("abcde")
    assert data.train_count.sum() == 8
    batch = BatchBuilder(data).events(np.arange(10))
    assert (batch.ids["query.time"].lengths() == 1).all()
    assert data.raw_query(0, 0, data.timeline_of(0))["time"] == "time 0"


def test_the_item_to_be_predicted_is_no_feature_of_the_query(make) -> None:
    with pytest.raises(UserError, match="what is to be predicted"):
        make(EVENTS, query=[HISTORY, Feature(name="item", kind="id", column="item_id")])


def test_two_types_of_ids_cannot_share_a_table(make) -> None:
    shared = [HISTORY, Feature(name="user_id", kind="id", table="item_id")]
    with pytest.raises(UserError, match="embedding table 'item_id'"):
        make(EVENTS, query=shared)
