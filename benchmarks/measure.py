"""What the benchmarks share: commands measured from outside, and results with their origin."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def memory_bytes(process: psutil.Process) -> int:
    """Return the memory of a process and all below it.

    It is the sum of their proportional set sizes: pages that several share, or that map a file, are
    divided among them.
    """
    total = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
        except psutil.Error:  # ended meanwhile
            continue
    return total


def measure(command: list[str], cwd: Path = ROOT, **options: Any) -> tuple[float, int]:
    """Run a command and return its seconds and peak memory in bytes, sampled every 50 ms."""
    started = time.monotonic()
    process = psutil.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, **options)
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory_bytes(process))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}")
    return time.monotonic() - started, peak


def write_result(name: str, result: dict[str, Any], packages: tuple[str, ...]) -> None:
    """Write results/<name>.json, with the machine, the versions and the commit."""
    origin = {
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version()} | {n: version(n) for n in packages},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result | origin, indent=2) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(
        (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "unknown"
    )
