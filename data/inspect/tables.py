"""The engine's tables that everything is counted in, and where a feature's values stand in them.

    log        one row an event: seq, user, item, time (µs), split, h.<context> (a hash of it)
    per_user   user, n events, train events
    per_item   item, n events, train events

Users and items are rows of the tables that `make_entities` makes: joining and grouping by them
costs a few bytes an event, whatever the log's own ids are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.data.engine import arrow_batches, column, one_value, quoted
from twotower.data.prepare.split import Cuts, find_cuts
from twotower.data.schema import DataConfig, Feature, is_own_id

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Counted:
    """How often each value occurs: enough for any quantile, share or curve of a large log.

    Attributes:
        value: ascending (V,).
        count: of each value (V,).
    """

    value: npt.NDArray[np.int64]
    count: npt.NDArray[np.int64]

    @classmethod
    def of(cls, connection: Any, query: str) -> Counted:
        """Count the values of a query's only column `value`."""
        rows = connection.execute(
            f"SELECT value, count(*) FROM ({query}) GROUP BY value ORDER BY value"
        ).fetchall()
        value, count = zip(*rows, strict=True) if rows else ((), ())
        return cls(np.array(value, np.int64), np.array(count, np.int64))

    @property
    def total(self) -> int:
        """How many there are."""
        return int(self.count.sum())

    def mean(self) -> float:
        """Return the mean; 0 of nothing."""
        return float((self.value * self.count).sum() / max(1, self.total))

    def quantile(self, q: float) -> int:
        """Return the smallest value that a share `q` of all do not exceed; 0 of nothing."""
        if not self.total:
            return 0
        place = max(1, int(np.ceil(q * self.total - 1e-9)))
        return int(self.value[np.searchsorted(np.cumsum(self.count), place)])

    def doubling(self) -> list[list[int]]:
        """Return [from, to, how many] in bins 0, 1, 2-3, 4-7 and so on, up to the last in use."""
        if not self.total:
            return []
        bins = np.frexp(self.value.astype(np.float64))[1]
        sums = np.bincount(bins, weights=self.count)
        return [[(1 << b) >> 1, max(0, (1 << b) - 1), int(n)] for b, n in enumerate(sums)]


def temporal_cuts(connection: Any, config: DataConfig) -> Cuts:
    """Return when validation and test begin, where the split is temporal."""
    if config.split.kind != "temporal":
        return Cuts()

    def times() -> Iterator[npt.NDArray[np.int64]]:
        for batch in arrow_batches(connection.cursor(), "SELECT time FROM raw_events"):
            yield column(batch, "time")

    return find_cuts(config.split, times)


def make_log(connection: Any, config: DataConfig, cuts: Cuts, contexts: list[Feature]) -> None:
    """Make `log`, `per_user` and `per_item`, after `make_entities`.

    Args:
        connection: the engine.
        config: the schema, resolved.
        cuts: of a temporal split; without any, all events are training.
        contexts: features of the interactions whose hashes are kept.
    """
    columns = ["e.seq", "u.rowid::INT AS user", "i.rowid::INT AS item", "e.time"]
    columns += [f"{hashed(f, 'e')} AS {quoted('h.' + f.name)}" for f in contexts]
    split = f"((e.time >= {cuts.validation})::TINYINT + (e.time >= {cuts.test})::TINYINT)"
    if config.split.kind == "given":
        split = "e.split"
    elif config.split.kind == "leave_last_out":
        of_user = "PARTITION BY e.user"
        split = (
            f"(CASE WHEN count(*) OVER ({of_user}) < 3 THEN 0 ELSE greatest(0, 3 - row_number() "
            f"OVER ({of_user} ORDER BY e.time DESC, e.seq DESC)) END)"
        )
    judged = f"WHERE {split} = 0 OR e.positive" if config.columns.train_on == "all" else ""
    connection.execute(
        f"CREATE TABLE log AS SELECT {', '.join(columns)}, {split}::TINYINT AS split "
        f"FROM events e JOIN users u ON u.id = e.user JOIN items i ON i.id = e.item {judged}"
    )
    for side in ("user", "item"):
        connection.execute(
            f"CREATE TABLE per_{side} AS SELECT {side}, count(*) AS n, "
            f"count(*) FILTER (split = 0) AS train FROM log GROUP BY {side}"
        )


def contexts_of(config: DataConfig) -> list[Feature]:
    """Return the features of the interactions, histories left out."""
    return [f for f in config.query if f.source == "interactions" and f.kind != "history"]


def raw_column(config: DataConfig, tower: str, feature: Feature) -> tuple[str, str] | None:
    """Return (table, column) of a feature's raw values; None for a history that is derived."""
    if feature.kind == "history":
        if feature.column is None:
            return None
        return ("events" if feature.source == "interactions" else "log_users"), "prior"
    if is_own_id(config, tower, feature):
        return ("users" if tower == "query" else "items"), "id"
    tables = {"interactions": "events", "users": "log_users", "items": "log_items"}
    return tables[feature.source or ""], quoted(f"f.{feature.name}")


def missing(feature: Feature, value: str) -> str:
    """Return the SQL condition that an event or row has no value of a feature."""
    if feature.kind in ("ids", "history"):
        return f"({value} IS NULL OR len({value}) = 0)"
    if feature.kind == "vector":  # the scan reads a missing vector as zeros
        return f"({value} IS NULL OR array_inner_product({value}, {value}) = 0)"
    return f"({value} IS NULL)"


def hashed(feature: Feature, alias: str) -> str:
    """Return SQL that gives a feature's value as a number, 0 for a missing one; a bag's as list."""
    value = f"{alias}.{quoted('f.' + feature.name)}"
    one = f"list_transform({value}, lambda x: hash(x))" if feature.kind == "ids" else (
        f"hash({value})"
    )  # fmt: skip
    nothing = "[0::UBIGINT]" if feature.kind == "ids" else "0::UBIGINT"
    return f"CASE WHEN {missing(feature, value)} THEN {nothing} ELSE {one} END"


def count(connection: Any, query: str) -> int:
    """Return how many rows a query has."""
    return int(one_value(connection, f"SELECT count(*) FROM ({query})"))
