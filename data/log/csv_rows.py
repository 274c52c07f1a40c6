"""CSV (RFC 4180): records split here, so that each keeps its line; their fields parsed by Arrow.

All columns come as text, which `twotower.data.log.checks` converts: a value that does not fit is
named by its line, and no type is guessed from a file's first rows.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

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
from twotower.errors import UserError

LINE = re.compile(rb"[^\r\n]*")
BREAK = re.compile(rb"\r\n|\n|\r")
END = re.compile(rb"\r\n|\n|\r|\Z")
QUOTED = re.compile(rb'"[^"]*(?:""[^"]*)*"(?!")')
FIELD = re.compile(rb"[^,\r\n]*")
SIMPLE = rb'(?:"[^"\r\n]*"|[^",\r\n]*)'

# A record, the line it begins in, and what is wrong with it.
Record = tuple[bytes, int, "str | None"]


class Records:
    """The records of a CSV file, block after block, each with the line that it begins in.

    A quoted field may hold line ends. Where such a record has another number of fields than the
    header, its quote was most likely never meant to be open: its first line alone is broken, and
    the next one begins a record.

    Args:
        handle: the file, decompressed.
        file: for errors.
        size: bytes read at once, and the most that a record may have.
    """

    def __init__(self, handle: Any, file: LogFile, size: int = BLOCK_BYTES) -> None:
        self.file, self.size = file, size
        self.blocks = text_blocks(handle, file, size)
        self.line = 1
        self.rest = b""
        self.final = False
        self.header = self._header()
        # A record in one line, whole: nearly all are, and are found in one step.
        self.simple = re.compile(b",".join([SIMPLE] * len(self.header)) + rb"(\r\n|\n)")

    def _header(self) -> list[str]:
        while not self.final:
            self._fill()
            match = re.match(rb"[\r\n]*", self.rest)
            blank = match.group() if match else b""
            self.line += len(BREAK.findall(blank))
            self.rest = self.rest[len(blank) :]
            end = self._end(0, None)
            if self.rest and end is not None:
                record, self.rest = self.rest[: end[0]], self.rest[end[1] :]
                self.line += len(BREAK.findall(record)) + 1
                return self._names(record)
        raise UserError(f"{self.file.path}: is empty, it lacks even a header: remove it")

    def _names(self, record: bytes) -> list[str]:
        try:
            text = record.decode()
        except UnicodeDecodeError:
            raise UserError(f"{self.file.path}: the header is no UTF-8 text: convert it") from None
        try:
            return next(csv.reader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise UserError(f"{self.file.path}: the header cannot be read: {error}") from None

    def _fill(self) -> None:
        block = next(self.blocks, None)
        self.final = block is None
        self.rest += block or b""
        if len(self.rest) > max(LONGEST_BYTES, 2 * self.size):
            raise too_long(self.file, self.line)

    def __iter__(self) -> Iterator[list[Record]]:
        while self.rest or not self.final:
            self._fill()
            found, used = self._plain() if b'"' not in self.rest else self._quoted()
            self.rest = self.rest[used:]
            if found:
                yield found

    def _plain(self) -> tuple[list[Record], int]:
        """Split a block without quotes."""
        used = len(self.rest)
        if not self.final:
            # A '\r' at the end may be half of a line's end.
            used = max(self.rest.rfind(b"\n"), self.rest.rfind(b"\r", 0, -1)) + 1
        lines = self.rest[:used].splitlines()
        first, width = self.line, len(self.header)
        self.line += len(lines)
        return [
            (text, first + i, self._wrong(fields) if (fields := text.count(b",") + 1) != width
             else None)
            for i, text in enumerate(lines) if text
        ], used  # fmt: skip

    def _quoted(self) -> tuple[list[Record], int]:
        """Split a block with quotes."""
        out: list[Record] = []
        place, width = 0, len(self.header)
        while place < len(self.rest):
            if match := self.simple.match(self.rest, place):
                if match.start(1) > place:
                    out.append((self.rest[place : match.start(1)], self.line, None))
                self.line, place = self.line + 1, match.end()
                continue
            end = self._end(place, width)
            if end is None:
                break
            stop, after, wrong = end
            record = self.rest[place:stop]
            if record:
                out.append((record, self.line, wrong))
            self.line += len(BREAK.findall(record)) + 1
            place = after
        return out, place

    def _end(self, start: int, width: int | None) -> tuple[int, int, str | None] | None:
        """Return where a record ends, where the next begins, and what is wrong with it.

        None when the file must be read further first.
        """
        text, place, fields, wrong = self.rest, start, 1, None
        while True:
            if text[place : place + 1] == b'"':
                quoted = QUOTED.match(text, place)
                if quoted is None:
                    if not self.final and len(text) - start < self.size:
                        return None
                    wrong = "a quote is opened and not closed"
                    break
                place = quoted.end()
                if FIELD.match(text, place).end() > place:  # type: ignore[union-attr]
                    wrong = "text follows a closing quote"
                    break
            place = FIELD.match(text, place).end()  # type: ignore[union-attr]
            if text[place : place + 1] != b",":
                break
            place, fields = place + 1, fields + 1
        if wrong is None and place >= len(text) and not self.final:
            return None
        if wrong is None and width is not None and fields != width and text[start:place]:
            wrong = self._wrong(fields)
        if wrong is not None:
            place = LINE.match(text, start).end()  # type: ignore[union-attr]
        after = END.match(text, place).end()  # type: ignore[union-attr]
        # What ends with the block may go on in the next one.
        return None if after >= len(text) and not self.final else (place, after, wrong)

    def _wrong(self, fields: int) -> str:
        return f"has {fields} columns, expected {len(self.header)}"


def csv_names(file: LogFile) -> list[str]:
    """Return the header's names."""
    with open_text(file) as handle:
        return Records(handle, file, 1 << 16).header


