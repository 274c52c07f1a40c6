"""Rows for raw ids: users, items and the values of context features, each ascending by raw id.

All of it happens in the engine, so that tens of millions of ids need no more memory than a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.engine import arrow_batches, column, column_types, one_value, quoted, table_names
from twotower.data.log.id_types import IdTypes
from twotower.data.prepared import PreparedDataset, gather
from twotower.data.schema import DataConfig, Feature

I32 = npt.NDArray[np.int32]
USERS_A_PIECE = 1 << 16


def context_ids(config: DataConfig) -> list[Feature]:
    """Return the query features of the interactions whose values are ids."""
    return [f for f in config.query if f.source == "interactions" and f.kind in ("id", "ids")]


def make_entities(
    connection: Any, config: DataConfig, types: IdTypes, previous: PreparedDataset | None
) -> None:
    """Make the tables `users`, `items`, `priors` and `values_<feature>`; a row is a `rowid`.

    The views `events`, `skipped`, `log_users` and `log_items` show the scan's tables with ids of
    one type.
    """
    _views(connection, config, types)
    if config.earlier is not None and previous is None:
        _add_earlier(connection, config, types)
    known = table_names(connection)
    parts = {
        "users": ["SELECT user AS id FROM events"],
        "items": ["SELECT item AS id FROM events"],
    }
    for side in parts:
        if f"log_{side}" in known:
            parts[side].append(f"SELECT id FROM log_{side}")
        if previous is not None:
            connection.register(f"previous_{side}", with_rows(getattr(previous, side), "id"))
            parts[side].append(f"SELECT key AS id FROM previous_{side}")
    _distinct(connection, "users", parts["users"])
    prior = next((f for f in config.histories() if f.column), None)
    if prior is not None:
        _first_priors(connection, prior, previous)
        parts["items"].append("SELECT id FROM prior_ids")
    _distinct(connection, "items", parts["items"])
    if prior is not None:
        _make_priors(connection, previous)
    for f in context_ids(config):
        value = f"unnest({quoted('f.' + f.name)})" if f.kind == "ids" else quoted(f"f.{f.name}")
        values = [f"SELECT {value} AS id FROM events"]
        if previous is not None:
            connection.register(
                f"previous_values_{f.name}", with_rows(previous.context(f.name), "value")
            )
            values.append(f"SELECT key AS id FROM previous_values_{f.name}")
        _distinct(connection, f"values_{f.name}", values)


def with_rows(table: pa.Table, key: str) -> pa.Table:
    """Return a mapped table's key column beside its row numbers."""
    return pa.table({"key": table[key], "row": pa.array(np.arange(len(table), dtype=np.int32))})


def _views(connection: Any, config: DataConfig, types: IdTypes) -> None:
    known = table_names(connection)

    def view(name: str, table: str, domains: dict[str, str]) -> None:
        if table not in known:
            return
        chosen = []
        for c, kind in column_types(connection, table).items():
            if c in domains:
                to = types.sql(domains[c], is_list=kind.endswith("[]"))
                chosen.append(f"CAST({quoted(c)} AS {to}) AS {quoted(c)}")
            else:
                chosen.append(quoted(c))
        connection.execute(
            f"CREATE VIEW {name} AS SELECT {', '.join(chosen)}, rowid AS seq FROM {table}"
        )

    features = {
        side: {
            f"f.{f.name}": f"table {f.table_name}"
            for _, f in config.features()
            if f.source == side and f.kind in ("id", "ids")
        }
        for side in ("interactions", "users", "items")
    }
    prior = {"prior": "item"}
    own = {"user": "user", "item": "item"}
    view("events", "raw_events", own | prior | features["interactions"])
    view("skipped", "raw_skipped", own)
    view("log_users", "raw_users", {"id": "user"} | prior | features["users"])
    view("log_items", "raw_items", {"id": "item"} | features["items"])


