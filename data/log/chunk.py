"""What the readers of all formats share: a chunk of rows, and what becomes of bad ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.log.files import LogFile
from twotower.errors import UserError, did_you_mean

BLOCK_BYTES = 16 << 20
# A line or record that is longer is taken for a file of another kind, and not held in memory.
LONGEST_BYTES = 256 << 20
REASONS_KEPT = 5
BOM = b"\xef\xbb\xbf"
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff")
REMEDY = "mend it, or set data.on_bad_rows to skip to go on without such rows"

# Columns by name, and what tells a row's place in the file.
Columns = tuple[dict[str, pa.Array], Callable[[int], str]]


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
        """Refuse rows: count them.

        Raises:
            UserError: with the reason, unless bad rows are skipped.
        """
        if not self.skip:
            raise UserError(f"{reason}; {REMEDY}")
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
        typed: whether the file says its columns' types, which then hold for all rows.
    """

    file: str
    columns: dict[str, pa.Array]
    place: Callable[[int], str]
    bad_rows: BadRows
    bad: npt.NDArray[np.bool_]
    text: frozenset[str] = frozenset()
    typed: bool = True

    def refuse(self, mask: Any, values: Any, where: str, message: str) -> npt.NDArray[np.bool_]:
        """Refuse the rows of `mask`: raise, or mark them to be skipped.

        Raises:
            UserError: naming the first row and its value, unless bad rows are skipped.
        """
        found = np.asarray(mask, dtype=bool)
        new = found & ~self.bad
        if new.any():
            row = int(new.argmax())
            reason = f"{where}: {self.place(row)}: {message}: {shown(values[row])}"
            self.bad_rows.add(int(new.sum()), reason)
            self.bad |= new
        return found


def shown(value: Any) -> str:
    """Return a value as a message shows it; Python cannot hold every Arrow time."""
    if isinstance(value, pa.Scalar):
        try:
            value = value.as_py()
        except (ValueError, OverflowError):
            value = value.cast(pa.int64()).as_py() if hasattr(value, "value") else str(value)
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 100 else text[:90] + " ..."


def missing_column(file: str, name: str, key: str, known: list[str]) -> UserError:
    """Return the answer to a column that is not there."""
    return UserError(f"{file}: has no column '{name}' ({key}){did_you_mean(name, known)}")


def open_text(file: LogFile) -> Any:
    """Open a text file, decompressed by its name."""
    if file.path.endswith(".zst"):
        return pa.CompressedInputStream(pa.PythonFile(file.fs.open(file.path, "rb")), "zstd")
    return file.fs.open(file.path, "rb", compression="infer")


def too_long(file: LogFile, line: int) -> UserError:
    """Return the answer to a line or record without an end."""
    return UserError(
        f"{file.path}: line {line} is longer than {LONGEST_BYTES >> 20} MB: expected a row a line "
        f"({file.format}): convert the file"
    )


def text_blocks(handle: Any, file: LogFile, size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Yield a text file's bytes without its byte order mark.

    Raises:
        UserError: for UTF-16.
    """
    block = handle.read(size)
    if block[:2] in WIDE_BOMS:
        raise UserError(f"{file.path}: is UTF-16 text, expected UTF-8: convert it")
    block = block.removeprefix(BOM)
    while block:
        yield block
        block = handle.read(size)
