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

from rich.console import Console
from rich.table import Table

from twotower.export.bundle import Bundle, read_bundle
from twotower.serve.config import MODEL, ServeConfig
from twotower.serve.hold import held
from twotower.serve.server import TritonServer


def supervise(server: TritonServer, stop: threading.Event) -> None:
    """Keep the model answering until `stop` is set."""
    failures = 0
    while not stop.wait(0.0 if failures else server.config.probe_interval_s):
        try:
            server.probe()
            failures = 0
            continue
        except Exception as error:  # whatever it is, supervision goes on
            failures += 1
            _say(f"probe {failures} failed: {_line(error)}")
        started = time.monotonic()
        alive = server.process is not None and server.process.poll() is None
        try:
            if alive and failures < 3:
                action, done = "model loaded anew", server.reload()
            else:
                action, done = "server restarted", True
                server.restart()
        except Exception as error:
            action, done = f"restart failed: {_line(error)}", False
        _say(f"{action}{'' if done else ' (failed)'} in {time.monotonic() - started:.1f} s")
        if not done:
            stop.wait(server.config.probe_interval_s)


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _say(message: str) -> None:
    Console(stderr=True, highlight=False).print(f"twotower serve: {message}")


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
    thread = threading.Thread(target=supervise, args=(server, stop), name="supervisor")
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


def serve_forever(bundle_path: Path, config: ServeConfig, work_dir: Path) -> None:
    """Serve a bundle until SIGTERM or SIGINT, then stop cleanly.

    Raises:
        UserError: for a damaged bundle, a server of this job that runs already, or as
            `TritonServer.start`.
    """
    with held(work_dir):
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        server = TritonServer(_demanded(bundle_path, config), config, work_dir)
        started = time.monotonic()
        server.start()
        try:
            _print_endpoints(server, time.monotonic() - started)
            supervise(server, stop)
        finally:
            server.stop()
    _say("stopped")


def _print_endpoints(server: TritonServer, seconds: float) -> None:
    m = server.bundle.manifest
    out = Table(title="serve", title_justify="left", title_style="bold", show_header=False)
    for name, value in {
        "bundle": f"{server.bundle.path} (version {m.version}, {m.num_items:,} items)",
        "gRPC": server.grpc_url,
        "HTTP": f"http://{server.http_url}/v2/models/{MODEL}",
        "metrics": server.metrics_url,
        "golden queries": f"{len(server.golden)} answered as at the export, in {seconds:.1f} s",
        "log": str(server.log),
    }.items():
        out.add_row(name, value)
    Console(highlight=False).print(out)
