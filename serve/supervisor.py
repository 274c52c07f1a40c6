"""Keeping the local Triton server answering: `twotower serve`.

Triton's own health endpoint stays green when the process that answers is dead, so health here is a
golden query answered as eager PyTorch answered it. The supervisor asks one every second: when it
fails, the model is loaded anew (Triton never restarts a dead stub by itself), and when that does
not help, the server is.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from twotower.errors import UserError
from twotower.export.bundle import Bundle, latest_bundle, read_bundle
from twotower.serve.config import MODEL, ServeConfig
from twotower.serve.control import Act, Say, control_socket
from twotower.serve.health import Health, HealthEndpoint
from twotower.serve.hold import held
from twotower.serve.procfs import share_free_memory
from twotower.serve.rollout import Rollouts
from twotower.serve.server import TritonServer
from twotower.serve.source import FOLDER, REPOSITORY, Source

# How often it is seen whether a stub has ended, which costs a few ms.
GLANCE_S = 0.25


def supervise(server: TritonServer, health: Health, stop: threading.Event) -> None:
    """Keep the model answering until `stop` is set."""
    failures, pause_s = 0, 0.0
    while not _pause(server, pause_s, stop):
        changes, started = server.changes, time.monotonic()
        try:
            server.probe()
            health.answered(time.monotonic() - started)
            health.version.set(server.served.version)
            failures, pause_s = 0, server.config.probe_interval_s
            continue
        except Exception as error:  # whatever it is, supervision goes on
            failures, pause_s = failures + 1, 0.0
            health.failed(_line(error))
            _say(f"probe {failures} failed: {_line(error)}")
        while not server.changing.acquire(timeout=GLANCE_S):
            if stop.is_set():
                return
        try:
            # A rollout that ended meanwhile may have mended it, or changed what is right.
            if server.changes == changes:
                _mend(server, health, stop, failures)
        finally:
            server.changing.release()


def _pause(server: TritonServer, seconds: float, stop: threading.Event) -> bool:
    """Wait for the next probe, or until a stub has ended; return whether to stop."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not stop.wait(min(left, GLANCE_S)):
        if server.lost():
            break
    return stop.is_set()


def _mend(server: TritonServer, health: Health, stop: threading.Event, failures: int) -> None:
    """Load the model anew, or replace the server where that has not helped."""
    started = time.monotonic()
    alive = server.process is not None and server.process.poll() is None
    try:
        if alive and failures < 3:
            health.reloads.inc()
            action = "model loaded anew"
            server.reload()
        else:
            health.restarts.inc()
            action = "server restarted"
            server.restart()
    except Exception as error:
        _say(f"{action}: failed after {time.monotonic() - started:.1f} s: {_line(error)}")
        stop.wait(server.config.probe_interval_s)
    else:
        _say(f"{action} in {time.monotonic() - started:.1f} s")


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _say(message: str) -> None:
    Console(stderr=True, highlight=False).print(
        f"twotower serve: {message}", markup=False, soft_wrap=True
    )


def _demanded(path: Path, config: ServeConfig) -> Bundle:
    return read_bundle(path, signed_by=config.require_signature)


@contextmanager
def running_server(
    bundle_path: Path, config: ServeConfig, work_dir: Path
) -> Iterator[TritonServer]:
    """Serve a bundle, supervised by a thread, while the block runs.

    Raises:
        UserError: for a damaged bundle, or as `TritonServer.start`.
    """
    server = TritonServer(_demanded(bundle_path, config), config, work_dir)
    server.start()
    stop = threading.Event()
    thread = threading.Thread(
        target=supervise, args=(server, Health(config), stop), name="supervisor"
    )
    thread.start()
    try:
        yield server
    finally:
        stop.set()
        thread.join()
        server.stop()


@contextmanager
def passing_server(bundle: Bundle, config: ServeConfig) -> Iterator[TritonServer]:
    """Serve a bundle on free ports while the block runs, neither proven nor supervised.

    Raises:
        UserError: as `TritonServer.start`.
    """
    free = replace(config, http_port=0, grpc_port=0, metrics_port=0)
    with TemporaryDirectory(prefix="twotower-server-") as work:
        server = TritonServer(bundle, free, Path(work))
        server.start(prove=False)
        try:
            yield server
        finally:
            server.stop()


def serve_forever(source: Source, config: ServeConfig, work_dir: Path) -> None:
    """Serve until SIGTERM or SIGINT, then answer what is under way and stop.

    Args:
        source: what is served; of a folder the last rollout's bundle, else the newest.
        config: of the server.
        work_dir: the server's directory.

    Raises:
        UserError: for a damaged bundle, a server that runs there already, or as
            `TritonServer.start`.
    """
    share_free_memory()
    health, stop = Health(config), threading.Event()

    def leave(*_: object) -> None:
        health.leave()
        stop.set()

    with held(work_dir), HealthEndpoint(health, config) as endpoint:
        config = replace(config, health_port=endpoint.port)
        bundle = source.read(config, work_dir)
        if source.kind == FOLDER and bundle.path != (newest := latest_bundle(source.path)):
            _say(
                f"version {bundle.path.name} is served, as the last rollout chose; "
                f"{newest.name} is newer"
            )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, leave)
        rendered = source.path if source.kind == REPOSITORY else None
        server = TritonServer(bundle, config, work_dir, rendered)
        started = time.monotonic()
        server.start()
        try:
            _print_endpoints(server, endpoint, time.monotonic() - started)
            with control_socket(work_dir, _rollouts(server, source, health)):
                supervise(server, health, stop)
            _say(f"stopping within serve.drain_s={config.drain_s:g} seconds")
            server.drain()
        finally:
            server.stop()
    _say("stopped")


def _rollouts(server: TritonServer, source: Source, health: Health) -> Act:
    """Return what does the request of `twotower rollout`."""
    rollouts = Rollouts(server, source.path)

    def act(request: dict[str, Any], say: Say) -> str:
        def tell(text: str) -> None:
            _say(text)
            say(text)

        try:
            if source.kind != FOLDER:
                raise UserError(
                    f"{source.path}: a {source.kind} has no other version: start `twotower serve` "
                    "on a folder of bundles to roll out from it"
                )
            outcome = rollouts.run(tell, **request)
        except Exception as error:
            health.rollouts.labels("refused").inc()
            _say(f"rollout refused, version {server.served.version} goes on: {_line(error)}")
            raise
        _say(outcome)
        health.rollouts.labels("done").inc()
        health.version.set(server.served.version)
        return outcome

    return act


def _print_endpoints(server: TritonServer, endpoint: HealthEndpoint, seconds: float) -> None:
    m = server.bundle.manifest
    out = Table(title="serve", title_justify="left", title_style="bold", show_header=False)
    for name, value in {
        "bundle": f"{server.bundle.path} (version {m.version}, {m.num_items:,} items)",
        "gRPC": server.grpc_url,
        "HTTP": f"http://{server.http_url}/v2/models/{MODEL}",
        "metrics": f"{server.metrics_url} (Triton), {endpoint.url}/metrics (supervisor)",
        "health": f"{endpoint.url}/healthz",
        "golden queries": f"{len(server.golden)} answered as at the export, in {seconds:.1f} s",
        "log": str(server.log),
    }.items():
        out.add_row(name, value)
    Console(highlight=False).print(out)
