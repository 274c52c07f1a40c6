"""Export of a table of 3 GiB, and what mapping ids costs a query.

    python benchmarks/export.py           # about 3 minutes on 2 cores, 11 GB of disk

The large table holds 6.3 million users x 128 whose ids are strings, beside 20,000 items. The log is
made here and prepared; the checkpoint is written as two ranks would leave it, each half of the
table, with nothing trained. `twotower export` then runs in a process of its own, measured from
outside: seconds, and the peak of the memory that is its own or mapped (proportional set size).
Another process opens both graphs and answers.

The latency is that of `query.onnx` on one thread, from raw ids to vector, beside the tower alone,
from rows: a user id and a history of 50 items, of a million string ids each. Runs are interleaved,
and the median is told. The result is written to benchmarks/results/export.json.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from measure import measure, write_result
from torch import Tensor

from twotower import steps
from twotower.cli import build_parser
from twotower.data.encode import Encoder
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import DataConfig, Feature
from twotower.data.vocabulary import Vocabulary
from twotower.export.graphs import raw_graph, save_graph, tower_graph
from twotower.export.weights import StoredWeights
from twotower.job import Job
from twotower.show import table
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint.manifest import (
    MODEL,
    Manifest,
    StoredTensor,
    chunk_in,
    versions,
    write_manifest,
)
from twotower.train.checkpoint.safe_file import Entry, write_safe_file
from twotower.train.checkpoint.storage import rank_file
from twotower.train.checkpoint.towers import write_model_spec
from twotower.train.summary import write_summary

WIDTH, ITEMS, HELD_OUT = 128, 20_000, 2_000
RANKS, ROWS_A_BLOCK = 2, 1 << 16
KEYS, HISTORY, RUNS = 1_000_000, 50, 300


def write_log(folder: Path, users: int) -> None:
    """Write one training event a user, and some of validation and test."""
    place = np.arange(users + 2 * HELD_OUT)
    user = place % users
    rng = np.random.default_rng(0)
    split = np.repeat(["train", "validation", "test"], [users, HELD_OUT, HELD_OUT])
    events = {
        "user_id": pc.binary_join_element_wise(
            "user-", pc.utf8_lpad(pa.array(user).cast(pa.string()), 9, "0"), ""
        ),
        "item_id": rng.integers(0, ITEMS, len(place)),
        "timestamp": place + 1_700_000_000,
        "split": split,
    }
    folder.mkdir()
    pq.write_table(pa.table(events), folder / "interactions.parquet")


def write_job(folder: Path) -> Path:
    """Write the job's YAML."""
    job = {
        "name": "large", "run_dir": "run",
        "data": {
            "root": "log", "interactions": "interactions.parquet",
            "split": {"kind": "given", "column": "split"},
            "query": [
                {"name": "user_id", "kind": "id"},
                {"name": "history", "kind": "history", "length": 20, "table": "item_id"},
            ],
            "item": [{"name": "item_id", "kind": "id"}],
        },
        "model": {"dim": WIDTH}, "tracking": {"wandb": "off"},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def write_checkpoint(job_file: Path) -> int:
    """Write what training would leave, block by block; returns the bytes of the largest table."""
    parser = build_parser(["export"])
    chosen = parser.instantiate(parser.parse_args(["export", "--config", str(job_file)]))
    job = Job(**{f.name: chosen["export"][f.name] for f in fields(Job)})
    data, train = PreparedDataset(job.path("prepared")), job.path("train")
    rows = {name: t["rows"] for name, t in data.summary["tables"].items()}
    torch.manual_seed(0)
    model = TwoTower(data.config, rows, job.model, table_device="meta")
    (train / "checkpoint").mkdir(parents=True)
    write_model_spec(train, data, job.model)
    tensors: dict[str, StoredTensor] = {}
    files = {}
    entries: dict[str, list[Entry]] = {rank_file(rank): [] for rank in range(RANKS)}
    for name, value in model.state_dict().items():
        path, chunks = MODEL + name, []
        parts = np.array_split(np.arange(len(value)), RANKS) if value.is_meta else [None]
        for rank, part in enumerate(parts):
            file = rank_file(rank)
            if part is None:
                chunk = chunk_in(file, path, [0] * value.dim(), value.shape)
                blocks: Any = [value]
            else:
                chunk = chunk_in(file, path, [int(part[0]), 0], [len(part), value.shape[1]])
                blocks = random_rows(len(part), value.shape[1], rank)
            entries[file].append(Entry(chunk.key, torch.float32, chunk.shape, blocks))
            chunks.append(chunk)
        tensors[path] = StoredTensor(
            shape=tuple(value.shape), type="float32", chunks=tuple(chunks)
        )  # fmt: skip
    for file, of_rank in entries.items():
        files[file] = write_safe_file(train / "checkpoint" / file, of_rank)
    write_manifest(train / "checkpoint", Manifest(
        ranks=RANKS, tensors=tensors, files=files, state={}, versions=versions()
    ))  # fmt: skip
    write_summary(train, {"fingerprint": steps.train_mark(job, data), "wandb_run": None})
    return max(tensor.bytes for tensor in tensors.values())


def random_rows(rows: int, width: int, seed: int) -> Iterator[Tensor]:
    """Yield rows of a table."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, rows, ROWS_A_BLOCK):
        size = min(ROWS_A_BLOCK, rows - start)
        yield torch.rand(size, width, generator=generator) - 0.5


def export_large(table_bytes: int) -> dict[str, Any]:
    """Measure the export of a large table, and opening what it made."""
    environment = os.environ | {"WANDB_MODE": "offline"}
    with TemporaryDirectory(prefix="twotower-") as work:
        folder = Path(work)
        write_log(folder / "log", table_bytes // (WIDTH * 4))
        job = write_job(folder)
        command = [sys.executable, "-m", "twotower"]
        measure([*command, "prepare", "--config", str(job)], cwd=folder, env=environment)
        os.chdir(folder)  # the job's paths are relative
        size = write_checkpoint(job)
        print(f"table of {size / 2**30:.2f} GiB, checkpoint written", flush=True)
        os.sync()  # what was written before is not to be waited for in what is measured
        before = cpu_seconds()
        seconds, peak = measure(
            [*command, "export", "--config", str(job)], cwd=folder, env=environment
        )
        cpu = cpu_seconds() - before
        bundle = folder / "run" / "bundles" / "1"
        opened = json.loads(subprocess.run(
            [sys.executable, __file__, "--open", str(bundle)], check=True, capture_output=True,
            text=True,
        ).stdout)  # fmt: skip
        os.chdir("/")
        return {
            "table_bytes": size, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak,
            "peak_of_table": peak / size,
            "bundle_bytes": {p.name: p.stat().st_size for p in sorted(bundle.iterdir())},
            "opened": opened,
        }  # fmt: skip


def cpu_seconds() -> float:
    """Return what the processes that this one waited for have computed."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def open_bundle(bundle: Path) -> None:
    """Print what opening a bundle's graphs and answering costs, in a process that did no more."""
    process = psutil.Process()

    def memory() -> dict[str, int]:
        info = process.memory_full_info()
        return {"resident": info.rss, "mapped_files": info.shared}

    before = memory()
    started = time.monotonic()
    query = open_session(bundle / "query.onnx")
    seconds = time.monotonic() - started
    opened = memory()
    golden = json.loads((bundle / "golden.json").read_text())
    for g in golden:
        history = g["features"]["history"] or [np.iinfo(np.int64).min]
        query.run(None, {
            "user_id": np.array([[g["features"]["user_id"]]], object),
            "history": np.array([history], np.int64),
        })  # fmt: skip
    print(json.dumps({
        "seconds": seconds, "before": before, "opened": opened, "answered": memory(),
        "queries": len(golden),
    }))  # fmt: skip


def open_session(path: Path) -> ort.InferenceSession:
    """Open a graph on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def query_latency(pooling: str) -> list[dict[str, Any]]:
    """Measure a query from raw ids, and from rows."""
    history = Feature(name="history", kind="history", table="item_id", length=HISTORY,
                      pooling=pooling)  # fmt: skip
    config = DataConfig(
        root=".", interactions="-", query=[Feature(name="user_id", kind="id"), history],
        item=[Feature(name="item_id", kind="id")],
    )  # fmt: skip
    place = pa.array(np.arange(KEYS)).cast(pa.string())
    vocabularies = {
        f"{kind}_id": Vocabulary(
            pc.binary_join_element_wise(f"{kind}-", pc.utf8_lpad(place, 9, "0"), ""),
            pa.array(np.ones(KEYS, np.int64)), 4,
        )
        for kind in ("user", "item")
    }  # fmt: skip
    encoder = Encoder(vocabularies=vocabularies, normalisers={})
    torch.manual_seed(0)
    rows = {name: v.rows for name, v in vocabularies.items()}
    model = TwoTower(config, rows, ModelConfig()).eval()
    specs = encoder.specs(config, "query")
    results = []
    with TemporaryDirectory(prefix="twotower-") as work:
        folder = Path(work)
        stored = StoredWeights(model, folder=folder)
        save_graph(raw_graph(encoder, model, "query", specs, None, stored), folder / "raw.onnx")
        save_graph(tower_graph(model, "query", specs, None, stored), folder / "tower.onnx")
        raw, tower = (open_session(folder / f"{name}.onnx") for name in ("raw", "tower"))
        rng = np.random.default_rng(0)
        for batch in (1, 64):
            times: dict[str, list[float]] = {"raw": [], "tower": []}
            for _ in range(RUNS):
                users, items = rng.integers(0, KEYS, (batch, 1)), rng.integers(0, KEYS, (batch, 50))
                found = {
                    "user_id": vocabularies["user_id"].keys.take(pa.array(users.ravel())),
                    "history": vocabularies["item_id"].keys.take(pa.array(items.ravel())),
                }
                ids = {n: np.array(v.to_pylist(), object).reshape(batch, -1)
                       for n, v in found.items()}  # fmt: skip
                encoded = {"user_id_encoded": users + 4, "history_encoded": items + 4}
                vectors = []
                for name, session, inputs in (("raw", raw, ids), ("tower", tower, encoded)):
                    started = time.perf_counter()
                    vectors.append(session.run(None, inputs)[0])
                    times[name].append((time.perf_counter() - started) * 1e6)
                np.testing.assert_allclose(*vectors, atol=1e-6)
            us = {name: statistics.median(values) for name, values in times.items()}
            results.append({
                "pooling": pooling, "batch": batch, "raw_us": us["raw"], "tower_us": us["tower"],
                "ratio": us["raw"] / us["tower"],
            })  # fmt: skip
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=3.0, help="Size of the large table.")
    parser.add_argument("--open", default=None, help="Used by the script itself: a bundle.")
    options = parser.parse_args()
    if options.open:
        return open_bundle(Path(options.open))
    load = psutil.getloadavg()[0]
    latency = [row for pooling in ("mean", "attention", "hstu") for row in query_latency(pooling)]
    table(
        f"query, one thread, {KEYS:,} string ids a table, history of {HISTORY}",
        ["pooling", ">batch", ">from raw ids", ">tower alone", ">ratio"],
        [[r["pooling"], r["batch"], f"{r['raw_us']:.0f} us", f"{r['tower_us']:.0f} us",
          f"{r['ratio']:.2f}"] for r in latency],
    )  # fmt: skip
    large = export_large(int(options.gib * 2**30))
    opened = large["opened"]
    table(
        f"table of {large['table_bytes'] / 2**30:.2f} GiB",
        ["", ">"],
        [["export", f"{large['seconds']:.1f} s, {large['cpu_seconds']:.1f} s of CPU time"],
         ["peak memory", f"{large['peak_bytes'] / 1e9:.2f} GB, "
                         f"{large['peak_of_table']:.2f} of the table"],
         ["opening the query graph", f"{opened['seconds']:.1f} s"],
         *([f"resident, {when}", f"{opened[when]['resident'] / 1e9:.2f} GB, of it mapped files "
                                 f"{opened[when]['mapped_files'] / 1e9:.2f}"]
           for when in ("before", "opened", "answered"))],
    )  # fmt: skip
    write_result(
        "export", {"large": large, "latency": latency, "load_at_start": load},
        ("numpy", "onnx", "onnxruntime", "torch"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
