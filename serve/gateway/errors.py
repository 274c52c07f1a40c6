"""Every error of the gateway as JSON: what, where, what was expected, what to do."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        what: is wrong.
        where: part of the request.
        expected: instead.
        remedy: what the caller can do.
        retry_s: seconds after which to come again.
    """

    def __init__(
        self, status: int, what: str, where: str, expected: str, remedy: str,
        retry_s: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(what)
        self.status, self.retry_s = status, retry_s
        self.error = ErrorDetail(what=what, where=where, expected=expected, remedy=remedy)


class ErrorDetail(BaseModel):
    """A mistake, and the way out."""

    what: str
    where: str
    expected: str
    remedy: str


class ErrorAnswer(BaseModel):
    """The body of every answer of status 400 and above."""

    error: ErrorDetail


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return a JSON answer; ASCII alone, so that no text of a caller's can break it."""
    body = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    return Response(body, status, headers, media_type="application/json")


def refusal_response(refusal: Refusal) -> Response:
    """Return the answer to a request that is refused."""
    headers = {}
    if refusal.retry_s is not None:
        # Whole seconds are all that the header can say.
        headers["Retry-After"] = str(max(1, int(-(-refusal.retry_s // 1))))
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response({"error": refusal.error.model_dump()}, refusal.status, headers)
