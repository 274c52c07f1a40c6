"""Logs that the tests of reading and preparing share, and what a dataset made of them holds."""

import csv
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import DataConfig

from ..conftest import HISTORY, ITEM

TYPES = {
    "user_id": pa.string(), "item_id": pa.int64(), "timestamp": pa.int64(), "price": pa.float64(),
    "tags": pa.list_(pa.string()),
}  # fmt: skip


def prepared(folder: Path, log: str, **changes: Any) -> PreparedDataset:
    target = folder / f"prepared{len(list(folder.glob('prepared*')))}"
    target.mkdir()
    config = DataConfig(root=str(folder), interactions=log, query=[HISTORY], item=[ITEM])
    prepare(replace(config, **changes), target)
    return PreparedDataset(target)


def meaning(data: PreparedDataset) -> dict[str, Any]:
    """Return all bytes of a dataset, of prepared.json what is not about the files read."""
    files: dict[str, Any] = {
        str(f.relative_to(data.path)): f.read_bytes() for f in data.path.rglob("*.arrow")
    }
    told = ("counts", "time", "types", "normalisers", "tables")
    return files | {name: data.summary[name] for name in told}


def write_formats(folder: Path, log: dict[str, list[Any]]) -> list[str]:
    """Write a log in every format; returns the files."""
    pq.write_table(
        pa.table({n: pa.array(v, TYPES[n]) for n, v in log.items()}), folder / "log.parquet"
    )
    rows = [dict(zip(log, values, strict=True)) for values in zip(*log.values(), strict=True)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(log))
    writer.writeheader()
    writer.writerows(row | {"tags": "|".join(row["tags"])} for row in rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (("log.csv", text.getvalue()), ("log.jsonl", lines)):
        (folder / name).write_bytes(content.encode())
        (folder / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    return ["log.parquet", "log.csv", "log.csv.gz", "log.jsonl", "log.jsonl.gz"]


def days(count: int = 3, rows: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "user_id": [f"u{(k * 7 + d) % 5}" for k in range(rows)],
            "item_id": [(k * k + d) % 9 for k in range(rows)],
            "timestamp": [86_400 * d + k for k in range(rows)],
            "hour": [k % 3 for k in range(rows)],
        }
        for d in range(count)
    ]


def write_all(path: Path, tables: list[dict[str, Any]]) -> None:
    pq.write_table(pa.concat_tables([pa.table(t) for t in tables]), path)


def write_nested(folder: Path) -> None:
    for place, day in zip(("a.parquet", "b/c.parquet", "d/e/f/g.pq"), days(), strict=True):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(day), folder / place)
    for noise in ("_SUCCESS", ".a.parquet.crc", "_temporary/0/x.parquet", "README.md"):
        (folder / noise).parent.mkdir(parents=True, exist_ok=True)
        (folder / noise).write_text("no data")
