"""From a request to an answer: the stores, then the model; popularity where one is silent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from twotower.errors import UserError
from twotower.serve.client import ServerUnavailable
from twotower.serve.config import SIMILAR
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.defaults import Defaults
from twotower.serve.gateway.feast import FeastFeatures
from twotower.serve.gateway.guard import Guard
from twotower.serve.gateway.observe import Metrics, Trail
from twotower.serve.gateway.replicas import EMBED_ITEMS, EMBED_QUERY, Query, Replicas
from twotower.serve.gateway.store import DamagedRecord, HistoryStore, Record, StoreUnavailable
from twotower.serve.gateway.tracing import span
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
        feast: what knows features of theirs that go before the store's; None for no such.
        replicas: the servers of the model.
        config: of the gateway.
        metrics: to count in.
    """

    def __init__(
        self, schema: Schema, record: type[BaseModel], defaults: Defaults, store: HistoryStore,
        feast: FeastFeatures | None, replicas: Replicas, config: GatewayConfig, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.schema, self.defaults, self.store, self.replicas = schema, defaults, store, replicas
        self.feast = feast
        self._config, self._record, self._metrics = config, record, metrics
        self._to_store = Guard("store", config, metrics)
        self._to_feast = Guard("features", config, metrics)

    async def recommend(self, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return the answer as JSON-like values.

        Raises:
            UserError: for a request that the model refuses.
        """
        end = time.monotonic() + ask.timeout_ms / 1000
        record, silent = await self.look_up(ask.user, end - time.monotonic())
        features, excluded = self.features_of(ask, record), self._excluded(ask, record)
        if silent:
            return self._popular(ask, trail, silent, features, excluded)
        query = Query(features, ask.k, excluded, ask.allow, ask.filters, ask.explain)
        return await self._asked(query, ask, trail, end, excluded)

    async def similar(self, item: Any, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return the items nearest to one, as `recommend` does."""
        end = time.monotonic() + ask.timeout_ms / 1000
        query = Query(
            {"item": item}, ask.k, ask.exclude, ask.allow, ask.filters, ask.explain, SIMILAR
        )  # fmt: skip
        return await self._asked(query, ask, trail, end, [*ask.exclude, item])

    async def embed(self, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return a query's vector as JSON-like values.

        Raises:
            ServerUnavailable: when none came in time; nothing stands in for a vector.
            StoreUnavailable: when a store does not tell what the query needs.
        """
        end = time.monotonic() + ask.timeout_ms / 1000
        record, silent = await self.look_up(ask.user, end - time.monotonic())
        if silent:
            raise StoreUnavailable(silent)
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
        answer = await self._from_model(Query(features, None, [], model=model), trail, end)
        return {"vector": answer.vector, "version": answer.version}

    async def _asked(
        self, query: Query, ask: Ask, trail: Trail, end: float, excluded: list[Any]
    ) -> dict[str, Any]:
        try:
            answer = await self._from_model(query, trail, end)
        except ServerUnavailable:
            return self._popular(ask, trail, "model", query.features, excluded)
        items = zip(answer.item_ids, answer.scores, strict=True)
        return {
            "items": [{"id": item, "score": score} for item, score in items],
            "version": answer.version, "fallback": None, "reason": None,
            "explanation": answer.explanation,
        }  # fmt: skip

    async def _from_model(self, query: Query, trail: Trail, end: float) -> Any:
        with span("model"):
            answer = await self.replicas.ask(query, end - time.monotonic(), trail.traceparent)
        trail.version = answer.version
        return answer

    async def look_up(self, user: Any, left_s: float) -> tuple[Record | None, str | None]:
        """Return what is known of a user, and the store that was silent: store, features.

        The first is None for a user whom nobody knows, the second where all have answered.
        """
        if user is None:
            return None, None
        timeout_ms = self._config.store_timeout_ms
        asked = self._known(self._to_store, self.store, user, timeout_ms, left_s)
        if self.feast is None:
            return await asked
        timeout_ms = self._config.feast.timeout_ms
        (record, silent), (own, no_features) = await asyncio.gather(
            asked, self._known(self._to_feast, self.feast, user, timeout_ms, left_s)
        )
        if own is not None:
            record = record or Record()
            record = replace(record, features=record.features | own.features)
        return record, silent or no_features

    async def _known(
        self, guard: Guard, store: HistoryStore | FeastFeatures, user: Any, timeout_ms: float,
        left_s: float,
    ) -> tuple[Record | None, str | None]:  # fmt: skip
        """Return what one store knows of a user, or its name where it does not say."""
        started = time.monotonic()
        try:
            record = await guard.ask(self._checked(store, user), timeout_ms / 1000, left_s)
        except StoreUnavailable:
            return None, guard.name
        self._metrics.store_seconds.labels(guard.name).observe(time.monotonic() - started)
        return record, None

    async def _checked(self, store: HistoryStore | FeastFeatures, user: Any) -> Record | None:
        record = await store.get(user)
        if record is None:
            return None
        # What another job or a mistake has left there is no fault of the caller's.
        known = {n: v for n, v in record.features.items() if n in self.defaults.features}
        record = replace(record, features=known)
        try:
            self._record.model_validate(vars(record))
        except ValidationError as error:
            raise DamagedRecord(f"user {user!r}: {error.errors()[0]['msg']}") from None
        return record

    async def append(self, user: Any, items: Sequence[Any], times: Sequence[int | None]) -> None:
        """Add events to a user's history.

        Raises:
            StoreUnavailable: when the store has not taken them.
        """
        # Nobody waits for an answer that the model must still give.
        timeout_s = self._config.deadline_ms / 1000
        await self._to_store.ask(self.store.append(user, items, times), timeout_s)

    async def health(self) -> tuple[bool, bool]:
        """Return whether the model answers a real request in time, and the stores a ping."""
        ask = Ask(
            features={}, k=1, exclude=[], filter_seen=False, timeout_ms=self._config.deadline_ms
        )
        query, timeout_s = Query(self.features_of(ask, None), 1, []), ask.timeout_ms / 1000
        try:
            answer = await self.replicas.ask(query, timeout_s)
            model = bool(answer.item_ids)
        except UserError:
            model = False
        try:
            await self._to_store.ask(self.store.ping(), timeout_s)
            if self.feast is not None:
                await self._to_feast.ask(self.feast.ping(), timeout_s)
        except StoreUnavailable:
            return model, False
        return model, True

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


def _history(ask: Ask, record: Record | None) -> tuple[list[Any], list[int | None]]:
    """Return the items of the history and their times: the caller's, else the store's."""
    if ask.history is not None:
        return ask.history, ask.history_times or [None] * len(ask.history)
    return (record.items, record.times) if record else ([], [])
