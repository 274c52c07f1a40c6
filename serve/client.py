"""Clients of the model `recommend`: sync and asyncio, gRPC and HTTP.

    with RecommendClient("127.0.0.1:8001") as client:
        answer = client.recommend({"user_id": 7, "history": ["a", "b"]}, k=10, exclude=["a"])

A client reads the model's schema from the server, so a mistake is explained before it is sent. It
holds its connection, and asks again (`twotower.serve.retry`) when that is lost or the server is not
there, since a request changes nothing; one deadline holds for all tries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gevent

from twotower.errors import UserError
from twotower.serve.config import EMBED, MODEL
from twotower.serve.failure import ServerUnavailable, explain
from twotower.serve.request import (
    OUTPUTS,
    Embedding,
    Outputs,
    Recommendation,
    Schema,
    TowerSchema,
    decode,
    decode_vector,
    encode,
    encode_features,
    parse_schema,
    parse_tower,
)
from twotower.serve.retry import Retries
from twotower.serve.tls import ClientTls
from twotower.serve.transport import GrpcTransport, open_transport

__all__ = ["AsyncRecommendClient", "RecommendClient", "ServerUnavailable"]

RETRIES = 3


def _wanted(explain: bool) -> Sequence[str]:
    # What is not asked for is not made.
    return (*OUTPUTS, "explanation") if explain else OUTPUTS


class RecommendClient:
    """Asks the model from ordinary code; not to be shared by threads.

    Args:
        url: host:port of the protocol's endpoint.
        protocol: grpc or http.
        timeout_s: the deadline of each request, over all tries.
        proxy: whether gRPC heeds http_proxy and no_proxy of the environment, as it does by
            default; a loopback address never goes through a proxy.
        retries: further tries when the connection is lost or the server is not there.
        model: name of the model, on a server that has several.
        tls: how gRPC is encrypted; not at all without it.

    Raises:
        UserError: for another protocol or a negative number of retries.
    """

    def __init__(
        self, url: str, protocol: str = "grpc", timeout_s: float = 2.0, *, proxy: bool = True,
        retries: int = RETRIES, model: str = MODEL, tls: ClientTls | None = None,
    ) -> None:  # fmt: skip
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        self.model = model
        self._retries = Retries(retries)
        self._calls = open_transport(
            url, protocol, asynchronous=False, timeout_s=timeout_s, proxy=proxy, tls=tls
        )
        self._schema: Schema | None = None
        self._towers: dict[str, TowerSchema] = {}

    def __enter__(self) -> RecommendClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._calls.close()

    def schema(self) -> Schema:
        """Return the served model's schema, asked for once.

        Raises:
            ServerUnavailable: when no server answers.
        """
        return self._read_schema(time.monotonic() + self.timeout_s)

    def _read_schema(self, deadline: float) -> Schema:
        if self._schema is None:
            self._schema = parse_schema(self._model_config(self.model, deadline))
        return self._schema

    def _model_config(self, model: str, deadline: float) -> dict[str, Any]:
        try:
            answer = self._try(lambda left_s: self._calls.model_config(model, left_s), deadline)
            return self._calls.read_config(answer)
        except ServerUnavailable:
            raise
        except UserError as error:  # a server that has no such model
            raise ServerUnavailable(str(error), "failed") from None

    def statistics(self) -> dict[str, Any]:
        """Return what the server has counted of the model, by gRPC's names; gRPC alone.

        Raises:
            ServerUnavailable: when no server answers.
        """
        calls, deadline = self._calls, time.monotonic() + self.timeout_s
        assert isinstance(calls, GrpcTransport)
        answer = self._try(lambda left_s: calls.statistics(self.model, left_s), deadline)
        return calls.as_json(answer)

    def recommend(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = (),
        allow: Sequence[Any] | None = None, filters: Mapping[str, Any] | None = None,
        explain: bool = False, priority: int = 0,
    ) -> Recommendation:  # fmt: skip
        """Return the best items.

        Args:
            features: every feature of the model by name: an id or None, a list of ids, a number,
                a list of floats. The times of a history may be left out.
            k: number of items; the server's default without it.
            exclude: item ids that may not be answered, for instance those seen.
            allow: the only item ids that may be answered, for instance candidates to be scored.
            filters: attribute -> a value that answers must have, a list of values of which they
                must have one, or {"not": …}: `{"genre": ["drama"], "adult": False}`.
            explain: whether the answer says how it came about.
            priority: 1 for the first served, up to `serve.priority_levels`; 0 for the default.

        Raises:
            UserError: for a request that the model cannot answer.
            ServerUnavailable: when no answer came within the deadline.
        """
        deadline = time.monotonic() + self.timeout_s
        schema = self._read_schema(deadline)
        tensors = encode(schema, features, k, exclude, allow, filters)
        request = self._calls.prepare(self.model, tensors, _wanted(explain), priority)
        return decode(schema, self._infer(self.model, request, deadline))

    def embed(self, model: str, features: dict[str, Any]) -> Embedding:
        """Return a tower's vector.

        Args:
            model: `embed_query` or `embed_items`; see `serve.models`.
            features: as `recommend` takes them; of an item, every item feature by name.

        Raises:
            UserError: for features that the model cannot embed.
            ServerUnavailable: when no answer came within the deadline, or the server has no such
                model.
        """
        deadline = time.monotonic() + self.timeout_s
        if model not in self._towers:
            self._towers[model] = parse_tower(self._model_config(model, deadline))
        tensors = encode_features(self._towers[model].features, features)
        return decode_vector(self._infer(model, self._calls.prepare(model, tensors), deadline))

    def _infer(self, model: str, request: Any, deadline: float) -> Outputs:
        answer = self._try(lambda left_s: self._calls.infer(model, request, left_s), deadline)
        return self._calls.read(answer)

    def _try(self, ask: Callable[[float], Any], deadline: float) -> Any:
        """Return what `ask` does within the seconds that a try has left; asked again if safe."""
        tries = 0
        while True:
            tries += 1
            left = max(0.0, deadline - time.monotonic())
            limit: AbstractContextManager[Any] = nullcontext()
            if self.protocol == "http":
                # A socket's own time-out holds for each read of it alone.
                limit = gevent.Timeout(left, TimeoutError("the deadline has passed"))
            try:
                with limit:
                    answer = ask(left)
            except Exception as error:  # what the HTTP libraries raise, too
                pause_s = _pause(explain(error, self.url), self._retries, tries, deadline)
                time.sleep(pause_s)
            else:
                self._retries.succeeded()
                return answer


def _pause(failure: UserError, retries: Retries, tries: int, deadline: float) -> float:
    """Return the seconds until the next try; raises the failure when that is unsafe or too late."""
    if isinstance(failure, ServerUnavailable) and failure.kind == "lost":
        pause_s = retries.pause_s(tries, deadline - time.monotonic())
        if pause_s is not None:
            return pause_s
    raise failure from None


class AsyncRecommendClient:
    """Asks the model from asyncio code; many requests may be under way at once.

    The arguments are those of `RecommendClient`.
    """

    def __init__(
        self, url: str, protocol: str = "grpc", timeout_s: float = 2.0, *, proxy: bool = True,
        retries: int = RETRIES, model: str = MODEL, tls: ClientTls | None = None,
    ) -> None:  # fmt: skip
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        self.model = model
        self._retries = Retries(retries)
        self._calls = open_transport(
            url, protocol, asynchronous=True, timeout_s=timeout_s, proxy=proxy, tls=tls
        )
        self._schema: Schema | None = None
        self._towers: dict[str, TowerSchema] = {}
        self._schema_lock = asyncio.Lock()

    async def __aenter__(self) -> AsyncRecommendClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._calls.close()

    async def schema(self) -> Schema:
        """Return the served model's schema, asked for once.

        Raises:
            ServerUnavailable: when no server answers.
        """
        return await self._read_schema(time.monotonic() + self.timeout_s)

    async def _read_schema(self, deadline: float) -> Schema:
        async with self._schema_lock:  # many first requests at once ask once
            if self._schema is None:
                self._schema = parse_schema(await self._model_config(self.model, deadline))
        return self._schema

    async def _model_config(self, model: str, deadline: float) -> dict[str, Any]:
        try:
            answer = await self._try(
                lambda left_s: self._calls.model_config(model, left_s), deadline
            )
            return self._calls.read_config(answer)
        except ServerUnavailable:
            raise
        except UserError as error:  # a server that has no such model
            raise ServerUnavailable(str(error), "failed") from None

    async def recommend(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = (),
        allow: Sequence[Any] | None = None, filters: Mapping[str, Any] | None = None,
        explain: bool = False, priority: int = 0, headers: Mapping[str, str] | None = None,
    ) -> Recommendation:  # fmt: skip
        """Return the best items; see `RecommendClient.recommend`.

        `headers` go with the request, for instance a traceparent.
        """
        deadline = time.monotonic() + self.timeout_s
        schema = await self._read_schema(deadline)
        tensors = encode(schema, features, k, exclude, allow, filters)
        request = self._calls.prepare(self.model, tensors, _wanted(explain), priority)
        answer = await self._infer(self.model, request, deadline, headers)
        return decode(schema, self._calls.read(answer))

    async def embed(
        self, model: str, features: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> Embedding:
        """Return a tower's vector; see `RecommendClient.embed`."""
        deadline = time.monotonic() + self.timeout_s
        tower = await self._read_tower(model, deadline)
        request = self._calls.prepare(model, encode_features(tower.features, features))
        answer = await self._infer(model, request, deadline, headers)
        return decode_vector(self._calls.read(answer))

    async def tower(self, model: str) -> TowerSchema:
        """Return what `embed_query` or `embed_items` takes, asked for once.

        Raises:
            ServerUnavailable: when no server answers, or it has no such model.
        """
        return await self._read_tower(model, time.monotonic() + self.timeout_s)

    async def _read_tower(self, model: str, deadline: float) -> TowerSchema:
        async with self._schema_lock:
            if model not in self._towers:
                self._towers[model] = parse_tower(await self._model_config(model, deadline))
            return self._towers[model]

    def forget(self) -> None:
        """Ask for the schema anew before the next request: the server may have another bundle."""
        self._schema = None
        self._towers.clear()

    async def has(self, model: str) -> bool:
        """Return whether the server has a model ready, as far as it says so in time."""
        try:
            return self._calls.read_ready(
                await self._try(lambda left_s: self._calls.is_ready(model, left_s),
                                time.monotonic() + self.timeout_s)
            )  # fmt: skip
        except UserError:
            return False

    async def prepare(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = ()
    ) -> Any:
        """Return a request made ahead of time for `ask`, as load tests do.

        A client whose `model` is `embed_query` asks by the features alone.
        """
        if self.model in EMBED:
            tower = await self.tower(self.model)
            return self._calls.prepare(self.model, encode_features(tower.features, features))
        tensors = encode(await self.schema(), features, k, exclude)
        return self._calls.prepare(self.model, tensors, _wanted(False))

    async def ask(self, prepared: Any) -> Any:
        """Return Triton's answer to a prepared request, unread; raises as `recommend`."""
        return await self._infer(self.model, prepared, time.monotonic() + self.timeout_s, None)

    async def _infer(
        self, model: str, request: Any, deadline: float, headers: Mapping[str, str] | None
    ) -> Any:
        infer = self._calls.infer
        return await self._try(lambda left_s: infer(model, request, left_s, headers), deadline)

    async def _try(self, ask: Callable[[float], Awaitable[Any]], deadline: float) -> Any:
        """Return what `ask` does within the seconds that a try has left; asked again if safe."""
        tries = 0
        while True:
            tries += 1
            left = max(0.0, deadline - time.monotonic())
            try:
                if self.protocol == "grpc":
                    answer = await ask(left)
                else:  # Triton's asyncio HTTP client has no deadline of its own
                    answer = await asyncio.wait_for(ask(left), left)
            except Exception as error:  # what the HTTP libraries raise, too
                pause_s = _pause(explain(error, self.url), self._retries, tries, deadline)
                await asyncio.sleep(pause_s)
            else:
                self._retries.succeeded()
                return answer
