"""Checking a log's columns: raw Arrow values to ids, times and numbers.

Every refusal names the file, the column, the first offending row and the remedy. Where bad rows
are skipped, their values come out as null or zero, and the chunk's `bad` marks them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.log.chunk import Chunk
from twotower.data.schema import TIME_UNITS
from twotower.errors import UserError

YEAR_2100_US = 4_102_444_800_000_000
WHOLE = r"^(0|-?[1-9][0-9]{0,18})$"
FLOAT32_MAX = float(np.finfo(np.float32).max)
TIMES = (
    pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.timestamp("ns"),
    pa.timestamp("ns", "UTC"),
)  # fmt: skip
NOTHING = pa.array(["", "NA", "N/A", "NaN", "nan", "NULL", "null", "None"])
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spot:
    """One column of a chunk, for what is said about it."""

    chunk: Chunk
    column: str

    @property
    def where(self) -> str:
        """File and column."""
        return f"{self.chunk.file}, column '{self.column}'"

    @property
    def values(self) -> pa.Array:
        """The column, of a plain type, its text checked to be UTF-8."""
        array = plain(self.chunk.columns[self.column])
        return _utf8(self, array) if is_text(array) or pa.types.is_binary(array.type) else array

    def refuse(self, mask: Any, values: Any, message: str) -> npt.NDArray[np.bool_]:
        """Refuse the rows of `mask`; returns it."""
        return self.chunk.refuse(mask, values, self.where, message)

    def fail(self, message: str) -> UserError:
        """Return the answer to a column that is wrong as a whole."""
        return UserError(f"{self.where}: {message}")


def plain(values: Any) -> pa.Array:
    """Return one array of a plain type: no chunks, dictionary, view, decimal or large variant."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        return plain(array.dictionary_decode())
    if pa.types.is_string_view(kind) or pa.types.is_large_string(kind):
        return array.cast(pa.string())
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return array.cast(pa.binary())
    if pa.types.is_float16(kind):
        return array.cast(pa.float32())
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return array.cast(pa.list_(kind.value_type))
    # Warehouses write whole numbers as decimals without a scale.
    if pa.types.is_decimal(kind):
        try:
            return array.cast(pa.float64() if kind.scale else pa.int64())
        except pa.ArrowInvalid:
            return array
    return array


def _utf8(spot: Spot, array: pa.Array) -> pa.Array:
    """Return text, refusing what is no UTF-8: Arrow reads Parquet and JSON without a look."""
    raw = array.cast(pa.binary())
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:
        bad = np.array([v.is_valid and not _casts(v, pa.string()) for v in raw])
    return _nothing(raw, spot.refuse(bad, raw, "is no UTF-8 text")).cast(pa.string())


def is_text(array: pa.Array) -> bool:
    """Whether an array holds strings."""
    return bool(pa.types.is_string(array.type) or pa.types.is_large_string(array.type))


def _nothing(array: pa.Array, mask: npt.NDArray[np.bool_]) -> pa.Array:
    return pc.if_else(pa.array(mask), None, array) if mask.any() else array


def numpy_mask(mask: pa.Array) -> npt.NDArray[np.bool_]:
    """Return a boolean array as numpy, null as False."""
    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), dtype=bool)


def as_ids(spot: Spot, array: pa.Array | None = None, *, allow_null: bool) -> pa.Array:
    """Return ids as a string or int64 array, with an empty string read as null.

    Args:
        spot: the column.
        array: its values, where they were changed before.
        allow_null: whether a missing id is a bad row.

    Raises:
        UserError: for another type, for a null where none is allowed, or a NUL character.
    """
    array = spot.values if array is None else array
    if pa.types.is_integer(array.type):
        try:
            array = array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise spot.fail(f"ids must fit signed 64-bit integers: {error}") from None
    elif is_text(array):
        array = array.cast(pa.string())
        if pc.any(pc.equal(array, "")).as_py():
            array = pc.if_else(pc.equal(array, ""), None, array)
        zero = pc.match_substring(array, "\0")
        if pc.any(zero).as_py():
            message = "an id may not hold a NUL character"
            array = _nothing(array, spot.refuse(numpy_mask(zero), array, message))
    elif pa.types.is_null(array.type):
        array = array.cast(pa.string())
    elif pa.types.is_floating(array.type) and not spot.chunk.typed:
        array = _whole(spot, array)
    else:
        raise spot.fail(f"holds {array.type}, expected string or integer ids: cast it")
    if not allow_null and array.null_count:
        missing = np.asarray(array.is_null().to_numpy(zero_copy_only=False))
        spot.refuse(missing, array, "the id is null or empty")
    return array


def _whole(spot: Spot, array: pa.Array) -> pa.Array:
    """Return the int64 ids that JSON wrote as floats; beyond 2^53 a float cannot tell two apart."""
    values = array.to_numpy(zero_copy_only=False)
    bad = numpy_mask(array.is_valid()) & ~((values == np.floor(values)) & (abs(values) < 2**53))
    if len(bad) != len(spot.chunk.bad) and bad.any():
        raise spot.fail("an id in a list is no whole number: mend it")
    return _nothing(array, spot.refuse(bad, array, "an id must be a whole number") if bad.any()
                    else bad).cast(pa.int64())  # fmt: skip


