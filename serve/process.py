"""One tritonserver process: its command line, its guarded endpoints, its end.

What changes the server (loading models, shared memory, tracing, logging) needs a key that is drawn
anew for every process and that this module alone holds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from twotower.errors import UserError
from twotower.serve.config import ServeConfig
from twotower.serve.hold import REPOSITORY
from twotower.serve.procfs import command_of, descendants, kill
from twotower.serve.repository import TARGET
from twotower.serve.runtime import Runtime, find_runtime
from twotower.serve.transport import channel_options

PORTS = ("http_port", "grpc_port", "metrics_port")
ADMIN_HEADER = "admin-key"
# What changes the server, or maps its host's memory, needs the key.
ADMIN = "model-repository,shared-memory,trace,logging"
# Tritonserver 2.51 frees what a stream (`ModelStreamInfer`) has asked beyond so many requests, 8 by
# default, while they may still be read: more at once ended it by SIGSEGV within seconds.
REQUESTS_KEPT = 1024
# Beyond the drain: Triton unloads its models, which takes a stub up to a few seconds.
STOP_S = 10.0
# Nobody asks any more, when nobody did for this long.
QUIET_S = 0.5
# Our own server is on this machine, so no request to it may go to a proxy of the environment.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Run in the child, before Triton in the same process: told to end when its parent does (prctl 1 is
# PR_SET_PDEATHSIG, 15 SIGTERM), however that comes. A `preexec_fn` would do, but makes Python fork
# with the handlers of gRPC, which may abort the child of a process that has gRPC's threads.
ENDS_WITH_ITS_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 15)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class TritonProcess:
    """A tritonserver process in a directory of its own.

    Args:
        config: of the server; ports of 0 are chosen when it starts.
        work_dir: holds the model repository, the log and `server.json`.
    """

    def __init__(self, config: ServeConfig, work_dir: Path) -> None:
        self.wanted, self.config, self.work_dir = config, config, work_dir
        self.runtime: Runtime = find_runtime()
        self.log = work_dir / "triton.log"
        self.repository = work_dir / REPOSITORY
        self.process: subprocess.Popen[bytes] | None = None
        self._admin_key = secrets.token_hex(16)
        self._shm_prefix = ""

    @property
    def grpc_url(self) -> str:
        """host:port of gRPC."""
        return f"{self.config.host}:{self.config.grpc_port}"

    @property
    def http_url(self) -> str:
        """host:port of HTTP."""
        return f"{self._http_host}:{self.config.http_port}"

    @property
    def _http_host(self) -> str:
        """Where HTTP listens: what Triton cannot encrypt stays on this machine."""
        return self.config.host if self.config.tls.cert is None else "127.0.0.1"

    @property
    def metrics_url(self) -> str:
        """URL of the Prometheus metrics."""
        return f"http://{self.config.host}:{self.config.metrics_port}/metrics"

    def _launch(self) -> None:
        c = self.config
        c.tls.check_files()
        # Unique a server, so that what a crash leaves in shared memory can be removed by name.
        self._shm_prefix = f"twotower_{os.getpid()}_{c.grpc_port}_"
        self._admin_key = secrets.token_hex(16)
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
            *_tracing(c),
            f"--exit-timeout-secs={max(1, round(c.drain_s / 2))}",
            "--allow-gpu-metrics=false",
            f"--grpc-infer-allocation-pool-size={REQUESTS_KEPT}",
            f"--http-restricted-api={ADMIN}:{ADMIN_HEADER}={self._admin_key}",
            f"--grpc-restricted-protocol={ADMIN}:{ADMIN_HEADER}={self._admin_key}",
        ]
        hosts = {"http": self._http_host, "grpc": c.host, "metrics": c.host}
        for name, host in hosts.items():
            command += [f"--{name}-port={getattr(c, f'{name}_port')}", f"--{name}-address={host}"]
        command += c.tls.flags()
        # Appended, so that a restart keeps the reason of the crash.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-ISc", ENDS_WITH_ITS_PARENT, str(os.getpid()), *command],
                env=self.runtime.environment(), cwd=self.work_dir, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
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
            if all(self._http(f"/v2/models/{m}/ready") == 200 for m in models):
                return
            time.sleep(0.05)
        raise UserError(
            f"Triton was not ready after serve.load_timeout_s={self.config.load_timeout_s:g} "
            f"seconds; its log, {self.log}, closes with:\n{self.log_tail()}"
        )

    def log_tail(self, lines: int = 12) -> str:
        """Return the last lines of Triton's log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _http(self, path: str) -> int | None:
        """Return the status of a GET, None where no answer came."""
        try:
            with DIRECT.open(f"http://{self.http_url}{path}", timeout=2.0) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    @contextmanager
    def admin(self) -> Iterator[tuple[grpc.InferenceServerClient, dict[str, str]]]:
        """Yield a client and the headers that open what is guarded.

        It is gRPC's, since Triton loads in a thread of its own there. Over HTTP a load holds one of
        the few threads that requests are answered by, and every connection that shares it waits.
        """
        options = channel_options(self.grpc_url, False, self.config.tls.client())
        client = grpc.InferenceServerClient(self.grpc_url, **options)
        try:
            yield client, {f"triton-grpc-protocol-{ADMIN_HEADER}": self._admin_key}
        finally:
            client.close()

    def load(self, model: str, version: int) -> None:
        """Load a model whose directory is new or has changed; what is served goes on meanwhile.

        Triton skips a load when no file has changed. One that hangs would hold a loading thread of
        the server for ever: its stub is killed, upon which Triton gives the load up (unless it hung
        before it had spoken to Triton; then the model's name cannot be loaded again).

        Args:
            model: the model's name.
            version: that has to be loaded for it.

        Raises:
            UserError: when Triton refuses it, or has not done it within serve.load_timeout_s.
        """
        timeout_s = self.config.load_timeout_s
        try:
            with self.admin() as (client, headers):
                client.load_model(model, headers=headers, client_timeout=timeout_s)
        except InferenceServerException as error:
            reason = (error.message() or str(error)).strip().splitlines()[0]
            if error.status() == "StatusCode.DEADLINE_EXCEEDED":
                reason = f"not ready within serve.load_timeout_s={timeout_s:g}"
                kill(self.stubs(model, version))
            raise UserError(
                f"Triton did not load version {version}: {reason}; its log is {self.log}"
            ) from None

    def unload(self, model: str, version: int) -> None:
        """Unload a model, wait until its last request is answered, and remove its directory."""
        # Of a server that has ended, nothing is loaded.
        with suppress(InferenceServerException), self.admin() as (client, headers):
            client.unload_model(model, headers=headers, client_timeout=STOP_S)
        self.drained(model, version)
        shutil.rmtree(self.repository / model, ignore_errors=True)

    def drained(self, model: str, version: int) -> None:
        """Wait until a version that Triton unloads has answered what was under way."""
        deadline = time.monotonic() + self.config.drain_s
        while self.stubs(model, version) and time.monotonic() < deadline:
            time.sleep(0.05)

    def stubs(self, model: str, version: int) -> list[int]:
        """Return the pids of the processes that answer for, or load, a version of a model."""
        if self.process is None:
            return []
        file = str(self.repository.resolve() / model / str(version) / "model.py")
        return [pid for pid in descendants(self.process.pid) if file in command_of(pid)]

    def drain(self) -> None:
        """Go on answering those who do not know yet that the server leaves, until nobody asks.

        Triton by itself would stop listening at the first moment without a request under way. It
        takes half of serve.drain_s at the most: `stop` leaves the other half to what is under way.
        """
        deadline, before = time.monotonic() + self.config.drain_s / 2, -1
        with suppress(InferenceServerException), self.admin() as (client, headers):
            while time.monotonic() < deadline:
                models = client.get_inference_statistics(
                    headers=headers, client_timeout=1.0
                ).model_stats  # fmt: skip
                asked = sum(
                    m.inference_stats.success.count + m.inference_stats.fail.count for m in models
                )
                if asked == before:
                    return
                before = asked
                time.sleep(QUIET_S)

    def stop(self) -> None:
        """End the process: it answers what is under way, and is killed only if it does not end."""
        process, self.process = self.process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(self.config.drain_s / 2 + STOP_S)
            # A hung stub outlives a server that has ended, in its process group.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._ended(process.pid)
        if self._shm_prefix:
            for leftover in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
                leftover.unlink(missing_ok=True)

    def _ended(self, pid: int) -> None:
        """Clear up after the process of that pid."""


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


def _tracing(config: ServeConfig) -> list[str]:
    if config.trace_url is None:
        return []
    settings = ("mode=opentelemetry", f"opentelemetry,url={config.trace_url}", "level=TIMESTAMPS",
                # A request with a traceparent is always traced, and of others 1 in so many.
                f"rate={2**31 - 1}")  # fmt: skip
    return [f"--trace-config={setting}" for setting in settings]


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
                raise cannot_bind(name, config.host, port, error) from None
            ports[name] = sock.getsockname()[1]
    finally:
        for sock in held:
            sock.close()
    return replace(config, **ports)


def cannot_bind(name: str, host: str, port: int, error: OSError) -> UserError:
    """Return what to say of a port that cannot be listened at."""
    return UserError(
        f"serve.{name}: cannot bind {host}:{port} ({error.strerror}): stop what uses it, or choose "
        f"another, for instance --serve.{name}=0"
    )
