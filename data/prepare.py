"""Preparing a log: raw columns to the prepared dataset that training reads memory-mapped.

    twotower prepare --config JOB.yaml

    prepared/
      prepared.json       counts, split, normalisers, tables and the fingerprint of the inputs
      events.arrow        sorted by (user, split, time): user, item, time, split, history end
      timeline.arrow      each user's items in order; a history is a slice of it, not a copy
      users.arrow         raw id, start of the timeline, features raw and encoded
      items.arrow         the catalogue, ascending by raw id: training count, features, display
      tables/<name>.arrow the vocabulary of an embedding table

Vocabularies, item frequencies and normalisers come from the training period alone.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.encode import Encoder, Normaliser, fit_normaliser
from twotower.data.log import input_state, raw_feature
from twotower.data.schema import ID_KINDS, DataConfig
from twotower.data.source import Log, display, ids_or_raw, locations, read_log
from twotower.data.split import SPLIT_NAMES
from twotower.data.vocabulary import Vocabulary, build_vocabulary
from twotower.errors import UserError
from twotower.files import write_json

I64 = npt.NDArray[np.int64]


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
    config, log = read_log(config)
    raw, weights = _raw_columns(config, log)
    encoder = _fit(config, raw, weights)
    _write_tables(encoder, directory / "tables")
    _write_columns(config, log, encoder, raw, directory)
    summary = _summary(config, log, encoder, fingerprint)
    write_json(directory / "prepared.json", summary)
    return summary


def _raw_columns(config: DataConfig, log: Log) -> tuple[dict[str, pa.Array], dict[str, I64]]:
    """Return each feature's raw column, and how often training saw each of its rows."""
    raw: dict[str, pa.Array] = {}
    weights: dict[str, I64] = {}
    events, c = log.events, config.columns
    train = (events.split == 0).astype(np.int64)
    user_count = np.bincount(log.user_row, train, len(log.users.ids)).astype(np.int64)
    for tower, f in config.features():
        key = f"{tower}.{f.name}"
        if f.kind == "history":
            prior = np.bincount(log.prior_row, minlength=len(log.items.ids))
            raw[key], weights[key] = log.items.ids, log.item_count + prior
        elif tower == "item":
            raw[key], weights[key] = ids_or_raw(c.item, log.items, f), log.item_count
        elif f.source == "interactions":
            where = f"{events.where}, column '{f.source_column}'"
            raw[key] = raw_feature(f, events.table[f.source_column], where)
            weights[key] = train
        else:
            raw[key], weights[key] = ids_or_raw(c.user, log.users, f), user_count
    return raw, weights


def _write_tables(encoder: Encoder, directory: Path) -> None:
    directory.mkdir(parents=True)
    for name, vocabulary in encoder.vocabularies.items():
        table = pa.table({"key": vocabulary.keys, "count": vocabulary.counts})
        _write(directory / f"{name}.arrow", table)


def _write_columns(
    config: DataConfig, log: Log, encoder: Encoder, raw: dict[str, pa.Array], directory: Path
) -> None:
    columns: dict[str, dict[str, pa.Array]] = {"query": {}, "context": {}, "item": {}}
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
        columns[side] |= {f"feature.{f.name}": encoded, f"raw.{f.name}": plain}
    events = log.events
    order = np.lexsort((events.time, events.split, log.user_row))
    user, item, time = log.user_row[order], log.item_row[order], events.time[order]
    split = events.split[order]
    history_from, history_to, timeline = _timeline(
        user, item, split, time, log.prior, log.prior_row, len(log.users.ids)
    )
    context = {n: c.take(pa.array(order)) for n, c in columns["context"].items()}
    _write(directory / "timeline.arrow", pa.table({"item": timeline.astype(np.int32)}))
    _write(directory / "events.arrow", pa.table({
        "user": user.astype(np.int32), "item": item.astype(np.int32), "time": time,
        "split": split, "weight": events.weight[order], "history_to": history_to, **context,
    }))  # fmt: skip
    _write(directory / "users.arrow", pa.table({
        "id": log.users.ids, "history_from": history_from, **columns["query"],
    }))  # fmt: skip
    shown = {f"display.{name}": display(log.items, name) for name in config.display}
    _write(directory / "items.arrow", pa.table({
        "id": log.items.ids, "train_count": log.item_count, **columns["item"], **shown,
    }))  # fmt: skip


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


def _summary(config: DataConfig, log: Log, encoder: Encoder, fingerprint: str) -> dict[str, Any]:
    events, users, items = log.events, log.users, log.items
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
            "cold_items": int((log.item_count == 0).sum()),
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
