"""Vocabularies from the training period, growing without moving: a row once given is kept.

Keys follow in the order in which they came to be known: by the moment of the training event at
which they reached the table's `min_count`. Later days can therefore only append, and preparing all
days at once gives the same rows as preparing them one by one. Two things come before that order:
the ids that the table pins, and, where `max_size` cuts, the choice of the most frequent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.engine import arrow_batches, one_value, quoted
from twotower.data.log.id_types import IdTypes
from twotower.data.prepare.entities import context_ids, count_rows
from twotower.data.prepare.spool import Spool
from twotower.data.schema import ID_KINDS, DataConfig, Feature, is_own_id
from twotower.data.vocabulary import Vocabulary
from twotower.errors import UserError

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset

I64 = npt.NDArray[np.int64]
NEVER = 2**62
PIECE = 1 << 20


@dataclass(frozen=True)
class Seen:
    """How often training saw each row of something, and the first time."""

    count: I64
    first: I64

    @classmethod
    def nothing(cls, rows: int) -> Seen:
        """Return counts of zero."""
        return cls(np.zeros(rows, np.int64), np.full(rows, NEVER, np.int64))

    def add(self, rows: npt.NDArray[Any], time: I64) -> None:
        """Count training events."""
        self.count[:] += np.bincount(rows, minlength=len(self.count))
        np.minimum.at(self.first, rows, time)

    def table(self) -> pa.Table:
        """Return the rows that training saw, for the engine."""
        row = np.flatnonzero(self.count)
        return pa.table({"row": row, "n": self.count[row], "first": self.first[row]})


def count_training(
    connection: Any, config: DataConfig, events: pa.Table, train: int
) -> dict[str, Seen]:
    """Count users, items and context values of the training events.

    Args:
        connection: the engine, which gets a table `seen_<name>` of each.
        config: the schema, resolved.
        events: events.arrow, mapped; training events come first.
        train: how many they are.
    """
    names = {"users": "user", "items": "item"}
    names |= {f"values_{f.name}": f"context.{f.name}" for f in context_ids(config)}
    seen = {name: Seen.nothing(count_rows(connection, name)) for name in names}
    for start in range(0, train, PIECE):
        piece = events.slice(start, min(PIECE, train - start))
        time = np.asarray(piece["time"])
        for name, column in names.items():
            values, moments = piece[column].combine_chunks(), time
            if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
                lengths = np.diff(np.asarray(values.offsets))
                rows, moments = np.asarray(values.flatten()), np.repeat(time, lengths)
            else:
                rows = np.asarray(values)
            known = rows >= 0
            seen[name].add(rows[known], moments[known])
    for name, s in seen.items():
        connection.register("counted", s.table())
        connection.execute(f'CREATE TABLE "seen_{name}" AS SELECT * FROM counted')
        connection.unregister("counted")
    return seen


def build_vocabularies(
    connection: Any, config: DataConfig, types: IdTypes, events: pa.Table, train: int,
    previous: PreparedDataset | None,
) -> None:  # fmt: skip
    """Make the table `vocabulary_<table>` (key, count) of each that has one, in row order.

    Raises:
        UserError: for a pinned id that is no id of its table.
    """
    by_table: dict[str, list[tuple[str, Feature]]] = {}
    for tower, f in config.features():
        if f.kind in ID_KINDS and config.table(f.table_name).slots is None:
            by_table.setdefault(f.table_name, []).append((tower, f))
    for name, features in by_table.items():
        settings = config.table(name)
        kind = types.sql(f"table {name}")
        parts = [part for t, f in features for part in _occurrences(connection, config, t, f)]
        if any(f.kind != "history" and own_item(config, t, f) for t, f in features):
            # The item's own id counts its events; a history adds those from before the log alone.
            parts = [p for p in parts if not p.endswith("/*history*/")]
        union = " UNION ALL ".join(dict.fromkeys(parts))
        connection.execute(
            f"CREATE OR REPLACE TABLE counted AS SELECT key::{kind} AS key, "
            f"sum(n)::BIGINT AS n, min(first) AS since FROM ({union}) "
            "WHERE key IS NOT NULL GROUP BY key"
        )
        if settings.min_count > 1:
            _since_min_count(connection, config, features, settings.min_count, events, train,
                             previous)  # fmt: skip
        connection.execute(f"CREATE OR REPLACE TABLE fixed (key {kind}, place BIGINT)")
        _fix(connection, name, config, kind, previous)
        kept = one_value(connection, "SELECT count(*) FROM fixed")
        room = "" if settings.max_size is None else f"LIMIT {max(0, settings.max_size - kept)}"
        connection.execute(
            f"CREATE TABLE {quoted('vocabulary_' + name)} AS "
            "SELECT key, coalesce(n, 0) AS count FROM ("
            "  SELECT f.key, c.n, 0 AS part, f.place, 0 AS since FROM fixed f "
            "  LEFT JOIN counted c ON c.key = f.key UNION ALL "
            "  SELECT key, n, 1 AS part, 0 AS place, since FROM ("
            "    SELECT * FROM counted c WHERE n >= "
            f"   {settings.min_count} AND NOT EXISTS (SELECT 1 FROM fixed f WHERE f.key = c.key)"
            f"   ORDER BY n DESC, key {room})"
            ") ORDER BY part, place, since, key"
        )
    connection.execute("DROP TABLE IF EXISTS counted; DROP TABLE IF EXISTS fixed")


def own_item(config: DataConfig, tower: str, feature: Feature) -> bool:
    """Whether a feature is the item's id itself."""
    return tower == "item" and is_own_id(config, tower, feature)


