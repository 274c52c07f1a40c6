"""One server of the model: what it serves, and requests that are made for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.serve.client import AsyncRecommendClient, ServerUnavailable
from twotower.serve.config import EMBED, EMBED_ITEMS, MODEL, SIMILAR
from twotower.serve.gateway.breaker import Breaker
from twotower.serve.gateway.following import Following
from twotower.serve.gateway.tracing import span, trace_headers
from twotower.serve.request import Schema, TowerSchema


@dataclass(frozen=True)
class Query:
    """What `AsyncRecommendClient.recommend` is asked, or `embed`: by the features alone."""

    features: Callable[[Sequence[TensorSpec]], dict[str, Any]]
    """Makes them for what a server takes; may raise `ServerUnavailable`."""
    k: int | None = None
    exclude: Sequence[Any] = ()
    allow: Sequence[Any] | None = None
    filters: Mapping[str, Any] | None = None
    explain: bool = False
    model: str = MODEL
    """One of `serve.models`."""


class Replica:
    """One server.

    It may take another bundle at any time. It is asked anew what it serves when an answer is of
    another version, or when it refuses a request, which is then made and sent once more if it
    serves something else.

    Args:
        address: of its gRPC endpoint.
        breaker: its circuit.
        options: of the clients.
    """

    def __init__(self, address: str, breaker: Breaker, **options: Any) -> None:
        self.breaker = breaker
        self.client = AsyncRecommendClient(address, **options)
        self.similar = AsyncRecommendClient(address, model=SIMILAR, **options)
        self.following: Following | None = None
        """Told of what is served; may refuse it with `ServerUnavailable`."""
        self._known: dict[str, Schema | TowerSchema] = {}

    async def answer(self, query: Query, traceparent: str | None) -> Any:
        """Return a `Recommendation`, or the `Embedding` of a tower.

        Args:
            query: the request.
            traceparent: the caller's, for what is not traced here.

        Raises:
            ServerUnavailable: when no answer came, or what is served cannot be followed.
            UserError: for a request that the model refuses.
        """
        served = await self._served(query.model)
        try:
            answer = await self._send(query, served, traceparent)
        except ServerUnavailable:
            raise
        except UserError:
            # Also what another request has asked since: that may have been before a model changed.
            self._forget()
            now = await self._served(query.model)
            if now == served:
                raise
            return await self._send(query, now, traceparent)
        if answer.version != served.version:
            self._forget_if_known(query.model, served)
        return answer

    async def _send(
        self, query: Query, served: Schema | TowerSchema, traceparent: str | None
    ) -> Any:
        try:
            features = query.features(served.features)
        except ServerUnavailable:
            self._forget_if_known(query.model, served)
            raise
        client = self.similar if query.model == SIMILAR else self.client
        with span("triton", {"server.address": client.url}):
            headers = trace_headers(traceparent)
            if query.model in EMBED:
                return await client.embed(query.model, features, headers)
            return await client.recommend(
                features, k=query.k, exclude=query.exclude, allow=query.allow,
                filters=query.filters, explain=query.explain, headers=headers,
            )  # fmt: skip

    async def _served(self, model: str) -> Schema | TowerSchema:
        """Return what a model says of itself, asked for once, and told to `following` first."""
        if model in self._known:
            return self._known[model]
        whole = False
        try:
            whole = await self._tell()
            served: Schema | TowerSchema
            if model in EMBED:
                served = await self.client.tower(model)
            else:
                served = await (self.similar if model == SIMILAR else self.client).schema()
            if whole:
                self._known[model] = served
            return served
        finally:
            if not whole:
                self.client.forget()
                self.similar.forget()

    async def _tell(self) -> bool:
        """Tell what is served; false while one model is of another version than the rest."""
        schema = await self.client.schema()
        if self.following is None:
            return True
        items, whole = None, True
        if self.following.embeds_items:
            try:
                tower = await self.client.tower(EMBED_ITEMS)
                items, whole = tower.features, tower.version == schema.version
            except ServerUnavailable:  # not loaded yet
                whole = False
        await self.following.follow(schema, items)
        return whole

    def _forget_if_known(self, model: str, served: Schema | TowerSchema) -> None:
        """Have it asked anew what it serves, unless it has been since."""
        if self._known.get(model) is served:
            self._forget()

    def _forget(self) -> None:
        self._known.clear()
        self.client.forget()
        self.similar.forget()

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()
        await self.similar.close()