def _add_earlier(connection: Any, config: DataConfig, types: IdTypes) -> None:
    """Put the lists of `data.earlier` a second before the first event, a microsecond an item."""
    columns = column_types(connection, "raw_events")
    more = {"weight": "1.0", "split": "0", "positive": "true"}
    more |= {f"o.{name}": "'nan'" for name in config.columns.outcomes}
    for f in config.query:
        if f.source == "interactions" and f.kind == "vector":
            more[f"f.{f.name}"] = f"{[0.0] * (f.width or 0)}"
    given = "".join(
        f", ({value})::{columns[name]} AS {quoted(name)}"
        for name, value in more.items()
        if name in columns
    )
    connection.execute(
        f"CREATE TABLE earlier AS SELECT CAST(id AS {types.sql('user')}) AS user, "
        f"CAST(unnest(prior) AS {types.sql('item')}) AS item, "
        "(SELECT min(time) FROM raw_events) - 1000000 - len(prior) + generate_subscripts(prior, 1) "
        f"AS time{given}, generate_subscripts(prior, 1) AS seq FROM raw_earlier"
    )
    connection.execute(
        "ALTER VIEW events RENAME TO log_events; CREATE VIEW events AS "
        "SELECT * FROM log_events UNION ALL BY NAME SELECT * FROM earlier"
    )


def _distinct(connection: Any, table: str, parts: list[str]) -> None:
    union = " UNION ALL ".join(parts)
    connection.execute(
        f'CREATE TABLE "{table}" AS SELECT id FROM (SELECT DISTINCT id FROM ({union})) '
        "WHERE id IS NOT NULL ORDER BY id"
    )


def _first_priors(connection: Any, prior: Feature, previous: PreparedDataset | None) -> None:
    """Make `prior_ids`: the items from before the log of users who are new to the dataset."""
    new = ""
    if previous is not None:
        users = previous.users
        if prior.source == "interactions":
            # A user of the users table alone is new when the first event comes.
            users = users.filter(pa.array(previous.events_of > 0))
        connection.register("old_users", with_rows(users, "id"))
        new = "WHERE u.id NOT IN (SELECT key FROM old_users)"
    if prior.source == "users":
        lists = (
            f"SELECT u.rowid::INT AS user, l.prior AS ids FROM users u "
            f"JOIN log_users l ON l.id = u.id {new}"
        )
    else:
        # Later lists would repeat what the events themselves say: a user's first event counts.
        lists = (
            "SELECT u.rowid::INT AS user, e.prior AS ids FROM (SELECT user, prior FROM events "
            "QUALIFY row_number() OVER (PARTITION BY user ORDER BY time, seq) = 1) e "
            f"JOIN users u ON u.id = e.user {new}"
        )
    connection.execute(
        "CREATE TABLE prior_ids AS SELECT user, unnest(ids) AS id, "
        f"generate_subscripts(ids, 1) AS place FROM ({lists})"
    )


def _make_priors(connection: Any, previous: PreparedDataset | None) -> None:
    """Make `priors` (user, item): new users' items from before the log, and those known already."""
    connection.execute(
        "CREATE TABLE unordered AS SELECT p.user, i.rowid::INT AS item, p.place::INT AS place "
        "FROM prior_ids p JOIN items i ON i.id = p.id"
    )
    for rows in _known_priors(connection, previous) if previous is not None else ():
        connection.register("known", rows)
        connection.execute("INSERT INTO unordered SELECT user, item, place FROM known")
        connection.unregister("known")
    connection.execute(
        "CREATE TABLE priors AS SELECT user, item FROM unordered ORDER BY user, place"
    )
    connection.execute("DROP TABLE unordered; DROP TABLE prior_ids")


def _known_priors(connection: Any, previous: PreparedDataset) -> Iterator[pa.Table]:
    """Yield the items from before the log that the dataset appended to holds."""
    user_map, item_map = row_map(connection, "users"), row_map(connection, "items")
    for low in range(0, len(user_map), USERS_A_PIECE):
        piece = slice(low, low + USERS_A_PIECE)
        start, lengths = previous.history_from[piece], previous.prior_lengths[piece]
        items, _ = gather(previous.timeline, start, start + lengths)
        place = np.arange(len(items)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        yield pa.table({
            "user": np.repeat(user_map[piece], lengths), "item": item_map[items],
            "place": place.astype(np.int32),
        })  # fmt: skip


def row_map(connection: Any, table: str) -> I32:
    """Return the new row of each row that the dataset appended to had; it ascends."""
    query = (
        f"SELECT t.rowid::INT AS row FROM previous_{table} p "
        f'JOIN "{table}" t ON t.id = p.key ORDER BY p.row'
    )
    pieces = [column(b, "row") for b in arrow_batches(connection, query)]
    return np.concatenate(pieces).astype(np.int32) if pieces else np.empty(0, np.int32)


def count_rows(connection: Any, table: str) -> int:
    """Return the rows of a table."""
    return int(one_value(connection, f'SELECT count(*) FROM "{table}"'))
