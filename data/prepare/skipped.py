"""Skipped events: what users were shown and did not take, below `data.columns.positive_from`.

They are no events: no history, count or vocabulary knows them, and no user or item is there for
their sake. Of those between users and items of the dataset, all are kept but those of a given
validation or test; what is trained on takes those before its own events alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.data.engine import arrow_batches, table_names
from twotower.data.prepare.entities import row_map
from twotower.data.prepare.spool import PIECE, Spool
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import DataConfig

KINDS = {"user": pa.int32(), "item": pa.int32(), "time": pa.int64()}


def write_skipped(
    connection: Any, config: DataConfig, directory: Path, scratch: Path,
    previous: PreparedDataset | None,
) -> int:  # fmt: skip
    """Write skipped.arrow, sorted by (user, time), and return its rows; after `make_entities`."""
    spool = Spool(scratch / "skipped")
    spool.append({name: pa.array([], kind) for name, kind in KINDS.items()})
    parts = []
    if "skipped" in table_names(connection):
        training = " WHERE s.split = 0" if config.split.kind == "given" else ""
        parts.append(
            "SELECT u.rowid::INT AS user, i.rowid::INT AS item, s.time FROM skipped s "
            f"JOIN users u ON u.id = s.user JOIN items i ON i.id = s.item{training}"
        )
    if previous is not None and len(previous.skipped_columns["user"]):
        _insert_previous(connection, previous)
        parts.append("SELECT * FROM previous_skipped")
    rows = 0
    if parts:
        union = " UNION ALL ".join(parts)
        query = f"SELECT * FROM ({union}) ORDER BY user, time, item"
        for batch in arrow_batches(connection.cursor(), query):
            spool.append({name: batch.column(name) for name in KINDS})
            rows += len(batch)
    spool.finish(directory / "skipped.arrow")
    return rows


def _insert_previous(connection: Any, previous: PreparedDataset) -> None:
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
