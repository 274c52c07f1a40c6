"""How a log is written and where it lies makes no difference to the dataset.

Formats and their types, folders, globs and hive partitions.
"""

import csv
import io
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.schema import Feature, Split

from ..conftest import EVENTS, HISTORY, ITEM
from .logs import days, meaning, prepared, write_all, write_formats, write_nested

QUERY = [
    HISTORY, Feature(name="user_id", kind="id"), Feature(name="price", kind="number"),
    Feature(name="tags", kind="ids", separator="|"),
]  # fmt: skip


@st.composite
def logs(draw):
    size = draw(st.integers(10, 30))
    # A word, lest a text file's ids be numbers, which they are when every one is.
    words = st.text(st.sampled_from('ab,"\n\r| é日'), max_size=5).map(lambda t: "w" + t)
    users = draw(st.lists(words, min_size=2, max_size=4, unique=True))
    numbers = st.one_of(st.none(), st.integers(-9, 9), st.floats(-1e9, 1e9))
    tags = st.lists(words.map(lambda t: t.replace("|", "")), max_size=3)
    return {
        "user_id": [users[k % len(users)] for k in range(size)],
        "item_id": draw(st.lists(st.integers(-(2**62), 2**62), min_size=2, max_size=9,
                                 unique=True).map(lambda i: [i[k % len(i)] for k in range(size)])),
        "timestamp": draw(st.permutations(range(10**9, 10**9 + size))),
        "price": [0.5, *draw(st.lists(numbers, min_size=size - 1, max_size=size - 1))],
        "tags": draw(st.lists(tags, min_size=size, max_size=size)),
    }  # fmt: skip


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(log=logs())
def test_every_format_gives_the_same_bytes(tmp_path, log) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    parquet, *others = [
        meaning(prepared(folder, name, query=QUERY)) for name in write_formats(folder, log)
    ]
    assert set(parquet["types"].values()) == {"int64", "string"}
    for other in others:
        assert other == parquet


def test_ids_of_a_text_file_are_numbers_when_all_of_them_are(tmp_path) -> None:
    base = {"timestamp": range(10), "item_id": [1, 2] * 5}
    for name, users in (("whole", ["1", "-2"]), ("leading", ["1", "02"]), ("word", ["1", "x"])):
        text = io.StringIO()
        csv.writer(text).writerows(
            [("user_id", *base), *zip(users * 5, *base.values(), strict=True)]
        )
        (tmp_path / f"{name}.csv").write_text(text.getvalue())
    ids = {n: prepared(tmp_path, f"{n}.csv").users["id"].to_pylist()
           for n in ("whole", "leading", "word")}  # fmt: skip
    assert ids == {"whole": [-2, 1], "leading": ["02", "1"], "word": ["1", "x"]}


@pytest.mark.parametrize(
    ("item", "time"),
    [(pa.int32(), pa.int32()), (pa.uint64(), pa.uint64()), (pa.int8(), pa.float64()),
     (pa.decimal128(38, 0), pa.decimal128(20, 0)), (pa.dictionary(pa.int8(), pa.int64()), None),
     (pa.int64(), pa.timestamp("s")), (pa.int64(), pa.timestamp("ms", "Europe/Berlin")),
     (pa.int64(), pa.timestamp("ns"))],
)  # fmt: skip
def test_every_whole_number_type_of_parquet_means_the_same(tmp_path, item, time) -> None:
    log = EVENTS | {"item_id": [0, 1, 2, 0, 2, 3, 1, 0, 3, 4]}
    pq.write_table(pa.table(log), tmp_path / "plain.parquet")
    typed = log | {
        "item_id": pa.array(log["item_id"]).cast(item) if not pa.types.is_dictionary(item)
        else pa.array(log["item_id"]).dictionary_encode(),
        "timestamp": _times(log["timestamp"], time),
    }  # fmt: skip
    pq.write_table(pa.table(typed), tmp_path / "typed.parquet")
    assert meaning(prepared(tmp_path, "typed.parquet")) == meaning(
        prepared(tmp_path, "plain.parquet")
    )


def _times(seconds: list[int], kind: pa.DataType | None) -> pa.Array:
    plain = pa.array(seconds, pa.int64())
    if kind is None:
        return plain
    if pa.types.is_timestamp(kind):
        return plain.cast(pa.timestamp("s", kind.tz)).cast(kind)
    return plain.cast(kind)


WORDS = [
    pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
    pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string()),
]  # fmt: skip
BAGS = [
    pa.large_list(pa.string()), pa.list_(pa.large_string()), pa.list_(pa.binary()),
    pa.list_view(pa.string()), pa.list_(pa.string(), 2),
    pa.list_(pa.dictionary(pa.int32(), pa.string())),
]  # fmt: skip
NUMBERS = [
    pa.float16(), pa.float32(), pa.decimal128(9, 2), pa.int8(), pa.uint64(), pa.decimal256(40, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "column"),
    [*((t, "item_id") for t in WORDS), *((t, "tags") for t in BAGS), *((t, "x") for t in NUMBERS)],
)
def test_every_type_of_text_list_and_number_means_the_same(tmp_path, kind, column) -> None:
    plain = EVENTS | {"tags": [["p", "q"], ["q", "r"]] * 5, "x": [1.0, 2.0] * 5}
    values = plain[column]
    if "binary" in str(kind):
        values = [[t.encode() for t in v] if isinstance(v, list) else v.encode() for v in values]
    typed = pa.array(values) if "decimal" in str(kind) else None
    array = typed.cast(kind) if typed is not None else pa.array(values, kind)
    pq.write_table(pa.table(plain), tmp_path / "plain.parquet")
    pq.write_table(pa.table(plain | {column: array}), tmp_path / "typed.parquet")
    query = [HISTORY, Feature(name="tags", kind="ids"), Feature(name="x", kind="number")]
    first, second = (
        meaning(prepared(tmp_path, f"{n}.parquet", query=query)) for n in ("plain", "typed")
    )
    assert first == second


