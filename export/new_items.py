"""Items of a Parquet table as a bundle's item graph takes them, checked as `prepare` checks a log.

Shape legend: `M` rows of the table, `D` width of a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from twotower.data.encode import arrow_type
from twotower.data.log.checks import Spot, as_ids
from twotower.data.log.chunk import BadRows, Chunk
from twotower.data.log.features import raw_feature
from twotower.data.schema import DataConfig, TensorSpec, is_own_id
from twotower.errors import UserError, did_you_mean
from twotower.export.golden import raw_tensors, session

BATCH = 1024


@dataclass(frozen=True)
class NewItems:
    """A table's items.

    Attributes:
        ids: (M,) string or int64, no two alike.
        features: a column for each tensor of the item graph.
        display: the columns shown beside an answer.
    """

    ids: pa.Array
    features: pa.Table
    display: pa.Table


def read_items(path: Path, data: DataConfig, specs: list[TensorSpec], id_dtype: str) -> NewItems:
    """Read a Parquet table with one row an item, of the columns that `data` names.

    Args:
        path: of the file.
        data: the schema that the towers were trained with.
        specs: of the item graph's inputs.
        id_dtype: string or int64, of the catalogue's ids.

    Raises:
        UserError: naming the column, the row and the remedy.
    """
    own = data.columns.item
    sources = {f.name: own if is_own_id(data, "item", f) else f.source_column for f in data.item}
    needed = [own, *sources.values(), *data.display]
    table = _read(path, needed)
    bad = BadRows(skip=True)
    chunk = Chunk(
        str(path), {n: table[n].combine_chunks() for n in table.column_names},
        lambda row: f"row {row + 1}", bad, np.zeros(len(table), bool),
    )  # fmt: skip
    ids = _typed(as_ids(Spot(chunk, own), allow_null=False), id_dtype, Spot(chunk, own))
    by_name = {f.name: f for f in data.item}
    columns = {}
    for spec in specs:
        feature = by_name[spec.name]
        if is_own_id(data, "item", feature):
            columns[spec.name] = _typed(ids, spec.dtype, Spot(chunk, own))
            continue
        spot = Spot(chunk, feature.source_column)
        raw = raw_feature(feature, spot)
        columns[spec.name] = raw if spec.dtype == "float32" else _as(raw, spec, spot)
    if bad.count:
        raise UserError(f"{bad.first[0]}: mend it; nothing was changed")
    counts = pc.value_counts(ids)
    if len(counts) < len(ids):
        twice = next(c for c in counts if c["counts"].as_py() > 1)
        raise UserError(
            f"{path}, column '{own}': item {twice['values'].as_py()!r} stands in "
            f"{twice['counts']} rows: keep one row an item"
        )
    return NewItems(ids, pa.table(columns), table.select(data.display))


def _read(path: Path, needed: list[str]) -> pa.Table:
    if not path.is_file():
        raise UserError(f"{path}: no such file: --update takes a Parquet table, one row an item")
    try:
        names = pq.read_schema(path).names
        for name in needed:
            if name not in names:
                raise UserError(
                    f"{path}: no column '{name}', which the towers were trained with"
                    f"{did_you_mean(name, names)}"
                )
        table = pq.read_table(path, columns=list(dict.fromkeys(needed)))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be read as Parquet ({reason}): write it again") from None
    if not len(table):
        raise UserError(f"{path}: holds no row: give the items to add or update")
    return table


def _typed(ids: pa.Array, dtype: str, spot: Spot) -> pa.Array:
    """Return ids in the type that the bundle's have; numbers can be words, not words numbers."""
    wanted = pa.string() if dtype == "string" else pa.int64()
    if ids.type == wanted or ids.null_count == len(ids):
        return ids.cast(wanted)
    if dtype == "string":
        return ids.cast(wanted)
    raise spot.fail(f"holds {ids.type} ids, the bundle's are {wanted}: cast the column")


def _as(raw: pa.Array, spec: TensorSpec, spot: Spot) -> pa.Array:
    if spec.is_list:
        flat = _typed(raw.flatten(), spec.dtype, spot)
        return pa.ListArray.from_arrays(raw.offsets, flat).cast(arrow_type(spec))
    return _typed(raw, spec.dtype, spot)


def id_array(ids: Sequence[Any], dtype: str) -> npt.NDArray[Any]:
    """Return raw ids as `item_ids.npy` holds them."""
    if dtype == "int64":
        return np.array(ids, np.int64)
    return np.array([value.encode() for value in ids], np.bytes_)


def item_vectors(
    bundle: Path, specs: list[TensorSpec], items: NewItems, report: Callable[[float], None]
) -> npt.NDArray[np.float32]:
    """Return the vectors (M, D) that a bundle's item graph gives.

    Args:
        bundle: directory of a checked bundle.
        specs: of the graph's inputs.
        items: of `read_items`.
        report: is told the share done.

    Raises:
        UserError: for items that the tower cannot compute with, with their ids.
    """
    graph, features = session(bundle / "item.onnx"), items.features
    for name, mean in _means(bundle / "item.onnx", specs).items():
        place = features.schema.get_field_index(name)
        features = features.set_column(place, name, pc.fill_null(features[name], mean))
    parts = []
    for start in range(0, len(features), BATCH):
        rows = features.slice(start, BATCH).to_pylist()
        parts.append(graph.run(["vector"], raw_tensors(specs, rows))[0])
        report(min(1.0, (start + BATCH) / len(features)))
    vectors = np.concatenate(parts)
    check_vectors(vectors, items.ids)
    return vectors


def check_vectors(vector_MD: npt.NDArray[np.float32], ids: Any) -> None:
    """Refuse vectors that are not numbers, or nothing but zeros: their tower overflowed.

    Raises:
        UserError: with the first such items.
    """
    bad: npt.NDArray[np.bool_] = np.logical_not(
        np.isfinite(vector_MD).all(axis=1) & vector_MD.any(axis=1)
    )
    if bad.any():
        first = [ids[int(row)].as_py() for row in np.flatnonzero(bad)[:3]]
        raise UserError(
            f"{int(bad.sum())} of {len(bad)} item vectors hold NaN, infinity or zeros alone, those "
            f"of items {', '.join(map(repr, first))} first: look at their features for numbers far "
            "from the training log's, and at train/curves.png for a run that diverged"
        )


def _means(graph: Path, specs: list[TensorSpec]) -> dict[str, float]:
    """Return what stands for a missing number: the training period's mean, which the graph has."""
    numbers = {f"{s.name}:mean": s.name for s in specs if s.kind == "number"}
    if not numbers:
        return {}
    model = onnx.load(graph, load_external_data=False)
    return {
        numbers[t.name]: float(onnx.numpy_helper.to_array(t).item())
        for t in model.graph.initializer
        if t.name in numbers
    }
