"""Clients of the model `recommend`: sync and asyncio, gRPC and HTTP.

    with RecommendClient("127.0.0.1:8001") as client:
        answer = client.recommend({"user_id": 7, "history": ["a", "b"]}, k=10, exclude=["a"])

A client reads the model's schema from the server, so a mistake is explained before it is sent.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from typing import Any

import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

from twotower.errors import UserError
from twotower.serve.config import MODEL
from twotower.serve.request import Recommendation, Schema, Tensors, decode, encode, parse_schema
from twotower.serve.tls import ClientTls


class ServerUnavailable(UserError):
    """No answer came: the server is not there, not ready, too busy or too slow."""


def explain(error: Exception, url: str) -> UserError:
    """Turn what a Triton client raises into an answer."""
    text = str(error)
    if isinstance(error, InferenceServerException):
        text = error.message() or text
        if error.status() in ("400", "StatusCode.INVALID_ARGUMENT"):
            return UserError(f"{url} refused the request: {text}")
        if error.status() in ("500", "StatusCode.INTERNAL"):
            # For instance a stub that has died, which the supervisor is bringing back.
            return ServerUnavailable(f"{url} failed to answer: {text}: try again in a few seconds")
    return ServerUnavailable(
        f"no answer from {url} ({text.splitlines()[0] if text else type(error).__name__}): is "
        "`twotower serve` running there, and is this its port for the protocol?"
    )


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


def channel_options(url: str, protocol: str, proxy: bool, tls: ClientTls | None) -> dict[str, Any]:
    """Return what keeps a client from the environment's proxy, which only gRPC's would use.

    And what encrypts it, which only gRPC's can.
    """
    if protocol != "grpc":
        if tls is not None:
            raise UserError(f"{url}: Triton encrypts gRPC alone: give its gRPC address")
        return {}
    # These replace tritonclient's own, of which the sizes matter: gRPC receives 4 MB by default.
    arguments = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    if not proxy or _is_local(url):
        arguments.append(("grpc.enable_http_proxy", 0))
    return {"channel_args": arguments} if tls is None else tls.options(arguments)


def _is_local(url: str) -> bool:
    """Whether an address is of this machine itself, where no proxy could reach it."""
    host = url.rsplit("/", 1)[-1].rsplit(":", 1)[0].strip("[]")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _deadline(protocol: str, timeout_s: float) -> dict[str, Any]:
    """Return the arguments of a request's deadline; over HTTP the connection holds it."""
    return {"client_timeout": timeout_s} if protocol == "grpc" else {}


class RecommendClient:
    """Asks the model from ordinary code; not to be shared by threads.

    Args:
        url: host:port of the protocol's endpoint.
        protocol: grpc or http.
        timeout_s: the deadline of each request.
        proxy: whether gRPC heeds http_proxy and no_proxy of the environment, as it does by
            default; a loopback address never goes through a proxy.
        model: name of the model, on a server that has several.
        tls: how gRPC is encrypted; not at all without it.
    """

    def __init__(
        self, url: str, protocol: str = "grpc", timeout_s: float = 2.0, *, proxy: bool = True,
        model: str = MODEL, tls: ClientTls | None = None,
    ) -> None:  # fmt: skip
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        self.model = model
        module = _module(protocol, asynchronous=False)
        options = channel_options(url, protocol, proxy, tls)
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
        if self._schema is None:
            try:
                if self.protocol == "grpc":
                    config = self._client.get_model_config(
                        self.model, as_json=True, client_timeout=self.timeout_s
                    )["config"]
                else:
                    config = self._client.get_model_config(self.model)
            except Exception as error:
                raise ServerUnavailable(str(explain(error, self.url))) from None
            self._schema = parse_schema(config)
        return self._schema

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
        tensors = encode(self.schema(), features, k, exclude)
        try:
            result = self._client.infer(
                self.model, _inputs(self.protocol, tensors),
                **_deadline(self.protocol, self.timeout_s),
            )  # fmt: skip
        except Exception as error:  # also what the HTTP libraries raise and tritonclient lets by
            raise explain(error, self.url) from None
        return decode(self.schema(), result)


class AsyncRecommendClient:
    """Asks the model from asyncio code; many requests may be under way at once.

    Args:
        url: host:port of the protocol's endpoint.
        protocol: grpc or http.
        timeout_s: the deadline of each request.
        proxy: whether gRPC heeds http_proxy and no_proxy of the environment, as it does by
            default; a loopback address never goes through a proxy.
        tls: how gRPC is encrypted; not at all without it.
    """

    def __init__(
        self, url: str, protocol: str = "grpc", timeout_s: float = 2.0, *, proxy: bool = True,
        tls: ClientTls | None = None,
    ) -> None:  # fmt: skip
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        module = _module(protocol, asynchronous=True)
        options = channel_options(url, protocol, proxy, tls)
        self._client = module.InferenceServerClient(url, **options)
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
        async with self._schema_lock:  # many first requests at once ask once
            if self._schema is None:
                self._schema = parse_schema(await self._model_config())
        return self._schema

    async def _model_config(self) -> dict[str, Any]:
        try:
            if self.protocol == "grpc":
                asked = self._client.get_model_config(MODEL, as_json=True)
                return dict((await asyncio.wait_for(asked, self.timeout_s))["config"])
            return dict(
                await asyncio.wait_for(self._client.get_model_config(MODEL), self.timeout_s)
            )
        except Exception as error:
            raise ServerUnavailable(str(explain(error, self.url))) from None

    async def recommend(
        self, features: dict[str, Any], *, k: int | None = None, exclude: Sequence[Any] = ()
    ) -> Recommendation:
        """Return the best items; see `RecommendClient.recommend`."""
        schema = await self.schema()
        tensors = encode(schema, features, k, exclude)
        try:
            # Triton's asyncio HTTP client has no deadline of its own.
            result = await asyncio.wait_for(
                self._client.infer(MODEL, _inputs(self.protocol, tensors)), self.timeout_s
            )
        except Exception as error:  # also what the HTTP libraries raise and tritonclient lets by
            raise explain(error, self.url) from None
        return decode(schema, result)
