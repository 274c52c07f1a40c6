"""Dividing events into training, validation and test, without holding them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.data.schema import Split, parse_date
from twotower.data.shuffle import Shuffle
from twotower.errors import UserError

I8 = npt.NDArray[np.int8]
I64 = npt.NDArray[np.int64]
Times = Callable[[], Iterator[I64]]
BINS = 1 << 20
NEVER = 2**62


@dataclass(frozen=True)
class Cuts:
    """When validation and test begin, in microseconds since 1970; `NEVER` for other splits."""

    validation: int = NEVER
    test: int = NEVER

    def split(self, time: I64) -> I8:
        """Return 0 (train), 1 (validation) or 2 (test) of each time."""
        return (time >= self.validation).astype(np.int8) + (time >= self.test).astype(np.int8)


def find_cuts(split: Split, times: Times) -> Cuts:
    """Return the cuts of a temporal split.

    Args:
        split: the rule.
        times: gives all times, in pieces, each time that it is called.
    """
    total = sum(len(piece) for piece in times())

    def cut(date: str | None, name: str, share: float) -> int:
        if date is not None:
            return parse_date(f"data.split.{name}", date)
        place = round(total * (1 - share))
        return kth_time(times, place) if place < total else kth_time(times, total - 1) + 1

    test = cut(split.test_from, "test_from", split.test)
    validation = cut(split.validation_from, "validation_from", split.validation + split.test)
    if validation > test:
        raise UserError("data.split.validation_from lies after data.split.test_from: swap them")
    return Cuts(validation, test)


def kth_time(times: Times, place: int) -> int:
    """Return what would stand at `place` (from 0) if all times were sorted, counting in bins."""
    low = min(int(piece.min()) for piece in times() if len(piece))
    high = max(int(piece.max()) for piece in times() if len(piece))
    while low < high:
        width = -(-(high - low + 1) // BINS)
        counts = np.zeros((high - low) // width + 1, np.int64)
        for piece in times():
            inside = piece[(piece >= low) & (piece <= high)]
            counts += np.bincount((inside - low) // width, minlength=len(counts))
        ends = np.cumsum(counts)
        bin_ = int(np.searchsorted(ends, place, side="right"))
        place -= int(ends[bin_ - 1]) if bin_ else 0
        low += bin_ * width
        high = min(high, low + width - 1)
    return low


def leave_last_out(user: npt.NDArray[np.int32]) -> I8:
    """Split whole users' events, sorted by (user, time): each one's last two are held out."""
    out = np.zeros(len(user), np.int8)
    _, counts = np.unique(user, return_counts=True)
    ends = np.cumsum(counts)
    for back, number in ((1, 2), (2, 1)):
        out[ends[counts >= 3] - back] = number
    return out


def hold_out(user: npt.NDArray[np.int32], split: I8, time: I64, rule: Split) -> tuple[I8, I64]:
    """Move a share of each user's training events to validation, at one moment after the others.

    Args:
        user: rows, of whole users (E,).
        split: 0 or 2 (E,).
        time: ascending within a user's training (E,).
        rule: its `held_out` is random or last.

    Returns:
        The new split and time; a user keeps at least one training event.
    """
    rows = np.flatnonzero(split == 0)
    _, start, owner, counts = np.unique(
        user[rows], return_index=True, return_inverse=True, return_counts=True
    )
    place = np.arange(len(rows)) - start[owner]
    if rule.held_out == "random":
        # One order of all events there can be, so that it does not matter which come together.
        order = Shuffle(1 << 62, rule.seed, 0)((user[rows].astype(np.int64) << 31) + place)
        sorted_rows = np.lexsort((order, owner))
        place[sorted_rows] = np.arange(len(rows)) - start[owner[sorted_rows]]
    kept = np.maximum(counts - np.rint(counts * rule.validation).astype(np.int64), 1)
    held = place >= kept[owner]
    split, time = split.copy(), time.copy()
    split[rows[held]] = 1
    time[rows[held]] = time[rows[start + counts - 1]][owner[held]]
    return split, time
