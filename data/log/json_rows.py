"""JSON lines: parsed by Arrow a block at a time, and line by line where Arrow refuses a block.

A column's first value says what it holds: text, numbers, truth values or lists of such. A line
that holds something else is a bad row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json as pajson

from twotower.data.log.chunk import (
    BLOCK_BYTES,
    LONGEST_BYTES,
    BadRows,
    Columns,
    missing_column,
    open_text,
    text_blocks,
    too_long,
)
from twotower.data.log.files import LogFile

SAMPLE_BYTES = 1 << 20
SAMPLE_LINES = 1000
INT64 = range(-(2**63), 2**63)


def json_names(file: LogFile) -> list[str]:
    """Return the keys of a file's first lines."""
    with open_text(file) as handle:
        for lines, _ in _lines(handle, file, SAMPLE_BYTES):
            if names := _keys(lines):
                return names
    return []


def read_json(file: LogFile, names: list[str], key: str, bad_rows: BadRows) -> Iterator[Columns]:
    """Yield the columns `names` of a file of JSON lines, in chunks.

    Raises:
        UserError: for a column that no line has, and for a broken line unless it is skipped.
    """
    reader = _Reader(file, names, bad_rows)
    some = False
    with open_text(file) as handle:
        for lines, numbers in _lines(handle, file):
            if not reader.known:
                reader.known = _keys(lines[:SAMPLE_LINES])
                if not set(names) <= set(reader.known):
                    reader.known = _keys(lines)
                for name in names:
                    if reader.known and name not in reader.known:
                        raise missing_column(file.path, name, key, reader.known)
            columns, numbers = reader.columns(lines, numbers)
            if numbers:
                some = True
                yield columns, lambda row, numbers=numbers: f"line {numbers[row]}"  # type: ignore[misc]
    if not some:
        yield {n: pa.nulls(0) for n in names}, str


def _lines(
    handle: Any, file: LogFile, size: int = BLOCK_BYTES
) -> Iterator[tuple[list[bytes], list[int]]]:
    """Yield blocks of lines that are not blank, with their numbers."""
    line, rest = 1, b""
    for block in text_blocks(handle, file, size):
        whole, newline, left = block.rpartition(b"\n")
        if not newline:
            rest += block
            if len(rest) > LONGEST_BYTES:
                raise too_long(file, line)
            continue
        lines = (rest + whole).split(b"\n")
        rest = left
        yield _not_blank(lines, line)
        line += len(lines)
    yield _not_blank([rest], line)


def _not_blank(lines: list[bytes], first: int) -> tuple[list[bytes], list[int]]:
    some = [(text, first + i) for i, text in enumerate(lines) if text.strip()]
    return [text for text, _ in some], [number for _, number in some]


def _keys(lines: list[bytes]) -> list[str]:
    """Return the keys of all lines that are objects."""
    found: dict[str, None] = {}
    for text in lines:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found |= dict.fromkeys(value)
    return list(found)


class _Reader:
    """Lines to columns.

    Attributes:
        known: keys of the first lines.
        kinds: what each column holds, as its first value said.
    """

    def __init__(self, file: LogFile, names: list[str], bad_rows: BadRows) -> None:
        self.file, self.names, self.bad_rows = file, names, bad_rows
        self.known: list[str] = []
        self.kinds: dict[str, str] = {}

    def columns(
        self, lines: list[bytes], numbers: list[int]
    ) -> tuple[dict[str, pa.Array], list[int]]:
        """Return columns of the good lines, and those lines' numbers."""
        if not lines:
            return {}, []
        self._look(lines)
        # Text stays text: Arrow would read ids that look like dates as times.
        texts = [(n, pa.string()) for n, kind in self.kinds.items() if kind == "text"]
        data = b"\n".join(lines) + b"\n"
        try:
            table = pajson.read_json(
                pa.BufferReader(data),
                # One block: a second one could find other types.
                read_options=pajson.ReadOptions(block_size=len(data) + 1),
                parse_options=pajson.ParseOptions(explicit_schema=pa.schema(texts)),
            )
        except pa.ArrowInvalid:
            return self._by_line(lines, numbers)
        have = table.column_names
        out = {
            n: _one(table[n]) if n in have else pa.nulls(table.num_rows) for n in self.names
        }  # fmt: skip
        if table.num_rows != len(lines) or any(self._differs(n, a.type) for n, a in out.items()):
            return self._by_line(lines, numbers)
        return out, numbers

    def _look(self, lines: list[bytes]) -> None:
        """Learn what the columns hold from the first line that has a value of each."""
        for text in lines:
            if len(self.kinds) == len(self.names):
                return
            value = _object(text) or {}
            for name in self.names:
                kind = kind_of(value[name]) if name in value else None
                if kind is not None:
                    self.kinds.setdefault(name, kind)

    def _differs(self, name: str, found: pa.DataType) -> bool:
        kind = self.kinds.get(name)
        if kind is None or pa.types.is_null(found):
            return False
        number = pa.types.is_integer(found) or pa.types.is_floating(found)
        text = bool(pa.types.is_string(found))
        return (kind == "text") != text or (kind == "numbers") != bool(number)

    def _by_line(
        self, lines: list[bytes], numbers: list[int]
    ) -> tuple[dict[str, pa.Array], list[int]]:
        rows, kept = [], []
        for text, number in zip(lines, numbers, strict=True):
            value = _object(text)
            wrong = "is no JSON object" if value is None else self._wrong(value)
            if wrong is not None:
                line = text[:80].decode(errors="replace")
                self.bad_rows.add(1, f"{self.file.path}: line {number}: {wrong}: {line!r}")
                continue
            rows.append(value)
            kept.append(number)
        out = {}
        for name in self.names:
            values = [row.get(name) for row in rows if row is not None]
            out[name] = pa.array(values, pa.string() if self.kinds.get(name) == "text" else None)
        return out, kept

    def _wrong(self, value: dict[str, Any]) -> str | None:
        for name in self.names:
            kind = kind_of(value.get(name))
            if kind == "nothing usable":
                return f"'{name}' holds what no column can"
            if kind is not None and kind != self.kinds.setdefault(name, kind):
                return f"'{name}' holds {kind}, where lines before hold {self.kinds[name]}"
        return None


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def kind_of(value: Any) -> str | None:
    """Say what a JSON value is; None for null, whose kind the other lines say."""
    if value is None:
        return None
    if isinstance(value, str):
        return "text" if value.isprintable() or _encodes(value) else "nothing usable"
    if isinstance(value, bool):
        return "truth values"
    if isinstance(value, (int, float)):
        return "numbers" if isinstance(value, float) or value in INT64 else "nothing usable"
    if isinstance(value, list):
        kinds = {kind_of(v) for v in value} - {None}
        if not kinds:
            return None
        return f"lists of {kinds.pop()}" if len(kinds) == 1 else "nothing usable"
    return "objects"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one(values: pa.ChunkedArray) -> pa.Array:
    array = values.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
