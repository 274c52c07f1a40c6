"""Reading a log: Parquet or CSV, a file, folder, glob or fsspec URL, into checked Arrow columns.

Every refusal names the file, the column, the first offending row (counted from 1, without a CSV's
header) and the remedy.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from twotower.data.schema import TIME_UNITS, Feature
from twotower.errors import UserError, did_you_mean

FORMATS = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv", ".csv.gz": "csv"}
YEAR_2100_US = 4_102_444_800_000_000


def locate(root: str, location: str) -> str:
    """Return `location` below `root`, unless it is absolute or a URL of its own."""
    if not root or "://" in location or posixpath.isabs(location):
        return location
    return posixpath.join(root, location)


def list_files(location: str, key: str) -> tuple[Any, list[str]]:
    """Return the fsspec filesystem and the sorted files that `location` stands for.

    Raises:
        UserError: when nothing is there.
    """
    try:
        fs, path = fsspec.core.url_to_fs(location)
        files = _matching(fs, path)
    except (ImportError, ValueError, PermissionError) as error:
        raise UserError(f"{location}: cannot be opened ({key}): {error}") from None
    if not files:
        raise UserError(
            f"{location}: no such file ({key}): correct {key}, or data.root if it is relative"
        )
    return fs, files


def _matching(fs: Any, path: str) -> list[str]:
    if any(c in path for c in "*?["):
        return sorted(fs.glob(path))
    if fs.isdir(path):
        return sorted(f for f in fs.find(path) if _format(f))
    return [path] if fs.exists(path) else []


def _format(file: str) -> str | None:
    return next((f for suffix, f in FORMATS.items() if file.endswith(suffix)), None)


def read_table(location: str, key: str) -> pa.Table:
    """Read a whole table.

    Args:
        location: file, folder, glob or URL; all files of one format.
        key: the configuration key, for the error.
    """
    fs, files = list_files(location, key)
    formats = {_format(f) for f in files}
    if len(formats) != 1 or None in formats:
        raise UserError(f"{location}: expected .parquet or .csv files ({key}), got {files[0]}")
    try:
        return pads.dataset(files, format=formats.pop(), filesystem=fs).to_table()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{location}: cannot be read ({key}): {first}") from None


def input_state(location: str, key: str) -> list[list[Any]]:
    """Return what tells whether the files of `location` changed: name, size, time or ETag."""
    fs, files = list_files(location, key)
    state = []
    for file in files:
        info = fs.info(file)
        stamp = info.get("mtime") or info.get("ETag") or info.get("LastModified")
        state.append([file, info.get("size"), str(stamp)])
    return state


def column(table: pa.Table, name: str, location: str, key: str) -> pa.ChunkedArray:
    """Return a column, or an answer that lists what is there."""
    if name not in table.column_names:
        raise UserError(
            f"{location}: has no column '{name}' ({key}){did_you_mean(name, table.column_names)}"
        )
    return table[name]


def refuse_rows(bad: Any, values: Any, where: str, message: str) -> None:
    """Raise for the first true entry of `bad`, showing the row and its value."""
    mask = np.asarray(bad, dtype=bool)
    if not mask.any():
        return
    row = int(mask.argmax())
    value = values[row].as_py() if hasattr(values[row], "as_py") else values[row]
    raise UserError(
        f"{where}: row {row + 1} (of {int(mask.sum())} such rows): {message}: {value!r}"
    )


def as_ids(values: Any, where: str, *, allow_null: bool) -> pa.Array:
    """Return ids as a string or int64 array, with an empty string read as null.

    Raises:
        UserError: for another type, for a null where none is allowed, or a NUL character.
    """
    array = _plain(values)
    if pa.types.is_integer(array.type):
        try:
            array = array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise UserError(f"{where}: ids must fit signed 64-bit integers: {error}") from None
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.cast(pa.string())
        array = pc.if_else(pc.equal(array, ""), None, array)
        zero = pc.fill_null(pc.match_substring(array, "\0"), False)
        refuse_rows(zero, array, where, "an id may not hold a NUL character")
    elif pa.types.is_null(array.type):
        array = array.cast(pa.string())
    else:
        raise UserError(f"{where}: holds {array.type}, expected string or integer ids: cast it")
    if not allow_null and array.null_count:
        refuse_rows(array.is_null(), array, where, "the id is null or empty: drop or mend the row")
    return array


def _plain(values: Any) -> pa.Array:
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.string()) if pa.types.is_string_view(array.type) else array


def as_timestamps(values: Any, where: str, unit: str) -> npt.NDArray[np.int64]:
    """Return times as microseconds since 1970.

    Raises:
        UserError: for a null, a negative time or one after the year 2100.
    """
    array = _plain(values)
    if pa.types.is_string(array.type):
        array = _parse_times(array, where)
    refuse_rows(array.is_null(), array, where, "the timestamp is null: drop or mend the row")
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        micros = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).to_numpy()
    elif pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        raw = array.to_numpy(zero_copy_only=False)
        scale = 0.001 if unit == "ns" else float(TIME_UNITS[unit])
        approximate = raw.astype(np.float64) * scale
        _refuse_absurd(approximate, array, where, unit)
        exact = raw // 1000 if unit == "ns" else raw * TIME_UNITS[unit]
        micros = exact.astype(np.int64)
    else:
        raise UserError(f"{where}: holds {array.type}, expected integers or timestamps")
    _refuse_absurd(micros.astype(np.float64), array, where, unit)
    return np.asarray(micros, dtype=np.int64)


def _parse_times(array: pa.Array, where: str) -> pa.Array:
    """Parse ISO times, all with a zone or all without one, which means UTC."""
    try:
        return array.cast(pa.timestamp("us"))
    except pa.ArrowInvalid as error:
        reason = str(error)
    try:
        return array.cast(pa.timestamp("us", "UTC"))
    except pa.ArrowInvalid:
        raise UserError(f"{where}: {reason}; expected integers or ISO times") from None


def _refuse_absurd(micros: npt.NDArray[np.float64], array: pa.Array, where: str, unit: str) -> None:
    hint = f"check data.columns.timestamp_unit, now '{unit}' (one of {', '.join(TIME_UNITS)})"
    refuse_rows(~(micros >= 0), array, where, f"the timestamp is before 1970; {hint}")
    refuse_rows(micros >= YEAR_2100_US, array, where, f"the timestamp is after 2100; {hint}")


def as_floats(values: Any, where: str) -> pa.Array:
    """Return numbers as a float64 array; nulls stay, NaN and infinity are refused."""
    array = _plain(values)
    if not (
        pa.types.is_integer(array.type)
        or pa.types.is_floating(array.type)
        or pa.types.is_boolean(array.type)
        or pa.types.is_null(array.type)
    ):
        raise UserError(f"{where}: holds {array.type}, expected numbers: cast it")
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    array = array.cast(pa.float64())
    finite = pc.fill_null(pc.is_finite(array), True)
    refuse_rows(pc.invert(finite), array, where, "not a finite number: drop or mend the row")
    return array


def raw_feature(feature: Feature, values: Any, where: str) -> pa.Array:
    """Return a feature's column in its raw type, as a request would carry it.

    Returns:
        `id`: string or int64 with nulls; `ids` and `history`: lists of them, at most `length`;
        `number`: float64 with nulls; `vector`: lists of `width` float32.
    """
    array = _plain(values)
    if feature.pattern is not None:
        array = _extract(array, feature.pattern, where)
    if feature.kind == "id":
        return as_ids(array, where, allow_null=True)
    if feature.kind == "number":
        if pa.types.is_string(array.type) and feature.pattern is not None:
            array = array.cast(pa.float64())
        return as_floats(array, where)
    if feature.kind == "vector":
        return _vectors(feature, array, where)
    return _id_lists(feature, array, where)


def _extract(array: pa.Array, pattern: str, where: str) -> pa.Array:
    if not pa.types.is_string(array.type):
        raise UserError(f"{where}: `pattern` needs a string column, got {array.type}")
    # Arrow wants the group to have a name.
    named = re.sub(r"(?<!\\)\((?!\?)", "(?P<value>", pattern, count=1)
    groups = pc.extract_regex(array, pattern=named)
    return pc.struct_field(groups, [0])


def _id_lists(feature: Feature, array: pa.Array, where: str) -> pa.Array:
    if feature.separator is not None and pa.types.is_string(array.type):
        array = pc.split_pattern(array, pattern=feature.separator)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        raise UserError(
            f"{where}: holds {array.type}, expected a list of ids: "
            "set the feature's `separator` if the column is text"
        )
    ids = as_ids(array.flatten(), where, allow_null=True)
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


def _vectors(feature: Feature, array: pa.Array, where: str) -> pa.Array:
    if not (
        pa.types.is_list(array.type)
        or pa.types.is_large_list(array.type)
        or pa.types.is_fixed_size_list(array.type)
    ):
        raise UserError(f"{where}: holds {array.type}, expected lists of {feature.width} floats")
    lengths = pc.fill_null(pc.list_value_length(array), feature.width or 0)
    lengths = lengths.to_numpy(zero_copy_only=False)
    refuse_rows(
        lengths != feature.width, lengths, where,
        f"expected a vector of width {feature.width} (the feature's `width`), got width",
    )  # fmt: skip
    present = array.is_valid().to_numpy(zero_copy_only=False)
    out = np.zeros((len(array), feature.width or 0), dtype=np.float32)
    flat = as_floats(array.drop_null().flatten(), where)
    if flat.null_count:
        raise UserError(f"{where}: a vector holds a null: fill it in")
    out[present] = flat.to_numpy(zero_copy_only=False).reshape(-1, feature.width or 0)
    return pa.FixedSizeListArray.from_arrays(pa.array(out.ravel()), feature.width)
