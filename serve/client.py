"""Clients of the model `recommend`: sync and asyncio, gRPC and HTTP.

    with RecommendClient("127.0.0.1:8001") as client:
        answer = client.recommend({"user_id": 7, "history": ["a", "b"]}, k=10, exclude=["a"])

A client reads the model's schema from the server, so a mistake is explained before it is sent. It
holds its connection, and asks again (`twotower.serve.retry`) when that is lost or the server is not
there, since a request changes nothing; one deadline holds for all tries.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gevent
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
import tritonclient.http.aio as http_aio

from twotower.errors import UserError
from twotower.serve.config import MODEL
from twotower.serve.failure import ServerUnavailable, explain
from twotower.serve.request import Recommendation, Schema, Tensors, decode, encode, parse_schema
from twotower.serve.retry import Retries

__all__ = ["AsyncRecommendClient", "RecommendClient", "ServerUnavailable"]

RETRIES = 3
# gRPC waits a second before it connects anew, and a retry should find the server that is back.
RECONNECT_MS = 50
MOST_RECONNECT_MS = 2000


def _module(protocol: str, *, asynchronous: bool) -> Any:
    modules = {
        ("grpc", False): grpc, ("http", False): http,
        ("grpc", True): grpc_aio, ("http", True): http_aio,
    }  # fmt: skip
    if (protocol, asynchronous) not in modules:
        raise UserError(f"protocol must be grpc or http, got '{protocol}'")
    return modules[protocol, asynchronous]


def _inputs(protocol: str, tensors: Tensors) -> list[Any]:
    module = _module(protocol, asynchronous=False)
    out = []
    for name, (kind, value) in tensors.items():
        tensor = module.InferInput(name, list(value.shape), kind)
        tensor.set_data_from_numpy(value)
        out.append(tensor)
    return out


def _channel(url: str, protocol: str, proxy: bool) -> dict[str, Any]:
    """Return the options of a connection; only gRPC's would use the environment's proxy."""
    if protocol != "grpc":
        return {}
    # These replace tritonclient's own, of which the sizes matter: gRPC receives 4 MB by default.
    options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    options += [
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", MOST_RECONNECT_MS),
    ]
    if not proxy or is_local(url):
        options.append(("grpc.enable_http_proxy", 0))
    return {"channel_args": options}


def is_local(url: str) -> bool:
    """Whether an address is of this machine itself, where no proxy could reach it."""
    host = url.rsplit("/", 1)[-1].rsplit(":", 1)[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


class RecommendClient:
    """Asks the model from ordinary code; not to be shared by threads.

    Args:
        url: host:port of the protocol's endpoint.
        protocol: grpc or http.
        timeout_s: the deadline of each request, over all tries.
        proxy: whether gRPC heeds http_proxy and no_proxy of the environment, as it does by
            default; a loopback address never goes through a proxy.
        retries: further tries when the connection is lost or the server is not there.

    Raises:
        UserError: for another protocol or a negative number of retries.
    """

    def __init__(
        self, url: str, protocol: str = "grpc", timeout_s: float = 2.0, *, proxy: bool = True,
        retries: int = RETRIES,
    ) -> None:  # fmt: skip
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        self._retries = Retries(retries)
        module = _module(protocol, asynchronous=False)
        options = _channel(url, protocol, proxy)
        if protocol == "http":
            options = {"network_timeout": timeout_s, "connection_timeout": timeout_s}
        self._client = module.InferenceServerClient(url, **options)
        self._schema: Schema | None = None

    def __enter__(self) -> RecommendClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def schema(self) -> Schema:
        """Return the served model's schema, asked for once.

        Raises:
            ServerUnavailable: when no server answers.
        """
        return self._read_schema(time.monotonic() + self.timeout_s)

    def _read_schema(self, deadline: float) -> Schema:
        if self._schema is None:
            try:
                if self.protocol == "grpc":
                    ask = self._client.get_model_config
                    found = self._try(lambda t: ask(MODEL, as_json=True, **t), deadline)["config"]
                else:
                    found = self._try(lambda _: self._client.get_model_config(MODEL), deadline)
            except ServerUnavailable:
                raise
            except UserError as error:  # a server that has no such model
                raise ServerUnavailable(str(error), "failed") from None
            self._schema = parse_schema(found)
        return self._schema

    def statistics(self) -> dict[str, Any]:
        """Return what the server has counted of the model, by gRPC's names; gRPC alone.

        Raises:
            ServerUnavailable: when no server answers.
        """
        ask = self._client.get_inference_statistics
        deadline = time.monotonic() + self.timeout_s
        return dict(self._try(lambda t: ask(MODEL, as_json=True, **t), deadline))

    def recommend(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = ()
    ) -> Recommendation:
        """Return the best items.

        Args:
            features: every feature of the model by name: an id or None, a list of ids, a number,
                a list of floats. The times of a history may be left out.
            k: number of items; the server's default without it.
            exclude: item ids that may not be answered, for instance those seen.

        Raises:
            UserError: for a request that the model cannot answer.
            ServerUnavailable: when no answer came within the deadline.
        """
        deadline = time.monotonic() + self.timeout_s
        schema = self._read_schema(deadline)
        inputs = _inputs(self.protocol, encode(schema, features, k, exclude))
        return decode(schema, self._try(lambda t: self._client.infer(MODEL, inputs, **t), deadline))

    def _try(self, ask: Callable[[dict[str, float]], Any], deadline: float) -> Any:
        """Return what `ask` does, given the arguments of a try's deadline; asked again if safe."""
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
                    answer = ask({"client_timeout": left} if self.protocol == "grpc" else {})
            except (
                Exception
            ) as error:  # also what the HTTP libraries raise and tritonclient lets by
                failure = explain(error, self.url)
                left = deadline - time.monotonic()
                if (pause := _pause(failure, self._retries, tries, left)) is None:
                    raise failure from None
                time.sleep(pause)
            else:
                self._retries.succeeded()
                return answer


