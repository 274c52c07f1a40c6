"""Reading a log's files as record batches, in constant memory, one format a function.

Text formats (CSV) arrive as strings, which `twotower.data.log.checks` converts, so that a value
which does not fit is named by its line and no type is guessed from a file's first rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq

from twotower.data.log.files import LogFile
from twotower.errors import UserError, did_you_mean

ROWS = 1 << 18
BLOCK_BYTES = 16 << 20
REASONS_KEPT = 5


@dataclass
class BadRows:
    """What becomes of a row that cannot be used: an error, or skipped and counted.

    Attributes:
        skip: whether to go on without it.
        count: rows skipped.
        first: the first few reasons.
    """

    skip: bool
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, count: int, reason: str) -> None:
        """Count skipped rows."""
        self.count += count
        if len(self.first) < REASONS_KEPT:
            self.first.append(reason)


@dataclass
class Chunk:
    """Some consecutive rows of one file.

    Attributes:
        file: where they come from.
        columns: by name.
        place: tells a row's place in the file, for instance `line 7`.
        bad_rows: what becomes of bad ones.
        bad: rows found bad so far.
        text: columns that a text file or a folder's name brought, whose type is not said.
    """

    file: str
    columns: dict[str, pa.Array]
    place: Callable[[int], str]
    bad_rows: BadRows
    bad: npt.NDArray[np.bool_]
    text: frozenset[str] = frozenset()

    def refuse(self, mask: Any, values: Any, where: str, message: str) -> npt.NDArray[np.bool_]:
        """Refuse the rows of `mask`: raise, or mark them to be skipped.

        Raises:
            UserError: naming the first row and its value, unless bad rows are skipped.
        """
        found = np.asarray(mask, dtype=bool)
        new = found & ~self.bad
        if new.any():
            row = int(new.argmax())
            value = values[row].as_py() if hasattr(values[row], "as_py") else values[row]
            reason = f"{where}: {self.place(row)}: {message}: {value!r}"
            if not self.bad_rows.skip:
                raise UserError(
                    f"{reason}; mend it, or set data.on_bad_rows to skip to go on without such rows"
                )
            self.bad_rows.add(int(new.sum()), reason)
            self.bad |= new
        return found


def column_names(file: LogFile, key: str) -> list[str]:
    """Return the columns of a file, those that its folders' names give included."""
    with _readable(file):
        if file.format == "parquet":
            with _open(file) as handle:
                names = pq.read_schema(handle).names
        elif file.format == "csv":
            with _open(file) as handle:
                names = pacsv.open_csv(handle).schema.names
        else:
            names = [name for rows in _json_blocks(file, 1 << 20) for name in rows[1].column_names]
    repeated = next((n for n in names if names.count(n) > 1 and file.format != "json"), None)
    if repeated is not None:
        raise UserError(f"{file.path}: column '{repeated}' stands twice ({key}): rename one")
    return list(dict.fromkeys([*names, *file.partition]))


def read_chunks(file: LogFile, names: list[str], key: str, bad_rows: BadRows) -> Iterator[Chunk]:
    """Yield a file's columns `names` in chunks.

    Raises:
        UserError: for a file that is cut short or not of its format, a missing column, and a
            broken row unless it is skipped.
    """
    stored = [n for n in names if n not in file.partition]
    reader = {"parquet": _parquet, "csv": _csv, "json": _json}[file.format]
    text = frozenset(names if file.format == "csv" else file.partition)
    with _readable(file):
        for columns, place in reader(file, stored, key, bad_rows):
            size = len(next(iter(columns.values()))) if columns else 0
            for name in names:
                if name in file.partition:
                    columns[name] = pa.repeat(pa.scalar(file.partition[name], pa.string()), size)
            bad = np.zeros(size, bool)
            yield Chunk(file.path, columns, place, bad_rows, bad, text)


