"""A real Triton server on the bundle of the finished run."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from twotower.serve.config import ServeConfig
from twotower.serve.runtime import setup_runtime
from twotower.serve.server import TritonServer
from twotower.serve.supervisor import running_server

FREE = ServeConfig(http_port=0, grpc_port=0, metrics_port=0, probe_interval_s=0.3)


@pytest.fixture(scope="session", autouse=True)
def runtime() -> None:
    """Make the server's environment, unless `make install` did."""
    setup_runtime()


@pytest.fixture(scope="module")
def server(finished_run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with running_server(finished_run.bundle, FREE, tmp_path_factory.mktemp("server")) as running:
        yield running


def stubs_of(pid: int) -> list[psutil.Process]:
    """Return the processes that run the Python model."""
    children = psutil.Process(pid).children(recursive=True)
    alive = [c for c in children if c.status() != psutil.STATUS_ZOMBIE]
    return [c for c in alive if "triton_python_b" in c.name()]


def shared_memory(pid: int) -> list[Path]:
    """Return what the servers of a twotower process hold in shared memory."""
    return list(Path("/dev/shm").glob(f"twotower_{pid}_*"))