def read_csv(file: LogFile, names: list[str], key: str, bad_rows: BadRows) -> Iterator[Columns]:
    """Yield the columns `names` of a CSV file as text, in chunks.

    Raises:
        UserError: for a missing column, and for a broken row unless it is skipped.
    """
    with open_text(file) as handle:
        records = Records(handle, file)
        for name in names:
            if records.header.count(name) > 1:
                raise UserError(f"{file.path}: column '{name}' stands twice ({key}): rename one")
            if name not in records.header:
                raise missing_column(file.path, name, key, records.header)
        some = False
        for found in records:
            for record, line, wrong in found:
                if wrong is not None:
                    text = record[:80].decode(errors="replace")
                    bad_rows.add(1, f"{file.path}: line {line}: {wrong}: {text!r}")
            good = [(record, line) for record, line, wrong in found if wrong is None]
            if good:
                some = True
                lines = [line for _, line in good]
                columns = _parse([record for record, _ in good], records.header, names)
                yield columns, lambda row, lines=lines: f"line {lines[row]}"  # type: ignore[misc]
        if not some:
            yield {n: pa.array([], pa.string()) for n in names}, str


def _parse(records: list[bytes], header: list[str], names: list[str]) -> dict[str, pa.Array]:
    data = b"\n".join(records) + b"\n"
    # Numbers for names, which need not differ.
    numbers = {name: str(header.index(name)) for name in names}
    table = pacsv.read_csv(
        pa.BufferReader(data),
        read_options=pacsv.ReadOptions(
            column_names=[str(i) for i in range(len(header))], block_size=len(data) + 1
        ),
        parse_options=pacsv.ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(numbers.values()), strings_can_be_null=False,
            # What is no UTF-8 is found later, row by row.
            column_types=dict.fromkeys(numbers.values(), pa.binary()),
        ),
    )  # fmt: skip
    assert len(table) == len(records), "Arrow splits records as we do"
    return {name: table[number].combine_chunks() for name, number in numbers.items()}