def _pause(failure: UserError, retries: Retries, tries: int, left_s: float) -> float | None:
    """Return the seconds until the next try; None when asking again is not safe, or too late."""
    if not isinstance(failure, ServerUnavailable) or failure.kind != "lost":
        return None
    return retries.pause_s(tries, left_s)


class AsyncRecommendClient:
    """Asks the model from asyncio code; many requests may be under way at once.

    The arguments are those of `RecommendClient`.
    """

    def __init__(
        self, url: str, protocol: str = "grpc", timeout_s: float = 2.0, *, proxy: bool = True,
        retries: int = RETRIES,
    ) -> None:  # fmt: skip
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        self._retries = Retries(retries)
        module = _module(protocol, asynchronous=True)
        self._client = module.InferenceServerClient(url, **_channel(url, protocol, proxy))
        self._schema: Schema | None = None
        self._schema_lock = asyncio.Lock()

    async def __aenter__(self) -> AsyncRecommendClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._client.close()

    async def schema(self) -> Schema:
        """Return the served model's schema, asked for once.

        Raises:
            ServerUnavailable: when no server answers.
        """
        return await self._read_schema(time.monotonic() + self.timeout_s)

    async def _read_schema(self, deadline: float) -> Schema:
        async with self._schema_lock:  # many first requests at once ask once
            if self._schema is None:
                self._schema = parse_schema(await self._model_config(deadline))
        return self._schema

    async def _model_config(self, deadline: float) -> dict[str, Any]:
        try:
            if self.protocol == "grpc":
                ask = self._client.get_model_config
                found = await self._try(lambda t: ask(MODEL, as_json=True, **t), deadline)
                return dict(found["config"])
            return dict(await self._try(lambda _: self._client.get_model_config(MODEL), deadline))
        except ServerUnavailable:
            raise
        except UserError as error:  # a server that has no such model
            raise ServerUnavailable(str(error), "failed") from None

    async def recommend(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = ()
    ) -> Recommendation:
        """Return the best items; see `RecommendClient.recommend`."""
        deadline = time.monotonic() + self.timeout_s
        schema = await self._read_schema(deadline)
        inputs = _inputs(self.protocol, encode(schema, features, k, exclude))
        return decode(schema, await self._infer(inputs, deadline))

    async def prepare(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = ()
    ) -> list[Any]:
        """Return a request encoded ahead of time for `ask`, as load tests do."""
        return _inputs(self.protocol, encode(await self.schema(), features, k, exclude))

    async def ask(self, prepared: list[Any]) -> Any:
        """Return Triton's result of a prepared request; raises as `recommend`."""
        return await self._infer(prepared, time.monotonic() + self.timeout_s)

    async def _infer(self, inputs: list[Any], deadline: float) -> Any:
        return await self._try(lambda t: self._client.infer(MODEL, inputs, **t), deadline)

    async def _try(self, ask: Callable[[dict[str, float]], Awaitable[Any]], deadline: float) -> Any:
        """Return what `ask` does, given the arguments of a try's deadline; asked again if safe."""
        tries = 0
        while True:
            tries += 1
            left = max(0.0, deadline - time.monotonic())
            try:
                if self.protocol == "grpc":
                    answer = await ask({"client_timeout": left})
                else:  # Triton's asyncio HTTP client has no deadline of its own
                    answer = await asyncio.wait_for(ask({}), left)
            except (
                Exception
            ) as error:  # also what the HTTP libraries raise and tritonclient lets by
                failure = explain(error, self.url)
                left = deadline - time.monotonic()
                if (pause := _pause(failure, self._retries, tries, left)) is None:
                    raise failure from None
                await asyncio.sleep(pause)
            else:
                self._retries.succeeded()
                return answer
