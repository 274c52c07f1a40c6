"""The served model's throughput beside the same without batching, and beside ONNX Runtime alone.

    python benchmarks/serving.py         # about 9 minutes on 2 cores

A bundle of the demo log's towers, 64 wide, grown to 100,000 items, answers the top 100 to 32
clients of a closed loop over gRPC; client and server share the machine. In turn, and again: the
server as it is configured by default, one instance of one thread; the same with two instances; the
same with batches of 1; and, in this process, ONNX Runtime's runs of both graphs on prepared tensors
by one thread, at the batch sizes that each server has just had, and by two such threads at once for
two instances; and once more with a Gemm and a TopK in place of the bundle's index, which is what
ONNX Runtime has of its own. Ratios are taken within a round, and their medians over the rounds are
the result.

Before that, two instances are asked by streams, 32 of a request each, in turn with 32 calls of a
request each (`--streams` measures this alone, about 4 minutes, and leaves the rest as it was
written). After it a single client asks with tensors in the request, and with tensors in shared
memory, in turn; and `embed_query` alone is asked by 8 clients as fast as it goes, then at half of
that rate, its latencies counted from the moment that each request was due. The result is written to
benchmarks/results/serving.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import psutil
import pyarrow.parquet as pq
import tritonclient.grpc as grpc
from grpc import aio
from index import grown_items
from measure import RESULTS, ROOT, measure, write_result
from search import Search, two_nodes
from tritonclient.grpc import service_pb2 as messages
from tritonclient.utils import serialize_byte_tensor, shared_memory

from twotower.export.bundle import Bundle, read_bundle
from twotower.export.golden import raw_tensors
from twotower.export.search import open_search
from twotower.serve.client import AsyncRecommendClient, RecommendClient
from twotower.serve.config import ServeConfig
from twotower.serve.load.asker import Target
from twotower.serve.load.generator import LoadGenerator
from twotower.serve.load.measurement import Measurement, mean_size, server_side
from twotower.serve.request import encode, parse_schema
from twotower.serve.server import TritonServer
from twotower.serve.supervisor import passing_server
from twotower.serve.transport import INFER, channel_options
from twotower.show import table

LIBRARIES = ("numpy", "onnxruntime", "tritonclient")
K, CLIENTS, RUNS, REQUESTS, BLOCK = 100, 32, 15, 4000, 200
SERVE = ServeConfig(default_k=K)
SERVERS = {
    "batches of 1": replace(SERVE, max_batch_size=1),
    "default": SERVE,
    "two instances": replace(SERVE, instances=2),
}
TWICE = "in process, two threads at once, at the sizes of two instances"
# The searches that both graphs are run with here.
OURS, PLAIN = "in process", "in process with Gemm and TopK"
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


class Towers:
    """Both graphs of a bundle, for one thread of this process."""

    def __init__(self, bundle: Bundle) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = SERVE.threads
        self.query = ort.InferenceSession(
            str(bundle.path / "query.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.spec = bundle.manifest.query
        self.features = [g.features for g in bundle.golden()]
        index = open_search(bundle.path, asdict(bundle.manifest.index), SERVE.threads)
        self.searches: dict[str, Search] = {
            OURS: lambda vectors: index.search(vectors, K),
            PLAIN: two_nodes(np.load(bundle.path / "item_vectors.npy")),
        }

    def seconds(self, batches: dict[int, int], way: str) -> float:
        """Return how long batches take, from size -> number, by the median of each size's runs."""
        spent = 0.0
        for size, runs in batches.items():
            rows = [self.features[i % len(self.features)] for i in range(size)]
            feed = raw_tensors(self.spec, rows)
            seconds = []
            for _ in range(RUNS):
                started = time.perf_counter()
                self.searches[way](self.query.run(["vector"], feed)[0])
                seconds.append(time.perf_counter() - started)
            spent += runs * statistics.median(seconds)
        return spent


