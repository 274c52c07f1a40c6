"""Preparing a log: raw columns to the prepared dataset that training reads memory-mapped.

    twotower prepare --config JOB.yaml

    prepared/
      prepared.json       counts, split, normalisers, tables and the fingerprint of the inputs
      events.arrow        sorted by (user, split, time): user and item rows, time, split, history end
      timeline.arrow      each user's items in order; a history is a slice of it, so it costs no copy
      users.arrow         raw id, start of the timeline, features raw and encoded
      items.arrow         the catalogue, ascending by raw id: training count, features, display
      tables/<name>.arrow the vocabulary of an embedding table

Vocabularies, item frequencies and normalisers come from the training period alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.encode import Encoder, Normaliser, fit_normaliser
from twotower.data.log import (
    as_floats,
    as_ids,
    as_timestamps,
    column,
    input_state,
    locate,
    raw_feature,
    read_table,
    refuse_rows,
)
from twotower.data.schema import ID_KINDS, DataConfig, Feature
from twotower.data.split import SPLIT_NAMES, assign_split
from twotower.data.vocabulary import Vocabulary, build_vocabulary
from twotower.errors import UserError, did_you_mean
from twotower.files import write_json

I64 = npt.NDArray[np.int64]


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


def prepare_inputs(config: DataConfig) -> dict[str, Any]:
    """Return what the prepared dataset depends on, for its fingerprint."""
    return {
        "data": asdict(config),
        "files": {key: input_state(loc, key) for key, loc in locations(config).items()},
    }


def prepare(config: DataConfig, directory: Path, fingerprint: str) -> dict[str, Any]:
    """Write the prepared dataset into `directory`, which is empty.

    Args:
        config: a validated schema.
        directory: where to write; the caller renames it into place.
        fingerprint: of `prepare_inputs`.

    Returns:
        The content of `prepared.json`.

    Raises:
        UserError: for anything wrong with the log, naming file, column, row and remedy.
    """
    config.validate()
    places = locations(config)
    events = _read_events(config, places)
    config = resolve_sources(config, places, events.table.column_names)
    users = _entities(config.columns.user, "data.users", places, [events.user])
    prior_raw = {f.name: _prior(f, users, events) for f in config.histories() if f.column}
    extra = [p.flatten() for p in prior_raw.values()]
    items = _entities(config.columns.item, "data.items", places, [events.item, *extra])
    if len(users.ids) < 2 or len(items.ids) < 2:
        raise UserError(
            f"{events.where}: has {len(users.ids)} user(s) and {len(items.ids)} item(s): "
            "retrieval needs at least two of each"
        )
    user_row, item_row = users.rows(events.user), items.rows(events.item)
    order = np.lexsort((events.time, events.split, user_row))
    train = events.split == 0
    user_count = np.bincount(user_row[train], minlength=len(users.ids))
    item_count = np.bincount(item_row[train], minlength=len(items.ids))
    prior = next(iter(prior_raw.values())) if prior_raw else None
    prior_items = items.rows(prior.flatten()) if prior is not None else np.empty(0, np.int64)
    history_count = item_count + np.bincount(prior_items, minlength=len(items.ids))

    raw: dict[str, pa.Array] = {}
    weights: dict[str, I64] = {}
    for tower, f in config.features():
        key = f"{tower}.{f.name}"
        if f.kind == "history":
            raw[key], weights[key] = items.ids, history_count
        elif tower == "item":
            raw[key] = _ids_or_raw(config.columns.item, items, f)
            weights[key] = item_count
        elif f.source == "interactions":
            where = f"{events.where}, column '{f.source_column}'"
            raw[key] = raw_feature(f, events.table[f.source_column], where)
            weights[key] = train.astype(np.int64)
        else:
            raw[key] = _ids_or_raw(config.columns.user, users, f)
            weights[key] = user_count
    encoder = _fit(config, raw, weights)

    tables = directory / "tables"
    tables.mkdir(parents=True)
    for name, vocabulary in encoder.vocabularies.items():
        table = pa.table({"key": vocabulary.keys, "count": vocabulary.counts})
        _write(tables / f"{name}.arrow", table)
    history_from, history_to, timeline = _timeline(
        user_row[order], item_row[order], events.split[order], events.time[order],
        prior, prior_items, len(users.ids),
    )  # fmt: skip
    columns = {"query": {}, "context": {}, "item": {}}  # type: dict[str, dict[str, pa.Array]]
    for tower, f in config.features():
        key = f"{tower}.{f.name}"
        if f.kind == "history":
            identity = replace(f, kind="id")
            columns["item"][f"history.{f.name}"] = encoder.encode(tower, identity, raw[key])
            continue
        side = "context" if f.source == "interactions" else tower
        encoded, plain = encoder.encode(tower, f, raw[key]), raw[key]
        if f.kind == "number":
            plain = pc.fill_null(plain, encoder.normalisers[key].mean)
        columns[side][f.name], columns[side][f"raw.{f.name}"] = encoded, plain
    context = {n: c.take(pa.array(order)) for n, c in columns["context"].items()}
    _write(directory / "timeline.arrow", pa.table({"item": timeline.astype(np.int32)}))
    _write(directory / "events.arrow", pa.table({
        "user": user_row[order].astype(np.int32), "item": item_row[order].astype(np.int32),
        "time": events.time[order], "split": events.split[order],
        "weight": events.weight[order], "history_to": history_to, **context,
    }))  # fmt: skip
    _write(directory / "users.arrow", pa.table({
        "id": users.ids, "history_from": history_from, **columns["query"],
    }))  # fmt: skip
    display = {f"display.{name}": _display(items, name) for name in config.display}
    _write(directory / "items.arrow", pa.table({
        "id": items.ids, "train_count": item_count, **columns["item"], **display,
    }))  # fmt: skip
    summary = _summary(config, events, users, items, item_count, encoder, fingerprint)
    write_json(directory / "prepared.json", summary)
    return summary


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
    c, dropped = config.columns, 0
    if c.label is not None and c.positive_from is not None:
        spot = f"{where}, column '{c.label}'"
        label = as_floats(column(table, c.label, where, "data.columns.label"), spot)
        keep = pc.fill_null(pc.greater_equal(label, c.positive_from), False)
        dropped = table.num_rows - int(pc.sum(keep).as_py() or 0)
        table, mask = table.filter(keep), keep.to_numpy(zero_copy_only=False)
        given = [np.concatenate(given)[mask]]
        if table.num_rows == 0:
            raise UserError(f"{spot}: no label reaches data.columns.positive_from: lower it")

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
    split = assign_split(config.split, table, where, user, time, np.concatenate(given))
    return Events(table, where, user, item, time, split, weight, dropped)


def resolve_sources(
    config: DataConfig, places: dict[str, str], log_columns: list[str]
) -> DataConfig:
    """Return the schema with every feature's `source` filled in, or say what is missing."""
    have = {"interactions": log_columns, "users": [], "items": []}  # type: dict[str, list[str]]
    for name in ("users", "items"):
        if (key := f"data.{name}") in places:
            have[name] = read_table(places[key], key).column_names
    have["users"] = [*have["users"], config.columns.user]
    have["items"] = [*have["items"], config.columns.item]
    resolved = {"query": [], "item": []}  # type: dict[str, list[Feature]]
    for tower, f in config.features():
        possible = ["users", "interactions"] if tower == "query" else ["items"]
        found = [s for s in possible if f.source_column in have[s]]
        if f.source_column == config.columns.user:
            found = ["users"]
        if f.kind == "history" and f.column is None:
            resolved[tower].append(f)
            continue
        spot = f"data.{tower}, feature '{f.name}'"
        if f.source is not None and f.source not in found or not found:
            tables = [f.source] if f.source else possible
            names = [n for s in tables for n in have[s]]
            raise UserError(
                f"{spot}: no column '{f.source_column}' in {' or '.join(tables)}"
                f"{did_you_mean(f.source_column, names)}"
            )
        if f.source is None and len(found) > 1:
            raise UserError(
                f"{spot}: column '{f.source_column}' is in users and in interactions: "
                "say which with `source: users` or `source: interactions`"
            )
        resolved[tower].append(replace(f, source=f.source or found[0]))
    return replace(config, **resolved)