class _readable:
    """Turns a reader's errors into answers that name the file."""

    def __init__(self, file: LogFile) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, UserError) or not isinstance(
            error, (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError,
                    EOFError)
        ):  # fmt: skip
            return
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{self.file.path}: cannot be read as {self.file.format}, it may be cut short: "
            f"{reason}: write the file anew, or remove it"
        ) from None


def _open(file: LogFile) -> Any:
    if file.format == "parquet":
        return file.fs.open(file.path, "rb")
    return file.fs.open(file.path, "rb", compression="infer")


def missing_column(file: str, name: str, key: str, known: list[str]) -> UserError:
    """Return the answer to a column that is not there."""
    return UserError(f"{file}: has no column '{name}' ({key}){did_you_mean(name, known)}")


Columns = tuple[dict[str, pa.Array], Callable[[int], str]]


def _parquet(file: LogFile, names: list[str], key: str, _: BadRows) -> Iterator[Columns]:
    local = "file" in file.fs.protocol
    with pq.ParquetFile(file.path) if local else pq.ParquetFile(_open(file)) as source:
        known = source.schema_arrow.names
        for name in names:
            if name not in known:
                raise missing_column(file.path, name, key, known)
        if not source.metadata.num_rows:
            empty = source.schema_arrow.empty_table()
            yield {n: _one(empty[n]) for n in names}, _row_place(0)
        first = 0
        for batch in source.iter_batches(batch_size=ROWS, columns=names):
            yield {n: batch.column(n) for n in names}, _row_place(first)
            first += batch.num_rows


def _row_place(first: int) -> Callable[[int], str]:
    return lambda row: f"row {first + row + 1}"


def _csv(file: LogFile, names: list[str], key: str, bad_rows: BadRows) -> Iterator[Columns]:
    broken: list[int] = []

    def invalid(row: Any) -> str:
        broken.append(row.number)
        reason = f"has {row.actual_columns} columns, expected {row.expected_columns}"
        text = row.text[:80]
        where = f"{file.path}: line {_physical_line(file, row.number)}: {reason}: {text!r}"
        if not bad_rows.skip:
            answers.append(where)
            return "error"
        bad_rows.add(1, where)
        return "skip"

    answers: list[str] = []
    with _open(file) as handle:
        known = pacsv.open_csv(handle).schema.names
    for name in names:
        if name not in known:
            raise missing_column(file.path, name, key, known)
    try:
        with _open(file) as handle:
            reader = pacsv.open_csv(
                handle,
                # One thread: only then are broken rows given with their number.
                read_options=pacsv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                parse_options=pacsv.ParseOptions(invalid_row_handler=invalid),
                convert_options=pacsv.ConvertOptions(
                    include_columns=names, column_types=dict.fromkeys(names, pa.string()),
                    strings_can_be_null=False,
                ),
            )  # fmt: skip
            first = 0
            for batch in reader:
                columns = {n: batch.column(n) for n in names}
                yield columns, _line_place(file, first, broken)
                first += batch.num_rows
    except pa.ArrowInvalid:
        if not answers:
            raise
        raise UserError(
            f"{answers[0]}; mend it, or set data.on_bad_rows to skip to go on without such rows"
        ) from None


def _line_place(file: LogFile, first: int, broken: list[int]) -> Callable[[int], str]:
    def place(row: int) -> str:
        # Line 1 is the header; Arrow counts neither empty lines nor, here, broken ones.
        number = first + row + 2
        for line in sorted(broken):
            number += line <= number
        return f"line {_physical_line(file, number)}"

    return place


def _physical_line(file: LogFile, number: int) -> int:
    """Return the line in the file of the `number`-th line that is not empty."""
    seen = 0
    with _open(file) as handle:
        for line, text in enumerate(handle, 1):
            seen += bool(text.strip(b"\r\n"))
            if seen == number:
                return line
    return number


