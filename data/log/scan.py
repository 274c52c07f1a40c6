"""The scan: every file of a log, checked, into tables of the engine.

    raw_events  user, item, time (µs), [weight], [split], [positive], [prior], f.<feature>
    raw_skipped user, item, time (µs), [split]: events below `positive_from`
    raw_users   id, [prior], f.<feature>
    raw_items   id, f.<feature>, d.<display>
    raw_earlier id, prior

Rows keep the log's order, which DuckDB's `rowid` tells. Ids that a text file brought are text
until all files are read: they are numbers when every one of them is (`IdTypes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.engine import column_types, one_value, quoted
from twotower.data.log.checks import (
    Spot,
    as_floats,
    as_ids,
    as_timestamps,
    is_text,
    numpy_mask,
    whole_numbers,
)
from twotower.data.log.chunk import BadRows, Chunk
from twotower.data.log.features import raw_feature
from twotower.data.log.id_types import IdTypes
from twotower.data.log.read import read_chunks
from twotower.data.log.sources import Source, locations, resolve_sources
from twotower.data.schema import ENTITIES, LINE_FORMATS, DataConfig, Earlier, Feature, is_own_id
from twotower.errors import UserError

SPLIT_NAMES = ("train", "validation", "test")
SPLIT_NUMBERS = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "test": 2}
Report = Callable[[str, float], None]


@dataclass(frozen=True)
class Scan:
    """What the scan found, beside the tables.

    Attributes:
        config: with every feature's source filled in.
        types: of the ids.
        dropped: events below `positive_from`.
        bad_rows: rows skipped.
    """

    config: DataConfig
    types: IdTypes
    dropped: int
    bad_rows: BadRows


def scan(
    connection: Any, config: DataConfig, sources: list[Source], types: IdTypes, report: Report
) -> Scan:
    """Read and check every file of `sources` into the engine's tables.

    Raises:
        UserError: for anything wrong, naming file, column, row and remedy.
    """
    config = resolve_sources(config, sources)
    bad_rows = BadRows(config.on_bad_rows == "skip")
    events = _Events(config, types)
    readers: dict[str, _Events | _Entities | _Earlier] = {
        "raw_events": events,
        "raw_users": _Entities("users", config, types),
        "raw_items": _Entities("items", config, types),
    }
    if config.earlier is not None:
        readers["raw_earlier"] = _Earlier(config, config.earlier, types)
    total = max(1, sum(f.size for s in sources for f in s.files))
    done = 0
    empty: dict[str, dict[str, pa.Array]] = {}
    for source in sources:
        reader, names = readers[source.table], readers[source.table].names()
        for file in source.files:
            for chunk in read_chunks(file, list(names), names_key(names), bad_rows):
                rows = reader.rows(chunk, source.split)
                good = ~chunk.bad if reader.keep is None else ~chunk.bad & reader.keep
                skipped = None if reader.skipped is None else ~chunk.bad & reader.skipped
                if skipped is not None and skipped.any():
                    _insert(connection, "raw_skipped", _skipped(rows, skipped))
                if not good.all():
                    rows = {n: a.filter(pa.array(good)) for n, a in rows.items()}
                if good.any():
                    _insert(connection, source.table, pa.table(rows))
                else:
                    empty.setdefault(source.table, rows)
            file.refuse_if_changed()
            done += file.size
            report("reading the log", done / total)
    for table in empty.keys() - {s.table for s in sources if column_types(connection, s.table)}:
        _insert(connection, table, pa.table(empty[table]))
    # What Arrow keeps for later is the engine's to use now.
    pa.default_memory_pool().release_unused()
    if not types.decided:
        _refuse_nothing(connection, config, events)
    _refuse_repeated(connection, config, sources)
    types.resolve()
    return Scan(config, types, events.dropped, bad_rows)


def names_key(names: dict[str, str]) -> str:
    """Return what asks for the columns: shown where one is missing."""
    return ", ".join(dict.fromkeys(names.values()))


def _skipped(rows: dict[str, pa.Array], mask: npt.NDArray[np.bool_]) -> pa.Table:
    kept = {n: rows[n] for n in ("user", "item", "time", "split") if n in rows}
    return pa.table(kept).filter(pa.array(mask))


class _Events:
    """Checks chunks of the interactions."""

    def __init__(self, config: DataConfig, types: IdTypes) -> None:
        self.config, self.types = config, types
        self.features = [f for f in config.query if f.source == "interactions"]
        self.keep: Any = None
        self.skipped: Any = None
        self.dropped = 0
        self.lines = config.format in LINE_FORMATS
        self.clock = 0

    def names(self) -> dict[str, str]:
        """Return the columns to read, each with the key that names it."""
        c, split = self.config.columns, self.config.split
        out = {c.user: "data.columns.user", c.item: "data.columns.item"}
        if not self.lines:
            out[c.timestamp] = "data.columns.timestamp"
        if c.weight is not None:
            out[c.weight] = "data.columns.weight"
        if c.label is not None and c.positive_from is not None:
            out[c.label] = "data.columns.label"
        if split.kind == "given" and split.column is not None:
            out[split.column] = "data.split.column"
        for name in c.outcomes:
            out.setdefault(name, "data.columns.outcomes")
        for f in self.features:
            out.setdefault(f.source_column, f"data.query, feature '{f.name}'")
        return out

    def rows(self, chunk: Chunk, split: int) -> dict[str, pa.Array]:
        """Return a chunk's checked columns."""
        c, types = self.config.columns, self.types
        out = {}
        for name, column in (("user", c.user), ("item", c.item)):
            spot = Spot(chunk, column)
            ids = as_ids(spot, allow_null=False)
            out[name] = note_ids(types, name, f"raw_events.{name}", spot, ids)
        if self.lines:
            out["time"] = pa.array(self._places(len(chunk.bad), split))
        else:
            out["time"] = pa.array(as_timestamps(Spot(chunk, c.timestamp), c.timestamp_unit))
        if c.weight is not None:
            spot = Spot(chunk, c.weight)
            weight = pc.fill_null(as_floats(spot), 1.0)
            spot.refuse(numpy_mask(pc.less(weight, 0)), weight, "a weight may not be negative")
            out["weight"] = weight.cast(pa.float32())
        if self.config.split.kind == "given":
            size = len(chunk.bad)
            out["split"] = pa.array(np.full(size, split, np.int8))
            if self.config.split.column is not None:
                out["split"] = _split_column(Spot(chunk, self.config.split.column))
        for f in self.features:
            spot = Spot(chunk, f.source_column)
            name = "prior" if f.kind == "history" else f"f.{f.name}"
            out[name] = _feature(types, "query", f, "raw_events", name, spot)
        for name in c.outcomes:
            out[f"o.{name}"] = as_floats(Spot(chunk, name)).cast(pa.float32())
        self.keep = self.skipped = None
        if c.label is not None and c.positive_from is not None:
            label = as_floats(Spot(chunk, c.label))
            positive = numpy_mask(pc.greater_equal(label, c.positive_from))
            if c.train_on == "all":
                out["positive"] = pa.array(positive)
                return out
            self.keep = positive
            self.skipped = numpy_mask(pc.less(label, c.positive_from))
            self.dropped += int((~positive & ~chunk.bad).sum())
        return out

    def _places(self, size: int, split: int) -> npt.NDArray[np.int64]:
        """Return the times of a log without any: its order, a microsecond an event.

        What a user has in files of a given split is of one moment, after the training.
        """
        if split:
            return np.full(size, self.clock + split)
        self.clock += size
        return np.arange(self.clock - size, self.clock)


