"""What is seen of the gateway: Prometheus metrics and JSON log lines."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from dataclasses import dataclass
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
            "store_seconds", "Time of look-ups.", ["of"], buckets=BUCKETS, **shared
        )
        self.store_failures = Counter(
            "store_failures", "Look-ups without an answer.", ["of", "kind"], **shared
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
