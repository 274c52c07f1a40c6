"""Triton's calls as the clients make them, over gRPC and HTTP, sync and asyncio.

Every call returns an answer or, of asyncio, what is to be awaited for it. Over gRPC the messages
are made and read here: those of tritonclient go through each string by itself, which was half of a
request's CPU time.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.http as http
import tritonclient.http.aio as http_aio
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc

from twotower.errors import UserError
from twotower.serve.request import Outputs, Tensors
from twotower.serve.tls import ClientTls
from twotower.serve.triton import wire

# gRPC waits a second before it connects anew, and a retry should find the server that is back.
RECONNECT_MS = 50
MOST_RECONNECT_MS = 2000
INFER = f"/{messages.DESCRIPTOR.services_by_name['GRPCInferenceService'].full_name}/ModelInfer"
NUMBERS = {"FP32": "<f4", "INT64": "<i8"}
Headers = Mapping[str, str] | None


class GrpcTransport:
    """Calls over one gRPC channel.

    Args:
        url: host:port.
        asynchronous: whether asyncio code calls.
        proxy: whether the environment's proxy is heeded.
        tls: how it is encrypted; not at all without it.
    """

    def __init__(self, url: str, *, asynchronous: bool, proxy: bool, tls: ClientTls | None) -> None:
        module: Any = grpc.aio if asynchronous else grpc
        options = channel_options(url, proxy, tls)["channel_args"]
        if tls is None:
            self._channel = module.insecure_channel(url, options)
        else:
            files = [Path(f).read_bytes() if f else None for f in (tls.ca, tls.key, tls.cert)]
            credentials = grpc.ssl_channel_credentials(*files)
            self._channel = module.secure_channel(url, credentials, options)
        self._stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # A request comes as bytes already, so that it can be made ahead of time.
        self._infer = self._channel.unary_unary(
            INFER, response_deserializer=messages.ModelInferResponse.FromString
        )

    def close(self) -> Any:
        """Close the connection."""
        return self._channel.close()

    def prepare(
        self, model: str, tensors: Tensors, outputs: Sequence[str] = (), priority: int = 0
    ) -> Any:
        """Return a request; of outputs, none for all."""
        request = messages.ModelInferRequest(model_name=model)
        for name, (kind, value) in tensors.items():
            request.inputs.add(name=name, datatype=kind, shape=value.shape)
            request.raw_input_contents.append(
                wire.serialize(value.ravel().tolist()) if kind == "BYTES" else value.tobytes()
            )
        for name in outputs:
            request.outputs.add(name=name)
        if priority:
            request.parameters["priority"].uint64_param = priority
        return request.SerializeToString()

    def infer(self, model: str, request: Any, left_s: float, headers: Headers = None) -> Any:
        """Ask a model what `prepare` made for it."""
        metadata = tuple(headers.items()) if headers else None
        return self._infer(request, timeout=left_s, metadata=metadata)

    @staticmethod
    def read(answer: Any) -> Outputs:
        """Return the tensors of an answer."""
        found: Outputs = {}
        for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
            if output.datatype == "BYTES":
                found[output.name] = wire.deserialize(raw)
            else:
                found[output.name] = np.frombuffer(raw, NUMBERS[output.datatype]).tolist()
        return found

    def model_config(self, model: str, left_s: float) -> Any:
        """Ask for a model's configuration."""
        return self._stub.ModelConfig(messages.ModelConfigRequest(name=model), timeout=left_s)

    def read_config(self, answer: Any) -> dict[str, Any]:
        """Return the configuration in an answer, as JSON has it."""
        return self.as_json(answer.config)

    def statistics(self, model: str, left_s: float) -> Any:
        """Ask what the server has counted of a model."""
        request = messages.ModelStatisticsRequest(name=model)
        return self._stub.ModelStatistics(request, timeout=left_s)

    @staticmethod
    def as_json(answer: Any) -> dict[str, Any]:
        """Return an answer by JSON's rules for protobuf, which writes 64 bits as text."""
        found: dict[str, Any] = MessageToDict(answer, preserving_proto_field_name=True)
        return found

    def is_ready(self, model: str, left_s: float) -> Any:
        """Ask whether a model is ready."""
        return self._stub.ModelReady(messages.ModelReadyRequest(name=model), timeout=left_s)

    @staticmethod
    def read_ready(answer: Any) -> bool:
        """Return whether an answer says so."""
        return bool(answer.ready)


