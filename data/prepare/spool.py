"""Spools: columns written piece by piece, and one Arrow file of one record batch in the end.

Arrow's own writer makes a batch of each piece, and a column of many pieces cannot be read as one
numpy array. A spool keeps each buffer in a file of its own; the end maps them and writes them out,
so that nothing is held in memory and what is read later is one mapped array a column.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

PIECE = 1 << 20
INT32_MAX = 2**31 - 1


class Spool:
    """The columns of one Arrow file in the making.

    Args:
        directory: for its files; made here.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.columns: dict[str, _Column] = {}

    def append(self, columns: Mapping[str, Any]) -> None:
        """Append rows: Arrow or numpy arrays of one length, of the same types each time."""
        for name, values in columns.items():
            array = values if isinstance(values, pa.Array) else pa.array(values)
            if name not in self.columns:
                path = self.directory / str(len(self.columns))
                self.columns[name] = _Column(array.type, path)
            self.columns[name].append(array)

    def extend(self, other: Spool) -> None:
        """Append all rows of another spool, which is used up."""
        for name, column in other.columns.items():
            if name not in self.columns:
                path = self.directory / str(len(self.columns))
                self.columns[name] = _Column(column.type, path)
            self.columns[name].extend(column)

    def finish(self, path: Path) -> None:
        """Write the Arrow file and remove the spool."""
        table = pa.table({name: column.finish() for name, column in self.columns.items()})
        write_arrow(path, table)
        del table
        shutil.rmtree(self.directory)


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write a table as an Arrow file of one record batch."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_arrow(path: Path) -> pa.Table:
    """Return an Arrow file's columns over the mapped file."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


class _Column:
    """One column: fixed-width values, strings, or lists of such."""

    def __init__(self, kind: pa.DataType, path: Path) -> None:
        self.type, self.path = kind, path
        self.length = self.nulls = 0
        self.files: dict[str, BinaryIO] = {}
        self.child: _Column | None = None
        if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            self.child = _Column(kind.value_type, path.with_name(path.name + ".values"))

    def append(self, array: pa.Array) -> None:
        if array.type != self.type:
            array = array.cast(self.type)
        self._valid(np.asarray(array.is_valid()) if array.null_count else None, len(array))
        if pa.types.is_fixed_size_list(self.type):
            assert self.child is not None
            self.child.append(array.flatten())
        elif self.child is not None:
            self._lengths(array)
            self.child.append(array.flatten())
        elif pa.types.is_string(self.type):
            self._lengths(array)
            _, offsets, data = array.buffers()
            ends = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
            if len(ends) and data is not None:
                self._write("data", np.frombuffer(data, np.uint8)[ends[0] : ends[-1]])
        else:
            filled = array.fill_null(0) if array.null_count else array
            self._write("data", filled.to_numpy(zero_copy_only=False))
        self.length += len(array)

    def _lengths(self, array: pa.Array) -> None:
        offsets = np.frombuffer(array.buffers()[1], np.int32)
        own = offsets[array.offset : array.offset + len(array) + 1]
        self._write("lengths", np.diff(own).astype(np.int32))

    def _valid(self, valid: npt.NDArray[np.bool_] | None, rows: int) -> None:
        if valid is None and not self.nulls:
            return
        if not self.nulls:
            self._write("valid", np.ones(self.length, np.uint8))
        mask = np.ones(rows, np.uint8) if valid is None else valid.astype(np.uint8)
        self.nulls += int(rows - mask.sum())
        self._write("valid", mask)

    def _write(self, name: str, values: npt.NDArray[Any]) -> None:
        if name not in self.files:
            self.files[name] = self.path.with_name(f"{self.path.name}.{name}").open("w+b")
        self.files[name].write(np.ascontiguousarray(values).data)

    def extend(self, other: _Column) -> None:
        if other.nulls or self.nulls:
            valid = other._map("valid", np.uint8) if other.nulls else None
            self._valid(valid, other.length)
        for name, source in other.files.items():
            if name == "valid":
                continue
            if name not in self.files:
                self._write(name, np.empty(0, np.uint8))
            source.seek(0)
            shutil.copyfileobj(source, self.files[name], PIECE)
        if self.child is not None and other.child is not None:
            self.child.extend(other.child)
        self.length += other.length

    def _map(self, name: str, dtype: Any) -> npt.NDArray[Any]:
        if name not in self.files:
            return np.empty(0, dtype)
        file = self.files[name]
        file.flush()
        if not file.tell():
            return np.empty(0, dtype)
        return np.memmap(file, dtype, "r")

    def finish(self) -> pa.Array:
        """Return the whole column over mapped files."""
        valid = None
        if self.nulls:
            packed = np.packbits(self._map("valid", np.uint8), bitorder="little")
            valid = pa.py_buffer(packed)
        if pa.types.is_fixed_size_list(self.type):
            assert self.child is not None
            return pa.FixedSizeListArray.from_arrays(self.child.finish(), self.type.list_size)
        if self.child is not None:
            offsets, wide = self._offsets()
            make = pa.large_list if wide else pa.list_
            values = self.child.finish()
            return pa.Array.from_buffers(
                make(self.type.value_type), self.length, [valid, offsets], self.nulls,
                children=[values.cast(self.type.value_type) if not wide else values],
            )  # fmt: skip
        if pa.types.is_string(self.type):
            offsets, wide = self._offsets()
            kind = pa.large_string() if wide else pa.string()
            data = pa.py_buffer(self._map("data", np.uint8))
            return pa.Array.from_buffers(
                kind, self.length, [valid, offsets, data], self.nulls
            )  # fmt: skip
        data = self._map("data", self.type.to_pandas_dtype())
        return pa.Array.from_buffers(
            self.type, self.length, [valid, pa.py_buffer(data)], self.nulls
        )

    def _offsets(self) -> tuple[pa.Buffer, bool]:
        """Sum the lengths into offsets, in pieces; 64 bits wide only where 32 do not reach."""
        lengths = self._map("lengths", np.int32)
        total = sum(
            int(lengths[i : i + PIECE].sum(dtype=np.int64)) for i in range(0, len(lengths), PIECE)
        )
        dtype = np.int64 if total > INT32_MAX else np.int32
        self._write("offsets", np.zeros(1, dtype))
        end = 0
        for i in range(0, len(lengths), PIECE):
            ends = end + np.cumsum(lengths[i : i + PIECE], dtype=np.int64)
            self._write("offsets", ends.astype(dtype))
            end = int(ends[-1])
        return pa.py_buffer(self._map("offsets", dtype)), dtype == np.int64
