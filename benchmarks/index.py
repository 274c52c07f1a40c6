"""Kinds of index on a million item vectors, and items added to a bundle of a million.

    python benchmarks/index.py           # about 9 minutes on 2 cores

The vectors are made as trained ones are shaped: 4,000 clusters whose sizes fall as 1 / rank,
coordinates whose spread falls as rank^-0.5, and half of a vector's length from its own noise;
queries come from the same clusters, so that most ask where most items are. Each kind has the
defaults of `export.index`; times are medians of interleaved runs on 2 threads.

The bundle of a million items is one of the demo log's towers, grown by `twotower index --update`;
then 1,000 more are added to it, by the same command in a process of its own. The result is written
to benchmarks/results/index.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measure import RESULTS, ROOT, measure, write_result

from twotower.export.bundle import read_bundle
from twotower.export.compare import measure_indexes
from twotower.export.config import INDEX_KINDS, IndexConfig
from twotower.show import table

K, QUERIES, WIDTH, CLUSTERS = 100, 500, 64, 4000
SPREAD = np.arange(1, WIDTH + 1) ** -0.5


def vectors_like_trained_ones(rows: int, seed: int) -> Any:
    """Return vectors of length 1 from clusters whose sizes fall as 1 / rank."""
    share = 1 / np.arange(1, CLUSTERS + 1)
    centre = np.random.default_rng(0).standard_normal((CLUSTERS, WIDTH)) * SPREAD
    rng = np.random.default_rng(seed)
    own = rng.choice(CLUSTERS, rows, p=share / share.sum())
    vectors = (centre[own] + 0.5 * rng.standard_normal((rows, WIDTH)) * SPREAD).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def index_table(items: int) -> list[dict[str, Any]]:
    """Measure every kind, and int8 where fewer candidates are rescored."""
    vectors, queries = vectors_like_trained_ones(items, 1), vectors_like_trained_ones(QUERIES, 2)
    settings = [IndexConfig(kind=kind) for kind in INDEX_KINDS]
    settings.append(IndexConfig(kind="int8", rescore=1))
    with TemporaryDirectory(prefix="twotower-") as work:
        costs = measure_indexes(
            vectors, queries, settings, K, False, Path(work),
            lambda stage, share: print(f"{share:.0%} {stage}", flush=True),
        )  # fmt: skip
    return [
        asdict(cost) | {"rescore": s.rescore, "queries_s": 64 / cost.latency_ms[64] * 1000}
        for cost, s in zip(costs, settings, strict=True)
    ]


def grown_items(log: Path, rows: int, prefix: str) -> pa.Table:
    """Return items with new ids and the features of the demo log's, again and again."""
    items = pq.read_table(log / "items.parquet")
    taken = items.take(pa.array(np.arange(rows) % len(items)))
    ids = pa.array([f"{prefix}-{row:07d}" for row in range(rows)])
    return taken.set_column(taken.schema.get_field_index("item_id"), "item_id", ids)


def update_times(items: int, added: int) -> list[dict[str, Any]]:
    """Grow a bundle to `items`, then measure the adding of `added` more."""
    command = [sys.executable, "-m", "twotower"]
    environment = os.environ | {"WANDB_MODE": "offline"}
    results = []
    with TemporaryDirectory(prefix="twotower-") as work:
        folder = Path(work)
        small = ["--users=600", "--items=2000", "--events=12000"]
        measure([*command, "demo-log", "--output=log", *small], cwd=folder)
        for name, rows in (("grown", items), ("new", added)):
            pq.write_table(grown_items(folder / "log", rows, name), folder / f"{name}.parquet")
        job = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.root=log",
               "--train.max_epochs=1", "--tracking.wandb=off", "--model.dim=64"]  # fmt: skip
        kinds = ("exact", "int8", "ivf")
        for kind in kinds:
            own = [*job, f"--run_dir={kind}", f"--export.index.kind={kind}"]
            if kind == kinds[0]:
                for step in ("prepare", "train"):
                    measure([*command, step, *own], cwd=folder, env=environment)
            else:  # the same towers
                for step in ("prepared", "train"):
                    shutil.copytree(folder / kinds[0] / step, folder / kind / step)
            measure([*command, "export", *own], cwd=folder, env=environment)
            seconds = {}
            for name in ("grown", "new"):
                seconds[name], peak = measure(
                    [*command, "index", kind, f"--update={name}.parquet"], cwd=folder
                )
            bundle = read_bundle(folder / kind / "bundles" / "3")
            results.append({
                "kind": kind, "items": bundle.manifest.num_items, "added": added,
                "seconds": seconds["new"], "peak_bytes": peak,
                "seconds_to_grow": seconds["grown"], "recall": bundle.manifest.index.recall,
            })  # fmt: skip
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--added", type=int, default=1000)
    parser.add_argument(
        "--updates", action="store_true", help="Measure these alone; the rest as it was written."
    )
    options = parser.parse_args()
    load = psutil.getloadavg()[0]
    started = time.monotonic()
    if options.updates:
        indexes = json.loads((RESULTS / "index.json").read_text())["indexes"]
        for cost in indexes:  # JSON's keys are text
            cost["latency_ms"] = {int(size): ms for size, ms in cost["latency_ms"].items()}
    else:
        indexes = index_table(options.items)
    updates = update_times(options.items, options.added)
    table(
        f"{options.items:,} x {WIDTH}, {QUERIES} queries",
        ["kind", ">rescored", f">recall@{K}", ">bytes", ">queries/s", ">ms, 1", ">build"],
        [[c["kind"], c["rescore"], f"{c['recall']:.4f}", f"{c['bytes_an_item']:.0f}",
          f"{c['queries_s']:,.0f}", f"{c['latency_ms'][1]:.2f}", f"{c['build_s']:.0f} s"]
         for c in indexes],
    )  # fmt: skip
    table(
        f"{options.added:,} items added to {options.items:,}",
        ["kind", ">seconds", ">peak", ">growing took"],
        [[u["kind"], f"{u['seconds']:.1f}", f"{u['peak_bytes'] / 1e9:.2f} GB",
          f"{u['seconds_to_grow']:.0f} s"] for u in updates],
    )  # fmt: skip
    write_result(
        "index",
        {"items": options.items, "width": WIDTH, "k": K, "queries": QUERIES, "indexes": indexes,
         "updates": updates, "load_at_start": load, "seconds": time.monotonic() - started},
        ("numpy", "onnxruntime", "faiss-cpu", "pyarrow"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
