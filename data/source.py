"""The log's tables after reading: checked events, and users and items with their features.

Every refusal names the file, the column, the row and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.log import (
    as_floats,
    as_ids,
    as_timestamps,
    column,
    locate,
    raw_feature,
    read_table,
    refuse_rows,
)
from twotower.data.schema import DataConfig, Feature
from twotower.data.split import assign_split
from twotower.errors import UserError, did_you_mean

I64 = npt.NDArray[np.int64]
ENTITIES = ("users", "items")


@dataclass(frozen=True)
class Events:
    """The log's checked columns, in the log's order."""

    table: pa.Table
    where: str
    user: pa.Array
    item: pa.Array
    time: I64
    split: npt.NDArray[np.int8]
    weight: npt.NDArray[np.float32]
    dropped: int


@dataclass(frozen=True)
class Entities:
    """Users or items: ascending raw ids, and the table's row of each (-1 where it has none)."""

    ids: pa.Array
    table: pa.Table | None
    table_row: I64
    where: str

    def rows(self, ids: pa.Array) -> I64:
        """Return the row of each raw id."""
        found = pc.index_in(ids, value_set=self.ids)
        return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64)

    def raw(self, feature: Feature) -> pa.Array:
        """Return a feature's raw column in row order, null or empty where the table has no row."""
        assert self.table is not None
        values = self.table[feature.source_column]
        raw = raw_feature(feature, values, f"{self.where}, column '{feature.source_column}'")
        index = pa.array(self.table_row, mask=self.table_row < 0)
        taken = raw.take(index)
        if feature.kind in ("ids", "history"):
            empty = pa.array([[]], raw.type)
            return pc.coalesce(taken, empty[0]) if taken.null_count else taken
        if feature.kind == "vector" and taken.null_count:
            width = feature.width or 0
            dense = np.zeros((len(taken), width), np.float32)
            dense[self.table_row >= 0] = (
                taken.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
            )
            return pa.FixedSizeListArray.from_arrays(pa.array(dense.ravel()), width)
        return taken


@dataclass(frozen=True)
class Log:
    """Everything read, with rows for raw ids.

    Attributes:
        events: in the log's order.
        users: all users, of the log and of the users table.
        items: the catalogue.
        user_row: of each event.
        item_row: of each event.
        item_count: training events of each item.
        prior: each user's items from before the log, oldest first; None without any.
        prior_row: item row of each of them.
    """

    events: Events
    users: Entities
    items: Entities
    user_row: I64
    item_row: I64
    item_count: I64
    prior: pa.Array | None
    prior_row: I64


def read_log(config: DataConfig) -> tuple[DataConfig, Log]:
    """Read and check every table.

    Returns:
        The schema with every feature's source filled in, and the log.

    Raises:
        UserError: for anything wrong, naming file, column, row and remedy.
    """
    places = locations(config)
    events = _read_events(config, places)
    tables = {
        side: read_table(places[key], key) for side in ENTITIES if (key := f"data.{side}") in places
    }
    config = _resolve_sources(config, tables, events.table.column_names)
    c = config.columns
    users = _entities(c.user, "users", places, tables.get("users"), [events.user])
    history = next((f for f in config.histories() if f.column), None)
    prior = _prior(history, users, events) if history else None
    logs = [events.item, *([prior.flatten()] if prior is not None else [])]
    items = _entities(c.item, "items", places, tables.get("items"), logs)
    if len(users.ids) < 2 or len(items.ids) < 2:
        raise UserError(
            f"{events.where}: has {len(users.ids)} user(s) and {len(items.ids)} item(s): "
            "retrieval needs at least two of each"
        )
    item_row = items.rows(events.item)
    train = (events.split == 0).astype(np.int64)
    item_count = np.bincount(item_row, train, len(items.ids)).astype(np.int64)
    prior_row = items.rows(prior.flatten()) if prior is not None else np.empty(0, np.int64)
    return config, Log(
        events, users, items, users.rows(events.user), item_row, item_count, prior, prior_row
    )


def locations(config: DataConfig) -> dict[str, str]:
    """Return the configuration key and full location of every input."""
    named = {
        "data.interactions": config.interactions,
        "data.users": config.users,
        "data.items": config.items,
        "data.split.validation_files": config.split.validation_files,
        "data.split.test_files": config.split.test_files,
    }
    return {key: locate(config.root, value) for key, value in named.items() if value}


def _read_events(config: DataConfig, places: dict[str, str]) -> Events:
    files = [("data.interactions", 0), ("data.split.validation_files", 1),
             ("data.split.test_files", 2)]  # fmt: skip
    parts, given = [], []
    for key, split in files:
        if key in places:
            part = read_table(places[key], key)
            parts.append(part)
            given.append(np.full(part.num_rows, split, np.int8))
    where = places["data.interactions"]
    try:
        table = pa.concat_tables(parts, promote_options="default")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{where}: the split's files have other columns: {error}") from None
    if table.num_rows == 0:
        raise UserError(f"{where}: the log is empty: it needs at least one event")
    c = config.columns

    def read(name: str, key: str) -> tuple[Any, str]:
        spot = f"{where}, column '{name}'"
        return column(table, name, where, f"data.columns.{key}"), spot

    user = as_ids(*read(c.user, "user"), allow_null=False)
    item = as_ids(*read(c.item, "item"), allow_null=False)
    time = as_timestamps(*read(c.timestamp, "timestamp"), c.timestamp_unit)
    weight = np.ones(len(time), np.float32)
    if c.weight is not None:
        values, spot = read(c.weight, "weight")
        numbers = pc.fill_null(as_floats(values, spot), 1.0).to_numpy(zero_copy_only=False)
        refuse_rows(numbers < 0, numbers, spot, "a weight may not be negative")
        weight = numbers.astype(np.float32)
    keep = np.ones(len(time), bool)
    if c.label is not None and c.positive_from is not None:
        values, spot = read(c.label, "label")
        positive = pc.greater_equal(as_floats(values, spot), c.positive_from)
        keep = pc.fill_null(positive, False).to_numpy(zero_copy_only=False)
        if not keep.any():
            raise UserError(f"{spot}: no label reaches data.columns.positive_from: lower it")
    kept = pa.array(keep)
    table, user, item = table.filter(kept), user.filter(kept), item.filter(kept)
    time, weight, by_file = time[keep], weight[keep], np.concatenate(given)[keep]
    splits = assign_split(config.split, table, where, user, time, by_file)
    dropped = int((~keep).sum())
    return Events(table, where, user, item, time, splits, weight, dropped)


