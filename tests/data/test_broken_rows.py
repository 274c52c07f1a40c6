"""Rows and files that cannot be used: named by file and line, or skipped and counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import DataConfig, Feature, Split
from twotower.errors import UserError

from ..conftest import EVENTS, HISTORY, ITEM

X = Feature(name="x", kind="number")
ROWS = [
    {"user_id": u, "item_id": i, "timestamp": t, "x": k}
    for k, (u, i, t) in enumerate(zip(*EVENTS.values(), strict=True))
]
CSV = [b"user_id,item_id,timestamp,x", *(",".join(map(str, r.values())).encode() for r in ROWS)]
JSON = [json.dumps(row).encode() for row in ROWS]


def prepared(folder: Path, log: str, **changes: Any) -> PreparedDataset:
    target = folder / f"prepared{len(list(folder.iterdir()))}"
    target.mkdir()
    config = DataConfig(root=str(folder), interactions=log, query=[HISTORY, X], item=[ITEM])
    prepare(replace(config, **changes), target)
    return PreparedDataset(target)


def arrow_files(data: PreparedDataset) -> dict[str, bytes]:
    return {
        str(f.relative_to(data.path)): f.read_bytes() for f in sorted(data.path.rglob("*.arrow"))
    }


def answer(folder: Path, log: str, **changes: Any) -> str:
    """Return what the user is told, which is one line."""
    with pytest.raises(UserError) as caught:
        prepared(folder, log, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A broken row between good ones; the line that must be named; what is said of it.
BROKEN_CSV = {
    "too few fields": (b"7,x", "has 2 columns, expected 4"),
    "too many fields": (b"7,x,3,4,5", "has 5 columns, expected 4"),
    "blanks": (b"   ", "has 1 columns, expected 4"),
    "a quote that is not closed": (b'7,"x,3,4', "a quote is opened and not closed"),
    "text behind a quote": (b'7,"x"y,3,4', "text follows a closing quote"),
    "no number": (b"7,x,3,cheap", "column 'x': line {line}: expected a number: 'cheap'"),
    "infinity": (b"7,x,3,inf", "not a finite number"),
    "more than a float": (b"7,x,3,1e300", "not a finite number of float32"),
    "no time": (b"7,x,soon,4", "column 'timestamp': line {line}: expected an integer or an ISO"),
    "another kind of time": (b"7,x,2025-01-01,4", "as the other rows have: '2025-01-01'"),
    "no time at all": (b"7,x,,4", "the timestamp is null"),
    "no user": (b",x,3,4", "column 'user_id': line {line}: the id is null or empty"),
    "latin-1": (b"7,caf\xe9,3,4", "column 'item_id': line {line}: is no UTF-8 text"),
    "a NUL": (b"7,a\0b,3,4", "NUL"),
}  # fmt: skip
ROW = b'{"user_id":7,"item_id":"x","timestamp":3,"x":4}'
BROKEN_JSON = {
    "cut short": (b'{"user_id": 7, "item', "is no JSON object"),
    "no object": (b"[7]", "is no JSON object"),
    "two objects": (JSON[0] + JSON[1], "is no JSON object"),
    "text for a number": (ROW.replace(b"4", b'"dear"'), "'x' holds text"),
    "text for an id": (ROW.replace(b"7", b'"7"'), "'user_id' holds text"),
    "a number for text": (ROW.replace(b'"x",', b"5,"), "'item_id' holds num"),
    "a truth value": (ROW.replace(b"4", b"true"), "holds truth values"),
    "no time": (ROW.replace(b"3", b'"soon"'), "'timestamp' holds text"),
    "half an id": (ROW.replace(b"7", b"7.5"), "must be a whole number"),
    "a huge id": (ROW.replace(b"7", b"9" * 20), "user_id"),
    "no item": (ROW.replace(b'"item_id":"x",', b""), "'item_id': line {line}: the id is null"),
    "NaN": (ROW.replace(b"4", b"NaN"), "not a finite number"),
    "latin-1": (ROW.replace(b'"x",', b'"caf\xe9",'), "is no UTF-8 text"),
    "half a character": (ROW.replace(b'"x",', b'"\\ud800",'), "no column can"),
}  # fmt: skip
BROKEN = [("csv", name) for name in BROKEN_CSV] + [("jsonl", name) for name in BROKEN_JSON]
FORMATS = {"csv": (CSV, BROKEN_CSV), "jsonl": (JSON, BROKEN_JSON)}


@pytest.mark.parametrize(("form", "name"), BROKEN)
def test_a_broken_row_is_named_by_its_line_or_skipped_and_counted(tmp_path, form, name) -> None:
    good, cases = FORMATS[form]
    broken, said = cases[name]
    # Blank lines count: whoever opens the file counts them too.
    lines = [*good[:3], b"", b"", *good[3:5], broken, *good[5:]]
    line = 8
    (tmp_path / f"log.{form}").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / f"good.{form}").write_bytes(b"\n".join(good) + b"\n")
    message = answer(tmp_path, f"log.{form}")
    assert f"log.{form}" in message
    assert f"line {line}: " in message
    assert said.format(line=line) in message
    assert "data.on_bad_rows" in message
    skipped = prepared(tmp_path, f"log.{form}", on_bad_rows="skip")
    assert skipped.summary["counts"]["bad_rows"] == 1
    assert f"line {line}: " in skipped.summary["bad_rows"][0]
    assert arrow_files(skipped) == arrow_files(prepared(tmp_path, f"good.{form}"))


QUOTED = [b'1,"a\nb\r\n\r\nc",11,4', b'"1","d""e, f",12,"5"']


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("name", BROKEN_CSV)
def test_lines_are_counted_through_quoted_line_ends(tmp_path, name, end) -> None:
    broken, said = BROKEN_CSV[name]
    # The first record lies in lines 2 to 5.
    log = end.join([CSV[0], *QUOTED, broken, *CSV[1:]]) + end
    (tmp_path / "log.csv").write_bytes(log)
    (tmp_path / "good.csv").write_bytes(end.join([CSV[0], *QUOTED, *CSV[1:]]))
    message = answer(tmp_path, "log.csv")
    assert "line 7: " in message
    assert said.format(line=7) in message
    good = prepared(tmp_path, "good.csv")
    assert {"a\nb\r\n\r\nc", 'd"e, f'} <= set(good.items["id"].to_pylist())
    skipped = prepared(tmp_path, "log.csv", on_bad_rows="skip")
    assert skipped.summary["counts"]["bad_rows"] == 1
    assert arrow_files(skipped) == arrow_files(good)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), form=st.sampled_from(list(FORMATS)))
def test_what_is_left_of_a_log_is_the_dataset_of_its_good_rows(tmp_path, data, form) -> None:
    good, cases = FORMATS[form]
    words = st.sampled_from([broken for broken, _ in cases.values()])
    head = good[:1]  # a header, or the line that says what the columns hold
    lines: list[bytes] = []
    count = 0
    for line in good[1:]:
        for broken in data.draw(st.lists(words, max_size=2)):
            lines.append(broken)
            count += 1
        lines.append(line)
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    (folder / f"log.{form}").write_bytes(b"\n".join(head + lines))
    (folder / f"good.{form}").write_bytes(b"\n".join(good))
    skipped = prepared(folder, f"log.{form}", on_bad_rows="skip")
    assert skipped.summary["counts"]["bad_rows"] == count
    assert arrow_files(skipped) == arrow_files(prepared(folder, f"good.{form}"))


@st.composite
def fields(draw):
    width = draw(st.integers(2, 4))
    text = st.text(st.sampled_from('ab,"\n\r é'), max_size=6)
    return draw(st.lists(st.lists(text, min_size=width, max_size=width), min_size=1, max_size=12))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=fields(), size=st.integers(1, 40), end=st.sampled_from(["\n", "\r\n"]))
def test_records_are_split_as_pythons_csv_does_whatever_a_block_holds(
    tmp_path, rows, size, end
) -> None:
    import csv
    import io

    from twotower.data.log.chunk import BadRows
    from twotower.data.log.csv_rows import Records, _parse
    from twotower.data.log.files import list_files

    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL)
    header = [f"c{i}" for i in range(len(rows[0]))]
    writer.writerows([header, *rows])
    path = tmp_path / "log.csv"
    path.write_bytes(text.getvalue().encode())
    (file,) = list_files(str(path), "data.interactions")
    with path.open("rb") as handle:
        records = Records(handle, file, size)
        # No record is longer than what a block may grow to here.
        records.size = 10_000
        found = [r for block in records for r in block]
    assert BadRows(skip=False).count == 0
    assert [wrong for _, _, wrong in found] == [None] * len(rows)
    columns = _parse([record for record, _, _ in found], records.header, header)
    read = list(zip(*(columns[n].cast(pa.string()).to_pylist() for n in header), strict=True))
    assert read == [tuple(r) for r in rows]
    breaks = [sum(len(f.replace("\r\n", "\n").replace("\r", "\n").split("\n")) - 1 for f in r)
              for r in rows]  # fmt: skip
    assert [line for _, line, _ in found] == [2 + i + sum(breaks[:i]) for i in range(len(rows))]


@pytest.mark.parametrize("form", FORMATS)
def test_lines_are_counted_through_files_of_many_blocks(tmp_path, form) -> None:
    good, cases = FORMATS[form]
    pad = b"long " * 500_000
    wide = [(line + b"," + pad if form == "csv" else line[:-1] + b', "pad": "' + pad + b'"}')
            for line in good]  # fmt: skip
    if form == "csv":
        wide[0] = good[0] + b",pad"
    broken = cases["no time"][0] + (b",short" if form == "csv" else b"")
    (tmp_path / f"log.{form}").write_bytes(b"\n".join([*wide[:-1], broken, wide[-1]]))
    (tmp_path / f"good.{form}").write_bytes(b"\n".join(good))
    assert f"line {len(good)}: " in answer(tmp_path, f"log.{form}")
    skipped = prepared(tmp_path, f"log.{form}", on_bad_rows="skip")
    assert skipped.summary["counts"]["bad_rows"] == 1
    assert arrow_files(skipped) == arrow_files(prepared(tmp_path, f"good.{form}"))


EMPTY = {
    "no bytes": ("log.csv", b"", "is empty, it lacks even a header"),
    "blank lines": ("log.csv", b"\n\r\n\n", "is empty, it lacks even a header"),
    "a header alone": ("log.csv", CSV[0], "the log is empty"),
    "no JSON": ("log.jsonl", b"", "the log is empty"),
    "one JSON array": ("log.json", b"[" + b",".join(JSON) + b"]", "one object a line"),
    "UTF-16": ("log.csv", "user_id,item_id\n1,a\n".encode("utf-16"), "is UTF-16 text"),
    "a header in latin-1": ("log.csv", b"caf\xe9,user_id\n1,2\n", "the header is no UTF-8"),
    "no gzip": ("log.csv.gz", CSV[0], "cannot be read as csv"),
    "no zstd": ("log.jsonl.zst", JSON[0], "cannot be read as json"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_file_without_rows_or_of_another_kind_is_explained(tmp_path, name) -> None:
    file, content, said = EMPTY[name]
    (tmp_path / file).write_bytes(content)
    message = answer(tmp_path, file)
    assert file in message
    assert said in message


def test_files_without_rows_beside_others_are_no_trouble(tmp_path) -> None:
    for folder, end, good in (("csv", "csv", CSV), ("json", "jsonl", JSON)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"1.{end}").write_bytes(CSV[0] if end == "csv" else b"")
        (tmp_path / folder / f"2.{end}").write_bytes(b"\xef\xbb\xbf" + b"\n".join(good))
        (tmp_path / folder / f"3.{end}").write_bytes(CSV[0] + b"\n" if end == "csv" else b"\n")
        assert prepared(tmp_path, folder).summary["counts"]["events"] == len(ROWS)


@pytest.mark.parametrize("form", ["csv.gz", "jsonl.gz", "jsonl.xz", "csv.bz2", "csv.zst"])
def test_a_compressed_file_cut_short_or_damaged_is_named(tmp_path, form) -> None:
    import bz2
    import gzip
    import lzma

    packers = {
        "gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress,
        "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
    }  # fmt: skip
    pack = packers[form.split(".")[1]]
    good = b"\n".join(CSV if "csv" in form else JSON) + b"\n"
    whole = pack(good)
    (tmp_path / f"log.{form}").write_bytes(whole)
    assert prepared(tmp_path, f"log.{form}").summary["counts"]["events"] == len(ROWS)
    for end in (len(whole) // 2, len(whole) - 6):
        (tmp_path / f"log.{form}").write_bytes(whole[:end])
        assert f"log.{form}: cannot be read" in answer(tmp_path, f"log.{form}")
    middle = len(whole) // 2
    (tmp_path / f"log.{form}").write_bytes(whole[:middle] + b"\xff" * 9 + whole[middle + 9 :])
    assert f"log.{form}" in answer(tmp_path, f"log.{form}")


def test_a_parquet_file_cut_short_anywhere_is_named(tmp_path) -> None:
    (tmp_path / "log").mkdir()
    table = pa.table({**EVENTS, "x": [1.0] * 10})
    pq.write_table(table, tmp_path / "log" / "1.parquet")
    pq.write_table(table, tmp_path / "log" / "2.parquet", row_group_size=2)
    whole = (tmp_path / "log" / "2.parquet").read_bytes()
    for end in (0, 3, 4, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        (tmp_path / "log" / "2.parquet").write_bytes(whole[:end])
        message = answer(tmp_path, "log")
        assert "2.parquet: cannot be read as parquet, it may be cut short" in message
    (tmp_path / "log" / "2.parquet").write_bytes(whole[:4] + bytes(200) + whole[204:])
    assert "2.parquet: cannot be read as parquet" in answer(tmp_path, "log")


# Two files that disagree about a column, and what is said; None: both can be meant.
MIXED: dict[str, tuple[str, list[Any], list[Any], str | None]] = {
    "ids": ("item_id", [1, 2], ["a", "b"], "2.parquet, column 'item_id': holds string ids"),
    "ids and halves": ("item_id", [1, 2], [0.5, 1.5], "2.parquet, column 'item_id': holds double"),
    "numbers": ("x", [1.0, 2.0], ["a", "b"], "2.parquet, column 'x': holds string, expected"),
    "times": ("timestamp", [1, 2], ["soon", "late"], "2.parquet, column 'timestamp': row 1"),
    "whole and half numbers": ("x", [1, 2], [0.5, 1.5], None),
    "times and numbers": (
        "timestamp", [1, 2], pa.array([3_000, 4_000], pa.timestamp("ms")).to_pylist(), None,
    ),
    "times and words": ("timestamp", [1, 2], ["1970-01-01 00:00:03", "1970-01-01 00:00:04"], None),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXED)
def test_files_that_disagree_about_a_column_are_named_or_agree(tmp_path, name) -> None:
    column, first, second, said = MIXED[name]
    (tmp_path / "log").mkdir()
    base = {"user_id": [1, 2], "item_id": [1, 2], "timestamp": [1, 2], "x": [0.5, 1.5]}
    for number, values in ((1, first), (2, second)):
        day = base | {"timestamp": [t + 2 * (number - 1) for t in base["timestamp"]]}
        pq.write_table(pa.table(day | {column: values}), tmp_path / "log" / f"{number}.parquet")
    if said is not None:
        message = answer(tmp_path, "log")
        assert said in message
        assert ("1.parquet" in message) == (name == "ids"), "both, where both are right"
        return
    data = prepared(tmp_path, "log", split=Split(validation=0.0, test=0.25))
    assert sorted(data.event_columns["time"] // 1_000_000) == [1, 2, 3, 4]
