"""Driving NVIDIA's own `perf_analyzer` with the same requests, for a second opinion.

The binary is in the wheel tritonclient==2.51.0; later ones and the PyPI package `perf-analyzer` do
not hold it. It asks for two libraries that the server's wheel has under other names. Its latencies
begin when a request is sent, not when it was due.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from twotower.errors import UserError
from twotower.serve.config import MODEL
from twotower.serve.load.asker import Request, Target
from twotower.serve.load.config import LoadConfig
from twotower.serve.load.measurement import PERCENTILES, percentile
from twotower.serve.request import Schema, encode
from twotower.serve.runtime import Runtime, find_runtime

BINARY = "perf_analyzer"
WHEEL = "tritonclient==2.51.0"
WINDOWS = 3
SLACK_S = 60.0
LIBRARIES = {"libb64.so.0d": "libb64-*", "libcudart.so.12": "libcudart-*"}


def find_perf_analyzer() -> tuple[Path, Runtime]:
    """Return the binary, of the server's environment or on PATH, and that environment.

    Raises:
        UserError: when there is none, or no local server, whose libraries it needs.
    """
    runtime = find_runtime()
    own = runtime.path / "bin" / BINARY
    found = str(own) if own.exists() else shutil.which(BINARY)
    if found is None:
        raise UserError(
            f"--perf-analyzer: there is no {BINARY} in {own.parent} or on PATH: install it with "
            f"{own.parent / 'python'} -m pip install --no-deps {WHEEL}"
        )
    return Path(found), runtime


def run_perf_analyzer(
    target: Target, schema: Schema, rates: list[float], config: LoadConfig, work_dir: Path
) -> list[dict[str, Any]]:
    """Return what it measures at each rate: `asked_rate`, `answered_rate`, `latency_ms`, `max_ms`.

    Args:
        target: the server and the requests, of which it goes through all in turn.
        schema: of the served model.
        rates: requests a second.
        config: of the load test.
        work_dir: for its files.

    Raises:
        UserError: when it is not there, or fails, for instance by an unanswered request.
    """
    binary, runtime = find_perf_analyzer()
    libraries = work_dir / "lib"
    libraries.mkdir(parents=True)
    for name, pattern in LIBRARIES.items():
        for file in (runtime.site_packages / "nvidia_pytriton.libs").glob(pattern):
            (libraries / name).symlink_to(file)
    requests = work_dir / "requests.json"
    requests.write_text(json.dumps({"data": [_row(schema, target, r) for r in target.requests]}))
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    }
    found = []
    for rate in rates:
        export = work_dir / f"{rate:g}.json"
        command = [
            str(binary), "-m", MODEL, "-i", "grpc", "-u", target.url, "--async",
            "--input-data", str(requests), "--request-rate-range", f"{rate:g}",
            "--request-distribution", config.arrivals,
            # It measures windows until three agree, or reports nothing: so any three may.
            "--measurement-interval", str(math.ceil(1000 * config.seconds / WINDOWS)),
            "--max-trials", str(WINDOWS), "--stability-percentage", "1000000",
            "--profile-export-file", str(export),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, env=environment, cwd=work_dir, capture_output=True, text=True,
                check=False, timeout=SLACK_S + 3 * config.seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:  # seen once, with all requests answered
            raise UserError(f"{BINARY} hangs at {rate:g} requests a second: try again") from None
        if done.returncode or not export.exists():
            # Its usage may follow the reason.
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no reason given"]
            raise UserError(f"{BINARY} failed at {rate:g} requests a second: {lines[0]}")
        found.append(_measured(rate, json.loads(export.read_text())))
    return found


def _row(schema: Schema, target: Target, request: Request) -> Any:
    row = {}
    for name, (kind, value) in encode(schema, request[0], target.k, request[1]).items():
        content = value[0].tolist()
        if kind == "BYTES":
            content = [entry.decode() for entry in content]
        row[name] = {"content": content, "shape": [len(content)]}
    return row


def _measured(rate: float, profile: dict[str, Any]) -> dict[str, Any]:
    requests = profile["experiments"][0]["requests"]
    sent = np.array([r["timestamp"] for r in requests], np.int64)
    done = np.array([r["response_timestamps"][0] for r in requests], np.int64)
    latency = np.sort((done - sent) / 1e6)
    return {
        "asked_rate": rate,
        "answered_rate": len(requests) / (int(done.max() - sent.min()) / 1e9),
        "latency_ms": {name: percentile(latency, t) for name, t in PERCENTILES.items()},
        "max_ms": float(latency[-1]),
    }
