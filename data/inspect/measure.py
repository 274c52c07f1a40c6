"""The figures of a log: counts, time, popularity, histories, repeats, features and the split."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from twotower.data.engine import one_value, table_names
from twotower.data.inspect.tables import Counted, count, missing, raw_column
from twotower.data.log.scan import SPLIT_NAMES
from twotower.data.prepare.entities import count_rows
from twotower.data.prepare.split import NEVER, Cuts
from twotower.data.schema import DataConfig, Feature, is_own_id

DAY_US = 86_400_000_000
CURVE_POINTS = 200
TOP_ITEMS = 10
TOP_VALUES = 3
QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1}


def sizes(connection: Any) -> dict[str, int]:
    """Return how many events, users and items there are.

    `users` and `items` are all that are known, `active_users` and `active_items` those with
    events, `users_without_a_row` and `items_without_a_row` those their table does not have.
    """
    out = {"events": count_rows(connection, "log")}
    for side in ("user", "item"):
        out[f"{side}s"] = count_rows(connection, f"{side}s")
        out[f"active_{side}s"] = count_rows(connection, f"per_{side}")
        if f"log_{side}s" in table_names(connection):
            out[f"{side}s_without_a_row"] = count(
                connection, f"SELECT 1 FROM {side}s e ANTI JOIN log_{side}s l ON l.id = e.id"
            )
    return out


def time_span(connection: Any) -> dict[str, Any]:
    """Return the span of time and the events of each day.

    Returns:
        `first` and `last` in µs since 1970; `days`: first day with events to last, in UTC;
        `empty_days` among them; `events_a_day`: quantiles over these days; `daily`: [day since
        1970, events] of the days with any.
    """
    first, last = connection.execute("SELECT min(time), max(time) FROM log").fetchall()[0]
    daily = connection.execute(
        f"SELECT time // {DAY_US} AS day, count(*) FROM log GROUP BY day ORDER BY day"
    ).fetchall()
    days = last // DAY_US - first // DAY_US + 1
    counts = np.sort([n for _, n in daily])
    value, many = np.unique(counts, return_counts=True)
    if days > len(daily):
        value, many = np.append(0, value), np.append(days - len(daily), many)
    spread = Counted(value.astype(np.int64), many.astype(np.int64))
    return {
        "first": first, "last": last, "days": days, "empty_days": days - len(daily),
        "events_a_day": summary(spread), "daily": [list(row) for row in daily],
    }  # fmt: skip


def summary(counted: Counted) -> dict[str, float]:
    """Return mean and quantiles."""
    return {"mean": counted.mean()} | {n: counted.quantile(q) for n, q in QUANTILES.items()}


def popularity(connection: Any) -> dict[str, Any]:
    """Return how events spread over the items that have any.

    Returns:
        `curve`: [rank, events of the item of that rank], ranks spaced evenly in the logarithm;
        `gini`: 0 when all are equally popular; `top_1_percent` and `top_item`: their share of the
        events; `top`: [id, events] of the most popular.
    """
    counted = Counted.of(connection, "SELECT n AS value FROM per_item")
    value, many = counted.value[::-1], counted.count[::-1]
    ends = np.cumsum(many)
    items, events = int(ends[-1]), int((value * many).sum())
    ranks = np.unique(np.geomspace(1, items, CURVE_POINTS).round().astype(np.int64))
    best = math.ceil(items / 100)
    inside = np.clip(best - (ends - many), 0, many)
    # Ranks count from the rarest here: the sum of the ranks of equally popular items.
    last = items - (ends - many)
    rank_sums = (last - many + 1 + last) * many / 2
    gini = 2 * float((rank_sums * value).sum()) / (items * events) - (items + 1) / items
    top = connection.execute(
        "SELECT i.id, p.n FROM per_item p JOIN items i ON i.rowid = p.item "
        f"ORDER BY p.n DESC, i.id LIMIT {TOP_ITEMS}"
    ).fetchall()
    return {
        "curve": [[int(r), int(value[np.searchsorted(ends, r)])] for r in ranks],
        "gini": max(0.0, gini),
        "top_1_percent": float((inside * value).sum() / events),
        "top_item": float(value[0] / events),
        "top": [list(row) for row in top],
    }


def repeats(connection: Any) -> dict[str, int]:
    """Return how many events repeat an earlier one.

    Returns:
        `duplicates`: events that repeat user, item and time of another; `repeats`: events that
        repeat a pair of user and item, duplicates included.
    """
    events, moments, pairs = connection.execute(
        "SELECT sum(n), sum(moments), count(*) FROM (SELECT sum(n) AS n, count(*) AS moments FROM "
        "(SELECT user, item, count(*) AS n FROM log GROUP BY user, item, time) GROUP BY user, item)"
    ).fetchall()[0]
    return {"duplicates": int(events - moments), "repeats": int(events - pairs)}


def histories(connection: Any) -> dict[str, Any]:
    """Return how many events a user has, and how many came before a test event.

    Returns:
        `per_user` and `before_test`, each with mean, quantiles and `bins`: [from, to, how many];
        the second also with `without`: the share of test events of users without a history.
    """
    per_user = Counted.of(connection, "SELECT n AS value FROM per_user")
    before = Counted.of(
        connection,
        # Events of the same moment do not see each other: rank, not row_number.
        "SELECT before AS value FROM (SELECT split, rank() OVER (PARTITION BY user ORDER BY split, "
        "time) - 1 AS before FROM log WHERE user IN (SELECT user FROM log WHERE split = 2)) "
        "WHERE split = 2",
    )
    out = {
        name: {**summary(c), "bins": c.doubling()}
        for name, c in (("per_user", per_user), ("before_test", before))
    }
    without = int(before.count[before.value == 0].sum())
    out["before_test"]["without"] = without / max(1, before.total)
    return out


def split_figures(connection: Any, config: DataConfig, cuts: Cuts) -> dict[str, Any]:
    """Return what each part of the split holds, and what of it training never saw.

    Returns:
        `kind`; `cuts`: µs since 1970 at which validation and test begin, of a temporal split;
        `parts`: for train, validation and test its `events`, `users`, `items`, `first`, `last`,
        `unseen_users` and `unseen_items` (shares of its events).
    """
    parts = {}
    for number, name in enumerate(SPLIT_NAMES):
        events, first, last, users, items = connection.execute(
            "SELECT count(*), min(time), max(time), count(*) FILTER (u.train = 0), "
            "count(*) FILTER (i.train = 0) FROM log l JOIN per_user u ON u.user = l.user "
            f"JOIN per_item i ON i.item = l.item WHERE l.split = {number}"
        ).fetchall()[0]
        parts[name] = {
            "events": events,
            **{
                f"{s}s": count(connection, f"SELECT DISTINCT {s} FROM log WHERE split = {number}")
                for s in ("user", "item")
            },
            "first": first, "last": last,
            "unseen_users": users / max(1, events), "unseen_items": items / max(1, events),
        }  # fmt: skip
    known = [cuts.validation, cuts.test] if cuts.test != NEVER else None
    return {"kind": config.split.kind, "cuts": known, "parts": parts}


def feature_figures(
    connection: Any, config: DataConfig, tower: str, feature: Feature
) -> dict[str, Any]:
    """Return what a feature's column holds.

    Returns:
        `name`, `tower`, `kind`, `source`, `column`; `rows` of its table, `missing` of them, and
        `distinct` values (of a vector: different vectors); of a number `least`, `mean`, `std` and
        `most`; of a list its `mean_length`; of ids `top`: [value, how often] of the most frequent.
        A history that is derived from the events has its name and kind alone.
    """
    out: dict[str, Any] = {"name": feature.name, "tower": tower, "kind": feature.kind}
    where = raw_column(config, tower, feature)
    if where is None:
        return out | {"source": "derived", "column": None}
    own = is_own_id(config, tower, feature)
    table, value = where
    rows = count_rows(connection, table)
    absent = one_value(
        connection, f"SELECT count(*) FILTER ({missing(feature, value)}) FROM {table}"
    )
    flat = f"unnest({value})" if feature.kind in ("ids", "history") else value
    present = f"SELECT {flat} AS v FROM {table} WHERE NOT {missing(feature, value)}"
    distinct = count(connection, f"SELECT DISTINCT v FROM ({present})")
    out |= {"source": feature.source, "column": feature.source_column}
    out |= {"rows": rows, "missing": absent, "distinct": distinct}
    if feature.kind == "number":
        out |= _number(connection, present)
    if feature.kind in ("ids", "history"):
        out["mean_length"] = count(connection, present) / max(1, rows)
    if feature.kind in ("id", "ids") and not own:
        top = connection.execute(
            f"SELECT v, count(*) AS n FROM ({present}) GROUP BY v ORDER BY n DESC, v "
            f"LIMIT {TOP_VALUES}"
        ).fetchall()
        out["top"] = [list(row) for row in top]
    return out


def _number(connection: Any, present: str) -> dict[str, float | None]:
    found = connection.execute(
        f"SELECT min(v), avg(v::DOUBLE), stddev_pop(v::DOUBLE), max(v) FROM ({present})"
    ).fetchall()[0]
    return dict(zip(("least", "mean", "std", "most"), found, strict=True))
