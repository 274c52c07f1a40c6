"""The served model's throughput beside the same without batching, and beside ONNX Runtime alone.

    python benchmarks/serving.py         # about 5 minutes on 2 cores

A bundle of the demo log's towers, 64 wide, grown to 100,000 items, answers the top 100 to 32
clients of a closed loop over gRPC, on one instance of one thread; client and server share the
machine. In turn, and again: the server as it is configured by default; the same with batches of 1;
and, in this process, ONNX Runtime's runs of both graphs on prepared tensors, at the batch sizes
that the server has just had. Ratios are taken within a round, and their medians over the rounds are
the result.

Then a single client asks with tensors in the request, and with tensors in shared memory, in turn;
and `embed_query` alone is asked by 8 clients as fast as it goes, then at half of that rate, its
latencies counted from the moment that each request was due. The result is written to
benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pyarrow.parquet as pq
import tritonclient.grpc as grpc
from index import grown_items
from measure import ROOT, measure, write_result
from tritonclient.utils import serialize_byte_tensor, shared_memory

from twotower.export.bundle import Bundle, read_bundle
from twotower.export.golden import raw_tensors
from twotower.export.search import open_search
from twotower.serve.config import ServeConfig
from twotower.serve.load.asker import Target
from twotower.serve.load.generator import LoadGenerator
from twotower.serve.load.measurement import Measurement
from twotower.serve.request import encode, parse_schema
from twotower.serve.server import TritonServer
from twotower.serve.supervisor import passing_server
from twotower.show import table

K, CLIENTS, RUNS, REQUESTS, BLOCK = 100, 32, 15, 4000, 200
SERVE = ServeConfig(default_k=K)
# The model's results are of one shape: scores, ids of 11 characters with their length, and version.
OUTPUTS = {"scores": 4 * K, "item_ids": 64 * K, "version": 8}


def make_bundle(folder: Path, items: int) -> Bundle:
    """Return a bundle of `items` items, 64 wide."""
    command = [sys.executable, "-m", "twotower"]
    environment = os.environ | {"WANDB_MODE": "offline"}
    small = ["--users=600", "--items=2000", "--events=12000"]
    measure([*command, "demo-log", "--output=log", *small], cwd=folder)
    job = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.root=log",
           "--run_dir=run", "--train.max_epochs=1", "--tracking.wandb=off", "--model.dim=64",
           "--model.item_bias=false"]  # fmt: skip
    for step in ("prepare", "train", "export"):
        measure([*command, step, *job], cwd=folder, env=environment)
    pq.write_table(grown_items(folder / "log", items - 2000, "grown"), folder / "grown.parquet")
    measure([*command, "index", "run", "--update=grown.parquet"], cwd=folder)
    return read_bundle(folder / "run" / "bundles" / "2")


def in_process_rate(bundle: Bundle, features: list[Any], batches: dict[int, int]) -> float:
    """Return the rows a second of both graphs at the batch sizes that occurred."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = SERVE.threads
    query = ort.InferenceSession(
        str(bundle.path / "query.onnx"), options, providers=["CPUExecutionProvider"]
    )
    search = open_search(bundle.path, asdict(bundle.manifest.index), SERVE.threads).search
    spent = 0.0
    for size, runs in batches.items():
        feed = raw_tensors(
            bundle.manifest.query, [features[i % len(features)] for i in range(size)]
        )
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            search(query.run(["vector"], feed)[0], K)
            seconds.append(time.perf_counter() - started)
        spent += runs * statistics.median(seconds)
    return sum(size * runs for size, runs in batches.items()) / spent


