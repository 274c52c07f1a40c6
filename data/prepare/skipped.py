"""Skipped events: what users were shown and did not take, below `data.columns.positive_from`.

They are no events: no history, count or vocabulary knows them, and no user or item is there for
their sake. All are kept but those of a given validation or test; what is trained on takes those
before its own events alone. Those of a user or an item that the dataset does not have wait, by
their raw ids, for a day that brings both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.data.engine import arrow_batches, table_names
from twotower.data.log.id_types import IdTypes
from twotower.data.prepare.entities import row_map
from twotower.data.prepare.spool import PIECE, Spool
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import DataConfig

KNOWN, WAITING = "skipped.arrow", "skipped_waiting.arrow"
ROWS = {"user": pa.int32(), "item": pa.int32(), "time": pa.int64()}


def write_skipped(
    connection: Any, config: DataConfig, types: IdTypes, directory: Path, scratch: Path,
    previous: PreparedDataset | None,
) -> int:  # fmt: skip
    """Write what is skipped, sorted by (user, time), after `make_entities`.

    Returns:
        The number of rows of skipped.arrow.
    """
    ids = {side: types.dtype(side) for side in ("user", "item")}
    sql = {side: types.sql(side) for side in ids}
    connection.execute(
        f"CREATE TABLE all_skipped (user {sql['user']}, item {sql['item']}, time BIGINT)"
    )
    if "skipped" in table_names(connection):
        training = " WHERE split = 0" if config.split.kind == "given" else ""
        connection.execute(
            f"INSERT INTO all_skipped SELECT user, item, time FROM skipped{training}"
        )
    parts = [
        "SELECT u.rowid::INT AS user, i.rowid::INT AS item, s.time FROM all_skipped s "
        "JOIN users u ON u.id = s.user JOIN items i ON i.id = s.item"
    ]
    if previous is not None:
        connection.register("waiting", previous.skipped_waiting)
        connection.execute("INSERT INTO all_skipped SELECT user, item, time FROM waiting")
        _insert_known(connection, previous)
        parts.append("SELECT * FROM previous_skipped")
    known = " UNION ALL ".join(parts)
    waiting = (
        "SELECT s.user, s.item, s.time FROM all_skipped s LEFT JOIN users u ON u.id = s.user "
        "LEFT JOIN items i ON i.id = s.item WHERE u.id IS NULL OR i.id IS NULL"
    )
    raw = {side: pa.string() if kind == "string" else pa.int64() for side, kind in ids.items()}
    rows = _write(connection, known, ROWS, directory / KNOWN, scratch)
    _write(connection, waiting, raw | {"time": pa.int64()}, directory / WAITING, scratch)
    return rows


def _write(
    connection: Any, query: str, kinds: dict[str, pa.DataType], path: Path, scratch: Path
) -> int:
    spool, rows = Spool(scratch / path.stem), 0
    spool.append({name: pa.array([], kind) for name, kind in kinds.items()})
    ordered = f"SELECT * FROM ({query}) ORDER BY user, time, item"
    for batch in arrow_batches(connection.cursor(), ordered):
        spool.append({name: batch.column(name) for name in kinds})
        rows += len(batch)
    spool.finish(path)
    return rows


def _insert_known(connection: Any, previous: PreparedDataset) -> None:
    """Make a table of the skipped events of what is appended to, in today's rows."""
    columns = previous.skipped_columns
    to = {"user": row_map(connection, "users"), "item": row_map(connection, "items")}
    connection.execute("CREATE TABLE previous_skipped (user INT, item INT, time BIGINT)")
    for start in range(0, len(columns["user"]), PIECE):
        part = {name: values[start : start + PIECE] for name, values in columns.items()}
        chunk = pa.table(
            {n: pa.array(to[n][v] if n in to else np.asarray(v)) for n, v in part.items()}
        )
        connection.register("skipped_chunk", chunk)
        connection.execute("INSERT INTO previous_skipped SELECT * FROM skipped_chunk")
        connection.unregister("skipped_chunk")
