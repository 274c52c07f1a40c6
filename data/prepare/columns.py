"""Encoded columns: users.arrow, items.arrow and the values of context features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.encode import Normaliser
from twotower.data.engine import arrow_batches, quoted, table_names
from twotower.data.log.id_types import IdTypes
from twotower.data.prepare.entities import context_ids
from twotower.data.prepare.spool import Spool, read_arrow
from twotower.data.prepare.vocabularies import PIECE, Seen
from twotower.data.prepared import array
from twotower.data.schema import DataConfig, Feature, is_own_id
from twotower.data.vocabulary import DynamicIds, Vocabulary, murmur3
from twotower.errors import UserError

Array = npt.NDArray[Any]


def write_contexts(
    connection: Any, config: DataConfig, types: IdTypes, seen: dict[str, Seen], directory: Path,
    scratch: Path,
) -> None:  # fmt: skip
    """Write contexts/<feature>.arrow: each value, its training count, its embedding row or key."""
    directory.mkdir(parents=True)
    for f in context_ids(config):
        spool = Spool(scratch / "context")
        kind = pa.int64() if types.dtype(f"table {f.table_name}") == "int64" else pa.string()
        spool.append({
            "value": pa.array([], kind), "train_count": pa.array([], pa.int64()),
            "feature": pa.array([], pa.int64()),
        })  # fmt: skip
        row, join = _row_of(config, f, "v.id", "t")
        query = (
            f"SELECT v.id AS value, {row} AS row FROM {quoted('values_' + f.name)} v {join} "
            "ORDER BY v.rowid"
        )
        count, done = seen[f"values_{f.name}"].count, 0
        for batch in arrow_batches(connection, query):
            value = batch.column("value")
            rows = _rows(config, f, value, batch.column("row"))
            part = count[done : done + len(rows)]
            spool.append({"value": value, "train_count": part, "feature": rows})
            done += len(rows)
        spool.finish(directory / f"{f.name}.arrow")


def _row_of(config: DataConfig, f: Feature, raw: str, alias: str) -> tuple[str, str]:
    """Return the column of a raw id's row in its vocabulary, and the join that it needs."""
    if config.table(f.table_name).slots is not None:
        return "NULL::BIGINT", ""
    table = quoted("vocabulary_" + f.table_name)
    return f"{alias}.rowid", f"LEFT JOIN {table} {alias} ON {alias}.key = {raw}"


def _dynamic(config: DataConfig, f: Feature, raw: pa.Array) -> DynamicIds | None:
    """Return a table's dynamic ids, None where it has a vocabulary."""
    slots = config.table(f.table_name).slots
    if slots is None:
        return None
    return DynamicIds("int64" if pa.types.is_int64(raw.type) else "string", slots)


def _rows(config: DataConfig, f: Feature, raw: pa.Array, known: pa.Array) -> Array:
    """Return the embedding row, or key, of raw ids, -1 for null.

    Args:
        config: the schema.
        f: whose ids they are.
        raw: ids.
        known: their rows in the vocabulary, null where it lacks them; those are hashed.
    """
    if (dynamic := _dynamic(config, f, raw)) is not None:
        return dynamic.lookup(raw)
    oov_rows = config.table(f.table_name).oov_rows
    rows = np.asarray(pc.fill_null(known, -1).to_numpy(zero_copy_only=False), np.int64)
    rows = np.where(rows >= 0, rows + oov_rows, rows)
    unseen = (rows < 0) & np.asarray(raw.is_valid().to_numpy(zero_copy_only=False))
    if unseen.any():
        rows[unseen] = murmur3(raw.filter(pa.array(unseen))) % oov_rows
    return rows


def write_histories(config: DataConfig, directory: Path, scratch: Path) -> None:
    """Write histories/<table>.arrow: the timeline in the table's rows or keys, to be gathered."""
    (directory / "histories").mkdir()
    line = read_arrow(directory / "timeline.arrow")["item"]
    items = read_arrow(directory / "items.arrow")
    for f in {f.table_name: f for f in config.histories()}.values():
        keys = config.table(f.table_name).slots is not None
        row_of = array(items, f"history.{f.name}").astype(np.int64 if keys else np.int32)
        spool = Spool(scratch / "histories")
        spool.append({"row": row_of[:0]})
        for start in range(0, len(line), PIECE):
            spool.append({"row": row_of[np.asarray(line.slice(start, PIECE))]})
        spool.finish(directory / "histories" / f"{f.table_name}.arrow")


