"""Lines of ids: what is read from them, how they are split, and what is said of broken ones."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.loader import TrainLoader
from twotower.data.log.chunk import BadRows
from twotower.data.log.files import list_files
from twotower.data.log.lines import read_lines
from twotower.data.prepared import PreparedDataset
from twotower.data.queries import split_queries
from twotower.data.schema import Columns, Feature, Split
from twotower.errors import UserError

from .logs import prepared

LAST = Split(kind="leave_last_out")
GIVEN = Split(kind="given", test_files="test.txt")
IDS = st.text("abz019é,.-", min_size=1, max_size=6)
BLANKS = st.text(" \t", min_size=1, max_size=3)
MANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read(path: Path, form: str, size: int = 1 << 20) -> list[tuple[str, str, str]]:
    """Return (user, item, place) of every event of a file."""
    file = list_files(str(path), "data.interactions", form)[0]
    out = []
    for columns, place in read_lines(file, ["u", "i"], "", BadRows(skip=False), size):
        pairs = zip(columns["u"].to_pylist(), columns["i"].to_pylist(), strict=True)
        out += [(u.decode(), i.decode(), place(row)) for row, (u, i) in enumerate(pairs)]
    return out


@st.composite
def files(draw):
    """Lines of ids with any blanks and line ends, and the events that they say."""
    form = draw(st.sampled_from(["user_lines", "pair_lines"]))
    text, events = "", []
    for number in range(1, draw(st.integers(1, 12)) + 1):
        width = st.just(2) if form == "pair_lines" else st.integers(1, 5)
        ids = draw(st.lists(IDS, min_size=(n := draw(width)), max_size=n))
        if draw(st.booleans()) and draw(st.booleans()):
            ids = []
        blanks = [draw(BLANKS) for _ in ids]
        line = "".join(i + b for i, b in zip(ids, blanks, strict=True))
        if draw(st.booleans()):
            line = line.rstrip()
        text += draw(st.sampled_from(["", " "])) + line + draw(st.sampled_from(["\n", "\r\n"]))
        events += [(ids[0], item, f"line {number}") for item in ids[1:]]
    return form, text if draw(st.booleans()) else text.rstrip("\r\n"), events


@MANY
@given(file=files(), size=st.integers(1, 40))
def test_every_event_is_read_with_its_line_whatever_the_blanks(tmp_path, file, size) -> None:
    form, text, events = file
    (tmp_path / "log.txt").write_bytes(text.encode())
    if not events and text.split():
        with pytest.raises(UserError, match="no line has an item"):
            read(tmp_path / "log.txt", form, size)
    else:
        assert read(tmp_path / "log.txt", form, size) == events


def test_old_line_ends_and_a_byte_order_mark(tmp_path) -> None:
    (tmp_path / "log.txt").write_bytes(b"\xef\xbb\xbf1 2\r3 4\r\r5 6")
    assert [(u, p) for u, _, p in read(tmp_path / "log.txt", "user_lines", 5)] == [
        ("1", "line 1"), ("3", "line 2"), ("5", "line 4"),
    ]  # fmt: skip


def lines(folder: Path, train: str, test: str | None = None, **changes) -> PreparedDataset:
    (folder / "train.txt").write_text(train)
    if test is not None:
        (folder / "test.txt").write_text(test)
    changes = {"format": "user_lines", "split": LAST if test is None else GIVEN} | changes
    return prepared(folder, "train.txt", **changes)


def asked(data: PreparedDataset, split: int) -> dict[object, tuple[list, list]]:
    """Return user -> (history, relevant items) of a split's queries."""
    users, items = data.users["id"].to_pylist(), data.items["id"].to_pylist()
    q, c, out = split_queries(data, split, 1000, 0), data.event_columns, {}
    for n, event in enumerate(q.event):
        user = int(c["user"][event])
        assert users[user] not in out, "one query a user"
        history = data.timeline[data.history_from[user] : c["history_to"][event]]
        relevant = q.relevant[q.relevant_offset[n] : q.relevant_offset[n + 1]]
        out[users[user]] = ([items[i] for i in history], [items[i] for i in relevant])
    return out


TRAIN = "1 5 6 7\n\n2 6\n3 9\n4 7 8 9 10 11\n"


