"""What is seen of the gateway: Prometheus metrics, JSON log lines, and traces."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)

LOG = logging.getLogger("twotower.gateway")
TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
# Of seconds: around the deadlines that are usual, from a fast store to a slow model.
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass
class Trail:
    """What is noted of one request on its way.

    Attributes:
        request_id: the caller's X-Request-ID, or one made here.
        key: name of the API key.
        traceparent: the caller's, where it sent one.
        fallback: why popularity answered.
        version: of the bundle that answered.
    """

    request_id: str
    key: str = "-"
    traceparent: str | None = None
    fallback: str | None = None
    version: int | None = None


class Metrics:
    """The metrics of one gateway."""

    def __init__(self) -> None:
        # Else a series more for each of ours, of when it began.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        shared: dict[str, Any] = {"namespace": "twotower_gateway", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests answered.", ["endpoint", "status", "key"], **shared
        )
        self.seconds = Histogram(
            "request_seconds", "Time of a request.", ["endpoint"], buckets=BUCKETS, **shared
        )
        self.under_way = Gauge("under_way", "Requests being answered.", **shared)
        self.fallbacks = Counter(
            "fallbacks", "Answers from popularity, by what had failed.", ["reason"], **shared
        )
        self.store_seconds = Histogram(
            "store_seconds", "Time of the store's answers.", buckets=BUCKETS, **shared
        )
        self.store_failures = Counter(
            "store_failures", "Look-ups without an answer.", ["kind"], **shared
        )
        self.model_seconds = Histogram(
            "model_seconds", "Time of the model's answers.", buckets=BUCKETS, **shared
        )
        self.model_failures = Counter(
            "model_failures", "Requests to a server without an answer.", ["server"], **shared
        )
        self.hedges = Counter(
            "hedges", "Second requests, as the first was slow or failed.", **shared
        )
        self.circuit_open = Gauge(
            "circuit_open", "Whether requests are held back from it.", ["of"], **shared
        )


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(), "message": record.getMessage(),
        } | getattr(record, "fields", {})  # fmt: skip
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr() -> None:
    """Send our lines, and uvicorn's, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("twotower.gateway", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "twotower.gateway" else logging.WARNING)


def span(name: str, parent: str | None = None) -> AbstractContextManager[Any]:
    """Return a trace of a block, nothing where no traces are taken.

    Args:
        name: of the span.
        parent: the caller's traceparent; without one, the span under way is the parent.
    """
    tracer = _tracer()
    if tracer is None:
        return nullcontext()
    from opentelemetry import propagate

    context = propagate.extract({"traceparent": parent}) if parent else None
    started: AbstractContextManager[Any] = tracer.start_as_current_span(name, context)
    return started


@cache
def _tracer() -> Any:
    """Return what makes spans, None where nobody has set it up."""
    if find_spec("opentelemetry") is None:
        return None
    from opentelemetry import trace

    # Its stand-in costs 20 us a span to do nothing.
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return trace.get_tracer("twotower.gateway")


def trace_headers(trail: Trail) -> Mapping[str, str]:
    """Return what carries the trace on to Triton; the caller's own where nothing is traced here."""
    headers: dict[str, str] = {}
    if _tracer() is not None:
        from opentelemetry import propagate

        propagate.inject(headers)
    if not headers and trail.traceparent:
        headers["traceparent"] = trail.traceparent
    return headers
