"""Clients of the model `recommend`: sync and asyncio, gRPC and HTTP.

    with RecommendClient("127.0.0.1:8001") as client:
        answer = client.recommend({"user_id": 7, "history": ["a", "b"]}, k=10, exclude=["a"])

A client reads the model's schema from the server, so a mistake is explained before it is sent.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as http
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

from twotower.data.schema import PAD_INT64, PAD_STRING, TensorSpec
from twotower.errors import UserError, did_you_mean
from twotower.serve.config import MODEL

WIRE = {"string": "BYTES", "int64": "INT64", "float32": "FP32"}
Tensors = dict[str, tuple[str, npt.NDArray[Any]]]


class ServerUnavailable(UserError):
    """No answer came: the server is not there, not ready, too busy or too slow."""


@dataclass(frozen=True)
class Recommendation:
    """An answer, best first.

    Attributes:
        item_ids: as the log has them.
        scores: inner products of unit vectors, one an item.
        version: of the bundle that answered.
    """

    item_ids: list[Any]
    scores: list[float]
    version: int


@dataclass(frozen=True)
class Schema:
    """What the served model says of itself."""

    version: int
    item_id_dtype: str
    num_items: int
    default_k: int
    max_k: int
    features: list[TensorSpec]


def parse_schema(config: dict[str, Any]) -> Schema:
    """Read the schema from a model's configuration as JSON."""
    raw = json.loads(config["parameters"]["schema"]["string_value"])
    return Schema(**(raw | {"features": [TensorSpec(**f) for f in raw["features"]]}))


def encode(
    schema: Schema, features: dict[str, Any], k: int | None, exclude: Sequence[Any]
) -> Tensors:
    """Return a request's tensors: name -> (Triton type, array with a batch dimension of 1).

    Raises:
        UserError: naming the feature, what was expected and what came.
    """
    names = [spec.name for spec in schema.features]
    for name in features:
        if name not in names:
            raise UserError(f"the model has no feature '{name}'{did_you_mean(name, names)}")
    tensors: Tensors = {}
    for spec in schema.features:
        if spec.name not in features:
            raise UserError(
                f"feature '{spec.name}' ({spec.kind}, {spec.dtype}) is missing: send None for an "
                "unknown id, [] for an empty list"
            )
        tensors[spec.name] = (WIRE[spec.dtype], _feature(spec, features[spec.name]))
    k = schema.default_k if k is None else k
    if isinstance(k, bool) or not isinstance(k, int):
        raise UserError(f"k must be an integer, got {k!r}")
    if not 1 <= k <= schema.max_k:
        raise UserError(
            f"k must be in 1..{schema.max_k} (catalogue: {schema.num_items} items), got {k}"
        )
    # Both are optional to the server, but it batches only requests that carry the same inputs.
    tensors["k"] = ("INT32", np.array([[k]], np.int32))
    ids = [_id("exclude", schema.item_id_dtype, value) for value in exclude]
    tensors["exclude"] = (WIRE[schema.item_id_dtype], _ids(schema.item_id_dtype, ids))
    return tensors


def _feature(spec: TensorSpec, value: Any) -> npt.NDArray[Any]:
    if spec.dtype == "float32":
        values = [value] if spec.kind == "number" else _list(spec, value)
        if len(values) != spec.length:
            raise UserError(
                f"feature '{spec.name}' must be a vector of width {spec.length}, got {len(values)}"
            )
        return np.array([[_number(spec, v) for v in values]], np.float32)
    if not spec.is_list:
        return _ids(spec.dtype, [] if value is None else [_id(spec.name, spec.dtype, value)])
    entries = _list(spec, value)
    if len(entries) > spec.length:
        newest = "newest" if spec.kind == "history" else "first"
        raise UserError(
            f"feature '{spec.name}' has {len(entries)} entries, the model's window is "
            f"{spec.length}: send the {newest} {spec.length}"
        )
    return _ids(spec.dtype, [_id(spec.name, spec.dtype, v) for v in entries])


def _list(spec: TensorSpec, value: Any) -> list[Any]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        raise UserError(f"feature '{spec.name}' must be a list, got {value!r}")
    return list(value)


def _number(spec: TensorSpec, value: Any) -> float:
    if isinstance(value, (bool, str, bytes)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise UserError(f"feature '{spec.name}' must hold numbers, got {value!r}")
    if not math.isfinite(value):
        raise UserError(f"feature '{spec.name}' must hold finite numbers, got {value!r}")
    return float(value)


def _id(name: str, dtype: str, value: Any) -> Any:
    if dtype == "string":
        if not isinstance(value, str) or "\0" in value:
            raise UserError(f"'{name}' must hold string ids, got {value!r}")
        return value.encode()
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UserError(f"'{name}' must hold integer ids, got {value!r}")
    if not PAD_INT64 < int(value) < 2**63:
        raise UserError(f"'{name}': the id {value} does not fit 64 bits")
    return int(value)


def _ids(dtype: str, values: list[Any]) -> npt.NDArray[Any]:
    # An empty tensor is not safe on the wire: one entry of padding says the same.
    if dtype == "string":
        return np.array([values or [PAD_STRING.encode()]], dtype=object)
    return np.array([values or [PAD_INT64]], dtype=np.int64)


def decode(schema: Schema, result: Any) -> Recommendation:
    """Return the answer in a Triton result."""
    ids, scores = result.as_numpy("item_ids")[0], result.as_numpy("scores")[0]
    text = schema.item_id_dtype == "string"
    return Recommendation(
        [i.decode() if text else int(i) for i in ids],
        [float(s) for s in scores],
        int(result.as_numpy("version")[0, 0]),
    )


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


def _deadline(protocol: str, timeout_s: float) -> dict[str, Any]:
    """Return the arguments of a request's deadline; over HTTP the connection holds it."""
    return {"client_timeout": timeout_s} if protocol == "grpc" else {}


class RecommendClient:
    """Asks the model from ordinary code; not to be shared by threads.

    Args:
        url: host:port of the protocol's endpoint.
        protocol: grpc or http.
        timeout_s: the deadline of each request.
    """

    def __init__(self, url: str, protocol: str = "grpc", timeout_s: float = 2.0) -> None:
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        module = _module(protocol, asynchronous=False)
        limits = {}
        if protocol == "http":
            limits = {"network_timeout": timeout_s, "connection_timeout": timeout_s}
        self._client = module.InferenceServerClient(url, **limits)
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
                        MODEL, as_json=True, client_timeout=self.timeout_s
                    )["config"]
                else:
                    config = self._client.get_model_config(MODEL)
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
                a list of floats.
            k: number of items; the server's default without it.
            exclude: item ids that may not be answered, for instance those seen.

        Raises:
            UserError: for a request that the model cannot answer.
            ServerUnavailable: when no answer came within the deadline.
        """
        tensors = encode(self.schema(), features, k, exclude)
        try:
            result = self._client.infer(
                MODEL, _inputs(self.protocol, tensors), **_deadline(self.protocol, self.timeout_s)
            )
        except Exception as error:  # also what the HTTP libraries raise and tritonclient lets by
            raise explain(error, self.url) from None
        return decode(self.schema(), result)


class AsyncRecommendClient:
    """Asks the model from asyncio code; many requests may be under way at once.

    Args:
        url: host:port of the protocol's endpoint.
        protocol: grpc or http.
        timeout_s: the deadline of each request.
    """

    def __init__(self, url: str, protocol: str = "grpc", timeout_s: float = 2.0) -> None:
        self.url, self.protocol, self.timeout_s = url, protocol, timeout_s
        self._client = _module(protocol, asynchronous=True).InferenceServerClient(url)
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