def test_all_that_a_user_has_in_the_test_file_is_one_query_after_the_training(tmp_path) -> None:
    # User 1's second line goes on, 3 has no item, 5 is new, and 2 has 6 already.
    data = lines(tmp_path, TRAIN, "1 8 9\n2 6 5 7\n3 \n5 5\n1 10")
    assert asked(data, 2) == {
        1: ([5, 6, 7], [8, 9, 10]), 2: ([6], [5, 7]), 5: ([], [5])
    }  # fmt: skip
    assert data.summary["counts"]["validation_events"] == 0
    assert data.summary["types"]["item"] == "int64"


def test_a_user_who_has_two_lines_goes_on_where_the_first_ended(tmp_path) -> None:
    data = lines(tmp_path, "1 5 6\n2 5 6 7\n1 7 8\n")
    assert asked(data, 1) == {1: ([5, 6], [7]), 2: ([5], [6])}
    assert asked(data, 2) == {1: ([5, 6, 7], [8]), 2: ([5, 6], [7])}


def test_pairs_a_line_are_the_same_log_as_a_line_a_user(tmp_path) -> None:
    whole = lines(tmp_path, TRAIN)
    pairs = "".join(
        f"{user}\t{item}\r\n"
        for user, *items in (line.split() for line in TRAIN.splitlines() if line)
        for item in items
    )
    parted = lines(tmp_path, pairs, format="pair_lines")
    for name in ("events", "users", "items"):
        assert getattr(whole, name).equals(getattr(parted, name))
    assert np.array_equal(whole.timeline, parted.timeline)


def test_lines_have_no_times_to_weigh_events_by(tmp_path) -> None:
    message = r"train\.half_life_days weighs events by their times, and data\.format: user_lines"
    with pytest.raises(UserError, match=message):
        TrainLoader(lines(tmp_path, TRAIN), 4, seed=0, half_life_days=1)
    with pytest.raises(UserError, match=r"train\.negatives\.exclude_unreleased compares the times"):
        TrainLoader(lines(tmp_path, TRAIN), 4, seed=0, times=True)


def test_words_are_ids_too_and_a_folder_may_hold_several_files(tmp_path) -> None:
    (tmp_path / "days").mkdir()
    (tmp_path / "days" / "1.txt").write_text("B00A x1 x2 x3\n")
    (tmp_path / "days" / "2.txt").write_text("B00B x1 x4 x2\nB00A x5")
    data = prepared(tmp_path, "days", format="user_lines", split=LAST)
    assert asked(data, 2) == {"B00A": (["x1", "x2", "x3"], ["x5"]), "B00B": (["x1", "x4"], ["x2"])}


SETS = st.dictionaries(
    st.integers(0, 20), st.lists(st.integers(0, 15), min_size=1, max_size=12), min_size=2
)


@MANY
@given(train=SETS, share=st.sampled_from([0.1, 0.3, 0.9]), seed=st.integers(0, 9),
       how=st.sampled_from(["random", "last"]))  # fmt: skip
def test_held_out_events_are_a_share_of_each_users_training(
    tmp_path, train, share, seed, how
) -> None:
    text = "".join(f"{u} {' '.join(map(str, items))}\n" for u, items in train.items())
    rule = Split(kind="given", test_files="test.txt", held_out=how, validation=share, seed=seed)
    if len({i for items in train.values() for i in items}) < 2:
        return
    (tmp_path / "test.txt").write_text("0 99\n")
    data = lines(tmp_path, text, split=rule)
    c, items = data.event_columns, data.items["id"].to_pylist()
    users = data.users["id"].to_pylist()
    for row, user in enumerate(users):
        own = [[items[c["item"][e]] for e in data.section(s) if c["user"][e] == row]
               for s in (0, 1)]  # fmt: skip
        given_items = train.get(user, [])
        held = min(round(len(given_items) * share), max(0, len(given_items) - 1))
        assert len(own[1]) == held
        assert sorted(own[0] + own[1]) == sorted(given_items)
        if how == "last":
            assert own[0] + own[1] == given_items
        times = [c["time"][e] for e in data.section(1) if c["user"][e] == row]
        assert len(set(times)) <= 1, "one query a user"