def whole_numbers(array: pa.Array) -> bool:
    """Whether each string is an int64 as Python would print it, so that none loses anything."""
    if not pc.all(pc.match_substring_regex(array, WHOLE)).as_py() and len(array.drop_null()):
        return False
    try:
        array.cast(pa.int64())
    except pa.ArrowInvalid:
        return False
    return True


def as_timestamps(spot: Spot, unit: str) -> I64:
    """Return times as microseconds since 1970; 0 for a bad row that is skipped.

    Raises:
        UserError: for a null, a negative time or one after the year 2100.
    """
    array = spot.values
    if pa.types.is_null(array.type):
        array = array.cast(pa.int64())
    if is_text(array):
        array = _parse_times(spot, array)
    if array.null_count:
        missing = np.asarray(array.is_null().to_numpy(zero_copy_only=False))
        spot.refuse(missing, array, "the timestamp is null")
        array = pc.fill_null(array, pa.scalar(0).cast(array.type))
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        micros = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_numpy()
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        raw = array.to_numpy(zero_copy_only=False)
        raw = raw.astype(np.float64) if raw.dtype.kind == "f" else raw
        scale = 0.001 if unit == "ns" else float(TIME_UNITS[unit])
        bad = _absurd(spot, raw.astype(np.float64) * scale, array, unit)
        raw = np.where(bad, 0, raw) if bad.any() else raw
        exact = raw // 1000 if unit == "ns" else raw * TIME_UNITS[unit]
        micros = exact.astype(np.int64)
    else:
        raise spot.fail(f"holds {array.type}, expected integers or timestamps")
    bad = _absurd(spot, micros.astype(np.float64), array, unit)
    return np.asarray(np.where(bad, 0, micros), dtype=np.int64)


def _parse_times(spot: Spot, array: pa.Array) -> pa.Array:
    """Parse integers, or ISO times, all with a zone or all without one, which means UTC."""
    array = pc.if_else(pc.equal(array, ""), None, array)
    for kind in TIMES:
        try:
            return array.cast(kind)
        except pa.ArrowInvalid:
            continue
    # Some row fits no type that the others have: it is found one by one.
    valid = array.drop_null()
    kind = max(TIMES, key=lambda t: sum(_casts(v, t) for v in valid[:100]))
    bad = np.array([v.is_valid and not _casts(v, kind) for v in array])
    spot.refuse(bad, array, "expected an integer or an ISO time, as the other rows have")
    return pc.if_else(pa.array(bad), None, array).cast(kind)


def _casts(value: pa.Scalar, kind: pa.DataType) -> bool:
    try:
        value.cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def _absurd(
    spot: Spot, micros: npt.NDArray[np.float64], array: pa.Array, unit: str
) -> npt.NDArray[np.bool_]:
    early, late = ~(micros >= 0), micros >= YEAR_2100_US
    if early.any() or late.any():
        hint = f"check data.columns.timestamp_unit, now '{unit}' (one of {', '.join(TIME_UNITS)})"
        spot.refuse(early, array, f"the timestamp is before 1970; {hint}")
        spot.refuse(late, array, f"the timestamp is after 2100; {hint}")
    return np.asarray(early | late)


def as_floats(spot: Spot, array: pa.Array | None = None) -> pa.Array:
    """Return numbers as a float64 array; nulls stay, NaN and infinity are refused."""
    array = spot.values if array is None else array
    if is_text(array) and spot.column in spot.chunk.text:
        array = parse_numbers(spot, array)
    if not (
        pa.types.is_integer(array.type)
        or pa.types.is_floating(array.type)
        or pa.types.is_boolean(array.type)
        or pa.types.is_null(array.type)
    ):
        raise spot.fail(f"holds {array.type}, expected numbers: cast it")
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    array = array.cast(pa.float64(), safe=False)
    # Towers read float32; a comparison with NaN is false.
    finite = pc.less_equal(pc.abs(array), FLOAT32_MAX)
    if not pc.all(finite, min_count=0).as_py():
        # A list's numbers have no row of their own to skip.
        mask = numpy_mask(pc.invert(finite))
        if len(mask) != len(spot.chunk.bad):
            raise spot.fail("a vector holds NaN, infinity or more than float32 can: mend it")
        array = _nothing(array, spot.refuse(mask, array, "not a finite number of float32"))
    return array


def parse_numbers(spot: Spot, array: pa.Array) -> pa.Array:
    """Return text as numbers, what stands for nothing as null, other words refused."""
    array = pc.if_else(pc.is_in(array, value_set=NOTHING), None, array)
    try:
        return array.cast(pa.float64())
    except pa.ArrowInvalid:
        lower = pc.utf8_lower(array)
    if pc.all(pc.is_in(lower.drop_null(), value_set=pa.array(["true", "false"]))).as_py():
        return pc.equal(lower, "true")
    bad = np.array([v.is_valid and not _casts(v, pa.float64()) for v in array])
    spot.refuse(bad, array, "expected a number")
    return pc.if_else(pa.array(bad), None, array).cast(pa.float64())