class HttpTransport:
    """Calls over HTTP; the arguments are those of `GrpcTransport`, and the time of a connection.

    It has no deadline of its own: `left_s` is the caller's to hold.
    """

    def __init__(self, url: str, *, asynchronous: bool, timeout_s: float) -> None:
        module: Any = http_aio if asynchronous else http
        options = {} if asynchronous else {
            "network_timeout": timeout_s, "connection_timeout": timeout_s
        }  # fmt: skip
        self._client = module.InferenceServerClient(url, **options)

    def close(self) -> Any:
        """Close the connection."""
        return self._client.close()

    def prepare(
        self, model: str, tensors: Tensors, outputs: Sequence[str] = (), priority: int = 0
    ) -> Any:
        """Return a request; of outputs, none for all."""
        inputs = []
        for name, (kind, value) in tensors.items():
            inputs.append(http.InferInput(name, list(value.shape), kind))
            inputs[-1].set_data_from_numpy(value)
        wanted = [http.InferRequestedOutput(name) for name in outputs]
        return {"inputs": inputs, "outputs": wanted or None, "priority": priority}

    def infer(self, model: str, request: Any, left_s: float, headers: Headers = None) -> Any:
        """Ask a model what `prepare` made for it."""
        return self._client.infer(model, **request, headers=dict(headers) if headers else None)

    @staticmethod
    def read(answer: Any) -> Outputs:
        """Return the tensors of an answer."""
        names = [output["name"] for output in answer.get_response().get("outputs", [])]
        return {name: answer.as_numpy(name).ravel().tolist() for name in names}

    def model_config(self, model: str, left_s: float) -> Any:
        """Ask for a model's configuration."""
        return self._client.get_model_config(model)

    @staticmethod
    def read_config(answer: Any) -> dict[str, Any]:
        """Return the configuration in an answer, as JSON has it."""
        return dict(answer)

    def is_ready(self, model: str, left_s: float) -> Any:
        """Ask whether a model is ready."""
        return self._client.is_model_ready(model)

    @staticmethod
    def read_ready(answer: Any) -> bool:
        """Return whether an answer says so."""
        return bool(answer)


Transport = GrpcTransport | HttpTransport


def open_transport(
    url: str, protocol: str, *, asynchronous: bool, timeout_s: float, proxy: bool,
    tls: ClientTls | None,
) -> Transport:  # fmt: skip
    """Return the calls of a protocol.

    Raises:
        UserError: for another protocol than grpc and http, or encryption of HTTP.
    """
    if protocol == "grpc":
        return GrpcTransport(url, asynchronous=asynchronous, proxy=proxy, tls=tls)
    if protocol != "http":
        raise UserError(f"protocol must be grpc or http, got '{protocol}'")
    if tls is not None:
        raise UserError(f"{url}: Triton encrypts gRPC alone: give its gRPC address")
    return HttpTransport(url, asynchronous=asynchronous, timeout_s=timeout_s)


def channel_options(url: str, proxy: bool, tls: ClientTls | None) -> dict[str, Any]:
    """Return the options of a gRPC connection, as Triton's own clients take them.

    Only gRPC's would use the environment's proxy.
    """
    # These replace tritonclient's own, of which the sizes matter: gRPC receives 4 MB by default.
    options: list[tuple[str, Any]] = [
        (f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")
    ]
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