class EntityWriter:
    """Writes users.arrow or items.arrow: the raw id, each feature raw and encoded.

    Args:
        connection: the engine, after `build_vocabularies`.
        config: the schema, resolved.
        side: users or items.
        seen: how often training saw each.
        spool: of the file.
        scratch: folder for further spools.
    """

    def __init__(
        self, connection: Any, config: DataConfig, side: str, seen: Seen, spool: Spool,
        scratch: Path,
    ) -> None:  # fmt: skip
        self.connection, self.config, self.side = connection, config, side
        self.seen, self.spool = seen, spool
        self.tower = "query" if side == "users" else "item"
        self.features = [
            f for t, f in config.features()
            if t == self.tower and f.source == side and f.kind != "history"
        ]  # fmt: skip
        self.numbers = Spool(scratch / f"{side}.numbers")
        self.has_table = f"log_{side}" in table_names(connection)
        self.vocabularies: dict[str, Vocabulary] = {}

    def write(self) -> tuple[dict[str, Normaliser], int]:
        """Write all columns; returns the normalisers and how many have no row in their table."""
        done = without = 0
        for batch in arrow_batches(self.connection, self._query()):
            self._append(batch, done)
            done += batch.num_rows
            without += batch.column("without").to_numpy(zero_copy_only=False).sum()
        normalisers = {
            f"{self.tower}.{f.name}": self._normalise(f)
            for f in self.features
            if f.kind == "number"
        }
        return normalisers, int(without)

    def _raw(self, f: Feature) -> str:
        return "e.id" if is_own_id(self.config, self.tower, f) else "l." + quoted(f"f.{f.name}")

    def _query(self) -> str:
        columns = ["e.id"]
        columns.append("(l.id IS NULL) AS without" if self.has_table else "false AS without")
        joins = [f"LEFT JOIN log_{self.side} l ON l.id = e.id"] if self.has_table else []
        for i, f in enumerate(self.features):
            raw = self._raw(f)
            if f.kind == "id":
                row, join = _row_of(self.config, f, raw, f"t{i}")
                joins.append(join)
                columns.append(f"{row} AS row{i}")
            if f.kind == "ids":
                raw = f"coalesce({raw}, [])"
            columns.append(f"{raw} AS raw{i}")
        if self.side == "items":
            for i, f in enumerate(self.config.histories()):
                row, join = _row_of(self.config, f, "e.id", f"th{i}")
                joins.append(join)
                columns.append(f"{row} AS rowh{i}")
            for i, name in enumerate(self.config.display):
                columns.append(f"l.{quoted('d.' + name)} AS display{i}")
        return f"SELECT {', '.join(columns)} FROM {self.side} e {' '.join(joins)} ORDER BY e.rowid"

    def _append(self, batch: pa.RecordBatch, done: int) -> None:
        columns: dict[str, Any] = {"id": batch.column("id")}
        if self.side == "items":
            columns["train_count"] = self.seen.count[done : done + batch.num_rows]
        for i, f in enumerate(self.features):
            raw = batch.column(f"raw{i}")
            if f.kind == "number":
                self.numbers.append({f.name: raw})
                continue
            if f.kind == "vector" and raw.null_count:
                raw = _zeros_for_null(raw, f.width or 0)
            columns[f"raw.{f.name}"] = columns[f"feature.{f.name}"] = raw
            if f.kind == "id":
                columns[f"feature.{f.name}"] = _rows(self.config, f, raw, batch.column(f"row{i}"))
            elif f.kind == "ids":
                rows = self._lookup(f, raw.flatten())
                columns[f"feature.{f.name}"] = with_values(raw, rows)
        if self.side == "items":
            for i, f in enumerate(self.config.histories()):
                known = batch.column(f"rowh{i}")
                columns[f"history.{f.name}"] = _rows(self.config, f, batch.column("id"), known)
            for i, name in enumerate(self.config.display):
                columns[f"display.{name}"] = batch.column(f"display{i}")
        self.spool.append(columns)

    def _lookup(self, f: Feature, ids: pa.Array) -> Array:
        if (dynamic := _dynamic(self.config, f, ids)) is not None:
            return dynamic.lookup(ids)
        if f.table_name not in self.vocabularies:
            query = f"SELECT key FROM {quoted('vocabulary_' + f.table_name)} ORDER BY rowid"
            # A cursor: the stream of rows stays open beside it.
            cursor = self.connection.cursor()
            keys = cursor.sql(query).fetch_arrow_table()["key"].combine_chunks()
            oov = self.config.table(f.table_name).oov_rows
            self.vocabularies[f.table_name] = Vocabulary(keys, keys, oov)
        return self.vocabularies[f.table_name].lookup(ids)

    def _normalise(self, f: Feature) -> Normaliser:
        """Append a number's columns, a missing one set to the mean."""
        raw = self.numbers.columns[f.name].finish()
        where = f"data.{self.tower}, feature '{f.name}'"

        def trained(start: int) -> Array:
            piece = raw.slice(start, PIECE).to_numpy(zero_copy_only=False)
            return np.asarray(piece[self.seen.count[start : start + PIECE] > 0], np.float64)

        norm = fit_normaliser(trained, len(raw), where)
        for start in range(0, len(raw), PIECE):
            piece = pc.fill_null(raw.slice(start, PIECE), norm.mean)
            scaled = norm.apply(piece.to_numpy(zero_copy_only=False))
            self.spool.append({f"raw.{f.name}": piece, f"feature.{f.name}": scaled})
        return norm


def fit_normaliser(pieces: Any, length: int, where: str) -> Normaliser:
    """Return mean and deviation of a number, piece by piece (Chan et al. 1979).

    Args:
        pieces: from a start to the values from there on, NaN where there is none.
        length: of all.
        where: for the error.

    Raises:
        UserError: when there is no value at all.
    """
    count, mean, squares = 0, 0.0, 0.0
    for start in range(0, length, PIECE):
        values = pieces(start)
        values = values[~np.isnan(values)]
        if not len(values):
            continue
        own, total = float(values.mean()), count + len(values)
        delta = own - mean
        squares += float(((values - own) ** 2).sum()) + delta**2 * count * len(values) / total
        mean += delta * len(values) / total
        count = total
    if not count:
        raise UserError(f"{where}: no value in the training period: remove the feature")
    std = float(np.sqrt(squares / count))
    return Normaliser(mean=mean, std=std if std > 1e-12 else 1.0)


def _zeros_for_null(vectors: pa.Array, width: int) -> pa.Array:
    out = np.zeros((len(vectors), width), np.float32)
    present = vectors.is_valid().to_numpy(zero_copy_only=False)
    flat = vectors.filter(pa.array(present)).flatten()
    out[present] = flat.to_numpy(zero_copy_only=False).reshape(-1, width)
    return pa.FixedSizeListArray.from_arrays(pa.array(out.ravel()), width)


def with_values(lists: pa.Array, values: Array) -> pa.Array:
    """Return lists of the same lengths, none for null, that hold `values`."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
