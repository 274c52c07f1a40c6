"""Asking Triton: circuit breakers, a second request where the first is slow, one deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.serve.client import ServerUnavailable
from twotower.serve.config import EMBED_ITEMS, MODELS
from twotower.serve.gateway.breaker import Breaker
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.following import Following
from twotower.serve.gateway.observe import Metrics
from twotower.serve.gateway.replica import Query, Replica
from twotower.serve.request import Schema
from twotower.serve.tls import ClientTls


class Replicas:
    """The servers of the model, asked in turn.

    Args:
        addresses: of their gRPC endpoints.
        config: of the gateway.
        metrics: to count in.
        tls: how the servers' gRPC is encrypted; not at all without it.
    """

    def __init__(
        self, addresses: Sequence[str], config: GatewayConfig, metrics: Metrics,
        tls: ClientTls | None,
    ) -> None:  # fmt: skip
        self._config, self._metrics, self._turn = config, metrics, 0
        # Asking again is done here, where circuits and other servers are known.
        options: dict[str, Any] = {
            "timeout_s": config.deadline_ms / 1000, "retries": 0, "tls": tls,
        }  # fmt: skip
        self._replicas = [
            Replica(address, Breaker(config.failures, config.retry_s), **options)
            for address in addresses
        ]
        self._patience_s = (
            None if config.hedge_after_ms is None else config.hedge_after_ms / 1000
        )  # fmt: skip

    async def close(self) -> None:
        """Close the connections."""
        async with AsyncExitStack() as stack:
            for replica in self._replicas:
                stack.push_async_callback(replica.close)

    async def schema(self, timeout_s: float) -> Schema:
        """Return the model's schema as soon as a server tells it.

        Raises:
            ServerUnavailable: when none has told it in time.
        """
        end = time.monotonic() + timeout_s
        while True:
            for replica in self._replicas:
                try:
                    return await replica.client.schema()
                except ServerUnavailable:
                    if time.monotonic() > end:
                        raise
            await asyncio.sleep(0.2)

    async def models(self) -> list[str]:
        """Return which models a server has ready, beside `recommend`."""
        return [name for name in MODELS[1:] if await self._with(name)]

    async def item_features(self) -> list[TensorSpec]:
        """Return what embed_items takes; empty where no server has it."""
        replica = await self._with(EMBED_ITEMS)
        return [] if replica is None else (await replica.client.tower(EMBED_ITEMS)).features

    async def _with(self, model: str) -> Replica | None:
        for replica in self._replicas:
            if await replica.client.has(model):
                return replica
        return None

    def follow(self, following: Following) -> None:
        """Have `following` told of whatever is served from now on."""
        for replica in self._replicas:
            replica.following = following

    async def ask(self, query: Query, left_s: float, traceparent: str | None = None) -> Any:
        """Return the first answer: a `Recommendation`, or the `Embedding` of a tower.

        Args:
            query: the request.
            left_s: seconds after which no answer is of use.
            traceparent: the caller's, for what is not traced here.

        Raises:
            ServerUnavailable: when none came in time, or every circuit is open.
            UserError: for a request that the model refuses.
        """
        started = time.monotonic()
        end = started + left_s
        # A second request goes out once: to another server when one has failed, and in any case
        # where the first is slow and that is wanted.
        may_again = len(self._replicas) > 1 or self._patience_s is not None
        pending = self._start(query, traceparent)
        error: BaseException = ServerUnavailable("every circuit is open")
        try:
            while pending:
                wait_s = end - time.monotonic()
                if may_again and self._patience_s is not None:
                    wait_s = min(wait_s, started + self._patience_s - time.monotonic())
                done, _ = await asyncio.wait(
                    pending, timeout=max(0.0, wait_s), return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    del pending[task]
                    failure = task.exception()
                    if failure is None:
                        self._metrics.model_seconds.observe(time.monotonic() - started)
                        return task.result()
                    if not isinstance(failure, ServerUnavailable):
                        raise failure
                    error = failure
                if time.monotonic() >= end:
                    error = ServerUnavailable("no answer within the deadline")
                    self._blame(pending, left_s)
                    break
                if may_again and (not done or not pending):
                    may_again = False
                    if again := self._start(query, traceparent):
                        self._metrics.hedges.inc()
                        pending |= again
        finally:
            for task in pending:
                task.cancel()
                task.add_done_callback(_forget)
        raise error

    def _start(self, query: Query, traceparent: str | None) -> dict[asyncio.Task[Any], Replica]:
        """Send a request to the next server whose circuit lets it; empty where none does."""
        for _ in self._replicas:
            replica = self._replicas[self._turn % len(self._replicas)]
            self._turn += 1
            if replica.breaker.allows():
                return {asyncio.create_task(self._ask(replica, query, traceparent)): replica}
        return {}

    async def _ask(self, replica: Replica, query: Query, traceparent: str | None) -> Any:
        try:
            answer = await replica.answer(query, traceparent)
        except ServerUnavailable:
            self._failed(replica)
            raise
        except UserError:
            self._answers(replica)
            raise
        self._answers(replica)
        return answer

    def _blame(self, pending: Mapping[Any, Replica], left_s: float) -> None:
        """Count servers that let the deadline pass, unless a caller gave them hardly any time."""
        if left_s > self._config.deadline_ms / 2000:
            for replica in pending.values():
                self._failed(replica)

    def _failed(self, replica: Replica) -> None:
        replica.breaker.failed()
        url = replica.client.url
        self._metrics.model_failures.labels(url).inc()
        self._metrics.circuit_open.labels(url).set(replica.breaker.is_open)

    def _answers(self, replica: Replica) -> None:
        replica.breaker.succeeded()
        self._metrics.circuit_open.labels(replica.client.url).set(0)


def _forget(task: asyncio.Task[Any]) -> None:
    # Asyncio would complain of a failure that nobody has looked at.
    if not task.cancelled():
        task.exception()