def _entities(id_column: str, key: str, places: dict[str, str], logs: list[pa.Array]) -> Entities:
    table, ids, where = None, None, key
    if key in places:
        where = places[key]
        table = read_table(where, key)
        spot = f"{where}, column '{id_column}'"
        values = column(table, id_column, where, f"data.columns.{key[5:-1]}")
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


def _ids_or_raw(id_column: str, entities: Entities, feature: Feature) -> pa.Array:
    if feature.source_column == id_column and feature.kind == "id":
        return entities.ids
    return entities.raw(feature)


def _fit(config: DataConfig, raw: dict[str, pa.Array], weights: dict[str, I64]) -> Encoder:
    seen: dict[str, list[tuple[pa.Array, I64]]] = {}
    normalisers: dict[str, Normaliser] = {}
    item_id_tables = {
        f.table_name
        for t, f in config.features()
        if t == "item" and f.kind == "id" and f.source_column == config.columns.item
    }
    for tower, f in config.features():
        key = f"{tower}.{f.name}"
        values, count = raw[key], weights[key]
        if f.kind == "number":
            used = values.filter(pa.array(count > 0))
            normalisers[key] = fit_normaliser(used, f"data.{tower}, feature '{f.name}'")
        if f.kind not in ID_KINDS:
            continue
        if f.kind == "history" and f.table_name in item_id_tables:
            # The item's own id is counted already; only items from before the log are new.
            own = next(w for k, w in weights.items() if k.startswith("item."))
            count = count - own
        if f.kind == "ids":
            count = np.repeat(count, values.value_lengths().to_numpy(zero_copy_only=False))
            values = values.flatten()
        seen.setdefault(f.table_name, []).append((values, count))
    vocabularies: dict[str, Vocabulary] = {}
    for name, parts in seen.items():
        types = {str(v.type) for v, _ in parts}
        if len(types) > 1:
            raise UserError(
                f"embedding table '{name}': its features hold {' and '.join(sorted(types))} ids: "
                "give them different tables, or cast one"
            )
        ids = pa.concat_arrays([v for v, _ in parts])
        counts = np.concatenate([c for _, c in parts])
        vocabularies[name] = build_vocabulary(ids, counts, config.table(name))
    return Encoder(vocabularies=vocabularies, normalisers=normalisers)


