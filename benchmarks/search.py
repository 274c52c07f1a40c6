"""The exact index on a CPU beside a product and TopK of ONNX Runtime, and beside faiss.

    python benchmarks/search.py          # about a minute on 2 cores

100,000 random vectors, 64 wide, are searched for the 100 best of one query and of batches, on one
thread: by a bundle's exact index (`twotower`), which takes its scan in 8 bits for one or two
queries and its products in fp32 for more; by each of these alone; by a graph of two nodes, Gemm and
TopK, with the options that ONNX Runtime has by default; and by faiss's IndexFlatIP. Runs are
interleaved and times are medians. All give the same rows. The result is written to
benchmarks/results/search.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import faiss
import numpy as np
import onnxruntime as ort
from measure import write_result
from onnx import TensorProto, helper, numpy_helper

from twotower.export.config import IndexConfig
from twotower.export.id_nodes import IR_VERSION, OPSETS
from twotower.export.index import VECTORS, build_index, index_spec
from twotower.export.search import Scan, open_search
from twotower.show import table

ITEMS, WIDTH, K = 100_000, 64, 100
BATCHES = (1, 2, 3, 4, 8, 16, 32, 64)
SCANNED = 4  # and less
Search = Callable[[Any], Any]


def two_nodes(item_ND: Any) -> Search:
    """Return a search by Gemm and TopK alone."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["vector", "items"], ["all_scores"], transB=1),
         helper.make_node("TopK", ["all_scores", "k"], ["scores", "rows"], axis=1)],
        "two_nodes",
        [helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("rows", TensorProto.INT64, ["batch", K])],
        [numpy_helper.from_array(item_ND, "items"),
         numpy_helper.from_array(np.array([K], np.int64), "k")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda vector_BD: session.run(["rows"], {"vector": vector_BD})[0]


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    rng = np.random.default_rng(0)
    item_ND = rng.standard_normal((ITEMS, WIDTH)).astype(np.float32)
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(item_ND)
    with TemporaryDirectory(prefix="twotower-") as work:
        folder = Path(work)
        np.save(folder / VECTORS, item_ND)
        spec = index_spec(IndexConfig(), WIDTH, False)
        build_index(folder, spec, IndexConfig())
        own = open_search(folder, asdict(spec), 1)
        scan = Scan(folder, item_ND, 1)
        searches: dict[str, Search] = {
            "twotower": lambda vector_BD: own.search(vector_BD, K)[1],
            "scan": lambda vector_BD: scan.search(vector_BD, K)[1],
            "fp32": lambda vector_BD: own.session.run(
                ["rows"], {"vector": vector_BD, "k": np.array([K])}
            )[0],
            "Gemm and TopK": two_nodes(item_ND),
            "faiss": lambda vector_BD: flat.search(vector_BD, K)[1],
        }
        rows = []
        for batch in BATCHES:
            vector_BD = rng.standard_normal((batch, WIDTH)).astype(np.float32)
            tried = {n: s for n, s in searches.items() if n != "scan" or batch <= SCANNED}
            found = {name: search(vector_BD) for name, search in tried.items()}
            assert all(np.array_equal(found["twotower"], other) for other in found.values())
            seconds: dict[str, list[float]] = {name: [] for name in tried}
            for _ in range(repeats):
                for name, search in tried.items():
                    started = time.perf_counter()
                    search(vector_BD)
                    seconds[name].append(time.perf_counter() - started)
            rows.append({"batch": batch, "ms": {n: 1000 * median(s) for n, s in seconds.items()}})
    table(
        f"{ITEMS:,} x {WIDTH}, top {K}, one thread, ms, and times Gemm and TopK",
        [">batch", *(f">{name}" for name in searches), ">times"],
        [[str(row["batch"]),
          *(f"{row['ms'][name]:.2f}" if name in row["ms"] else "" for name in searches),
          f"{row['ms']['Gemm and TopK'] / row['ms']['twotower']:.2f}"] for row in rows],
    )  # fmt: skip
    write_result(
        "search", {"items": ITEMS, "width": WIDTH, "k": K, "repeats": repeats, "rows": rows},
        ("numpy", "onnxruntime", "faiss-cpu"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