def _occurrences(connection: Any, config: DataConfig, tower: str, f: Feature) -> list[str]:
    """Return queries of (key, n, first): what training saw of a feature's ids."""
    if f.kind == "history":
        own = (
            "SELECT i.id AS key, s.n, s.first FROM seen_items s "
            "JOIN items i ON i.rowid = s.row /*history*/"
        )
        if not any(h.column for h in config.histories()):
            return [own]
        # A user's items from before the log count when the user is first trained on.
        return [own, (
            "SELECT i.id AS key, 1 AS n, s.first FROM priors p "
            "JOIN seen_users s ON s.row = p.user JOIN items i ON i.rowid = p.item"
        )]  # fmt: skip
    if f.source == "interactions":
        table = quoted(f"values_{f.name}")
        seen = quoted(f"seen_values_{f.name}")
        return [f"SELECT v.id AS key, s.n, s.first FROM {seen} s JOIN {table} v ON v.rowid = s.row"]
    side = "users" if tower == "query" else "items"
    joined = f"seen_{side} s JOIN {side} e ON e.rowid = s.row"
    if is_own_id(config, tower, f):
        return [f"SELECT e.id AS key, s.n, s.first FROM {joined}"]
    value = quoted(f"f.{f.name}")
    value = f"unnest(l.{value})" if f.kind == "ids" else f"l.{value}"
    return [f"SELECT {value} AS key, s.n, s.first FROM {joined} JOIN log_{side} l ON l.id = e.id"]


