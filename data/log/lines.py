"""Lines of ids, blanks between them: the public formats of collaborative filtering and SASRec.

`user_lines` has a line a user, the user and then the items, oldest first (LightGCN's train.txt and
test.txt; He et al. 2020). `pair_lines` has a line an event, the user and the item (SASRec's files;
Kang and McAuley 2018). Neither names columns or times; ids come as text.

A block is cut into ids by numpy, whatever its lines: nothing is done line by line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.log.chunk import (
    LONGEST_BYTES,
    BadRows,
    Columns,
    open_text,
    shown,
    text_blocks,
    too_long,
)
from twotower.data.log.files import LogFile
from twotower.errors import UserError

# Of a block, a dozen arrays are held, some of eight bytes a byte.
BYTES = 4 << 20
NEWLINE, RETURN = 10, 13
BLANK = np.isin(np.arange(256), [9, NEWLINE, 11, 12, RETURN, 32])
I64 = npt.NDArray[np.int64]


def read_lines(
    file: LogFile, names: list[str], key: str, bad_rows: BadRows, size: int = BYTES
) -> Iterator[Columns]:
    """Yield the users and items of a file of lines, an event a row, as text.

    Args:
        file: of the format user_lines or pair_lines.
        names: of the two columns, the user's first.
        key: of the configuration, for errors.
        bad_rows: what becomes of a line that is no pair.
        size: bytes read at once.

    Raises:
        UserError: for a line without end, a file that no line of has an item, and, unless it is
            skipped, a line of pair_lines that has not two ids.
    """
    pick = _pairs if file.format == "pair_lines" else _users
    some = lone = False
    with open_text(file) as handle:
        for block in _blocks(handle, file, size):
            ids, line_of = _ids(block)
            user, item = pick(file, ids, line_of, bad_rows)
            lone |= len(ids) > 0
            if len(item):
                some = True
                columns = {names[0]: ids.take(pa.array(user)), names[1]: ids.take(pa.array(item))}
                place = line_of[item]
                yield columns, lambda row, place=place: f"line {place[row]}"  # type: ignore[misc]
    if lone and not some and not bad_rows.count:
        raise UserError(
            f"{file.path}: no line has an item ({key}): expected `user item item ...`, blanks "
            "between ids: convert the file"
        )
    if not some:
        yield {n: pa.array([], pa.string()) for n in names}, str


@dataclass(frozen=True)
class _Block:
    """Whole lines: their bytes, where each line ends, and the number of the first."""

    text: npt.NDArray[np.uint8]
    ends: I64
    line: int


def _blocks(handle: Any, file: LogFile, size: int) -> Iterator[_Block]:
    line, held = 1, 0
    rest: list[bytes] = []
    for block in chain(text_blocks(handle, file, size), [b""]):
        # A '\r' at the end may be half of a line's end.
        used = max(block.rfind(b"\n"), block.rfind(b"\r", 0, -1)) + 1
        if used or not block:
            text = np.frombuffer(b"".join([*rest, block[:used]]), np.uint8)
            ends = _ends(text)
            yield _Block(text, ends, line)
            line += len(ends)
            rest, held = [], 0
        rest.append(block[used:])
        held += len(rest[-1])
        if held > LONGEST_BYTES:
            raise too_long(file, line)


def _ends(text: npt.NDArray[np.uint8]) -> I64:
    """Return where lines end: at a newline, a carriage return or both."""
    newline = text == NEWLINE
    alone = text == RETURN
    alone[:-1] &= ~newline[1:]
    return np.flatnonzero(newline | alone)


def _ids(block: _Block) -> tuple[pa.Array, I64]:
    """Return the ids of a block, and the line of each."""
    blank = BLANK[block.text]
    edge = np.flatnonzero(np.diff(blank, prepend=True, append=True))
    start, end = edge[::2], edge[1::2]
    offsets = np.concatenate([[0], np.cumsum(end - start)]).astype(np.int32)
    data = pa.py_buffer(block.text[~blank])
    # What is no UTF-8 is found later, row by row.
    ids = pa.Array.from_buffers(pa.binary(), len(start), [None, pa.py_buffer(offsets), data])
    return ids, np.searchsorted(block.ends, start) + block.line


def _users(file: LogFile, ids: pa.Array, line_of: I64, bad_rows: BadRows) -> tuple[I64, I64]:
    """Return which ids are the user and the item of each event; a user may have no item."""
    first = np.diff(line_of, prepend=-1) > 0
    user = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
    item = np.flatnonzero(~first)
    return user[item], item


def _pairs(file: LogFile, ids: pa.Array, line_of: I64, bad_rows: BadRows) -> tuple[I64, I64]:
    """Return which ids are the user and the item of each event; other lines are bad rows."""
    _, first, count = np.unique(line_of, return_index=True, return_counts=True)
    bad = np.flatnonzero(count != 2)
    if len(bad):
        at, many = int(first[bad[0]]), int(count[bad[0]])
        words = b" ".join(ids.slice(at, min(many, 5)).to_pylist()).decode(errors="replace")
        reason = f"has {many} ids, expected 2, the user and the item: {shown(words)}"
        bad_rows.add(len(bad), f"{file.path}: line {line_of[at]}: {reason}")
    user = first[count == 2].astype(np.int64)
    return user, user + 1
