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
from collections.abc import Awaitable, Callable, Mapping, Sequence
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
from twotower.serve.request import (
    OUTPUTS,
    Embedding,
    Recommendation,
    Schema,
    Tensors,
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


def _outputs(protocol: str, explain: bool) -> list[Any]:
    # What is not asked for is not made.
    names = (*OUTPUTS, "explanation") if explain else OUTPUTS
    return [_module(protocol, asynchronous=False).InferRequestedOutput(name) for name in names]


def channel_options(url: str, protocol: str, proxy: bool, tls: ClientTls | None) -> dict[str, Any]:
    """Return the options of a connection.

    Only gRPC's would use the environment's proxy, and only gRPC's can be encrypted.
    """
    if protocol != "grpc":
        if tls is not None:
            raise UserError(f"{url}: Triton encrypts gRPC alone: give its gRPC address")
        return {}
    # These replace tritonclient's own, of which the sizes matter: gRPC receives 4 MB by default.
    options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    options += [
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", MOST_RECONNECT_MS),
    ]
    if not proxy or is_local(url):
        options.append(("grpc.enable_http_proxy", 0))
    return {"channel_args": options} if tls is None else tls.options(options)


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
        module = _module(protocol, asynchronous=False)
        options = channel_options(url, protocol, proxy, tls)
        if protocol == "http":
            options = {"network_timeout": timeout_s, "connection_timeout": timeout_s}
        self._client = module.InferenceServerClient(url, **options)
        self._schema: Schema | None = None
        self._towers: dict[str, TowerSchema] = {}

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
            self._schema = parse_schema(self._model_config(self.model, deadline))
        return self._schema

    def _model_config(self, model: str, deadline: float) -> dict[str, Any]:
        ask = self._client.get_model_config
        try:
            if self.protocol == "grpc":
                return dict(self._try(lambda t: ask(model, as_json=True, **t), deadline)["config"])
            return dict(self._try(lambda _: ask(model), deadline))
        except ServerUnavailable:
            raise
        except UserError as error:  # a server that has no such model
            raise ServerUnavailable(str(error), "failed") from None

    def statistics(self) -> dict[str, Any]:
        """Return what the server has counted of the model, by gRPC's names; gRPC alone.

        Raises:
            ServerUnavailable: when no server answers.
        """
        ask = self._client.get_inference_statistics
        deadline = time.monotonic() + self.timeout_s
        return dict(self._try(lambda t: ask(self.model, as_json=True, **t), deadline))

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
        inputs = _inputs(self.protocol, encode(schema, features, k, exclude, allow, filters))
        options = {"outputs": _outputs(self.protocol, explain), "priority": priority}
        return decode(
            schema,
            self._try(lambda t: self._client.infer(self.model, inputs, **options, **t), deadline),
        )

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
        inputs = _inputs(self.protocol, encode_features(self._towers[model].features, features))
        return decode_vector(self._try(lambda t: self._client.infer(model, inputs, **t), deadline))

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
        module = _module(protocol, asynchronous=True)
        options = channel_options(url, protocol, proxy, tls)
        self._client = module.InferenceServerClient(url, **options)
        self._schema: Schema | None = None
        self._towers: dict[str, TowerSchema] = {}
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
                self._schema = parse_schema(await self._model_config(self.model, deadline))
        return self._schema

    async def _model_config(self, model: str, deadline: float) -> dict[str, Any]:
        ask = self._client.get_model_config
        try:
            if self.protocol == "grpc":
                found = await self._try(lambda t: ask(model, as_json=True, **t), deadline)
                return dict(found["config"])
            return dict(await self._try(lambda _: ask(model), deadline))
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
        inputs = _inputs(self.protocol, encode(schema, features, k, exclude, allow, filters))
        options = {
            "outputs": _outputs(self.protocol, explain), "priority": priority,
            "headers": headers or None,
        }  # fmt: skip
        return decode(schema, await self._infer(self.model, inputs, deadline, **options))

    async def embed(
        self, model: str, features: dict[str, Any], headers: Mapping[str, str] | None = None
    ) -> Embedding:
        """Return a tower's vector; see `RecommendClient.embed`."""
        deadline = time.monotonic() + self.timeout_s
        tower = await self._read_tower(model, deadline)
        inputs = _inputs(self.protocol, encode_features(tower.features, features))
        return decode_vector(await self._infer(model, inputs, deadline, headers=headers or None))

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
            return bool(await self._try(lambda t: self._client.is_model_ready(model, **t),
                                        time.monotonic() + self.timeout_s))  # fmt: skip
        except UserError:
            return False

    async def prepare(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = ()
    ) -> list[Any]:
        """Return a request encoded ahead of time for `ask`, as load tests do."""
        return _inputs(self.protocol, encode(await self.schema(), features, k, exclude))

    async def ask(self, prepared: list[Any]) -> Any:
        """Return Triton's result of a prepared request; raises as `recommend`."""
        deadline, outputs = time.monotonic() + self.timeout_s, _outputs(self.protocol, False)
        return await self._infer(self.model, prepared, deadline, outputs=outputs)

    async def _infer(self, model: str, inputs: list[Any], deadline: float, **options: Any) -> Any:
        infer = self._client.infer
        return await self._try(lambda t: infer(model, inputs, **options, **t), deadline)

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
            except Exception as error:  # what the HTTP libraries raise, too
                pause_s = _pause(explain(error, self.url), self._retries, tries, deadline)
                await asyncio.sleep(pause_s)
            else:
                self._retries.succeeded()
                return answer
