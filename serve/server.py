"""One local tritonserver process: started, proven by golden queries, reloaded, stopped cleanly.

`twotower.serve.supervisor` keeps it answering.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from twotower.errors import UserError
from twotower.export.bundle import Bundle, Golden, answer_difference
from twotower.files import write_json
from twotower.serve.client import RecommendClient
from twotower.serve.config import ServeConfig
from twotower.serve.hold import REPOSITORY, STATE
from twotower.serve.repository import TARGET, render_repository
from twotower.serve.request import Recommendation
from twotower.serve.runtime import Runtime, find_runtime

TOLERANCE = 1e-4
PORTS = ("http_port", "grpc_port", "metrics_port")
ADMIN_HEADER = "admin-key"
# What changes the server, or maps its host's memory, needs the key.
ADMIN = "model-repository,shared-memory,trace,logging"
STOP_S = 20.0
# Our own server is on this machine, so no request to it may go to a proxy of the environment.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PR_SET_PDEATHSIG = 1


class TritonServer:
    """One tritonserver process that serves one bundle.

    Args:
        bundle: checked already.
        config: of the server; ports of 0 are chosen when it starts.
        work_dir: holds the model repository, the log and `server.json`.
    """

    def __init__(self, bundle: Bundle, config: ServeConfig, work_dir: Path) -> None:
        self.bundle, self.work_dir = bundle, work_dir
        self.wanted, self.config = config, config
        self.golden = answerable(bundle)
        self.runtime: Runtime = find_runtime()
        self.log = work_dir / "triton.log"
        self.repository = work_dir / REPOSITORY
        self.process: subprocess.Popen[bytes] | None = None
        self._admin_key = secrets.token_hex(16)
        self._shm_prefix = ""
        self._probes = 0

    @property
    def k_limit(self) -> int:
        """Most results of a request."""
        return min(self.config.max_k, self.bundle.manifest.num_items)

    @property
    def grpc_url(self) -> str:
        """host:port of gRPC."""
        return f"{self.config.host}:{self.config.grpc_port}"

    @property
    def http_url(self) -> str:
        """host:port of HTTP."""
        return f"{self.config.host}:{self.config.http_port}"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self.config.host}:{self.config.metrics_port}/metrics"

    def start(self, *, prove: bool = True) -> None:
        """Start, wait until ready, and check every golden query, unless who starts it does.

        Raises:
            UserError: for a port in use, a server that does not come up, or a wrong answer.
        """
        self.config = choose_ports(self.wanted)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.repository, ignore_errors=True)
        render_repository(self.bundle, self.repository, self.config, self.runtime.path)
        self._launch()
        try:
            self._wait_ready()
            if prove:
                self.prove()
        except BaseException:
            self.stop()
            raise
        write_json(self.work_dir / STATE, {
            "pid": self.process.pid if self.process else None,
            "host": self.config.host,
            **{name: getattr(self.config, name) for name in PORTS},
            "bundle": str(self.bundle.path),
            "version": self.bundle.manifest.version,
        })  # fmt: skip

    def _launch(self) -> None:
        c = self.config
        # Unique a server, so that what a crash leaves in shared memory can be removed by name.
        self._shm_prefix = f"twotower_{os.getpid()}_{c.grpc_port}_"
        command = [
            str(self.runtime.server / "bin" / "tritonserver"),
            f"--model-repository={self.repository.resolve()}",
            f"--backend-directory={self.runtime.backends.resolve()}",
            f"--cache-directory={self.runtime.server / 'caches'}",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            f"--model-config-name={TARGET}",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in c.models),
            *_limits(c),
            f"--exit-timeout-secs={int(STOP_S / 2)}",
            "--allow-gpu-metrics=false",
            f"--http-restricted-api={ADMIN}:{ADMIN_HEADER}={self._admin_key}",
            f"--grpc-restricted-protocol={ADMIN}:{ADMIN_HEADER}={self._admin_key}",
        ]
        for name, port in (("http", c.http_port), ("grpc", c.grpc_port)):
            command += [f"--{name}-port={port}", f"--{name}-address={c.host}"]
        command += [f"--metrics-port={c.metrics_port}", f"--metrics-address={c.host}"]
        # Loaded before the fork, since a child of a threaded process may not take locks.
        prctl = ctypes.CDLL(None).prctl
        # Appended, so that a restart keeps the reason of the crash.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.runtime.environment(), cwd=self.work_dir, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
            )  # fmt: skip

    def _wait_ready(self) -> None:
        deadline, models = time.monotonic() + self.config.load_timeout_s, self.config.models
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise UserError(
                    f"Triton ended with code {self.process.returncode} before it was ready; its "
                    f"log, {self.log}, closes with:\n{self.log_tail()}"
                )
            if all(self._http("GET", f"/v2/models/{m}/ready", 2.0) == 200 for m in models):
                return
            time.sleep(0.05)
        raise UserError(
            f"Triton was not ready after serve.load_timeout_s={self.config.load_timeout_s:g} "
            f"seconds; its log, {self.log}, closes with:\n{self.log_tail()}"
        )

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of Triton's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _http(self, method: str, path: str, timeout_s: float) -> int | None:
        request = urllib.request.Request(
            f"http://{self.http_url}{path}", method=method, data=b"{}" if method == "POST" else None
        )
        request.add_header(ADMIN_HEADER, self._admin_key)
        try:
            with DIRECT.open(request, timeout=timeout_s) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def prove(self) -> float:
        """Answer every golden query and return the largest score difference.

        Raises:
            UserError: when an answer differs from eager PyTorch's beyond ties.
        """
        with self._client(self.config.load_timeout_s) as client:
            return max(self._ask(client, number) for number in range(len(self.golden)))

    def probe(self) -> None:
        """Answer one golden query within the probe's deadline, another one each time.

        Raises:
            UserError: when no answer or a wrong one comes.
        """
        self._probes += 1
        with self._client(self.config.probe_timeout_s) as client:
            self._ask(client, self._probes % len(self.golden))

    def _client(self, timeout_s: float) -> RecommendClient:
        # A health check that asked again would hide what it is there to see.
        return RecommendClient(self.grpc_url, timeout_s=timeout_s, proxy=False, retries=0)

    def _ask(self, client: RecommendClient, number: int) -> float:
        golden: Golden = self.golden[number]
        k = self.k_limit
        answer = ask(client, golden, k)
        difference = answer_difference(
            golden.item_ids[:k], golden.scores[:k], answer.item_ids, answer.scores, TOLERANCE
        )
        if not difference <= TOLERANCE or answer.version != self.bundle.manifest.version:
            raise UserError(
                f"golden query {number}: version {answer.version} answered "
                f"{answer.item_ids[:3]}… {answer.scores[:3]}, expected {golden.item_ids[:3]}… "
                f"{golden.scores[:3]} of version {self.bundle.manifest.version}"
            )
        return difference

    def reload(self) -> bool:
        """Load the models anew, which starts new stubs; return whether Triton did so."""
        timeout_s = self.config.load_timeout_s
        for name in self.config.models:
            # Triton skips a load when no file has changed.
            (self.repository / name / str(self.bundle.manifest.version) / "model.py").touch()
            if self._http("POST", f"/v2/repository/models/{name}/load", timeout_s) != 200:
                return False
        return True

    def restart(self) -> None:
        """Replace the server process, on the same ports.

        Raises:
            UserError: as `start`.
        """
        ports = {name: getattr(self.config, name) for name in PORTS}
        self.stop()
        self.wanted = replace(self.wanted, **ports)
        self.start()

    def stop(self) -> None:
        """End the process: it drains, is given time, and is killed only if it does not end."""
        process, self.process = self.process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_S)
            # A hung stub outlives a server that has ended, in its process group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._withdraw(process.pid)
        if self._shm_prefix:
            for leftover in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
                leftover.unlink(missing_ok=True)

    def _withdraw(self, pid: int) -> None:
        """Remove the state file, if it is this process's."""
        state = self.work_dir / STATE
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(state.read_text())["pid"] == pid:
                state.unlink()


