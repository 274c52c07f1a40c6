"""Settings of `twotower load` and `twotower tune-serving`; read with the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from twotower.errors import UserError, one_of

ARRIVALS = ("poisson", "constant")
# A percentile is the luck of a few where fewer than this many requests lie beyond it.
BEYOND = 5
LEAST_REQUESTS = 100 * BEYOND
MOST_REQUESTS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What every measurement under load has."""

    seconds: float = 10.0
    """Time of each measurement that counts."""
    warmup_seconds: float = 1.0
    """Time of the same load before that, which does not count."""
    arrivals: str = "poisson"
    """When requests of a rate come: poisson, as independent users do, or constant."""
    processes: int = 0
    """Client processes that share the load; 0, as many as it takes, up to the cores."""
    requests: int = 1000
    """Different requests that are drawn from, made from the log or the bundle's golden queries."""
    k: int | None = None
    """Results of a request; serve.default_k without it."""
    deadline_ms: float = 2000.0
    """A request unanswered for this long has failed."""

    def check_requests(self, option: str, rate: float) -> None:
        """Refuse more requests than a client can keep in memory.

        Raises:
            UserError: naming the option.
        """
        seconds = self.warmup_seconds + self.seconds
        if rate * seconds > MOST_REQUESTS:
            raise UserError(
                f"{option} times seconds must be at most {MOST_REQUESTS:,} requests, got {rate:g} "
                f"x {seconds:g}: lower one of them"
            )

    def check_measurement(self) -> None:
        """Refuse what no measurement could have.

        Raises:
            UserError: naming the option.
        """
        one_of("arrivals", self.arrivals, ARRIVALS)
        for name in ("seconds", "deadline_ms"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{_option(name)} must be > 0, got {getattr(self, name):g}")
        if not 0 <= self.warmup_seconds < float("inf"):
            raise UserError(f"warmup-seconds must be >= 0, got {self.warmup_seconds:g}")
        for name, least in (("processes", 0), ("requests", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.k is not None and self.k < 1:
            raise UserError(f"k must be >= 1, got {self.k}")


@dataclass(frozen=True, kw_only=True)
class LoadConfig(Measured):
    """How much load is put on a server, and for how long."""

    rates: list[float] = field(default_factory=list)
    """Requests a second, such as [100,200]; none, for shares of what the server can."""

    def validate(self) -> None:
        """Refuse what measures nothing.

        Raises:
            UserError: naming the option.
        """
        for rate in self.rates:
            if not 0 < rate < float("inf"):
                raise UserError(f"rates must be > 0 requests a second, got {rate:g}")
            self.check_requests("rates", rate)
        self.check_measurement()


@dataclass(frozen=True, kw_only=True)
class TuneConfig(Measured):
    """Which settings of the server are tried, under which load, and what they are to reach."""

    p99_ms: float = 20.0
    """Latency that 99 of 100 requests are to be within."""
    rate: float | None = None
    """Requests a second, whatever is answered; none, for a fixed number under way."""
    clients: int = 32
    """Requests under way, each followed by another when it is answered; of no use with a rate."""
    instances: list[int] = field(default_factory=list)
    """Values of serve.instances; none, for 1, 2, 4 and so on up to the cores."""
    threads: list[int] = field(default_factory=list)
    """Values of serve.threads; none, for 1, 2, 4 and so on up to the cores."""
    max_queue_delay_us: list[int] = field(default_factory=lambda: [0, 500, 2000])
    """Values of serve.max_queue_delay_us."""
    max_batch_size: list[int] = field(default_factory=list)
    """Values of serve.max_batch_size; none, for the job's own."""
    repeats: int = 3
    """Rounds; after each but the last, the worse half is given up."""
    seconds: float = 3.0
    """Time of each measurement that counts."""

    def validate(self) -> None:
        """Refuse what tunes nothing.

        Raises:
            UserError: naming the option.
        """
        if not 0 < self.p99_ms <= self.deadline_ms:
            raise UserError(
                f"p99-ms must be > 0 and at most deadline-ms ({self.deadline_ms:g}), got "
                f"{self.p99_ms:g}"
            )
        for name in ("instances", "threads", "max_batch_size"):
            if any(value < 1 for value in getattr(self, name)):
                raise UserError(f"{_option(name)} must be >= 1, got {min(getattr(self, name))}")
        if not self.max_queue_delay_us or min(self.max_queue_delay_us) < 0:
            raise UserError(
                "max-queue-delay-us must be values >= 0, for instance [0,500], got "
                f"{self.max_queue_delay_us}"
            )
        if self.clients < 1:
            raise UserError(f"clients must be >= 1, got {self.clients}")
        if self.repeats < 2:
            raise UserError(
                f"repeats must be >= 2, got {self.repeats}: one run tells nothing of the noise"
            )
        self.check_measurement()
        if self.rate is not None:
            self.check_requests("rate", self.rate)
        if self.rate is not None and not self.rate * self.seconds >= LEAST_REQUESTS:
            raise UserError(
                f"rate times seconds must be >= {LEAST_REQUESTS} requests, or there is no 99th "
                f"percentile to speak of, got {self.rate:g} x {self.seconds:g}: raise seconds"
            )


def _option(name: str) -> str:
    return name.replace("_", "-")
