"""From a request to an answer: the store, then the model; popularity where one is silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from twotower.errors import UserError
from twotower.serve.client import ServerUnavailable
from twotower.serve.config import SIMILAR
from twotower.serve.gateway.breaker import Breaker
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.defaults import Defaults
from twotower.serve.gateway.observe import Metrics, Trail, span, trace_headers
from twotower.serve.gateway.replicas import EMBED_ITEMS, EMBED_QUERY, Query, Replicas
from twotower.serve.gateway.store import DamagedRecord, HistoryStore, Record, StoreUnavailable
from twotower.serve.request import Schema


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A request that has been checked."""

    user: Any = None
    features: dict[str, Any]
    history: list[Any] | None = None
    history_times: list[int | None] | None = None
    k: int
    exclude: list[Any]
    filter_seen: bool
    timeout_ms: float
    allow: list[Any] | None = None
    filters: dict[str, Any] | None = None
    explain: bool = False


class Recommender:
    """Answers requests.

    Args:
        schema: of the served model.
        record: type by which what the store holds is checked.
        defaults: what is known without the store.
        store: what knows the users.
        replicas: the servers of the model.
        config: of the gateway.
        metrics: to count in.
    """

    def __init__(
        self, schema: Schema, record: type[BaseModel], defaults: Defaults, store: HistoryStore,
        replicas: Replicas, config: GatewayConfig, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.schema, self.defaults, self.store, self.replicas = schema, defaults, store, replicas
        self._config, self._record, self._metrics = config, record, metrics
        self._breaker = Breaker(config.failures, config.retry_s)

    async def recommend(self, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return the answer as JSON-like values.

        Raises:
            UserError: for a request that the model refuses.
        """
        end = time.monotonic() + ask.timeout_ms / 1000
        record: Record | None = None
        if ask.user is not None:
            try:
                with span("store"):
                    record = await self.look_up(ask.user, end - time.monotonic())
            except StoreUnavailable:
                return self._popular(ask, trail, "store", ask.features, self._excluded(ask, None))
        features, excluded = self.features_of(ask, record), self._excluded(ask, record)
        query = Query(
            features, ask.k, excluded, trace_headers(trail), ask.allow, ask.filters, ask.explain
        )
        return await self._asked(query, ask, trail, end, excluded)

    async def similar(self, item: Any, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return the items nearest to one, as `recommend` does."""
        end = time.monotonic() + ask.timeout_ms / 1000
        query = Query(
            {"item": item}, ask.k, ask.exclude, trace_headers(trail), ask.allow, ask.filters,
            ask.explain, SIMILAR,
        )  # fmt: skip
        return await self._asked(query, ask, trail, end, [*ask.exclude, item])

    async def embed(self, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return a query's vector as JSON-like values.

        Raises:
            ServerUnavailable: when none came in time; nothing stands in for a vector.
            StoreUnavailable: when the store does not tell what the query needs.
        """
        end = time.monotonic() + ask.timeout_ms / 1000
        record = None
        if ask.user is not None:
            with span("store"):
                record = await self.look_up(ask.user, end - time.monotonic())
        return await self._embedded(EMBED_QUERY, self.features_of(ask, record), trail, end)

    async def embed_item(
        self, features: dict[str, Any], timeout_ms: float, trail: Trail
    ) -> dict[str, Any]:
        """Return an item's vector, by all its features; raises as `embed`."""
        end = time.monotonic() + timeout_ms / 1000
        return await self._embedded(EMBED_ITEMS, features, trail, end)

    async def _embedded(
        self, model: str, features: dict[str, Any], trail: Trail, end: float
    ) -> dict[str, Any]:
        query = Query(features, None, [], trace_headers(trail), model=model)
        with span("model"):
            answer = await self.replicas.ask(query, end - time.monotonic())
        trail.version = answer.version
        return {"vector": answer.vector, "version": answer.version}

    async def _asked(
        self, query: Query, ask: Ask, trail: Trail, end: float, excluded: list[Any]
    ) -> dict[str, Any]:
        try:
            with span("model"):
                answer = await self.replicas.ask(query, end - time.monotonic())
        except ServerUnavailable:
            return self._popular(ask, trail, "model", query.features, excluded)
        trail.version = answer.version
        items = zip(answer.item_ids, answer.scores, strict=True)
        return {
            "items": [{"id": item, "score": score} for item, score in items],
            "version": answer.version, "fallback": None, "reason": None,
            "explanation": answer.explanation,
        }  # fmt: skip

    async def look_up(self, user: Any, left_s: float) -> Record | None:
        """Return what the store knows of a user, None for one that it does not know.

        Raises:
            StoreUnavailable: when it has not told it in time, or its circuit is open.
        """
        started = time.monotonic()
        timeout_s = self._config.store_timeout_ms / 1000
        record = await self._from_store(self.store.get(user), timeout_s, left_s)
        self._metrics.store_seconds.observe(time.monotonic() - started)
        if record is None:
            return None
        # What another job or a mistake has left there is no fault of the caller's.
        known = {n: v for n, v in record.features.items() if n in self.defaults.features}
        record = Record(known, record.items, record.times)
        try:
            self._record.model_validate(vars(record))
        except ValidationError as error:
            self._metrics.store_failures.labels("damaged").inc()
            raise DamagedRecord(f"user {user!r}: {error.errors()[0]['msg']}") from None
        return record

    async def append(self, user: Any, items: Sequence[Any], times: Sequence[int | None]) -> None:
        """Add events to a user's history.

        Raises:
            StoreUnavailable: when the store has not taken them.
        """
        # Nobody waits for an answer that the model must still give.
        timeout_s = self._config.deadline_ms / 1000
        await self._from_store(self.store.append(user, items, times), timeout_s, timeout_s)

    async def health(self) -> tuple[bool, bool]:
        """Return whether the model answers a real request in time, and the store a ping."""
        ask = Ask(
            features={}, k=1, exclude=[], filter_seen=False, timeout_ms=self._config.deadline_ms
        )
        query, timeout_s = Query(self.features_of(ask, None), 1, [], {}), ask.timeout_ms / 1000
        try:
            answer = await self.replicas.ask(query, timeout_s)
            model = bool(answer.item_ids)
        except UserError:
            model = False
        try:
            await self._from_store(self.store.ping(), timeout_s, timeout_s)
        except StoreUnavailable:
            return model, False
        return model, True

    async def _from_store(self, asked: Any, timeout_s: float, left_s: float) -> Any:
        """Return the store's answer, within its time-out and what is left to the caller."""
        if not self._breaker.allows():
            asked.close()
            self._metrics.store_failures.labels("circuit open").inc()
            raise StoreUnavailable("the circuit to it is open")
        try:
            result = await _within(asked, max(0.0, min(timeout_s, left_s)))
        except DamagedRecord:
            self._breaker.succeeded()
            self._metrics.store_failures.labels("damaged").inc()
            raise
        except (StoreUnavailable, asyncio.TimeoutError) as error:
            late = isinstance(error, asyncio.TimeoutError)
            if not late or left_s >= timeout_s:  # else the caller gave it hardly any time
                self._breaker.failed()
            self._metrics.store_failures.labels("time-out" if late else "error").inc()
            self._metrics.circuit_open.labels("store").set(self._breaker.is_open)
            raise StoreUnavailable(str(error) or "no answer in time") from None
        self._breaker.succeeded()
        self._metrics.circuit_open.labels("store").set(0)
        return result

    def features_of(self, ask: Ask, record: Record | None) -> dict[str, Any]:
        """Return every feature of the model: the caller's, else the store's, else the default."""
        features = dict(self.defaults.features)
        if ask.user is not None:
            features |= dict.fromkeys(self.defaults.user_features, ask.user)
        if record is not None:
            features |= record.features
        features |= ask.features
        items, times = _history(ask, record)
        windows = {s.name: s.length for s in self.schema.features if s.kind == "history"}
        for spec in self.schema.features:
            if spec.kind == "history":
                features[spec.name] = items[-spec.length :]
            elif spec.kind == "times":
                features[spec.name] = times[-windows[spec.of] :]
        names = [spec.name for spec in self.schema.features]
        return {name: features[name] for name in names}

    @staticmethod
    def _excluded(ask: Ask, record: Record | None) -> list[Any]:
        seen: Iterable[Any] = ()
        if ask.filter_seen:
            seen = [*(record.items if record else ()), *(ask.history or ())]
        return list(dict.fromkeys([*ask.exclude, *seen]))

    def _popular(
        self, ask: Ask, trail: Trail, reason: str, features: dict[str, Any], excluded: list[Any]
    ) -> dict[str, Any]:
        """Return what is popular in the user's segment; nothing where attributes are filtered."""
        trail.fallback = reason
        self._metrics.fallbacks.labels(reason).inc()
        segment = features.get(self.defaults.segment_by) if self.defaults.segment_by else None
        items: list[Any] = []
        if ask.filters is None:  # popularity knows no attributes, and may not break a promise
            only = None if ask.allow is None else set(ask.allow)
            items = self.defaults.most_popular(segment, ask.k, set(excluded), only)
        return {
            "items": [{"id": item, "score": None} for item in items],
            "version": None, "fallback": "popularity", "reason": reason, "explanation": None,
        }  # fmt: skip


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


def _history(ask: Ask, record: Record | None) -> tuple[list[Any], list[int | None]]:
    """Return the items of the history and their times: the caller's, else the store's."""
    if ask.history is not None:
        return ask.history, ask.history_times or [None] * len(ask.history)
    return (record.items, record.times) if record else ([], [])