def ask(client: RecommendClient, golden: Golden, limit: int) -> Recommendation:
    """Ask a golden query for as many items as its answer has, at most `limit`."""
    # One of which nothing is left to answer is asked for one.
    k = min(max(1, len(golden.item_ids)), limit)
    return client.recommend(golden.features, k=k, exclude=golden.exclude)


def _limits(config: ServeConfig) -> list[str]:
    options = []
    if config.response_cache_mb:
        options.append(f"--cache-config=local,size={config.response_cache_mb << 20}")
    if config.concurrent_batches:
        options += [
            "--rate-limit=execution_count",
            f"--rate-limit-resource=batch:{config.concurrent_batches}",
        ]
    return options


def answerable(bundle: Bundle) -> list[Golden]:
    """Return the golden queries that a server can be judged by.

    Numbers that overflow the towers' float32 give eager PyTorch a vector of zeros, so scores of
    zeros; the server refuses such a query.

    Raises:
        UserError: when there is none, since nothing else says that a server is healthy.
    """
    golden = [g for g in bundle.golden() if not g.item_ids or any(g.scores)]
    if not golden:
        raise UserError(
            f"{bundle.path / 'golden.json'}: holds no golden query to judge the server by: make "
            "the bundle again with `twotower export`"
        )
    return golden


def choose_ports(config: ServeConfig) -> ServeConfig:
    """Return the configuration with every port of 0 replaced by a free one.

    Raises:
        UserError: for a port that is in use.
    """
    held, ports = [], {}
    try:
        for name in PORTS:
            port = getattr(config, name)
            sock = socket.socket()
            held.append(sock)
            # As servers do, so that connections closed a moment ago do not hold the port.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((config.host, port))
            except OSError as error:
                raise UserError(
                    f"serve.{name}: cannot bind {config.host}:{port} ({error.strerror}): stop "
                    f"what uses it, or choose another, for instance --serve.{name}=0"
                ) from None
            ports[name] = sock.getsockname()[1]
    finally:
        for sock in held:
            sock.close()
    return replace(config, **ports)
