"""Checking a log's columns: raw Arrow values to ids, times, numbers and vectors.

Every refusal names the file, the column, the first offending row and the remedy. Where bad rows
are skipped, their values come out as null or zero, and the chunk's `bad` marks them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.log.read import Chunk
from twotower.data.schema import TIME_UNITS, Feature
from twotower.errors import UserError

YEAR_2100_US = 4_102_444_800_000_000
WHOLE = r"^(0|-?[1-9][0-9]{0,18})$"
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
        """The column, without dictionaries or views."""
        return plain(self.chunk.columns[self.column])

    def refuse(self, mask: Any, values: Any, message: str) -> npt.NDArray[np.bool_]:
        """Refuse the rows of `mask`; returns it."""
        return self.chunk.refuse(mask, values, self.where, message)

    def fail(self, message: str) -> UserError:
        """Return the answer to a column that is wrong as a whole."""
        return UserError(f"{self.where}: {message}")


def plain(values: Any) -> pa.Array:
    """Return one array of a plain type: no chunks, dictionary, view or large variant."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type) or pa.types.is_large_string(array.type):
        return array.cast(pa.string())
    return array


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
    else:
        raise spot.fail(f"holds {array.type}, expected string or integer ids: cast it")
    if not allow_null and array.null_count:
        missing = np.asarray(array.is_null().to_numpy(zero_copy_only=False))
        spot.refuse(missing, array, "the id is null or empty")
    return array


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
    types = (pa.int64(), pa.float64(), pa.timestamp("us"), pa.timestamp("us", "UTC"))
    for kind in types:
        try:
            return array.cast(kind)
        except pa.ArrowInvalid as error:
            reason = str(error)
    # Some row fits no type that the others have: it is found one by one.
    valid = array.drop_null()
    kind = next((t for t in types if _casts(valid[0], t)), types[2])
    bad = np.array([v.is_valid and not _casts(v, kind) for v in array])
    spot.refuse(bad, array, f"expected integers or ISO times ({reason})")
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
        array = _parse_numbers(spot, array)
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
    finite = pc.is_finite(array)
    if not pc.all(finite, min_count=0).as_py():
        # A list's numbers have no row of their own to skip.
        mask = numpy_mask(pc.invert(finite))
        if len(mask) != len(spot.chunk.bad):
            raise spot.fail("a vector holds NaN or infinity: mend it")
        array = _nothing(array, spot.refuse(mask, array, "not a finite number"))
    return array


def _parse_numbers(spot: Spot, array: pa.Array) -> pa.Array:
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


def raw_feature(feature: Feature, spot: Spot) -> pa.Array:
    """Return a feature's column in its raw type, as a request would carry it.

    Returns:
        `id`: string or int64 with nulls; `ids` and `history`: lists of them, at most `length`;
        `number`: float64 with nulls; `vector`: lists of `width` float32, zeros for a null.
    """
    array = spot.values
    if feature.pattern is not None:
        array = _extract(spot, array, feature.pattern)
    if feature.kind == "id":
        return as_ids(spot, array, allow_null=True)
    if feature.kind == "number":
        if feature.pattern is not None:
            array = _parse_numbers(spot, array)
        return as_floats(spot, array)
    if feature.kind == "vector":
        return _vectors(feature, spot, array)
    return _id_lists(feature, spot, array)


def _extract(spot: Spot, array: pa.Array, pattern: str) -> pa.Array:
    if not is_text(array):
        raise spot.fail(f"`pattern` needs a string column, got {array.type}")
    # Arrow wants the group to have a name.
    named = re.sub(r"(?<!\\)\((?!\?)", "(?P<value>", pattern, count=1)
    groups = pc.extract_regex(array, pattern=named)
    return pc.struct_field(groups, [0])


def _id_lists(feature: Feature, spot: Spot, array: pa.Array) -> pa.Array:
    if feature.separator is not None and is_text(array):
        array = pc.split_pattern(array, pattern=feature.separator)
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.string()))
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise spot.fail(
            f"holds {array.type}, expected a list of ids: "
            "set the feature's `separator` if the column is text"
        )
    flat = array.flatten()
    if is_text(flat) and pc.any(pc.match_substring(flat, "\0")).as_py():
        raise spot.fail("an id may not hold a NUL character")
    ids = as_ids(spot, plain(flat), allow_null=True)
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(array)), lengths)
    valid = ids.is_valid().to_numpy(zero_copy_only=False)
    ids, owner = ids.drop_null(), owner[valid]
    counts = np.bincount(owner, minlength=len(array)).astype(np.int64)
    starts = np.cumsum(counts) - counts
    place = np.arange(len(owner)) - starts[owner]
    # A history keeps its newest entries, a bag its first.
    keep = (
        place >= (counts - feature.length)[owner]
        if feature.kind == "history"
        else place < feature.length
    )
    kept = np.minimum(counts, feature.length)
    offsets = np.concatenate([[0], np.cumsum(kept)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), ids.filter(pa.array(keep)))


def _vectors(feature: Feature, spot: Spot, array: pa.Array) -> pa.Array:
    width = feature.width or 0
    if pa.types.is_null(array.type):
        array = array.cast(pa.list_(pa.float32()))
    if not (
        pa.types.is_list(array.type)
        or pa.types.is_large_list(array.type)
        or pa.types.is_fixed_size_list(array.type)
    ):
        raise spot.fail(f"holds {array.type}, expected lists of {width} floats")
    lengths = pc.fill_null(pc.list_value_length(array), width).to_numpy(zero_copy_only=False)
    bad = spot.refuse(
        lengths != width, lengths,
        f"expected a vector of width {width} (the feature's `width`), got width",
    )  # fmt: skip
    present = array.is_valid().to_numpy(zero_copy_only=False) & ~bad
    out = np.zeros((len(array), width), dtype=np.float32)
    flat = as_floats(spot, array.filter(pa.array(present)).flatten())
    if flat.null_count:
        raise spot.fail("a vector holds a null: fill it in")
    out[present] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    return pa.FixedSizeListArray.from_arrays(pa.array(out.ravel()), width)
