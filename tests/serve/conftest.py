"""A real Triton server on the bundle of the finished run."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as grpc

from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.export.bundle import Bundle, Golden
from twotower.export.config import ExportConfig
from twotower.export.export import export
from twotower.serve.client import RecommendClient
from twotower.serve.config import ServeConfig
from twotower.serve.runtime import setup_runtime
from twotower.serve.server import TritonServer
from twotower.serve.supervisor import running_server

from ..conftest import FinishedRun

FREE = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, probe_interval_s=0.3)


GOOD = {"history": ["item-000001"], "country": "c1", "age": 30.0, "device": "web"}


@pytest.fixture(scope="session", autouse=True)
def runtime() -> None:
    """Make the server's environment, unless `make install` did."""
    setup_runtime()


@pytest.fixture(scope="module")
def server(finished_run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with running_server(finished_run.bundle, FREE, tmp_path_factory.mktemp("server")) as running:
        yield running


def exported(run: FinishedRun, folder: Path, **config: Any) -> Bundle:
    """Export the towers of a run once more, with other settings."""
    return export(
        PreparedDataset(run.run_dir / "prepared"), run.run_dir / "train", folder / "bundles",
        config=ExportConfig(**config), job=json.loads((run.bundle / "job.json").read_text()),
        name="exported again", fingerprint="of a test", metrics={}, seed=0,
        progress=lambda *_: None,
    )  # fmt: skip


def start_serving(
    run: FinishedRun, *options: str, env: Mapping[str, str] | None = None
) -> tuple["subprocess.Popen[str]", Path]:
    """Start `twotower serve`; returns the process and its state file, once that is there."""
    state = run.run_dir / "server" / "server.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "serve", *run.arguments,
         *(f"--serve.{name}_port=0" for name in ("http", "grpc", "metrics", "health")), *options],
        cwd=run.cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not state.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"no server: {process.communicate()[0]}")
        time.sleep(0.05)
    return process, state


def answers_again(url: str, golden: Golden, timeout_s: float) -> bool:
    """Whether the server at `url` answers a golden query rightly within the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with RecommendClient(url, timeout_s=1) as client:
                answer = client.recommend(
                    golden.features, k=len(golden.item_ids), exclude=golden.exclude
                )
                return answer.item_ids == golden.item_ids
        except UserError:
            time.sleep(0.1)
    return False


def stubs_of(pid: int) -> list[psutil.Process]:
    """Return the processes that run the Python model."""
    children = psutil.Process(pid).children(recursive=True)
    alive = [c for c in children if c.status() != psutil.STATUS_ZOMBIE]
    return [c for c in alive if "triton_python_b" in c.name()]


def shared_memory(pid: int) -> list[Path]:
    """Return what the servers of a twotower process hold in shared memory."""
    return list(Path("/dev/shm").glob(f"twotower_{pid}_*"))


def raw_inputs(**changes):
    """Return the tensors of a good request, changed, with no check of ours in between."""
    tensors = {
        "history": ("BYTES", np.array([[b"item-000001"]], dtype=object)),
        "country": ("BYTES", np.array([[b"c1"]], dtype=object)),
        "age": ("FP32", np.array([[30]], np.float32)),
        "device": ("BYTES", np.array([[b"web"]], dtype=object)),
    } | changes
    inputs = []
    for name, tensor in tensors.items():
        if tensor is not None:
            inputs.append(grpc.InferInput(name, list(tensor[1].shape), tensor[0]))
            inputs[-1].set_data_from_numpy(tensor[1])
    return inputs