class _Entities:
    """Checks chunks of the users or the items."""

    keep = skipped = None

    def __init__(self, side: str, config: DataConfig, types: IdTypes) -> None:
        self.side, self.config, self.types = side, config, types
        self.id = config.columns.user if side == "users" else config.columns.item
        tower = "query" if side == "users" else "item"
        self.features = [
            (t, f) for t, f in config.features()
            if t == tower and f.source == side and not is_own_id(config, t, f)
        ]  # fmt: skip

    def names(self) -> dict[str, str]:
        """Return the columns to read, each with the key that names it."""
        out = {self.id: f"data.columns.{self.side[:-1]}"}
        for tower, f in self.features:
            out.setdefault(f.source_column, f"data.{tower}, feature '{f.name}'")
        if self.side == "items":
            for name in self.config.display:
                out.setdefault(name, "data.display")
        return out

    def rows(self, chunk: Chunk, _: int) -> dict[str, pa.Array]:
        """Return a chunk's checked columns."""
        table, spot = f"raw_{self.side}", Spot(chunk, self.id)
        ids = as_ids(spot, allow_null=False)
        out = {"id": note_ids(self.types, self.side[:-1], f"{table}.id", spot, ids)}
        for tower, f in self.features:
            name = "prior" if f.kind == "history" else f"f.{f.name}"
            spot = Spot(chunk, f.source_column)
            out[name] = _feature(self.types, tower, f, table, name, spot)
        if self.side == "items":
            out |= {f"d.{n}": _display(Spot(chunk, n)) for n in self.config.display}
        return out


class _Earlier:
    """Checks chunks of what came before the log."""

    keep = skipped = None

    def __init__(self, config: DataConfig, earlier: Earlier, types: IdTypes) -> None:
        self.user, self.types = config.columns.user, types
        self.items = Feature(
            name="earlier", kind="history", column=earlier.column, separator=earlier.separator,
            length=2**31 - 1,
        )  # fmt: skip

    def names(self) -> dict[str, str]:
        """Return the columns to read, each with the key that names it."""
        return {self.user: "data.columns.user", self.items.source_column: "data.earlier.column"}

    def rows(self, chunk: Chunk, _: int) -> dict[str, pa.Array]:
        """Return a chunk's checked columns."""
        spot = Spot(chunk, self.user)
        ids = as_ids(spot, allow_null=False)
        lists = Spot(chunk, self.items.source_column)
        return {
            "id": note_ids(self.types, "user", "raw_earlier.id", spot, ids),
            "prior": _feature(self.types, "query", self.items, "raw_earlier", "prior", lists),
        }


