"""Preparing logs larger than its memory: rate, growth with the log, and peak memory from outside.

    python benchmarks/prepare.py                     # 10 and 50 million events: about 10 minutes
    python benchmarks/prepare.py --events 50000000 --users 40000000 --name prepare-sessions

Each log (`large_log.py`) is prepared by the command `twotower prepare` with `data.memory_gb: 4`.
The limit: at most 5 GB for all its processes, and a time that grows no faster than the log. The
result is written to benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml
from large_log import ITEMS, USERS, log_config, write_log
from measure import measure, write_result


def prepare(folder: Path, events: int, users: int, memory_gb: float) -> dict[str, float]:
    """Write a log, prepare it with the command, and return what it cost."""
    log, run = folder / f"log-{events}", folder / f"run-{events}"
    write_log(log, events, users)
    job = folder / "job.yaml"
    config = {"name": "large", "run_dir": str(run), "data": asdict(log_config(log, memory_gb))}
    job.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "twotower", "prepare", "--config", str(job)]
    seconds, peak = measure(command)
    summary = json.loads((run / "prepared" / "prepared.json").read_text())
    counts = summary["counts"]
    assert counts["events"] == events
    size = sum(f.stat().st_size for f in (run / "prepared").rglob("*") if f.is_file())
    return {
        "events": events, "users": counts["users"], "items": counts["items"],
        "largest_vocabulary": max(table["rows"] for table in summary["tables"].values()),
        "seconds": round(seconds, 1), "events_per_second": round(events / seconds),
        "peak_memory_gb": round(peak / 1e9, 2), "prepared_gb": round(size / 1e9, 2),
    }  # fmt: skip


def main() -> None:
    """Prepare logs of growing size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, nargs="+", default=[10_000_000, 50_000_000])
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--memory_gb", type=float, default=4.0)
    parser.add_argument("--name", default="prepare", help="of the result's file")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for events in arguments.events:
            rows.append(prepare(Path(folder), events, arguments.users, arguments.memory_gb))
            r = rows[-1]
            print(
                f"{events:>12,} events: {r['seconds']:6.1f} s, {r['events_per_second']:>9,} "
                f"events/s, peak {r['peak_memory_gb']:.2f} GB, {r['prepared_gb']:.2f} GB written, "
                f"largest vocabulary {r['largest_vocabulary']:,}",
                flush=True,
            )
    first, last = rows[0], rows[-1]
    growth = (last["seconds"] / first["seconds"]) / (last["events"] / first["events"])
    print(f"time an event, largest log / smallest: {growth:.2f}x")
    write_result(
        arguments.name,
        {
            "log": {"users": arguments.users, "items": ITEMS, "features": 6},
            "memory_gb": arguments.memory_gb, "runs": rows, "growth": round(growth, 3),
        },
        ("twotower", "duckdb", "pyarrow"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
