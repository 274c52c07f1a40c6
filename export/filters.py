"""The attributes that requests may filter a bundle's items by: `filters.npz`.

Of attribute number i, in the manifest's order: `<i>.values` (V,), `<i>.offset` (V + 1,) and
`<i>.rows`, the catalogue's rows that have value v being `rows[offset[v]:offset[v + 1]]`.
`serve/triton/filters.py` reads it. Strings are UTF-8 bytes, as nothing in a bundle is pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.errors import UserError, did_you_mean

FILTERS = "filters.npz"


def write_filters(bundle: Path, names: Sequence[str]) -> dict[str, str]:
    """Write the filters of a bundle that has its `items.parquet`, if any.

    Args:
        bundle: the directory.
        names: columns of `data.display`.

    Returns:
        Attribute -> the type of its values: string, int64 or bool.

    Raises:
        UserError: naming a column that there is not, or whose type cannot be filtered by.
    """
    items = pq.read_table(bundle / "items.parquet")
    kinds: dict[str, str] = {}
    arrays: dict[str, npt.NDArray[np.generic]] = {}
    for number, name in enumerate(names):
        if name not in items.column_names:
            near = did_you_mean(name, items.column_names) or ": add it there"
            raise UserError(f"export.filters: '{name}' is not in data.display{near}")
        column = items[name].combine_chunks()
        rows = np.arange(len(column))
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            rows = pc.list_parent_indices(column).to_numpy()
            column = pc.list_flatten(column)
        kinds[name] = _kind(name, column.type)
        known = pc.is_valid(column).to_numpy(zero_copy_only=False)
        values, place = _values(column.drop_null(), kinds[name])
        # A list that names a value twice has it once.
        pairs = np.unique(np.stack([place, rows[known]]), axis=1)
        arrays |= {
            f"{number}.values": values,
            f"{number}.offset": np.searchsorted(pairs[0], np.arange(len(values) + 1)),
            f"{number}.rows": pairs[1],
        }
    if names:
        np.savez(bundle / FILTERS, **arrays)  # type: ignore[arg-type]
    return kinds


def _kind(name: str, kind: pa.DataType) -> str:
    for known, fits in (
        ("bool", pa.types.is_boolean), ("int64", pa.types.is_integer),
        ("string", lambda t: pa.types.is_string(t) or pa.types.is_large_string(t)),
    ):  # fmt: skip
        if fits(kind):
            return known
    raise UserError(
        f"export.filters: '{name}' is of type {kind}: strings, integers and booleans, and lists of "
        "them, can be filtered by"
    )


def _values(column: pa.Array, kind: str) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.int64]]:
    """Return the distinct values, ascending, and the place of each entry's among them."""
    if kind == "string":
        entries = np.array([text.encode() for text in column.to_pylist()], dtype=np.bytes_)
    else:
        entries = column.to_numpy(zero_copy_only=False).astype(bool if kind == "bool" else np.int64)
    values, place = np.unique(entries, return_inverse=True)
    return values, place.astype(np.int64)