def test_another_seed_holds_out_others_and_the_same_the_same(tmp_path) -> None:
    text = "".join(f"{u} {' '.join(map(str, range(u, u + 20)))}\n" for u in range(9))
    (tmp_path / "test.txt").write_text("0 99\n")
    first, again, other = (
        asked(lines(tmp_path, text, split=Split(
            kind="given", test_files="test.txt", held_out="random", seed=seed)), 1)
        for seed in (0, 0, 1)
    )  # fmt: skip
    assert first == again != other
    assert {len(relevant) for _, relevant in first.values()} == {2}


BROKEN = {
    "a pair with three ids": (
        "1 2\n\n3 4 5\n", {"format": "pair_lines"}, r"train.txt: line 3: has 3 ids, expected 2",
    ),
    "no item at all": ("1\n2,3\n", {}, r"train.txt: no line has an item .*user item item"),
    "nothing": ("\n\n", {}, "the log is empty"),
    "a NUL": ("1 2 3\n4 a\0b\n", {}, r"line 2: an id may not hold a NUL"),
    "a time": ("1 2 3\n", {"split": Split()}, r"has no times: set it to leave_last_out"),
    "a column": ("1 2\n", {"columns": Columns(weight="w")}, r"data.columns.weight names a column"),
    "a feature": (
        "1 2 3 4\n", {"query": [Feature(name="hour", kind="id")]}, r"no column 'hour' in",
    ),
    "an unknown format": ("1 2\n", {"format": "user_line"}, "did you mean 'user_lines'"),
    "a share of nothing": (
        "1 2\n", {"split": Split(kind="given", test_files="t", held_out="last", validation=0)},
        r"data.split.validation is the share .* got 0",
    ),
    "two validations": (
        "1 2\n",
        {"split": Split(kind="given", test_files="t", validation_files="v", held_out="last")},
        r"held_out takes validation from the training events",
    ),
    "words where a table has numbers": ("1 2 3\n", {"items": "train.txt"}, "expected .parquet"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_file_or_schema_is_one_line(tmp_path, case) -> None:
    text, changes, message = BROKEN[case]
    with pytest.raises(UserError, match=message) as found:
        lines(tmp_path, text, **changes)
    assert "\n" not in str(found.value)


def test_broken_lines_can_be_skipped_and_are_counted(tmp_path) -> None:
    log = "1 2\n1 3\n1 4\n2 2 2\n2 3\n\xff\n2 4\n2 5\n"
    data = lines(tmp_path, log, format="pair_lines", on_bad_rows="skip")
    assert data.summary["counts"]["bad_rows"] == 2
    assert "line 4: has 3 ids" in data.summary["bad_rows"][0]


def test_a_text_file_without_its_format_says_how_to_read_it(tmp_path) -> None:
    with pytest.raises(UserError, match=r"or set data\.format to user_lines"):
        lines(tmp_path, "1 2\n", format="table", split=Split())


def test_users_and_items_of_lines_may_have_tables(tmp_path) -> None:
    (tmp_path / "items.csv").write_text("item_id,genre\n5,rock\n6,jazz\n99,jazz\n")
    item = [Feature(name="item_id", kind="id"), Feature(name="genre", kind="id")]
    data = lines(tmp_path, TRAIN, "1 8\n", items="items.csv", item=item)
    assert data.items["raw.genre"].to_pylist()[:2] == ["rock", "jazz"]
    assert data.items["id"].to_pylist()[-1] == 99, "an item that nobody took is a candidate"


def test_events_of_a_table_are_held_out_too(make, tmp_path) -> None:
    log = {"user_id": [1] * 5 + [2], "item_id": list("abcdea"), "timestamp": [1, 2, 3, 4, 5, 1]}
    test = {"user_id": [1, 2], "item_id": ["b", "c"], "timestamp": [9, 9]}
    pq.write_table(pa.table(test), tmp_path / "test.parquet")
    rule = Split(kind="given", test_files=str(tmp_path / "test.parquet"), held_out="last",
                 validation=0.4)  # fmt: skip
    data = make(log, split=rule)
    assert asked(data, 1) == {1: (["a", "b", "c"], ["d", "e"])}
    assert asked(data, 2) == {2: (["a"], ["c"])}
