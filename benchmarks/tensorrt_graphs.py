"""Parity of the query graph's halves in every precision, and tensorrt-rtx's engines of them.

    python benchmarks/tensorrt_graphs.py             # about three minutes on 2 busy cores

Every way to read a history with every interaction, all kinds of features at once: towers of random
weights, 64 wide, over lists of up to 50 entries; 1,000 queries at a log's events, and 10,000 items.
`fp16` and `bf16` are ONNX Runtime's, with products rounded as the graph says; the engines are built
without a GPU, for compute capability 8.0, and not run. The result is written to
benchmarks/results/tensorrt_graphs.json.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import tensorrt_rtx
import torch
from measure import write_result

from twotower.data.batches import BatchBuilder
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import ENCODERS, OF_HISTORIES, DataConfig, Feature
from twotower.export.build_engine import build
from twotower.export.config import TensorRTConfig
from twotower.export.golden import raw_tensors
from twotower.export.graphs import save_graph
from twotower.export.halves import (
    calibrated,
    dotted_tower,
    encoded_inputs,
    encoding_file,
    in_precision,
    input_shapes,
    padded_encoding,
    tower_file,
    tower_vectors,
)
from twotower.export.manifest import PRECISIONS
from twotower.export.parity import event_rows
from twotower.towers.config import INTERACTIONS, EncoderConfig, ModelConfig
from twotower.towers.two_tower import TwoTower

USERS, ITEMS, EVENTS, QUERIES, K = 2_000, 10_000, 60_000, 1_000, 10
# Compute capability of the oldest GPU that has the products.
CAPABILITY = dict.fromkeys(PRECISIONS, "SM80") | {"fp8": "SM89"}
SHAPE: dict[str, Any] = {"dim": 64, "hidden": [128], "encoder": EncoderConfig(layers=2, heads=2)}


def prepared(folder: Path, pooling: str) -> PreparedDataset:
    """Prepare a random log whose history is pooled so."""
    rng = np.random.default_rng(0)
    tables = {
        "log": {
            "user_id": rng.integers(0, USERS, EVENTS), "item_id": rng.integers(0, ITEMS, EVENTS),
            "timestamp": np.sort(rng.integers(0, 10**7, EVENTS)),
        },
        "users": {
            "user_id": np.arange(USERS),
            "friends": [rng.integers(0, USERS, i % 6).tolist() for i in range(USERS)],
            "age": rng.random(USERS), "text": rng.standard_normal((USERS, 8)).tolist(),
        },
        "items": {"item_id": np.arange(ITEMS), "price": rng.random(ITEMS)},
    }  # fmt: skip
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    target = folder / "prepared"
    target.mkdir()
    prepare(DataConfig(
        root=str(folder), interactions="log.parquet", users="users.parquet", items="items.parquet",
        query=[
            Feature(name="user_id", kind="id"),
            Feature(name="friends", kind="ids", table="user_id"),
            Feature(name="age", kind="number"), Feature(name="text", kind="vector", width=8),
            Feature(name="history", kind="history", table="item_id", pooling=pooling,
                    time_gaps=pooling in ENCODERS),
        ],
        item=[Feature(name="item_id", kind="id"), Feature(name="price", kind="number")],
    ), target)  # fmt: skip
    return PreparedDataset(target)


def top(query_BD: npt.NDArray[Any], item_ND: npt.NDArray[Any]) -> tuple[Any, Any]:
    """Return the best items' rows (B, K) and scores."""
    score_BN = query_BD @ item_ND.T
    found_BK = np.argsort(-score_BN, axis=1, kind="stable")[:, :K]
    return found_BK, np.take_along_axis(score_BN, found_BK, 1)


def measured(data: PreparedDataset, interaction: str, folder: Path) -> dict[str, Any]:
    """Return what each precision's halves and engine are like."""
    torch.manual_seed(1)
    rows = {name: table["rows"] for name, table in data.summary["tables"].items()}
    model = TwoTower(data.config, rows, ModelConfig(interaction=interaction, **SHAPE)).eval()
    specs, builder, raw = (
        data.encoder.specs(data.config, "query"),
        BatchBuilder(data),
        event_rows(data, 2, QUERIES, 1),
    )
    with torch.no_grad():
        eager_BD = model.query_vectors(builder.requests("query", raw)).numpy()
        item_ND = model.item_vectors(builder.items(np.arange(len(data.items)))).numpy()
    save_graph(
        padded_encoding(data.encoder, model, "query", specs), folder / encoding_file("query")
    )
    tower = dotted_tower(model, "query", specs)
    wanted, scores = top(eager_BD, item_ND)
    encoded = encoded_inputs(folder, "query", raw_tensors(specs, raw))
    result: dict[str, Any] = {}
    calibration = event_rows(data, 0, TensorRTConfig().calibration_queries, 1)
    largest = calibrated(
        folder, tower, encoded_inputs(folder, "query", raw_tensors(specs, calibration))
    )
    for precision in PRECISIONS:
        path = folder / tower_file("query", precision)
        save_graph(in_precision(tower, precision, folder, largest), path)
        vector_BD = tower_vectors(folder, "query", precision, encoded)
        found, _ = top(vector_BD, item_ND)
        mine = np.take_along_axis(vector_BD @ item_ND.T, wanted, 1)
        started = time.perf_counter()
        description = {
            "graph": path,
            "inputs": input_shapes(tower),
            "batch": [1, 64, 1024],
            "refit": False,
        }
        engine = build(tensorrt_rtx, description, CAPABILITY[precision])
        result[precision] = {
            "vectors": float(np.abs(vector_BD - eager_BD).max()),
            "scores": float(np.abs(mine - scores).max()),
            "identical_top_10": int((found == wanted).all(1).sum()),
            "overlap": float(np.mean([len({*a} & {*b}) / K for a, b in zip(
                found.tolist(), wanted.tolist(), strict=True)])),
            "engine_mb": memoryview(engine).nbytes / 1e6,
            "build_s": time.perf_counter() - started,
        }  # fmt: skip
    return result


def main() -> None:
    """Measure every way to read a history with every interaction."""
    results: dict[str, Any] = {}
    for pooling in ("mean", "attention", *OF_HISTORIES):
        with tempfile.TemporaryDirectory() as name:
            data = prepared(Path(name), pooling)
            for interaction in INTERACTIONS:
                results[f"{pooling}, {interaction}"] = measured(data, interaction, Path(name))
                for precision, r in results[f"{pooling}, {interaction}"].items():
                    print(
                        f"{pooling:11} {interaction:6} {precision}: vectors {r['vectors']:.1e}, "
                        f"scores {r['scores']:.1e}, identical top 10 {r['identical_top_10']:,} of "
                        f"{QUERIES:,}, overlap {r['overlap']:.4f}, engine {r['engine_mb']:.1f} MB "
                        f"in {r['build_s']:.1f} s", flush=True,
                    )  # fmt: skip
    load = {"load_average": round(os.getloadavg()[0], 1)}
    packages = ("torch", "onnx", "onnxruntime", "tensorrt-rtx")
    write_result("tensorrt_graphs", load | {"cases": results}, packages)


if __name__ == "__main__":
    main()
