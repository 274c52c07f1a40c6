"""Dividing events into training, validation and test."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.log import as_ids, column, refuse_rows
from twotower.data.schema import Split, parse_date
from twotower.errors import UserError

SPLIT_NAMES = ("train", "validation", "test")
ALIASES = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}

I8 = npt.NDArray[np.int8]
I64 = npt.NDArray[np.int64]


def assign_split(
    split: Split, table: pa.Table, where: str, user: pa.Array, time: I64, given: I8
) -> I8:
    """Return 0 (train), 1 (validation) or 2 (test) for each event.

    Args:
        split: the rule.
        table: the log, for a given split's column.
        where: the log's name, for errors.
        user: user ids.
        time: microseconds since 1970.
        given: the split that each event's file stands for.

    Raises:
        UserError: when no training or no test event is left.
    """
    if split.kind == "temporal":
        out, remedy = _temporal(split, time), "change data.split.test or data.split.test_from"
    elif split.kind == "leave_last_out":
        out = _leave_last_out(user, time)
        remedy = "leave_last_out needs users with at least 3 events: use a temporal split"
    elif split.column is not None:
        out = _from_column(table, split.column, where)
        remedy = f"mark test events in column '{split.column}'"
    else:
        out, remedy = given, "check data.split.test_files"
    for number in (0, 2):
        if not (out == number).any():
            raise UserError(
                f"{where}: the {split.kind} split leaves no {SPLIT_NAMES[number]} events "
                f"of {len(out)}: {remedy}"
            )
    return out


def _temporal(split: Split, time: I64) -> I8:
    ordered = np.sort(time)

    def cut(date: str | None, name: str, share: float) -> int:
        if date is not None:
            return parse_date(f"data.split.{name}", date)
        place = round(len(ordered) * (1 - share))
        return int(ordered[place]) if place < len(ordered) else int(ordered[-1]) + 1

    test = cut(split.test_from, "test_from", split.test)
    validation = cut(split.validation_from, "validation_from", split.validation + split.test)
    if validation > test:
        raise UserError("data.split.validation_from lies after data.split.test_from: swap them")
    return ((time >= validation).astype(np.int8) + (time >= test)).astype(np.int8)


def _leave_last_out(user: pa.Array, time: I64) -> I8:
    code = user.dictionary_encode().indices.to_numpy()
    order = np.lexsort((time, code))
    counts = np.bincount(code)
    ends = np.cumsum(counts)
    out = np.zeros(len(time), np.int8)
    for back, number in ((1, 2), (2, 1)):
        out[order[(ends - back)[counts >= 3]]] = number
    return out


def _from_column(table: pa.Table, name: str, where: str) -> I8:
    spot = f"{where}, column '{name}'"
    values = as_ids(column(table, name, where, "data.split.column"), spot, allow_null=False)
    if not pa.types.is_string(values.type):
        raise UserError(f"{spot}: holds {values.type}, expected train, validation or test")
    encoded = values.dictionary_encode()
    numbers = np.array([ALIASES.get(v, -1) for v in encoded.dictionary.to_pylist()], np.int8)
    out = numbers[encoded.indices.to_numpy()]
    refuse_rows(out < 0, values, spot, "expected train, validation or test")
    return np.asarray(out, np.int8)
