"""Checking the columns of features: raw Arrow values to ids, bags, numbers and vectors."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.log.checks import Spot, as_floats, as_ids, is_text, parse_numbers, plain
from twotower.data.schema import Feature


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
            array = parse_numbers(spot, array)
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
    if pa.types.is_fixed_size_list(array.type):
        array = array.cast(pa.list_(array.type.value_type))
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise spot.fail(
            f"holds {array.type}, expected a list of ids: "
            "set the feature's `separator` if the column is text"
        )
    flat = plain(array.flatten())
    if pa.types.is_binary(flat.type) or is_text(flat):
        try:
            flat = flat.cast(pa.binary()).cast(pa.string())
        except pa.ArrowInvalid:
            raise spot.fail("a list holds what is no UTF-8 text: mend it") from None
    if is_text(flat) and pc.any(pc.match_substring(flat, "\0")).as_py():
        raise spot.fail("an id may not hold a NUL character")
    ids = as_ids(spot, flat, allow_null=True)
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
    flat = as_floats(spot, plain(array.filter(pa.array(present)).flatten()))
    if flat.null_count:
        raise spot.fail("a vector holds a null: fill it in")
    out[present] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    return pa.FixedSizeListArray.from_arrays(pa.array(out.ravel()), width)