def in_process_rate(threads: list[Towers], batches: dict[int, int], way: str) -> float:
    """Return the rows a second of threads that run the same batches at once."""
    rows = sum(size * runs for size, runs in batches.items())
    with ThreadPoolExecutor(len(threads)) as pool:
        return sum(pool.map(lambda t: rows / t.seconds(batches, way), threads))


def rounds(bundle: Bundle, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Measure the servers and this process in turn."""
    towers = [Towers(bundle), Towers(bundle)]

    def load(server: TritonServer) -> Measurement:
        target = Target(
            url=server.grpc_url, proxy=False, deadline_s=10.0, k=K,
            requests=[(features, []) for features in towers[0].features],
        )  # fmt: skip
        with LoadGenerator(target, 0, 0) as generator:
            return generator.closed_loop(CLIENTS, seconds, warmup_seconds=1.0)

    found = []
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(passing_server(bundle, config))
            for name, config in SERVERS.items()
        }
        for number in range(repeats):
            each: dict[str, Any] = {"load": psutil.getloadavg()[0]}
            # Whichever is first in one round is last in the next.
            for name in sorted(servers, reverse=number % 2 == 1):
                measured = load(servers[name])
                each[name] = asdict(measured) | {"mean_batch": measured.mean_batch}
                for way in (OURS, PLAIN):
                    each[f"{way}, at the sizes of {name}"] = in_process_rate(
                        towers[:1], measured.batches, way
                    )
            own, plain_own = (
                {name: each[f"{way}, at the sizes of {name}"] for name in servers}
                for way in (OURS, PLAIN)
            )
            each[TWICE] = in_process_rate(towers, each["two instances"]["batches"], OURS)
            rate = {name: each[name]["answered_rate"] for name in servers}
            each["ratios"] = {
                "default / batches of 1": rate["default"] / rate["batches of 1"],
                "default / in process": rate["default"] / own["default"],
                "two instances / in process": rate["two instances"] / own["two instances"],
                "two instances / two threads": rate["two instances"] / each[TWICE],
                **{f"{name} / {PLAIN}": rate[name] / plain_own[name] for name in servers},
            }
            found.append(each)
            print(f"round {number + 1}: {'; '.join(f'{n} {r:,.0f}' for n, r in rate.items())}",
                  {n: round(r, 2) for n, r in each["ratios"].items()}, flush=True)  # fmt: skip
    return found


async def ask_in_streams(url: str, features: list[dict[str, Any]], seconds: float) -> float:
    """Return the answers a second to so many streams with a request under way each."""
    async with AsyncRecommendClient(url, proxy=False) as client:
        asked = [await client.prepare(f, k=K) for f in features]
    channel = aio.insecure_channel(url, channel_options(url, False, None)["channel_args"])
    infer = channel.stream_stream(
        INFER.replace("ModelInfer", "ModelStreamInfer"),
        response_deserializer=messages.ModelStreamInferResponse.FromString,
    )
    started, end = time.monotonic(), time.monotonic() + seconds

    async def keep_asking(which: int) -> int:
        stream, answered = infer(timeout=seconds + 30), 0
        while time.monotonic() < end:
            await stream.write(asked[(which + answered) % len(asked)])
            answer = await stream.read()
            if answer.error_message or len(answer.infer_response.outputs) != len(OUTPUTS):
                raise SystemExit(f"a stream was not answered: {answer.error_message}")
            answered += 1
        await stream.done_writing()
        return answered

    answered = sum(await asyncio.gather(*map(keep_asking, range(CLIENTS))))
    rate = answered / (time.monotonic() - started)
    await channel.close()
    return rate


def compare_streams(bundle: Bundle, seconds: float, repeats: int) -> dict[str, Any]:
    """Return what two instances answer to calls and to streams, beside this process."""
    towers, found = [Towers(bundle)], []
    features = towers[0].features
    with ExitStack() as stack:
        server = stack.enter_context(passing_server(bundle, SERVERS["two instances"]))
        client = stack.enter_context(RecommendClient(server.grpc_url))
        target = Target(
            url=server.grpc_url, proxy=False, deadline_s=10.0, k=K,
            requests=[(f, []) for f in features],
        )  # fmt: skip
        generator = stack.enter_context(LoadGenerator(target, 0, 0))
        for number in range(repeats):
            each: dict[str, Any] = {}
            for way in sorted(("calls", "streams"), reverse=number % 2 == 1):
                if way == "calls":
                    measured = generator.closed_loop(CLIENTS, seconds, warmup_seconds=1.0)
                    rate, batches = measured.answered_rate, measured.batches
                else:
                    before = client.statistics()
                    rate = asyncio.run(ask_in_streams(server.grpc_url, features, seconds))
                    batches = server_side(before, client.statistics())["batches"]
                own = in_process_rate(towers, batches, OURS)
                each[way] = {
                    "answered_rate": rate, "mean_batch": mean_size(batches), "in process": own,
                    "/ in process": rate / own,
                    f"/ {PLAIN}": rate / in_process_rate(towers, batches, PLAIN),
                }  # fmt: skip
            found.append(each)
            print({way: {n: round(v, 2) for n, v in of.items()} for way, of in each.items()},
                  flush=True)  # fmt: skip
    return {
        way: {n: statistics.median(each[way][n] for each in found) for n in found[0][way]}
        for way in found[0]
    } | {"rounds": found}


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
    parser.add_argument("--streams", action="store_true", help="Measure streams alone.")
    options = parser.parse_args()
    started = time.monotonic()
    with TemporaryDirectory(prefix="twotower-") as work:
        bundle = make_bundle(Path(work), options.items)
        streams = compare_streams(bundle, options.seconds, options.repeats)
        if options.streams:
            written = json.loads((RESULTS / "serving.json").read_text())
            write_result("serving", written | {"streams": streams}, LIBRARIES)
            return
        size = (bundle.manifest.num_items, bundle.manifest.dim)
        found = rounds(bundle, options.seconds, options.repeats)
        memory = compare_shared_memory(bundle)
        config = replace(SERVE, models=["recommend", "embed_query"])
        with passing_server(bundle, config) as server:
            vectors = [
                vectors_alone(server.grpc_url, bundle, options.seconds)
                for _ in range(options.repeats)
            ]

    rates = {name: [each[name]["answered_rate"] for each in found] for name in SERVERS}
    rates |= {name: [each[name] for each in found] for name in found[0] if "in process" in name}
    table(
        f"{size[0]:,} x {size[1]}, top {K}, gRPC, {CLIENTS} clients, {options.repeats} rounds",
        ["", ">answers/s, median", ">least", ">most"],
        [[name, f"{statistics.median(r):,.0f}", f"{min(r):,.0f}", f"{max(r):,.0f}"]
         for name, r in rates.items()],
    )  # fmt: skip
    summary: dict[str, Any] = {
        "rates": {name: statistics.median(r) for name, r in rates.items()},
        "ratios": {
            name: statistics.median(each["ratios"][name] for each in found)
            for name in found[0]["ratios"]
        },
        "mean_batch": {
            name: statistics.median(each[name]["mean_batch"] for each in found) for name in SERVERS
        },
    }
    print({name: round(value, 3) for name, value in summary["ratios"].items()}, memory)
    median = {n: statistics.median(each[n] for each in vectors) for n in vectors[0]}
    print("embed_query, at half of its rate:", {n: round(v, 2) for n, v in median.items()})
    write_result(
        "serving",
        {"items": size[0], "width": size[1], "k": K, "clients": CLIENTS, **summary,
         "shared_memory": memory, "vectors_alone": median, "streams": streams, "rounds": found,
         "seconds": time.monotonic() - started},
        LIBRARIES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
