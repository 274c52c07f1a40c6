"""The engine that works on logs larger than memory: DuckDB, held to a budget, spilling to disk.

DuckDB was kept over Polars after `benchmarks/prepare_engines.py` ran the same joins and the same
sort of the same 50 million events through both: DuckDB took 20 s and 2.6 GB, Polars 32 s and
3.5 GB, and DuckDB alone can be held to a memory limit.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.errors import UserError

# What DuckDB does not count: allocator slack, Arrow batches, mapped files, Python itself. With 50
# million events and 4 GB all of it peaked at 2.8 GB (benchmarks/prepare.py).
ENGINE_SHARE = 0.6
BATCH_ROWS = 1 << 18
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def open_engine(scratch: Path, memory_gb: float) -> Iterator[Any]:
    """Yield a DuckDB connection whose data lie in `scratch`, which is removed afterwards.

    Args:
        scratch: folder for its tables and what it spills.
        memory_gb: what the whole process may use, in GB.

    Raises:
        UserError: when the disk is full, or the budget is too small for the work.
    """
    import duckdb

    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    settings: dict[str, Any] = {
        "memory_limit": f"{int(memory_gb * ENGINE_SHARE * 1000)}MB",
        "temp_directory": str(scratch / "spill"),
        # What an extension would have to be fetched for is not used.
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    try:
        connection = duckdb.connect(str(scratch / "tables.duckdb"), config=settings)
        try:
            yield connection
        finally:
            connection.close()
    except duckdb.OutOfMemoryException as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"preparing needs more than data.memory_gb ({memory_gb:g}), or than the disk of "
            f"{scratch.parent} has left: raise it, or free space: {first}"
        ) from None
    except (duckdb.Error, OSError) as error:
        if _disk_is_full(error):
            raise UserError(
                f"{scratch.parent}: the disk is full: nothing was changed; free some space, or set "
                "run_dir to a larger disk, and run again"
            ) from None
        if isinstance(error, duckdb.IOException) or getattr(error, "filename", "") is None:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{scratch.parent}: cannot be written or read: {reason}: check the disk, and run "
                "again; nothing was changed"
            ) from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _disk_is_full(error: Exception) -> bool:
    # DuckDB says so in words alone, in errors of several kinds.
    words = any(text in str(error) for text in ("No space left", "File too large", "quota"))
    return words or (isinstance(error, OSError) and error.errno in FULL)


def arrow_batches(connection: Any, query: str, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Stream the answer of a query, which is never held whole."""
    relation = connection.sql(query)
    yield from relation.fetch_arrow_reader(rows)


def one_value(connection: Any, query: str) -> Any:
    """Return the only value of a query's answer."""
    return connection.execute(query).fetchall()[0][0]


def table_names(connection: Any) -> set[str]:
    """Return the tables and views that there are."""
    rows = connection.execute("SELECT table_name FROM information_schema.tables").fetchall()
    return {name for (name,) in rows}


def column_types(connection: Any, table: str) -> dict[str, str]:
    """Return a table's columns and their SQL types; none where it is not yet made."""
    found = connection.execute(
        f"SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = '{table}'"
    )
    return dict(found.fetchall())


def quoted(name: str) -> str:
    """Return a name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def column(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    """Return a primitive column of a batch as numpy."""
    return np.asarray(batch.column(name).to_numpy(zero_copy_only=False))
