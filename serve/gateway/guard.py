"""What stands between a request and a store: a time-out, a circuit breaker, metrics, a span."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from twotower.serve.gateway.breaker import Breaker
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.observe import LOG, Metrics
from twotower.serve.gateway.store import DamagedRecord, StoreUnavailable
from twotower.serve.gateway.tracing import span


class Guard:
    """Asks one store.

    Args:
        name: of the store, in metrics, spans and answers.
        config: of the gateway.
        metrics: to count in.
    """

    def __init__(self, name: str, config: GatewayConfig, metrics: Metrics) -> None:
        self.name, self._metrics = name, metrics
        self._breaker = Breaker(config.failures, config.retry_s)

    async def ask(
        self, asked: Coroutine[Any, Any, Any], timeout_s: float, left_s: float | None = None
    ) -> Any:
        """Return the store's answer.

        Args:
            asked: what asks it.
            timeout_s: seconds that it has.
            left_s: seconds that are left to the caller; the time-out without it.

        Raises:
            StoreUnavailable: when it has not answered in time, or its circuit is open.
        """
        left_s = timeout_s if left_s is None else left_s
        with span(self.name):
            if not self._breaker.allows():
                asked.close()
                self._failures("circuit open")
                raise StoreUnavailable(f"the circuit to the {self.name} is open")
            try:
                result = await _within(asked, max(0.0, min(timeout_s, left_s)))
            except DamagedRecord:
                self._breaker.succeeded()
                self._failures("damaged")
                raise
            except (StoreUnavailable, asyncio.TimeoutError) as error:
                late = isinstance(error, asyncio.TimeoutError)
                reason = str(error) or "no answer in time"
                self._failures("time-out" if late else "error")
                if not late or left_s >= timeout_s:  # else the caller gave it hardly any time
                    self._fail(reason)
                raise StoreUnavailable(reason) from None
            self._breaker.succeeded()
            self._metrics.circuit_open.labels(self.name).set(0)
            return result

    def _failures(self, kind: str) -> None:
        self._metrics.store_failures.labels(self.name, kind).inc()

    def _fail(self, reason: str) -> None:
        was_open = self._breaker.is_open
        self._breaker.failed()
        self._metrics.circuit_open.labels(self.name).set(self._breaker.is_open)
        if self._breaker.is_open and not was_open:
            LOG.warning("circuit open", extra={"fields": {"of": self.name, "reason": reason}})


async def _within(asked: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
    """Return an outcome, or raise `asyncio.TimeoutError`.

    Time in which this process did not get to run is given to the store again: the answer may lie in
    the socket, and `asyncio.wait_for` would throw it away.
    """
    task, end = asyncio.ensure_future(asked), time.monotonic() + timeout_s
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        done, _ = await asyncio.wait({task}, timeout=max(0.0, time.monotonic() - end))
    if done:
        return task.result()
    task.cancel()
    # Asyncio would complain of a failure that nobody has looked at.
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
    raise asyncio.TimeoutError
