"""Settings of the server; free of torch and of Triton, so that any host can read a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twotower.errors import UserError, one_of
from twotower.serve.tls import TlsConfig

MODEL = "recommend"
EMBED_QUERY, EMBED_ITEMS = "embed_query", "embed_items"
EMBED = {EMBED_QUERY: "query", EMBED_ITEMS: "item"}  # and the side
SIMILAR = "similar"
MODELS = (MODEL, *EMBED, SIMILAR)
TARGETS = ("cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How Triton serves a bundle."""

    host: str = "127.0.0.1"
    """Address that the endpoints are bound to."""
    http_port: int = 8000
    """Port of HTTP requests; 0 asks the system for a free one."""
    grpc_port: int = 8001
    """Port of gRPC requests; 0 asks the system for a free one."""
    metrics_port: int = 8002
    """Port of Triton's Prometheus metrics; 0 asks the system for a free one."""
    health_port: int = 8003
    """Port of the health endpoint and of the supervisor's metrics; 0 asks for a free one."""
    models: list[str] = field(default_factory=lambda: ["recommend"])
    """Which models are loaded: recommend; embed_query and embed_items, which give the towers'
    vectors; similar, which gives the items nearest to an item."""
    instances: int = 1
    """Processes that answer, of each model."""
    threads: int = 1
    """Threads of ONNX Runtime in each."""
    max_batch_size: int = 64
    """Most rows answered together."""
    preferred_batch_sizes: list[int] = field(default_factory=list)
    """Batch sizes that are sent at once when they are reached, where max_queue_delay_us waits."""
    max_queue_delay_us: int = 0
    """Time that a batch waits for more rows; 0 still batches what has queued up meanwhile."""
    max_queue_size: int = 0
    """Requests that may wait, those beyond being rejected; 0 for any number, which is the default
    because tritonserver 2.51 leaves what waits in a limited queue asleep for up to 0.5 s when no
    other request comes."""
    queue_timeout_ms: float = 0.0
    """Time after which a request that still waits is rejected, up to 0.5 s late; 0 for never."""
    priority_levels: int = 0
    """Levels of priority that a request may ask for, 1 being the first served and the last the
    default; 0 for none."""
    response_cache_mb: int = 0
    """Memory for answers, given again to requests that are the same byte for byte; 0 for none. Of
    a request that was refused, tritonserver 2.51 gives an empty answer from it, and no reason."""
    concurrent_batches: int = 0
    """Batches computed at the same time, of all models together; 0 for as many as instances."""
    default_k: int = 10
    """Results of a request that does not say."""
    max_k: int = 1000
    """Most results of a request."""
    require_signature: str | None = None
    """PEM file of the ed25519 public key by which a bundle must be signed; none, for any bundle."""
    probe_interval_s: float = 1.0
    """Time between two golden queries that prove the server's health."""
    probe_timeout_s: float = 2.0
    """A probe unanswered for this long has failed."""
    load_timeout_s: float = 60.0
    """A server or model that is not ready after this long has failed."""
    drain_s: float = 10.0
    """Time that requests under way have to be answered once the server is told to stop, or their
    version is replaced."""
    memory_limit_mb: int | None = None
    """Most memory of Triton while two bundles are loaded, in MB (1e6 bytes): a rollout that would
    need more is refused; none, for no limit."""
    trace_url: str | None = None
    """OpenTelemetry collector, http://HOST:4318/v1/traces, to which Triton sends spans of requests
    that carry a traceparent; none, for no spans."""
    tls: TlsConfig = field(default_factory=TlsConfig)
    """Encryption of gRPC."""

    def validate(self) -> None:
        """Refuse what Triton would refuse later.

        Raises:
            UserError: naming the key.
        """
        names = ("http_port", "grpc_port", "metrics_port", "health_port")
        ports = {name: getattr(self, name) for name in names}
        for name, port in ports.items():
            if not 0 <= port < 65536:
                raise UserError(f"serve.{name} must be in 0..65535, got {port}")
        fixed = [port for port in ports.values() if port]
        if len(set(fixed)) < len(fixed):
            raise UserError(f"serve: the ports must differ, got {ports}")
        for name in ("instances", "threads", "max_batch_size", "default_k", "max_k"):
            if getattr(self, name) < 1:
                raise UserError(f"serve.{name} must be >= 1, got {getattr(self, name)}")
        if self.default_k > self.max_k:
            raise UserError(
                f"serve.default_k must be <= serve.max_k ({self.max_k}), got {self.default_k}: "
                "lower it, or raise serve.max_k"
            )
        for name in (
            "max_queue_delay_us", "max_queue_size", "queue_timeout_ms", "priority_levels",
            "response_cache_mb", "concurrent_batches",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise UserError(f"serve.{name} must be >= 0, got {getattr(self, name)}")
        for name in self.models:
            one_of("serve.models", name, MODELS)
        if MODEL not in self.models or len(set(self.models)) < len(self.models):
            raise UserError(
                f"serve.models must name {MODEL}, and each model once, got {self.models}"
            )
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise UserError(
                    f"serve.preferred_batch_sizes must be in 1..{self.max_batch_size} "
                    f"(serve.max_batch_size), got {size}"
                )
        if self.memory_limit_mb is not None and self.memory_limit_mb < 1:
            raise UserError(f"serve.memory_limit_mb must be >= 1, got {self.memory_limit_mb}")
        for name in ("probe_interval_s", "probe_timeout_s", "load_timeout_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise UserError(f"serve.{name} must be > 0, got {getattr(self, name)}")
        if self.trace_url is not None and not self.trace_url.startswith(("http://", "https://")):
            raise UserError(
                "serve.trace_url must be http://HOST:PORT/v1/traces, or https://, got "
                f"'{self.trace_url}'"
            )
        self.tls.validate()


def serve_config(section: Mapping[str, Any]) -> ServeConfig:
    """Return the configuration that a job's section `serve` makes, as JSON-like values."""
    return ServeConfig(**{**section, "tls": TlsConfig(**section.get("tls", {}))})
