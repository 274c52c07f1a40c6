"""A server under load for minutes while everything that may happen to it happens.

    python benchmarks/soak.py                # 60 seconds of load, and about a minute before
    python benchmarks/soak.py --minutes 30

`twotower serve` serves a bundle of a small job; another version differs by one item. Four clients
ask golden queries over gRPC and HTTP, 50 times a second each, and hold every answer against eager
PyTorch's for the version that answered. Meanwhile, evenly over the time: ten rollouts to the other
version and ten back, and five kills of the process that answers. A client sends garbage to every
port, and one sends requests and never reads an answer.

A valid request fails when it has no right answer within 10 seconds, with retries, since a killed
process cannot answer what it had. Attempts that needed a retry are counted, and told apart: within
5 seconds of a kill, or otherwise, of which there must be none. Memory is what the supervisor,
Triton and its stubs have written (anonymous and shared memory: mapped files count for less while
other servers of the machine map them too), when nothing else happens; its growth is from the median
of the second fifth of the time to that of the last. It exits with code 1 where a limit is missed.
The result is written to benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from measure import ROOT, write_result

from twotower.errors import UserError
from twotower.export.bundle import Golden, answer_difference, read_bundle
from twotower.serve.client import RecommendClient, ServerUnavailable
from twotower.serve.control import command
from twotower.serve.request import encode

CLIENTS = ("grpc", "http", "grpc", "http")
PACE_S, DEADLINE_S, AFTER_KILL_S = 0.02, 10.0, 5.0
ROLLOUTS, KILLS = 10, 5
MAX_GROWTH = 0.05
PORTS = ("http", "grpc", "metrics", "health")
TWOTOWER = [sys.executable, "-m", "twotower"]


class Soak:
    """One server, its clients, and what they have seen."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.work_dir, self.bundles = run_dir / "server", run_dir / "bundles"
        self.golden: dict[int, list[Golden]] = {
            version: read_bundle(self.bundles / str(version)).golden() for version in (1, 2)
        }
        self.stop = threading.Event()
        self.answered = self.garbage = self.unread_bytes = 0
        self.failed: list[str] = []
        self.retried: list[float] = []
        self.kills: list[float] = []
        self.recoveries: list[float] = []
        self.memory: list[tuple[float, dict[str, int]]] = []
        self.latencies: list[float] = []
        self.rollout_s: list[float] = []
        self.seconds = 0.0
        self._lock = threading.Lock()
        self.log = (folder / "serve.log").open("w+")
        self.process = psutil.Popen(
            [*TWOTOWER, "serve", *job(folder), *(f"--serve.{name}_port=0" for name in PORTS)],
            cwd=folder, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        while not (self.work_dir / "server.json").exists():
            if self.process.poll() is not None:
                raise SystemExit((folder / "serve.log").read_text())
            time.sleep(0.1)
        self.state: dict[str, Any] = json.loads((self.work_dir / "server.json").read_text())

    def url(self, name: str) -> str:
        """Return host:port of an endpoint."""
        return f"127.0.0.1:{self.state[f'{name}_port']}"

    def ask(self, client: RecommendClient, golden: Golden, version: int) -> None:
        """Ask until there is an answer; take note of what was wrong."""
        started = time.monotonic()
        while True:
            attempt = time.monotonic()
            try:
                k = max(1, len(golden.item_ids))
                answer = client.recommend(golden.features, k=k, exclude=golden.exclude)
                break
            except ServerUnavailable as error:
                with self._lock:
                    self.retried.append(attempt)
                if time.monotonic() - started > DEADLINE_S:
                    with self._lock:
                        self.failed.append(str(error))
                    return
                time.sleep(0.05)
            except UserError as error:
                with self._lock:
                    self.failed.append(str(error))
                return
        wrong = answer.version == version and not answer_difference(
            golden.item_ids, golden.scores, answer.item_ids, answer.scores, 1e-4
        ) < 1e-4  # fmt: skip
        with self._lock:
            self.answered += 1
            self.latencies.append(time.monotonic() - started)
            if wrong:
                self.failed.append(f"version {version} answered wrongly")

    def ask_on(self, protocol: str) -> None:
        """Be a client that asks rightly."""
        with RecommendClient(self.url(protocol), protocol, timeout_s=3.0) as client:
            while not self.stop.wait(PACE_S):
                version = random.choice((1, 2))
                self.ask(client, random.choice(self.golden[version]), version)

    def send_garbage(self) -> None:
        """Be a client that sends what is no request."""
        paths = ("/v2/models/recommend/infer", "/v2/models/recommend", "/healthz", "/", "/%00")
        while not self.stop.wait(PACE_S):
            noise = random.randbytes(random.choice((1, 100, 70_000)))
            body = random.choice((noise, b'{"inputs": [{"name": "k", "shape": [-1], "data": []}]}'))
            head = (
                f"{random.choice(('POST', 'GET', 'PUT'))} {random.choice(paths)} HTTP/1.1\r\n"
                f"Host: x\r\nContent-Length: {len(body)}\r\n\r\n"
            ).encode()
            host, port = self.url(random.choice(PORTS)).split(":")
            try:
                with socket.create_connection((host, int(port)), timeout=1) as connection:
                    connection.sendall(random.choice((noise, head + body, head)))
                    if random.random() < 0.5:
                        connection.recv(1000)
            except OSError:
                pass
            self.garbage += 1

    def never_read(self) -> None:
        """Be a client that asks and leaves the answers where they are."""
        with RecommendClient(self.url("grpc")) as client:
            tensors = encode(client.schema(), self.golden[1][0].features, 200, [])
        body = json.dumps({"inputs": [
            {"name": name, "datatype": kind, "shape": list(value.shape),
             "data": [v.decode() if isinstance(v, bytes) else v for v in value.ravel().tolist()]}
            for name, (kind, value) in tensors.items()
        ]}).encode()  # fmt: skip
        head = (
            f"POST /v2/models/recommend/infer HTTP/1.1\r\nHost: x\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        host, port = self.url("http").split(":")
        while not self.stop.is_set():
            with socket.create_connection((host, int(port)), timeout=1) as connection:
                try:
                    while not self.stop.wait(PACE_S):
                        connection.sendall(head.encode() + body)
                        self.unread_bytes += len(body)
                except OSError:  # both sides are full, or Triton was restarted
                    self.stop.wait(5)

    def kill_stub(self) -> None:
        """Kill what answers, and measure until a client is answered again."""
        below = self.process.children(recursive=True)
        stubs = [p for p in below if "triton_python_b" in p.name()]
        started = time.monotonic()
        self.kills.append(started)
        for stub in stubs:
            stub.kill()
        while True:
            try:
                with RecommendClient(self.url("grpc"), timeout_s=1.0) as client:
                    client.recommend(self.golden[1][0].features)
                break
            except UserError:
                time.sleep(0.02)
        self.recoveries.append(time.monotonic() - started)

    def metrics(self) -> dict[str, float]:
        """Return the supervisor's counters."""
        with urllib.request.urlopen(f"http://{self.url('health')}/metrics") as response:
            text = response.read().decode()
        found = re.findall(r"^(twotower_\S+) (\S+)$", text, re.MULTILINE)
        return {
            name: float(v) for name, v in found if "bucket" not in name and "created" not in name
        }

    def rollout(self, to: int | None) -> None:
        """Serve a version, or the one before."""
        started = time.monotonic()
        request = {"to": to, "back": to is None, "new_schema": False}
        command(self.work_dir, request, lambda _: None)
        self.rollout_s.append(time.monotonic() - started)

    def run(self, seconds: float) -> None:
        """Have it all happen, evenly over the time."""
        threads = [threading.Thread(target=self.ask_on, args=(p,)) for p in CLIENTS]
        threads += [threading.Thread(target=t) for t in (self.send_garbage, self.never_read)]
        for thread in threads:
            thread.start()
        events: list[Callable[[], None]] = []
        for number in range(ROLLOUTS):
            events += [lambda: self.rollout(2), lambda: self.rollout(None)]
            if number % (ROLLOUTS // KILLS):
                events.append(self.kill_stub)
        started = time.monotonic()
        try:
            self.rollout(1)  # the newest is served at first
            for number, event in enumerate(events, 1):
                event()
                until = max(time.monotonic() + 0.1, started + seconds * number / len(events))
                while (left := until - time.monotonic()) > 0:
                    time.sleep(min(left, 0.5))
                    self.memory.append((time.monotonic() - started, written_bytes(self.process)))
            self.seconds = time.monotonic() - started
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()

    def end(self) -> tuple[int, float]:
        """Tell the server to stop; return its exit code and how long it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        return code, time.monotonic() - started


def job(folder: Path) -> list[str]:
    """Return the arguments of the job."""
    return [
        "--config", str(ROOT / "configs" / "quickstart.yaml"), f"--run_dir={folder / 'run'}",
        f"--data.root={folder / 'log'}", "--train.max_epochs=2", "--tracking.wandb=off",
    ]  # fmt: skip


def make_bundles(folder: Path) -> Path:
    """Train on a small log, and make a bundle and one without an item; return the run_dir."""
    for arguments in (
        ["demo-log", f"--output={folder / 'log'}", "--users=600", "--items=300", "--events=12000"],
        *([step, *job(folder)] for step in ("prepare", "train", "export")),
        ["index", str(folder / "run"), "--remove=[item-000001]"],
    ):
        done = subprocess.run(
            [*TWOTOWER, *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
    return folder / "run"


def written_bytes(process: psutil.Process) -> dict[str, int]:
    """Return the memory that a process and all below it have written, by the process's name."""
    found: dict[str, int] = {}
    for member in [process, *process.children(recursive=True)]:
        try:
            lines = Path(f"/proc/{member.pid}/smaps_rollup").read_text().splitlines()
            name = member.name()
        except (OSError, psutil.Error):  # ended meanwhile
            continue
        sizes = dict(line.split(":", 1) for line in lines[1:])
        size = sum(int(sizes[kind].split()[0]) << 10 for kind in ("Pss_Anon", "Pss_Shmem"))
        found[name] = found.get(name, 0) + size
    return found


def early_and_late(
    memory: list[tuple[float, dict[str, int]]], seconds: float
) -> list[dict[str, float]]:
    """Return the median bytes by process of the second fifth of the time, and of the last."""
    early = [sizes for at, sizes in memory if seconds / 5 < at < 2 * seconds / 5]
    late = [sizes for at, sizes in memory if at > 4 * seconds / 5]
    return [
        {name: statistics.median(sizes.get(name, 0) for sizes in part) for name in part[0]}
        | {"all": statistics.median(sum(sizes.values()) for sizes in part)}
        for part in (early, late)
    ]


def main() -> None:
    """Soak, print, write, and judge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1.0)
    seconds = 60 * parser.parse_args().minutes
    with TemporaryDirectory(prefix="twotower-") as work:
        folder = Path(work)
        soak = Soak(folder, make_bundles(folder))
        try:
            soak.run(seconds)
            metrics = soak.metrics()
            code, stop_s = soak.end()
        except BaseException:
            print((folder / "serve.log").read_text()[-4000:])
            raise
        finally:
            if soak.process.is_running():
                soak.process.kill()
        if soak.failed or code:
            print((folder / "serve.log").read_text()[-4000:])
    early, late = early_and_late(soak.memory, soak.seconds)
    growth = late["all"] / early["all"] - 1
    near = [t for t in soak.retried if any(k - 3 <= t < k + AFTER_KILL_S for k in soak.kills)]
    latencies = sorted(soak.latencies)
    result = {
        "seconds": soak.seconds, "answered": soak.answered, "failed": len(soak.failed),
        "reasons": sorted(set(soak.failed))[:5],
        "attempts_retried_after_a_kill": len(near),
        "attempts_retried_otherwise": len(soak.retried) - len(near),
        "rollouts": len(soak.rollout_s),
        "rollout_s": {"median": statistics.median(soak.rollout_s), "max": max(soak.rollout_s)},
        "kills": len(soak.kills),
        "answering_again_s": [round(s, 2) for s in soak.recoveries],
        "latency_ms": {
            f"p{q}": 1000 * latencies[int(len(latencies) * q / 100)] for q in (50, 99)
        },
        "garbage_requests": soak.garbage, "unread_request_bytes": soak.unread_bytes,
        "memory_bytes": {"early": early, "late": late}, "memory_growth": growth,
        "exit_code": code, "stopped_in_s": stop_s, "metrics": metrics,
    }  # fmt: skip
    print(json.dumps(result, indent=2))
    write_result("soak", result, ("onnxruntime", "tritonclient"))
    passes = (
        not soak.failed and len(near) == len(soak.retried) and code == 0
        and max(soak.recoveries) < AFTER_KILL_S and growth < MAX_GROWTH
    )  # fmt: skip
    sys.exit(0 if passes else 1)


if __name__ == "__main__":
    os.environ.setdefault("WANDB_MODE", "offline")
    main()