def rounds(bundle: Bundle, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Measure the three in turn."""
    features = [g.features for g in bundle.golden()]

    def load(server: TritonServer) -> Measurement:
        target = Target(
            url=server.grpc_url, proxy=False, deadline_s=10.0, k=K,
            requests=[(f, []) for f in features],
        )  # fmt: skip
        with LoadGenerator(target, 0, 0) as generator:
            return generator.closed_loop(CLIENTS, seconds, warmup_seconds=1.0)

    found = []
    with (
        passing_server(bundle, SERVE) as batched,
        passing_server(bundle, replace(SERVE, max_batch_size=1)) as single,
    ):
        for number in range(repeats):
            # Whichever is first in one round is second in the next.
            order = (batched, single) if number % 2 == 0 else (single, batched)
            by_server = {server: load(server) for server in order}
            ours, alone = by_server[batched], by_server[single]
            own = in_process_rate(bundle, features, ours.batches)
            found.append({
                "batched": asdict(ours), "alone": asdict(alone), "in_process_rate": own,
                "times_alone": ours.answered_rate / alone.answered_rate,
                "share_of_in_process": ours.answered_rate / own, "mean_batch": ours.mean_batch,
                "load": psutil.getloadavg()[0],
            })  # fmt: skip
            rates = (ours.answered_rate, alone.answered_rate, own)
            print(f"round {number + 1}, batched, alone, in process: {np.round(rates)}", flush=True)
    return found


class Regions:
    """One region of shared memory for a request's tensors, and one for its answer's."""

    def __init__(self, server: TritonServer, client: grpc.InferenceServerClient) -> None:
        self.client = client
        self.headers = {"triton-grpc-protocol-admin-key": server._admin_key}
        self.regions = {}
        for name, size in (("asked", 1 << 16), ("answered", sum(OUTPUTS.values()))):
            key = f"/twotower_benchmark_{os.getpid()}_{name}"
            self.regions[name] = shared_memory.create_shared_memory_region(name, key, size)
            client.register_system_shared_memory(name, key, size, headers=self.headers)
        self.outputs, start = [], 0
        for name, size in OUTPUTS.items():
            self.outputs.append(grpc.InferRequestedOutput(name))
            self.outputs[-1].set_shared_memory("answered", size, start)
            start += size

    def inputs(self, tensors: Any) -> list[Any]:
        """Copy a request's tensors into the region and return what names them."""
        out, start = [], 0
        for name, (kind, value) in tensors.items():
            data = serialize_byte_tensor(value) if kind == "BYTES" else value
            raw = np.frombuffer(data.item() if kind == "BYTES" else data.tobytes(), np.uint8)
            shared_memory.set_shared_memory_region(self.regions["asked"], [raw], start)
            out.append(grpc.InferInput(name, list(value.shape), kind))
            out[-1].set_shared_memory("asked", len(raw), start)
            start += len(raw)
        return out

    def close(self) -> None:
        """Give the regions back."""
        self.client.unregister_system_shared_memory(headers=self.headers)
        for region in self.regions.values():
            shared_memory.destroy_shared_memory_region(region)


def compare_shared_memory(bundle: Bundle) -> dict[str, Any]:
    """Return a single client's median latencies with and without shared memory, in ms."""
    milliseconds: dict[str, list[float]] = {"in the request": [], "shared memory": []}
    with (
        passing_server(bundle, SERVE) as server,
        grpc.InferenceServerClient(server.grpc_url) as client,
    ):
        schema = parse_schema(client.get_model_config("recommend", as_json=True)["config"])
        tensors = [encode(schema, g.features, K, []) for g in bundle.golden()]
        regions = Regions(server, client)

        def plain(number: int) -> None:
            inputs = []
            for name, (kind, value) in tensors[number % len(tensors)].items():
                inputs.append(grpc.InferInput(name, list(value.shape), kind))
                inputs[-1].set_data_from_numpy(value)
            answer = client.infer("recommend", inputs)
            assert answer.as_numpy("scores").shape == (1, K)

        def shared(number: int) -> None:
            inputs = regions.inputs(tensors[number % len(tensors)])
            client.infer("recommend", inputs, outputs=regions.outputs)
            shared_memory.get_contents_as_numpy(regions.regions["answered"], np.float32, [1, K])

        try:
            for number in range(2 * REQUESTS):
                way = "shared memory" if number // BLOCK % 2 else "in the request"
                started = time.perf_counter()
                (shared if number // BLOCK % 2 else plain)(number)
                milliseconds[way].append(1000 * (time.perf_counter() - started))
        finally:
            regions.close()
    medians = {way: statistics.median(values) for way, values in milliseconds.items()}
    gain = 1 - medians["shared memory"] / medians["in the request"]
    return {"median_ms": medians, "gain": gain, "requests_each": REQUESTS}


def vectors_alone(url: str, bundle: Bundle, seconds: float) -> dict[str, float]:
    """Return the rate of `embed_query` and, at half of it, the latencies in ms."""
    target = Target(
        url=url, proxy=False, deadline_s=30.0, k=None, model="embed_query",
        requests=[(g.features, []) for g in bundle.golden()],
    )  # fmt: skip
    with LoadGenerator(target, 1, 0) as generator:
        full = generator.closed_loop(8, seconds, warmup_seconds=1.0)
        half = generator.open_loop(
            full.answered_rate / 2, seconds, warmup_seconds=1.0, arrivals="poisson"
        )
    p50, p99 = half.latency_ms["p50"], half.latency_ms["p99"]
    if p50 is None or p99 is None:
        raise SystemExit(f"embed_query did not answer: {half.errors}")
    return {"rate": full.answered_rate, "p50_ms": p50, "p99_ms": p99, "ratio": p99 / p50}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    started = time.monotonic()
    with TemporaryDirectory(prefix="twotower-") as work:
        bundle = make_bundle(Path(work), options.items)
        size = (bundle.manifest.num_items, bundle.manifest.dim)
        found = rounds(bundle, options.seconds, options.repeats)
        memory = compare_shared_memory(bundle)
        config = replace(SERVE, models=["recommend", "embed_query"])
        with passing_server(bundle, config) as server:
            vectors = [
                vectors_alone(server.grpc_url, bundle, options.seconds)
                for _ in range(options.repeats)
            ]

    def middle(name: str) -> float:
        return statistics.median(each[name] for each in found)

    rates = {name: [each[name]["answered_rate"] for each in found] for name in ("batched", "alone")}
    rates["in process"] = [each["in_process_rate"] for each in found]
    table(
        f"{size[0]:,} x {size[1]}, top {K}, gRPC, {CLIENTS} clients, {options.repeats} rounds",
        ["", ">answers/s, median", ">least", ">most"],
        [[name, f"{statistics.median(r):,.0f}", f"{min(r):,.0f}", f"{max(r):,.0f}"]
         for name, r in rates.items()],
    )  # fmt: skip
    summary = {
        "times_alone": middle("times_alone"),
        "share_of_in_process": middle("share_of_in_process"), "mean_batch": middle("mean_batch"),
    }  # fmt: skip
    print({name: round(value, 3) for name, value in summary.items()}, memory)
    median = {n: statistics.median(each[n] for each in vectors) for n in vectors[0]}
    print("embed_query, at half of its rate:", {n: round(v, 2) for n, v in median.items()})
    write_result(
        "serving",
        {"items": size[0], "width": size[1], "k": K, "clients": CLIENTS, **summary,
         "shared_memory": memory, "vectors_alone": median, "rounds": found,
         "seconds": time.monotonic() - started},
        ("numpy", "onnxruntime", "tritonclient"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