@pytest.mark.parametrize(
    "column", ["a.b", "a b", 'q"u', "it's", "größe", "x;--", "SELECT", "rowid"]
)
def test_a_column_may_have_any_name(tmp_path, column) -> None:
    extra = pa.array([{"b": k} for k in range(10)])  # a nested column beside "a.b"
    pq.write_table(pa.table(EVENTS | {"a": extra, column: list("xy") * 5}), tmp_path / "l.parquet")
    query = [HISTORY, Feature(name="f", kind="id", column=column)]
    data = prepared(tmp_path, "l.parquet", query=query)
    assert data.context("f")["value"].to_pylist() == ["x", "y"]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"query": [HISTORY, *(Feature(name=n, kind="number", column="timestamp")
                            for n in ("Day", "day"))]}, "data.query: 'Day' and 'day' differ only"),
     ({"query": [replace(HISTORY, table="Item_ID")]}, "embedding tables: "),
     ({"query": [replace(HISTORY, table="../items")], "item": [replace(ITEM, table="../items")]},
      "no name for a file"),
     ({"query": [replace(HISTORY, table="t" * 300)], "item": [replace(ITEM, table="t" * 300)]},
      "no name for a file")],
)  # fmt: skip
def test_names_that_cannot_be_told_apart_or_be_a_files_are_refused(tmp_path, change, said) -> None:
    from twotower.errors import UserError

    pq.write_table(pa.table(EVENTS), tmp_path / "log.parquet")
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, "log.parquet", **change)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["log.parquet", "prepared0"]


@pytest.mark.parametrize(
    "place", ["log", "log/", "{url}/log", "log/**/*.p*q*", "{root}/log", "{url}/log/**/*.p*q*"]
)
def test_folders_of_any_depth_and_globs_are_read_whole(tmp_path, place) -> None:
    write_nested(tmp_path / "log")
    write_all(tmp_path / "one.parquet", days())
    if "*" in place:
        # A pattern takes what it matches, noise and all.
        (tmp_path / "log" / "_temporary" / "0" / "x.parquet").unlink()
        (tmp_path / "log" / ".a.parquet.crc").unlink()
    place = place.format(url=f"file://{tmp_path}", root=tmp_path)
    assert meaning(prepared(tmp_path, place)) == meaning(prepared(tmp_path, "one.parquet"))


def test_a_glob_takes_some_files_and_whole_folders(tmp_path) -> None:
    write_nested(tmp_path / "log")
    write_all(tmp_path / "two.parquet", days()[1:])
    assert meaning(prepared(tmp_path, "log/[bd]")) == meaning(prepared(tmp_path, "two.parquet"))


@pytest.mark.parametrize("place", ["log", "log/*", "log/day=*/*", "log/day=*/*/*.parquet"])
def test_hive_partitions_are_columns(tmp_path, place) -> None:
    expected = []
    for d, day in enumerate(days()):
        for city, folder in ((None, "__HIVE_DEFAULT_PARTITION__"), ("a/b c", "a%2Fb%20c")):
            part = tmp_path / "log" / f"day=2025-01-0{d + 1}" / f"city={folder}"
            part.mkdir(parents=True)
            rows = {n: v[: 6 if city else 4] for n, v in day.items() if n != "hour"}
            pq.write_table(pa.table(rows), part / "part.parquet")
            size = len(rows["user_id"])
            cities = pa.array([city] * size, pa.string())
            inside = {"day": [f"2025-01-0{d + 1}"] * size, "city": cities}
            expected.append(pa.table(rows | inside))
    pq.write_table(pa.concat_tables(expected), tmp_path / "one.parquet")
    query = [HISTORY, *(Feature(name=n, kind="id") for n in ("day", "city"))]
    partitioned = prepared(tmp_path, place, query=query)
    assert meaning(partitioned) == meaning(prepared(tmp_path, "one.parquet", query=query))
    assert partitioned.context("city")["value"].to_pylist() == ["a/b c"]


def test_a_hive_partition_may_be_numbers_or_the_split(tmp_path) -> None:
    names = ("train", "validation", "test")
    for name, day in zip(names, days(), strict=True):
        for hour in range(3):
            part = tmp_path / "log" / f"split={name}" / f"hour={hour}"
            part.mkdir(parents=True)
            some = [k for k, h in enumerate(day["hour"]) if h == hour]
            rows = {n: [v[k] for k in some] for n, v in day.items() if n != "hour"}
            pq.write_table(pa.table(rows), part / "part.parquet")
    tables = [
        day | {"split": [name] * len(day["hour"])} for name, day in zip(names, days(), strict=True)
    ]
    write_all(tmp_path / "one.parquet", tables)
    changes = {
        "query": [HISTORY, Feature(name="hour", kind="id")],
        "split": Split(kind="given", column="split"),
    }
    partitioned = prepared(tmp_path, "log", **changes)
    assert meaning(partitioned) == meaning(prepared(tmp_path, "one.parquet", **changes))
    assert partitioned.context("hour")["value"].to_pylist() == [0, 1, 2]
    assert [partitioned.summary["counts"][f"{n}_events"] for n in names] == [12, 12, 12]
