"""A synthetic log of any size for the benchmarks of data, written a day a file in bounded memory.

    python benchmarks/large_log.py --output runs/large-log --events 50000000

Items follow a power law, users a log-normal; six features: history, user_id and device for the
query tower, item_id, category and price for the item tower.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.schema import DataConfig, Feature

USERS, ITEMS = 2_000_000, 500_000
DAY_EVENTS = 1_000_000
FIRST_DAY_S = 1_735_689_600  # 2025-01-01


def log_config(folder: Path, memory_gb: float = 4.0, length: int = 50) -> DataConfig:
    """Return the schema of the log in `folder`."""
    return DataConfig(
        root=str(folder), interactions="events", items="items.parquet", memory_gb=memory_gb,
        query=[Feature(name="history", kind="history", table="item_id", length=length),
               Feature(name="user_id", kind="id"), Feature(name="device", kind="id")],
        item=[Feature(name="item_id", kind="id"), Feature(name="category", kind="id"),
              Feature(name="price", kind="number")],
    )  # fmt: skip


def write_log(
    folder: Path, events: int, users: int = USERS, items: int = ITEMS, seed: int = 0
) -> None:
    """Write `events/day=*.parquet` and `items.parquet` below `folder`."""
    rng = np.random.default_rng(seed)
    (folder / "events").mkdir(parents=True)
    pq.write_table(
        pa.table({
            "item_id": np.arange(items) * 7 + 1,
            "category": [f"category-{c}" for c in rng.integers(0, 300, items)],
            "price": rng.lognormal(3, 1, items),
        }),
        folder / "items.parquet",
    )  # fmt: skip
    activity = np.cumsum(rng.lognormal(0, 1, users))
    activity /= activity[-1]
    named = rng.permutation(items)
    devices = pa.array(["phone", "tablet", "web", "tv"])
    for day, start in enumerate(range(0, events, DAY_EVENTS)):
        size = min(DAY_EVENTS, events - start)
        # Rank r is drawn with probability of about 1 / r.
        rank = np.minimum(np.exp(rng.random(size) * np.log(items)).astype(np.int64), items - 1)
        time = FIRST_DAY_S + day * 86_400 + np.sort(rng.integers(0, 86_400, size))
        pq.write_table(
            pa.table({
                "user_id": np.searchsorted(activity, rng.random(size)) + 10**9,
                "item_id": named[rank] * 7 + 1,
                "timestamp": time,
                "device": devices.take(pa.array(rng.integers(0, 4, size))),
            }),
            folder / "events" / f"day-{day:03d}.parquet",
        )  # fmt: skip


def main() -> None:
    """Write a log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder that is not there")
    parser.add_argument("--events", type=int, default=50_000_000)
    arguments = parser.parse_args()
    write_log(arguments.output, arguments.events)


if __name__ == "__main__":
    main()
