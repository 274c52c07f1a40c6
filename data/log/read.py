"""Reading a log's files as record batches, in constant memory, one format a reader."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.log.chunk import BadRows, Chunk, Columns, missing_column
from twotower.data.log.csv_rows import csv_names, read_csv
from twotower.data.log.files import OUR_BUGS, LogFile, first_line
from twotower.data.log.json_rows import json_names, read_json
from twotower.data.log.lines import read_lines
from twotower.data.schema import LINE_FORMATS
from twotower.errors import UserError

ROWS = 1 << 18
# What a damaged file or a broken connection raises.
DAMAGE = (
    pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, pa.ArrowKeyError, OSError,
    EOFError, zlib.error, lzma.LZMAError,
)  # fmt: skip


def column_names(file: LogFile, key: str) -> list[str]:
    """Return the columns of a file, those that its folders' names give included."""
    reader = {"parquet": _parquet_names, "csv": csv_names, "json": json_names}[file.format]
    with _readable(file):
        names = reader(file)
    repeated = next((n for n in names if n and names.count(n) > 1), None)
    if repeated is not None:
        raise UserError(f"{file.path}: column '{repeated}' stands twice ({key}): rename one")
    return list(dict.fromkeys([*names, *file.partition]))


def read_chunks(file: LogFile, names: list[str], key: str, bad_rows: BadRows) -> Iterator[Chunk]:
    """Yield a file's columns `names` in chunks, the first of them perhaps without rows.

    Raises:
        UserError: for a file that is cut short or not of its format, a missing column, and a
            broken row unless it is skipped.
    """
    stored = [n for n in names if n not in file.partition]
    reader = {
        "parquet": _parquet, "csv": read_csv, "json": read_json,
        "user_lines": read_lines, "pair_lines": read_lines,
    }[file.format]  # fmt: skip
    untyped = file.format in ("csv", *LINE_FORMATS)
    text = frozenset(names if untyped else file.partition)
    with _readable(file):
        for columns, place in reader(file, stored, key, bad_rows):
            size = len(next(iter(columns.values()))) if columns else 0
            for name in names:
                if name in file.partition:
                    columns[name] = pa.repeat(pa.scalar(file.partition[name], pa.string()), size)
            bad = np.zeros(size, bool)
            yield Chunk(file.path, columns, place, bad_rows, bad, text, file.format == "parquet")


class _readable:
    """Turns a reader's errors into answers that name the file."""

    def __init__(self, file: LogFile) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        # Each of fsspec's backends has errors of its own.
        remote = "file" not in self.file.fs.protocol and isinstance(error, Exception)
        damage = isinstance(error, DAMAGE) or (remote and not isinstance(error, OUR_BUGS))
        if isinstance(error, UserError) or not damage:
            return
        path = self.file.path
        if isinstance(error, FileNotFoundError):
            raise UserError(
                f"{path}: is gone since the log was listed: run again once nothing removes or "
                "renames its files"
            ) from None
        if isinstance(error, PermissionError):
            raise UserError(f"{path}: may not be read: give this user the right to") from None
        raise UserError(
            f"{path}: cannot be read as {self.file.format}, it may be cut short: "
            f"{first_line(error)}: write the file anew, or remove it"
        ) from None


def _open_parquet(file: LogFile) -> pq.ParquetFile:
    if "file" in file.fs.protocol:
        return pq.ParquetFile(file.path)
    # Of a remote file, only the ranges that Arrow asks for: no cache that reads ahead.
    return pq.ParquetFile(file.fs.open(file.path, "rb", cache_type="none"), pre_buffer=True)


def _parquet_names(file: LogFile) -> list[str]:
    with _open_parquet(file) as source:
        return list(source.schema_arrow.names)


def _parquet(file: LogFile, names: list[str], key: str, _: BadRows) -> Iterator[Columns]:
    with _open_parquet(file) as source:
        known = source.schema_arrow.names
        for name in names:
            if name not in known:
                raise missing_column(file.path, name, key, known)
            if known.count(name) > 1:
                raise UserError(f"{file.path}: column '{name}' stands twice ({key}): rename one")
        if not source.metadata.num_rows:
            empty = source.schema_arrow.empty_table()
            yield {n: _one(empty[n]) for n in names}, _row_place(0)
        first = 0
        for groups in _row_groups(source.metadata):
            for batch in source.iter_batches(ROWS, row_groups=groups, columns=names):
                yield {n: batch.column(n) for n in names}, _row_place(first)
                first += batch.num_rows


def _row_groups(metadata: Any) -> Iterator[list[int]]:
    """Yield neighbouring row groups that together fill a chunk: what is fetched at once."""
    groups: list[int] = []
    rows = 0
    for number in range(metadata.num_row_groups):
        groups.append(number)
        rows += metadata.row_group(number).num_rows
        if rows >= ROWS:
            yield groups
            groups, rows = [], 0
    if groups:
        yield groups


def _row_place(first: int) -> Callable[[int], str]:
    return lambda row: f"row {first + row + 1}"


def _one(values: pa.ChunkedArray) -> pa.Array:
    array = values.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array
