"""What an orchestrator is told: `GET /healthz` and `GET /metrics` of `twotower serve`.

Triton's own readiness stays green when the process that answers is dead. Health here is a golden
query answered as eager PyTorch answered it, within the last interval.
"""

from __future__ import annotations

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from twotower.serve.config import ServeConfig
from twotower.serve.process import cannot_bind

# A connection that says nothing for this long is closed.
SILENCE_S = 5.0


class Health:
    """Whether the server answers rightly, and what was done for it.

    Args:
        config: of the server, whose probes tell.
    """

    def __init__(self, config: ServeConfig) -> None:
        # The next probe's answer may take its time-out, and does not come before its interval.
        self.fresh_s = config.probe_interval_s + config.probe_timeout_s
        self.registry = registry = CollectorRegistry()
        self._reason: str | None = "starting"
        self._answered = time.monotonic()
        self._leaving = False
        self.probe_s = Histogram(
            "twotower_probe_seconds", "Time of a golden query that was answered rightly.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5),
            registry=registry,
        )  # fmt: skip
        self.probe_failures = Counter(
            "twotower_probe_failures", "Golden queries without an answer, or with a wrong one.",
            registry=registry,
        )  # fmt: skip
        self.reloads = Counter(
            "twotower_reloads",
            "Times that the model was loaded anew, with new stubs.",
            registry=registry,
        )
        self.restarts = Counter(
            "twotower_restarts", "Times that the Triton process was replaced.", registry=registry
        )
        self.rollouts = Counter(
            "twotower_rollouts", "Rollouts asked for.", ["outcome"], registry=registry
        )  # fmt: skip
        for outcome in ("done", "refused"):
            self.rollouts.labels(outcome)
        self.version = Gauge(
            "twotower_version", "Bundle version that is served.", registry=registry
        )
        self.ready = Gauge(
            "twotower_ready", "1 while /healthz answers 200, else 0.", registry=registry
        )
        self.ready.set_function(lambda: float(self.reason() is None))

    def answered(self, seconds: float) -> None:
        """Take note of a golden query that was answered rightly."""
        self.probe_s.observe(seconds)
        self._answered, self._reason = time.monotonic(), None

    def failed(self, reason: str) -> None:
        """Take note of a golden query that was not."""
        self.probe_failures.inc()
        self._reason = f"golden query failed: {reason}"

    def leave(self) -> None:
        """Be unhealthy from now on; takes no lock, so that a signal's handler may call it."""
        self._leaving = True

    def reason(self) -> str | None:
        """Return why no request should be sent here, None where all is well."""
        if self._leaving:
            return "stopping"
        if self._reason is None and (age := time.monotonic() - self._answered) > self.fresh_s:
            return f"no golden query answered for {age:.1f} s"
        return self._reason


class HealthEndpoint:
    """The HTTP endpoint of a `Health`, in a thread, while the block runs.

    Args:
        health: what it tells.
        config: of the server: host and health_port.

    Raises:
        UserError: for a port that is in use.
    """

    def __init__(self, health: Health, config: ServeConfig) -> None:
        class Handler(_Handler):
            state = health

        address = (config.host, config.health_port)
        try:
            self._server = _Server(address, Handler)
        except OSError as error:
            raise cannot_bind("health_port", *address, error) from None
        self.port: int = self._server.server_address[1]
        self.url = f"http://{config.host}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> HealthEndpoint:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # Of connections that wait: with the 5 of the base class, a probe behind a burst waits a second.
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has hung up before it was answered."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    timeout = SILENCE_S
    state: Health

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if path == "/healthz":
            reason = self.state.reason()
            self._answer(200 if reason is None else 503, f"{reason or 'ok'}\n".encode())
        elif path == "/metrics":
            self._answer(200, generate_latest(self.state.registry), CONTENT_TYPE_LATEST)
        else:
            self._answer(404, b"there are /healthz and /metrics\n")

    def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing: a probe a second would fill the log."""
