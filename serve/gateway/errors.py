"""Every error of the gateway as JSON: what, where, what was expected, what to do."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from twotower.errors import UserError, did_you_mean
from twotower.serve.gateway.schemas import Bodies

# Of a name that the caller made up.
SHOWN = 80


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


def explain_errors(app: FastAPI, bodies: Bodies) -> None:
    """Have every error of an application answered as a refusal, with fields that bodies have."""

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return refusal_response(error)

    async def unfit(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        # A misspelt field is the cause of one that is missing.
        found = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        return refusal_response(_unfit(found[0], request.url.path, bodies))

    async def unanswerable(_: Request, error: Exception) -> Response:
        # What Triton refuses begins with its address, which is none of the caller's business.
        text = str(error).rpartition(" refused the request: ")[2]
        return refusal_response(
            Refusal(422, text, "body", "a request that the model can answer",
                    "change what is named; /openapi.json describes the body")
        )  # fmt: skip

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = refusal_response(
            Refusal(error.status_code, str(error.detail), "request", "a path and method of "
                    "/openapi.json, with a JSON body", "change the request")
        )  # fmt: skip
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, unfit)
    app.add_exception_handler(UserError, unanswerable)
    app.add_exception_handler(HTTPException, http_error)


def _unfit(error: Any, path: str, bodies: Bodies) -> Refusal:
    """Return the refusal of what pydantic found wrong, without the value itself."""
    if error["type"] == "json_invalid":
        return Refusal(
            400, "the body is no JSON", "body", "a JSON object", "check its quotes and brackets"
        )  # fmt: skip
    *parents, last = (str(part)[:SHOWN] for part in error["loc"])
    where = ".".join([*parents, last])
    if error["type"] == "extra_forbidden":
        known = bodies.names(path, parents)
        return Refusal(
            422, f"there is no '{last}' here", where, f"one of {', '.join(known)}",
            f"remove it{did_you_mean(last, known)}",
        )  # fmt: skip
    return Refusal(
        422, f"{where} does not fit", where, str(error["msg"]),
        "change it; /openapi.json describes the body",
    )  # fmt: skip