def _resolve_sources(
    config: DataConfig, tables: dict[str, pa.Table], log_columns: list[str]
) -> DataConfig:
    have: dict[str, list[str]] = {
        side: tables[side].column_names if side in tables else [] for side in ENTITIES
    }
    have["interactions"] = log_columns
    have["users"] = [*have["users"], config.columns.user]
    have["items"] = [*have["items"], config.columns.item]
    resolved = {"query": [], "item": []}  # type: dict[str, list[Feature]]
    for tower, f in config.features():
        possible = ["users", "interactions"] if tower == "query" else ["items"]
        found = [s for s in possible if f.source_column in have[s]]
        if f.kind == "history" and f.column is None:
            resolved[tower].append(f)
            continue
        spot = f"data.{tower}, feature '{f.name}'"
        if tower == "query":
            if f.source_column == config.columns.user:
                found = ["users"]
            if f.source_column in (config.columns.item, config.columns.label):
                raise UserError(
                    f"{spot}: column '{f.source_column}' is what is to be predicted and would "
                    "leak: earlier items come with kind: history"
                )
        if (f.source is not None and f.source not in found) or not found:
            searched = [f.source] if f.source else possible
            names = [n for s in searched for n in have[s]]
            raise UserError(
                f"{spot}: no column '{f.source_column}' in {' or '.join(searched)}"
                f"{did_you_mean(f.source_column, names)}"
            )
        if f.source is None and len(found) > 1:
            raise UserError(
                f"{spot}: column '{f.source_column}' is in users and in interactions: "
                "say which with `source: users` or `source: interactions`"
            )
        resolved[tower].append(replace(f, source=f.source or found[0]))
    return replace(config, query=resolved["query"], item=resolved["item"])


def _entities(
    id_column: str, side: str, places: dict[str, str], table: pa.Table | None, logs: list[pa.Array]
) -> Entities:
    key, ids = f"data.{side}", None
    where = places.get(key, key)
    if table is not None:
        spot = f"{where}, column '{id_column}'"
        values = column(table, id_column, where, f"data.columns.{side[:-1]}")
        ids = as_ids(values, spot, allow_null=False)
        first = pc.index_in(ids, value_set=pc.unique(ids)).to_numpy(zero_copy_only=False)
        if len(np.unique(first)) < len(ids):
            _, position = np.unique(first, return_index=True)
            repeated = np.ones(len(ids), bool)
            repeated[position] = False
            refuse_rows(repeated, ids, spot, "the id stands in an earlier row too: keep one")
        if ids.type != logs[0].type:
            raise UserError(
                f"{spot}: holds {ids.type} ids, the log holds {logs[0].type}: cast one of them"
            )
    arrays = ([ids] if ids is not None else []) + logs
    if any(a.type != arrays[0].type for a in arrays if len(a)):
        raise UserError(f"{where}: earlier items hold other ids than the log: cast one of them")
    unique = pc.unique(pa.chunked_array([a for a in arrays if a.type == arrays[0].type]))
    unique = unique.take(pc.sort_indices(unique))
    row = np.full(len(unique), -1, np.int64)
    if ids is not None:
        row[pc.index_in(ids, value_set=unique).to_numpy()] = np.arange(len(ids))
    return Entities(unique, table, row, where)


def _prior(feature: Feature, users: Entities, events: Events) -> pa.Array:
    """Return each user's items from before the log: a list a user, oldest first."""
    if feature.source == "users":
        return users.raw(feature)
    where = f"{events.where}, column '{feature.source_column}'"
    lists = raw_feature(feature, events.table[feature.source_column], where)
    row = users.rows(events.user)
    # Later lists would repeat what the events themselves say: a user's first event counts.
    order = np.lexsort((events.time, row))
    seen, first = np.unique(row[order], return_index=True)
    index = np.full(len(users.ids), -1, np.int64)
    index[seen] = order[first]
    taken = lists.take(pa.array(index, mask=index < 0))
    return pc.coalesce(taken, pa.array([[]], lists.type)[0])


def ids_or_raw(id_column: str, entities: Entities, feature: Feature) -> pa.Array:
    """Return a feature's raw column; the id column itself needs no table."""
    if feature.source_column == id_column and feature.kind == "id":
        return entities.ids
    return entities.raw(feature)


def display(items: Entities, name: str) -> pa.Array:
    """Return a display column in row order, null where the table has no row."""
    assert items.table is not None
    values = column(items.table, name, items.where, "data.display").combine_chunks()
    return values.take(pa.array(items.table_row, mask=items.table_row < 0))
