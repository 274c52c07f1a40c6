"""Both sides of a comparison in one engine: training's events and a new log's, value by value.

A prepared dataset holds a missing number of a user or an item as the mean of training; it is told
by that exact value, and the new log's are read the same way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.engine import one_value, quoted
from twotower.data.inspect.tables import count, missing, raw_column
from twotower.data.prepare.entities import with_rows
from twotower.data.schema import DataConfig, Feature

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset

F32 = npt.NDArray[np.float32]
SAMPLE_EVENTS = 20_000
SAMPLE_FLOATS = 4_000_000


class Sides:
    """Training's events (`was`) beside those of a new log (`now`).

    Args:
        connection: the engine, after `make_log` of the new log.
        config: the schema that the new log was read with, resolved.
        data: the dataset trained on.
    """

    def __init__(self, connection: Any, config: DataConfig, data: PreparedDataset) -> None:
        self.connection, self.config, self.data = connection, config, data
        self.old = {(t, f.name): f for t, f in data.config.features()}
        rows = data.section(0)
        events = data.events.slice(rows.start, len(rows))
        connection.register("trained", events)
        for side in ("user", "item"):
            connection.execute(
                f"CREATE TABLE was_{side} AS SELECT {side}, count(*) AS n FROM trained "
                f"GROUP BY {side}"
            )
        self.events = {"was": len(rows), "now": count(connection, "SELECT 1 FROM log")}
        self.users = {"was": self._effective("was_user"), "now": self._effective("per_user")}

    def _effective(self, table: str) -> float:
        squares = "sum(n)::DOUBLE ^ 2 / sum(n::DOUBLE ^ 2)"
        return float(one_value(self.connection, f"SELECT {squares} FROM {table}"))

    def unseen(self, side: str) -> float:
        """Return the share of the new events whose user or item (`side`) training never saw."""
        entities = self.data.users if side == "user" else self.data.items
        self.connection.register("entity", with_rows(entities, "id"))
        share = one_value(
            self.connection,
            "SELECT coalesce(sum(p.n) FILTER (k.key IS NULL), 0) / sum(p.n) "
            f"FROM per_{side} p JOIN {side}s e ON e.rowid = p.{side} LEFT JOIN (SELECT key FROM "
            f"entity t JOIN was_{side} w ON w.{side} = t.row) k ON k.key = e.id",
        )
        self.connection.unregister("entity")
        return float(share)

    def count_values(self, tower: str, feature: Feature) -> None:
        """Make `was` and `now`: v, a value or null, and n, its events (of a bag, its places)."""
        old, nothing = self.old[tower, feature.name], None
        if feature.kind == "number" and old.source != "interactions":
            nothing = self.data.encoder.normalisers[f"{tower}.{feature.name}"].mean
        was = _counted(feature, self._was(tower, old), nothing)
        if old.source == "interactions" and feature.kind in ("id", "ids"):
            # Events name the values of a context by number.
            self.connection.register("codes", with_rows(self.data.context(feature.name), "value"))
            was = f"SELECT c.key AS v, k.n FROM ({was}) k LEFT JOIN codes c ON c.row = k.v"
        self.connection.execute(f"CREATE OR REPLACE TABLE was AS {was}")
        now = _counted(feature, self._now(tower, feature), nothing)
        self.connection.execute(f"CREATE OR REPLACE TABLE now AS {now}")

    def sample(self, tower: str, feature: Feature) -> tuple[F32, F32]:
        """Return the vectors of some events of both sides (R, W), NaN for a missing one.

        They are chosen by a hash of the event: the same logs always give the same.
        """
        width = feature.width or 1
        wanted = min(SAMPLE_EVENTS, max(1, SAMPLE_FLOATS // width))

        def chosen(side: str) -> str:
            return f"hash(item, user, time) % {math.ceil(self.events[side] / wanted)} = 0"

        queries = (
            self._was(tower, self.old[tower, feature.name], chosen("was")),
            self._now(tower, feature, chosen("now")),
        )
        was, now = (
            self.connection.sql(f"SELECT value FROM ({q})").fetch_arrow_table()["value"]
            for q in queries
        )
        return _vectors(was, width), _vectors(now, width)

    def _was(self, tower: str, f: Feature, chosen: str | None = None) -> str:
        """Return a query of (value, n) over training's events, or those that are `chosen`."""
        if f.source == "interactions":
            column = quoted(f"context.{f.name}")
            value = f"nullif({column}, 'nan'::FLOAT)" if f.kind == "number" else column
            return f"SELECT {value} AS value, 1 AS n FROM trained WHERE {chosen or 'true'}"
        side, entities = "user", self.data.users
        if tower == "item":
            side, entities = "item", self.data.items
        self.connection.register("entity", with_rows(entities, f"raw.{f.name}"))
        who = _who(side, f"was_{side}", "trained", chosen)
        return f"SELECT e.key AS value, w.n FROM {who} w JOIN entity e ON e.row = w.{side}"

    def _now(self, tower: str, f: Feature, chosen: str | None = None) -> str:
        """Return a query of (value, n) over the new events, or those that are `chosen`."""
        table, column = raw_column(self.config, tower, f) or ("", "")
        if table == "events":
            return f"SELECT {column} AS value, 1 AS n FROM events WHERE {chosen or 'true'}"
        side = "user" if tower == "query" else "item"
        who = _who(side, f"per_{side}", "log", chosen)
        joined = f"FROM {who} p JOIN {side}s e ON e.rowid = p.{side}"
        if table == f"{side}s":  # the id itself
            return f"SELECT e.id AS value, p.n {joined}"
        return f"SELECT t.{column} AS value, p.n {joined} LEFT JOIN {table} t ON t.id = e.id"


def _who(side: str, counted: str, events: str, chosen: str | None) -> str:
    if chosen is None:
        return counted
    return f"(SELECT {side}, 1 AS n FROM {events} WHERE {chosen})"


def _counted(feature: Feature, base: str, nothing: float | None) -> str:
    """Return a query of (v, n) that counts a query of (value, n); `nothing` stands for missing."""
    value = "value"
    if nothing is not None:
        value = f"nullif(coalesce(value, {double(nothing)}), {double(nothing)})"
    if feature.kind == "ids":
        value = f"unnest(CASE WHEN {missing(feature, 'value')} THEN [NULL] ELSE value END)"
    return f"SELECT v, sum(n)::BIGINT AS n FROM (SELECT {value} AS v, n FROM ({base})) GROUP BY v"


def double(value: float) -> str:
    """Return a float as SQL; a plain literal would be a decimal, and not exact."""
    return f"'{value!r}'::DOUBLE"


def _vectors(values: pa.ChunkedArray, width: int) -> F32:
    out = np.full((len(values), width), np.nan, np.float32)
    array = values.combine_chunks()
    valid = np.asarray(array.is_valid().to_numpy(zero_copy_only=False))
    flat = array.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    out[valid] = np.where((flat == 0).all(1, keepdims=True), np.nan, flat)
    return out