def _timeline(
    user: I64, item: I64, split: npt.NDArray[np.int8], time: I64,
    prior: pa.Array | None, prior_items: I64, num_users: int,
) -> tuple[I64, I64, I64]:  # fmt: skip
    """Return each user's start, each event's history end, and the items they point into.

    Events come sorted by (user, split, time). A user's part of the timeline holds the items from
    before the log and then the events' own; a history ends before the first event of its moment,
    so events of the same moment do not see each other.
    """
    events_of = np.bincount(user, minlength=num_users)
    priors_of = np.zeros(num_users, np.int64)
    if prior is not None:
        priors_of = prior.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    start = np.cumsum(events_of + priors_of) - (events_of + priors_of)
    timeline = np.empty(int((events_of + priors_of).sum()), np.int64)
    place = np.arange(len(user)) - (np.cumsum(events_of) - events_of)[user]
    position = start[user] + priors_of[user] + place
    timeline[position] = item
    owner = np.repeat(np.arange(num_users), priors_of)
    within = np.arange(len(owner)) - (np.cumsum(priors_of) - priors_of)[owner]
    timeline[start[owner] + within] = prior_items
    new_moment = np.ones(len(user), bool)
    new_moment[1:] = (np.diff(user) != 0) | (np.diff(split) != 0) | (np.diff(time) != 0)
    moment = np.maximum.accumulate(np.where(new_moment, np.arange(len(user)), 0))
    return start, position[moment], timeline


def _display(items: Entities, name: str) -> pa.Array:
    assert items.table is not None
    values = column(items.table, name, items.where, "data.display").combine_chunks()
    return values.take(pa.array(items.table_row, mask=items.table_row < 0))


def _summary(
    config: DataConfig, events: Events, users: Entities, items: Entities,
    item_count: I64, encoder: Encoder, fingerprint: str,
) -> dict[str, Any]:  # fmt: skip
    counts = np.bincount(events.split, minlength=3).tolist()
    return {
        "format": 1,
        "fingerprint": fingerprint,
        "config": asdict(config),
        "counts": {
            "events": len(events.time),
            "dropped_by_label": events.dropped,
            **{f"{name}_events": n for name, n in zip(SPLIT_NAMES, counts, strict=True)},
            "users": len(users.ids),
            "items": len(items.ids),
            "items_without_a_row": int((items.table_row < 0).sum()) if items.table else 0,
            "cold_items": int((item_count == 0).sum()),
        },
        "time": {
            name: [int(t.min()), int(t.max())]
            for i, name in enumerate(SPLIT_NAMES)
            if len(t := events.time[events.split == i])
        },
        "normalisers": {k: asdict(n) for k, n in encoder.normalisers.items()},
        "tables": {
            name: {"rows": v.rows, "oov_rows": v.oov_rows, "dtype": v.dtype}
            for name, v in encoder.vocabularies.items()
        },
    }


def _write(path: Path, table: pa.Table) -> None:
    table = table.combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
