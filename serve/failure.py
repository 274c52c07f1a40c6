"""What a client raises when no answer came, and which of it another try may mend."""

from __future__ import annotations

import asyncio
from typing import Literal

import grpc
from aiohttp import ClientConnectionError
from geventhttpclient.response import HTTPConnectionClosed
from tritonclient.utils import InferenceServerException

from twotower.errors import UserError

LOST = ("503", "StatusCode.UNAVAILABLE")
LOST_CONNECTION = (OSError, HTTPConnectionClosed, ClientConnectionError)
LATE = (TimeoutError, asyncio.TimeoutError)  # two classes until Python 3.11
# What Triton says of a request whose stub has died; the supervisor brings the stub back.
DEAD_STUB = "is not healthy"
Kind = Literal["deadline", "lost", "failed"]


class ServerUnavailable(UserError):
    """No answer came: the server is not there, not ready, too busy or too slow.

    Attributes:
        kind: `deadline`, the time ran out; `lost`, there was no connection or the server could not
            take the request, so another try may help; `failed`, the server could not answer.
    """

    def __init__(self, message: str, kind: Kind = "failed") -> None:
        super().__init__(message)
        self.kind = kind


def explain(error: Exception, url: str) -> UserError:
    """Turn what a client of Triton or of gRPC raises into an answer."""
    text, status = str(error), None
    if isinstance(error, (InferenceServerException, grpc.RpcError)):
        if isinstance(error, InferenceServerException):
            text, status = error.message() or text, error.status()
        else:
            text, status = error.details() or text, str(error.code())
        if status in ("400", "StatusCode.INVALID_ARGUMENT"):
            return UserError(f"{url} refused the request: {text}")
        if status in ("500", "StatusCode.INTERNAL"):
            return ServerUnavailable(
                f"{url} failed to answer: {text}: try again in a few seconds",
                "lost" if DEAD_STUB in text else "failed",
            )
    kind: Kind = "failed"
    if status == "StatusCode.DEADLINE_EXCEEDED" or isinstance(error, LATE):
        kind = "deadline"
    elif status in LOST or isinstance(error, LOST_CONNECTION):
        kind = "lost"
    return ServerUnavailable(
        f"no answer from {url} ({text.splitlines()[0] if text else type(error).__name__}): is "
        "`twotower serve` running there, and is this its port for the protocol?",
        kind,
    )
