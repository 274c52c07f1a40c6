"""From a request to an answer: the stores, then the model; popularity where one is silent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.serve.client import ServerUnavailable
from twotower.serve.config import EMBED_ITEMS, EMBED_QUERY, SIMILAR
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.defaults import Defaults
from twotower.serve.gateway.observe import Metrics, Trail
from twotower.serve.gateway.replica import Query
from twotower.serve.gateway.replicas import Replicas
from twotower.serve.gateway.store import Record, StoreUnavailable
from twotower.serve.gateway.tracing import span
from twotower.serve.gateway.users import Users


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
        defaults: what is known without the stores; others may take their place.
        users: what the stores know.
        replicas: the servers of the model.
        config: of the gateway.
        metrics: to count in.
    """

    def __init__(
        self, defaults: Defaults, users: Users, replicas: Replicas, config: GatewayConfig,
        metrics: Metrics,
    ) -> None:  # fmt: skip
        self.defaults, self.users, self._replicas = defaults, users, replicas
        self._config, self._metrics = config, metrics

    async def recommend(self, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return the answer as JSON-like values.

        Raises:
            UserError: for a request that the model refuses.
        """
        end = time.monotonic() + ask.timeout_ms / 1000
        record, silent = await self.users.look_up(ask.user, end - time.monotonic())
        known, excluded = self._known(ask, record), self._excluded(ask, record)
        if silent:
            return self._popular(ask, trail, silent, known, excluded)
        query = Query(
            partial(self.features_of, ask, record), ask.k, excluded, ask.allow, ask.filters,
            ask.explain,
        )  # fmt: skip
        return await self._asked(query, ask, trail, end, known, excluded)

    async def similar(self, item: Any, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return the items nearest to one, as `recommend` does."""
        end = time.monotonic() + ask.timeout_ms / 1000
        query = Query(
            lambda _: {"item": item}, ask.k, ask.exclude, ask.allow, ask.filters, ask.explain,
            SIMILAR,
        )  # fmt: skip
        return await self._asked(query, ask, trail, end, {}, [*ask.exclude, item])

    async def embed(self, ask: Ask, trail: Trail) -> dict[str, Any]:
        """Return a query's vector as JSON-like values.

        Raises:
            ServerUnavailable: when none came in time; nothing stands in for a vector.
            StoreUnavailable: when a store does not tell what the query needs.
        """
        end = time.monotonic() + ask.timeout_ms / 1000
        record, silent = await self.users.look_up(ask.user, end - time.monotonic())
        if silent:
            raise StoreUnavailable(silent)
        query = Query(partial(self.features_of, ask, record), model=EMBED_QUERY)
        return await self._embedded(query, trail, end)

    async def embed_item(
        self, features: dict[str, Any], timeout_ms: float, trail: Trail
    ) -> dict[str, Any]:
        """Return an item's vector, by all its features; raises as `embed`."""
        end = time.monotonic() + timeout_ms / 1000
        query = Query(partial(_those_of, features), model=EMBED_ITEMS)
        return await self._embedded(query, trail, end)

    async def health(self) -> tuple[bool, bool]:
        """Return whether the model answers a real request in time, and the stores a ping."""
        timeout_ms = self._config.deadline_ms
        ask = Ask(features={}, k=1, exclude=[], filter_seen=False, timeout_ms=timeout_ms)
        query = Query(partial(self.features_of, ask, None), ask.k)
        try:
            answer = await self._replicas.ask(query, timeout_ms / 1000)
            model = bool(answer.item_ids)
        except UserError:
            model = False
        return model, await self.users.answer()

    async def _asked(
        self, query: Query, ask: Ask, trail: Trail, end: float, known: dict[str, Any],
        excluded: list[Any],
    ) -> dict[str, Any]:  # fmt: skip
        try:
            answer = await self._from_model(query, trail, end)
        except ServerUnavailable:
            return self._popular(ask, trail, "model", known, excluded)
        items = zip(answer.item_ids, answer.scores, strict=True)
        return {
            "items": [{"id": item, "score": score} for item, score in items],
            "version": answer.version, "fallback": None, "reason": None,
            "explanation": answer.explanation,
        }  # fmt: skip

    async def _embedded(self, query: Query, trail: Trail, end: float) -> dict[str, Any]:
        answer = await self._from_model(query, trail, end)
        return {"vector": answer.vector, "version": answer.version}

    async def _from_model(self, query: Query, trail: Trail, end: float) -> Any:
        with span("model"):
            answer = await self._replicas.ask(query, end - time.monotonic(), trail.traceparent)
        trail.version = answer.version
        return answer

    def features_of(
        self, ask: Ask, record: Record | None, specs: Sequence[TensorSpec]
    ) -> dict[str, Any]:
        """Return every feature of a model: the caller's, else the stores', else the default.

        Raises:
            ServerUnavailable: for a server of an older model, whose features are no longer known.
        """
        features = self._known(ask, record)
        items, times = _history(ask, record)
        windows = {s.name: s.length for s in specs if s.kind == "history"}
        for spec in specs:
            if spec.kind == "history":
                features[spec.name] = items[-spec.length :]
            elif spec.kind == "times":
                features[spec.name] = times[-windows[spec.of] :]
        return _those_of(features, specs)

    def _known(self, ask: Ask, record: Record | None) -> dict[str, Any]:
        """Return all that is known of who asks, but for the history."""
        features = dict(self.defaults.features)
        if ask.user is not None:
            features |= dict.fromkeys(self.defaults.user_features, ask.user)
        if record is not None:
            features |= record.features
        return features | ask.features

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


def _those_of(features: dict[str, Any], specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Return the features that a server takes, which may be of another bundle than the request."""
    names = [spec.name for spec in specs]
    if missing := [name for name in names if name not in features]:
        raise ServerUnavailable(f"it asks for {', '.join(missing)}")
    return {name: features[name] for name in names}


def _history(ask: Ask, record: Record | None) -> tuple[list[Any], list[int | None]]:
    """Return the items of the history and their times: the caller's, else the store's."""
    if ask.history is not None:
        return ask.history, ask.history_times or [None] * len(ask.history)
    return (record.items, record.times) if record else ([], [])