def _json(file: LogFile, names: list[str], key: str, bad_rows: BadRows) -> Iterator[Columns]:
    for first, table in _json_blocks(file, BLOCK_BYTES, names, bad_rows):
        for name in names:
            if name not in table.column_names:
                if first == 0:
                    raise missing_column(file.path, name, key, table.column_names)
                table = table.append_column(name, pa.nulls(table.num_rows))
        columns = {n: _one(table[n]) for n in names}
        yield columns, lambda row, numbers=table["\0line"]: f"line {numbers[row].as_py()}"  # type: ignore[misc]


def _one(values: pa.ChunkedArray) -> pa.Array:
    array = values.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _json_blocks(
    file: LogFile, size: int, names: list[str] | None = None, bad_rows: BadRows | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number of the block, its rows) with the line of each row; one block without names."""
    number, line, rest, schema = 0, 1, b"", None
    with _open(file) as handle:
        while block := handle.read(size):
            block, _, left = (rest + block).rpartition(b"\n")
            rest = left if block else block + left
            if not block:
                continue
            lines = block.split(b"\n")
            if schema is None:
                schema = _text_columns(lines, names)
            yield number, _json_rows(file, lines, line, schema, bad_rows)
            if names is None:
                return
            number, line = number + 1, line + len(lines)
    if rest.strip():
        schema = schema if schema is not None else _text_columns([rest], names)
        yield number, _json_rows(file, [rest], line, schema, bad_rows)


def _text_columns(lines: list[bytes], names: list[str] | None) -> pa.Schema:
    """Keep text as text: Arrow would read ids that look like dates as times."""
    try:
        first = json.loads(next(text for text in lines if text.strip()))
        texts = [n for n, v in first.items() if isinstance(v, str)]
    except (ValueError, StopIteration, AttributeError):
        texts = []
    return pa.schema([(n, pa.string()) for n in texts if names is None or n in names])


def _json_rows(
    file: LogFile, lines: list[bytes], first: int, schema: pa.Schema, bad_rows: BadRows | None
) -> pa.Table:
    numbers = [first + i for i, text in enumerate(lines) if text.strip()]
    lines = [text for text in lines if text.strip()]
    if not lines:
        return pa.table({"\0line": pa.array([], pa.int64())})
    try:
        table = _parse_json(lines, schema)
    except pa.ArrowInvalid as error:
        good = [i for i, text in enumerate(lines) if _parses(text, schema)]
        bad = sorted(set(range(len(lines))) - set(good))
        if not bad:  # each line alone is fine: two lines disagree about a column's type
            raise UserError(
                f"{file.path}: lines {numbers[0]} to {numbers[-1]}: {str(error).strip()}: "
                "give the column one type"
            ) from None
        where = f"{file.path}: line {numbers[bad[0]]}: is no JSON object of the expected types"
        where += f": {lines[bad[0]][:80].decode(errors='replace')!r}"
        if bad_rows is None or not bad_rows.skip:
            raise UserError(
                f"{where}; mend it, or set data.on_bad_rows to skip to go on without such rows"
            ) from None
        bad_rows.add(len(bad), where)
        numbers = [numbers[i] for i in good]
        lines = [lines[i] for i in good]
        if not lines:
            return pa.table({"\0line": pa.array([], pa.int64())})
        table = _parse_json(lines, schema)
    return table.append_column("\0line", pa.array(numbers))


def _parse_json(lines: list[bytes], schema: pa.Schema) -> pa.Table:
    data = b"\n".join(lines) + b"\n"
    return pajson.read_json(
        io.BytesIO(data),
        # One block: a second one could find other types.
        read_options=pajson.ReadOptions(block_size=len(data) + 1),
        parse_options=pajson.ParseOptions(explicit_schema=schema),
    )


def _parses(line: bytes, schema: pa.Schema) -> bool:
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return isinstance(value, dict) and all(
        value.get(n) is None or isinstance(value.get(n), str) for n in schema.names
    )