def _since_min_count(
    connection: Any, config: DataConfig, features: list[tuple[str, Feature]], min_count: int,
    events: pa.Table, train: int, previous: PreparedDataset | None,
) -> None:  # fmt: skip
    """Set `since` of each key to the time of the training event that made it frequent enough."""
    newest = -1
    if previous is not None and previous.summary["time"].get("train"):
        newest = previous.summary["time"]["train"][1]
    names = ["user", "item", "time", *(f"context.{f.name}" for f in context_ids(config))]
    connection.register("train_events", events.slice(0, train).select(names))
    parts = []
    for tower, f in features:
        if f.kind == "history":
            if any(h.column for h in config.histories()):
                parts.append(
                    "SELECT i.id AS key, s.first AS time FROM priors p "
                    "JOIN seen_users s ON s.row = p.user JOIN items i ON i.rowid = p.item "
                    f"WHERE s.first > {newest}"
                )
            if any(own_item(config, t, g) for t, g in features):
                continue
            parts.append(
                "SELECT i.id AS key, t.time FROM train_events t JOIN items i ON i.rowid = t.item "
                f"WHERE t.time > {newest}"
            )
            continue
        if f.source == "interactions":
            value, table = quoted(f"context.{f.name}"), quoted(f"values_{f.name}")
            code = f"unnest({value})" if f.kind == "ids" else value
            parts.append(
                f"SELECT v.id AS key, t.time FROM (SELECT {code} AS code, time FROM train_events "
                f"WHERE time > {newest}) t JOIN {table} v ON v.rowid = t.code"
            )
            continue
        side, row = ("users", "user") if tower == "query" else ("items", "item")
        joined = f"train_events t JOIN {side} e ON e.rowid = t.{row}"
        value = "e.id"
        if not is_own_id(config, tower, f):
            value = "l." + quoted(f"f.{f.name}")
            value = f"unnest({value})" if f.kind == "ids" else value
            joined += f" JOIN log_{side} l ON l.id = e.id"
        parts.append(f"SELECT {value} AS key, t.time FROM {joined} WHERE t.time > {newest}")
    occurrences = " UNION ALL ".join(dict.fromkeys(parts))
    connection.execute(
        "CREATE OR REPLACE TABLE reached AS SELECT key, time FROM ("
        "  SELECT o.key, o.time, row_number() OVER (PARTITION BY o.key ORDER BY o.time) AS place, "
        f"  count(*) OVER (PARTITION BY o.key) AS fresh, c.n FROM ({occurrences}) o "
        f"  JOIN counted c ON c.key = o.key WHERE c.n >= {min_count}"
        f") WHERE place = greatest(1, {min_count} - (n - fresh))"
    )
    connection.execute("UPDATE counted SET since = r.time FROM reached r WHERE r.key = counted.key")
    connection.execute("DROP TABLE reached")
    connection.unregister("train_events")


def _fix(
    connection: Any, name: str, config: DataConfig, kind: str, previous: PreparedDataset | None
) -> None:
    """Fill `fixed` with the keys whose rows are given: pinned ids, or those of the old dataset."""
    if previous is not None:
        before = previous.encoder.vocabularies[name]
        assert isinstance(before, Vocabulary)  # of the same schema
        keys = before.keys
    else:
        pinned = config.table(name).pinned
        try:
            keys = pa.array([int(p) if kind == "BIGINT" else str(p) for p in pinned],
                            pa.int64() if kind == "BIGINT" else pa.string())  # fmt: skip
        except (ValueError, pa.ArrowInvalid, OverflowError):
            raise UserError(
                f"data.tables.{name}.pinned: the table holds int64 ids, got {pinned}: "
                "correct the ids"
            ) from None
    fixed = pa.table({"key": keys, "place": pa.array(np.arange(len(keys)))})
    connection.register("given", fixed)
    connection.execute("INSERT INTO fixed SELECT key, place FROM given")
    connection.unregister("given")


def write_vocabularies(
    connection: Any, config: DataConfig, types: IdTypes, directory: Path, scratch: Path
) -> dict[str, dict[str, Any]]:
    """Write tables/<name>.arrow; returns what prepared.json says of each table."""
    directory.mkdir(parents=True)
    out: dict[str, dict[str, Any]] = {}
    for f in (f for _, f in config.features() if f.kind in ID_KINDS):
        name = f.table_name
        if name in out:
            continue
        dtype, slots = types.dtype(f"table {name}"), config.table(name).slots
        if slots is not None:
            out[name] = {"rows": slots, "slots": slots, "dtype": dtype}
            continue
        spool = Spool(scratch / "vocabulary")
        kind = pa.int64() if dtype == "int64" else pa.string()
        spool.append({"key": pa.array([], kind), "count": pa.array([], pa.int64())})
        query = f"SELECT key, count FROM {quoted('vocabulary_' + name)} ORDER BY rowid"
        keys = 0
        for batch in arrow_batches(connection, query):
            spool.append({"key": batch.column("key"), "count": batch.column("count")})
            keys += batch.num_rows
        spool.finish(directory / f"{name}.arrow")
        oov = config.table(name).oov_rows
        out[name] = {"rows": oov + keys, "oov_rows": oov, "dtype": dtype}
    return out