def _display(spot: Spot) -> pa.Array:
    """Return a column that is shown as it is: numbers and text stay, all else becomes text."""
    array = spot.values
    if is_text(array) or pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        return array
    try:
        return pa.array([None if v is None else str(v) for v in array.to_pylist()], pa.string())
    except (ValueError, OverflowError):  # times that Python cannot hold
        return array.cast(pa.string())


def _feature(types: IdTypes, tower: str, f: Feature, table: str, name: str, spot: Spot) -> pa.Array:
    raw = raw_feature(f, spot)
    if f.kind == "number":
        return raw.cast(pa.float32()) if table == "raw_events" else raw
    if f.kind == "vector":
        return raw
    soft = f.separator is not None and is_text(spot.values)
    domain = "item" if f.kind == "history" else f"table {f.table_name}"
    return note_ids(types, domain, f"{table}.{name}", spot, raw, soft=soft, hard=bool(f.pattern))


def note_ids(
    types: IdTypes, domain: str, column: str, spot: Spot, ids: pa.Array,
    *, soft: bool = False, hard: bool = False,
) -> pa.Array:  # fmt: skip
    """Tell `types` what a column of ids holds; returns them as they are kept until all are read."""
    flat = ids.flatten() if pa.types.is_list(ids.type) else ids
    if flat.null_count == len(flat):
        kept = types.kept(column) or pa.string()
        return ids.cast(pa.list_(kept) if pa.types.is_list(ids.type) else kept)
    text = is_text(flat)
    soft = text and not hard and (soft or spot.column in spot.chunk.text)
    kind = "text" if soft else ("string" if text else "int64")
    other = None
    if soft and types.may_be_whole(domain) and not whole_numbers(flat):
        other = _first_word(spot, flat)
    types.note(domain, column, kind, spot.where, other)
    return ids


def _first_word(spot: Spot, flat: pa.Array) -> str:
    word = next(v for v in flat if v.is_valid and not whole_numbers(pa.array([v])))
    return f"{spot.where}: '{word.as_py()}'"


def _split_column(spot: Spot) -> pa.Array:
    values = as_ids(spot, allow_null=False)
    if not is_text(values):
        raise spot.fail(f"holds {values.type}, expected train, validation or test")
    encoded = values.dictionary_encode()
    known = encoded.dictionary.to_pylist()
    numbers = np.array([SPLIT_NUMBERS.get(v, -1) for v in known] + [-1], np.int8)
    index = pc.fill_null(encoded.indices, len(known)).to_numpy(zero_copy_only=False)
    spot.refuse(numbers[index] < 0, values, "expected train, validation or test")
    return pa.array(numbers[index])


def _insert(connection: Any, table: str, rows: pa.Table) -> None:
    known = column_types(connection, table)
    connection.register("chunk", rows)
    if not known:
        connection.execute(f"CREATE TABLE {table} AS SELECT * FROM chunk")
    else:
        for name in rows.column_names:
            # A column of nulls was kept as text until its first id came.
            kind = rows.schema.field(name).type
            integer = pa.types.is_int64(kind) or (
                pa.types.is_list(kind) and pa.types.is_int64(kind.value_type)
            )
            if integer and known[name].startswith("VARCHAR"):
                to = known[name].replace("VARCHAR", "BIGINT")
                connection.execute(f"ALTER TABLE {table} ALTER {quoted(name)} TYPE {to}")
        columns = ", ".join(map(quoted, rows.column_names))
        connection.execute(f"INSERT INTO {table} ({columns}) SELECT {columns} FROM chunk")
    connection.unregister("chunk")


def _refuse_nothing(connection: Any, config: DataConfig, events: _Events) -> None:
    where = locations(config)["data.interactions"]
    if not one_value(connection, "SELECT count(*) FROM raw_events"):
        if events.dropped:
            raise UserError(
                f"{where}, column '{config.columns.label}': no label reaches "
                "data.columns.positive_from: lower it"
            )
        raise UserError(f"{where}: the log is empty: it needs at least one event")


def _refuse_repeated(connection: Any, config: DataConfig, sources: list[Source]) -> None:
    for side in (*ENTITIES, "earlier"):
        source = next((s for s in sources if s.key == f"data.{side}"), None)
        if source is None:
            continue
        repeated = connection.execute(
            f"SELECT id, min(rowid), max(rowid), count(*) FROM raw_{side} GROUP BY id "
            "HAVING count(*) > 1 ORDER BY 2 LIMIT 1"
        ).fetchall()
        for found in repeated:
            column = config.columns.item if side == "items" else config.columns.user
            raise UserError(
                f"{locations(config)[source.key]}, column '{column}': {found[0]!r} stands in row "
                f"{found[1] + 1} and again in row {found[2] + 1} ({found[3]} times): keep one"
            )
