"""Settings of the gateway; free of its libraries, so that any host can read a job."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from twotower.errors import UserError

MEMORY = "memory"
STORES = (MEMORY, "redis://HOST:PORT/DB", "rediss://HOST:PORT/DB")


@dataclass(frozen=True, kw_only=True)
class FeastConfig:
    """Which features of users come from Feast."""

    url: str | None = None
    """Feast's feature server, http://HOST:PORT or https://HOST:PORT, whose bearer token may come in
    TWOTOWER_FEAST_TOKEN; none, for features from `store` alone."""
    service: str | None = None
    """Feature service, whose features are called as the model's and go before those of `store`."""
    entity: str = "user_id"
    """Join key of its entity, as which the user's id is sent."""
    timeout_ms: float = 50.0
    """A feature server that has not answered for this long is done without."""

    def validate(self, deadline_ms: float) -> None:
        """Refuse what could not work.

        Args:
            deadline_ms: of the gateway.

        Raises:
            UserError: naming the key.
        """
        if self.url is None:
            return
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            shown = self.url.rpartition("@")[2]  # without a password
            raise UserError(
                f"gateway.feast.url must be http://HOST:PORT or https://HOST:PORT, got '{shown}'"
            )
        if not self.service or not self.entity:
            raise UserError(
                "gateway.feast.service and gateway.feast.entity must be named where "
                "gateway.feast.url is: those that `feast feature-services list` and `feast "
                "entities list` show"
            )
        if not 0 < self.timeout_ms < deadline_ms:
            raise UserError(
                f"gateway.feast.timeout_ms must be above 0 and below gateway.deadline_ms "
                f"({deadline_ms:g}), got {self.timeout_ms:g}"
            )


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """How `twotower gateway` answers JSON requests."""

    host: str = "127.0.0.1"
    """Address that it is bound to; one that other machines reach needs keys."""
    port: int = 8080
    """Port of HTTP requests; 0 asks the system for a free one."""
    triton: list[str] = field(default_factory=list)
    """gRPC addresses, HOST:PORT, of servers of the same model, asked in turn; by default the job's
    own running server."""
    store: str = MEMORY
    """What knows the users: memory (development: `load-store`'s file, events are forgotten at the
    end), or redis://HOST:PORT/DB, whose password may come in TWOTOWER_REDIS_PASSWORD."""
    store_timeout_ms: float = 20.0
    """A store that has not answered for this long is done without."""
    feast: FeastConfig = field(default_factory=FeastConfig)
    """A feature store beside it."""
    history_length: int = 500
    """Newest items kept of a user, all of which are filtered as seen; longer than any window."""
    segment_by: str | None = None
    """Query feature (an id from the users table) by whose values `load-store` counts popularity."""
    popular: int = 500
    """Most popular items kept for each segment, to answer with when nothing better is there."""
    deadline_ms: float = 250.0
    """Time for an answer; what the model has not answered by then comes from popularity."""
    hedge_after_ms: float | None = None
    """Ask a second time, the next server, where the first has not answered for this long; never by
    default."""
    failures: int = 5
    """So many failures in a row, over 0.2 s or more, open the circuit to a server or the store."""
    retry_s: float = 1.0
    """An open circuit is tried with one request after this time."""
    keys: str | None = None
    """File of the API keys, a line each: name, SHA-256 of the key in hex, requests a second where
    not `key_rate`. By default TWOTOWER_GATEWAY_KEYS holds such lines; without both, none is
    needed."""
    key_rate: float = 1000.0
    """Requests a second of one API key; a second's worth may come at once."""
    max_under_way: int = 64
    """Requests answered at the same time; one more is refused at once (429)."""
    max_body_bytes: int = 262144
    """Largest body of a request."""

    def validate(self) -> None:
        """Refuse what could not work.

        Raises:
            UserError: naming the key.
        """
        if not 0 <= self.port < 65536:
            raise UserError(f"gateway.port must be in 0..65535, got {self.port}")
        if self.store != MEMORY and not self.store.startswith(("redis://", "rediss://")):
            raise UserError(f"gateway.store must be one of {', '.join(STORES)}, got '{self.store}'")
        for name in ("history_length", "popular", "failures", "max_under_way", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"gateway.{name} must be >= 1, got {getattr(self, name)}")
        for name in ("store_timeout_ms", "deadline_ms", "retry_s", "key_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"gateway.{name} must be > 0, got {getattr(self, name):g}")
        if self.store_timeout_ms >= self.deadline_ms:
            raise UserError(
                f"gateway.store_timeout_ms must be < gateway.deadline_ms ({self.deadline_ms:g}), "
                f"got {self.store_timeout_ms:g}: lower it, or nothing is left for the model"
            )
        if self.hedge_after_ms is not None and not 0 < self.hedge_after_ms < self.deadline_ms:
            raise UserError(
                "gateway.hedge_after_ms must be above 0 and below gateway.deadline_ms "
                f"({self.deadline_ms:g}), got {self.hedge_after_ms:g}"
            )
        self.feast.validate(self.deadline_ms)
        for address in self.triton:
            port = address.rpartition(":")[2]
            if "://" in address or ":" not in address or not port.isdigit():
                raise UserError(
                    f"gateway.triton must hold gRPC addresses HOST:PORT, got '{address}'"
                )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
