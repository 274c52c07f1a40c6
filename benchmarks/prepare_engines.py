"""DuckDB or Polars for preparing: the same joins and the same sort of the same log, in both.

    python benchmarks/prepare_engines.py             # 50 million events: about 10 minutes

What preparing asks of its engine: number the distinct users and items, join both numbers to the
events, order them by (user, time) and write them. Each engine does it in a process of its own,
DuckDB held to a memory limit, Polars by its streaming engine, which has none to set. Peak memory is
of the whole process, measured from outside. The result is written to
benchmarks/results/prepare_engines.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

from large_log import write_log
from measure import measure, write_result

DUCKDB = """
import sys, duckdb
log, out, spill, limit = sys.argv[1:]
c = duckdb.connect(spill + "/t.duckdb", config={"memory_limit": limit, "temp_directory": spill})
c.execute(f"CREATE VIEW events AS SELECT * FROM read_parquet('{log}/events/*.parquet')")
for side in ("user", "item"):
    ids = f"SELECT DISTINCT {side}_id AS id FROM events"
    c.execute(f"CREATE TABLE {side}s AS SELECT id FROM ({ids}) ORDER BY id")
c.execute(f'''COPY (SELECT u.rowid::INT AS user, i.rowid::INT AS item, e.timestamp, e.device
    FROM events e JOIN users u ON u.id = e.user_id JOIN items i ON i.id = e.item_id
    ORDER BY u.rowid, e.timestamp) TO '{out}' (FORMAT parquet)''')
"""

POLARS = """
import sys, polars as pl
log, out, spill, limit = sys.argv[1:]
events = pl.scan_parquet(log + "/events/*.parquet")
for side in ("user", "item"):
    ids = events.select(pl.col(f"{side}_id").unique()).sort(f"{side}_id").with_row_index(side)
    events = events.join(ids, on=f"{side}_id")
events.select("user", "item", "timestamp", "device").sort("user", "timestamp").sink_parquet(
    out, engine="streaming")
"""


def main() -> None:
    """Run both engines over one log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=50_000_000)
    parser.add_argument("--limit", default="2400MB", help="DuckDB's memory_limit")
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        write_log(log, arguments.events)
        for name, script in (("duckdb", DUCKDB), ("polars", POLARS)):
            runs = []
            for number in range(arguments.repeat):
                work = Path(folder, f"{name}-{number}")
                work.mkdir()
                command = [sys.executable, "-c", script, str(log), str(work / "out.parquet"),
                           str(work), arguments.limit]  # fmt: skip
                runs.append(measure(command))
            seconds, peak = median(s for s, _ in runs), max(p for _, p in runs)
            results[name] = {"seconds": round(seconds, 1), "peak_memory_gb": round(peak / 1e9, 2)}
            print(f"{name:8} {seconds:7.1f} s, peak {peak / 1e9:5.2f} GB", flush=True)
    write_result(
        "prepare_engines",
        {"events": arguments.events, "duckdb_limit": arguments.limit, "engines": results},
        ("duckdb", "polars"),
    )


if __name__ == "__main__":
    main()
