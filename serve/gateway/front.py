"""What every request passes before it is answered: key, rate, size, and the cap on those under way.

It is plain ASGI, since Starlette's own middleware class costs a task a request.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.errors import Refusal, refusal_response
from twotower.serve.gateway.keys import Keys
from twotower.serve.gateway.observe import LOG, TRACEPARENT, Metrics, Trail
from twotower.serve.gateway.tracing import end_request, request_span

# Open to all, since a probe has no key: it says whether answers come, and nothing else.
HEALTH = "/healthz"
# A body that takes longer is a caller that does not send.
BODY_S = 5.0
# Of a path, in the log and in spans.
SHOWN = 200


class CallerGone(Exception):
    """The caller has hung up."""


class Front:
    """Admits, counts and logs requests.

    Args:
        app: answers them; another may take its place, see `take`.
        config: of the gateway.
        keys: None where none is needed.
        metrics: to count in.
    """

    def __init__(
        self, app: Starlette, config: GatewayConfig, keys: Keys | None, metrics: Metrics
    ) -> None:
        self.config, self.keys, self.metrics = config, keys, metrics
        self._under_way = 0
        self.take(app)

    def take(self, app: Starlette) -> None:
        """Pass requests on to another application from now on."""
        self.app = app
        # Those that metrics name; others are one.
        self.endpoints = {str(getattr(route, "path", "")) for route in app.routes}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        trail = _trail(headers)
        scope.setdefault("state", {})["trail"] = trail
        started, status = time.perf_counter(), 499

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()), (b"x-request-id", trail.request_id.encode())
                ]  # fmt: skip
            await send(message)

        error = None
        with self._span(scope, trail) as current:
            try:
                await self._admit(scope, headers, trail, receive, answer)
            except Refusal as refusal:
                await refusal_response(refusal)(scope, receive, answer)
            except CallerGone:
                pass
            except Exception as unexpected:
                # A mistake of ours: the log has all of it, the caller a way on.
                error = unexpected
                LOG.exception("unexpected", extra={"fields": {"request_id": trail.request_id}})
                if status == 499:
                    await refusal_response(_unexpected(trail))(scope, receive, answer)
            end_request(current, status, error, {
                "twotower.fallback": trail.fallback, "twotower.version": trail.version,
                "twotower.request_id": trail.request_id,
            })  # fmt: skip
        self._note(scope, trail, status, time.perf_counter() - started)

    def _span(self, scope: Scope, trail: Trail) -> AbstractContextManager[Any]:
        if scope["path"] == HEALTH:  # one a second would hide the requests
            return nullcontext()
        return request_span(
            f"{scope['method']} {self._endpoint(scope)}", trail.traceparent,
            {"http.request.method": scope["method"], "url.path": scope["path"][:SHOWN]},
        )  # fmt: skip

    def _endpoint(self, scope: Scope) -> str:
        """Return the path if it is one of ours: any number of others is one."""
        return scope["path"] if scope["path"] in self.endpoints else "other"

    async def _admit(
        self, scope: Scope, headers: dict[str, str], trail: Trail, receive: Receive, send: Send
    ) -> None:
        """Pass a request on, or raise `Refusal`."""
        if scope["path"] == HEALTH:
            return await self.app(scope, receive, send)
        self._check_key(headers, trail)
        # Read before it counts as under way, so that callers who send slowly take no one's place.
        body = await self._body(headers, receive)
        if self._under_way >= self.config.max_under_way:
            raise Refusal(
                429, f"{self._under_way} requests are under way", "gateway.max_under_way",
                "fewer requests at the same time", "come again later, or add gateways", 1,
            )  # fmt: skip
        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        self._under_way += 1
        self.metrics.under_way.set(self._under_way)
        try:
            await self.app(scope, replay, send)
        finally:
            self._under_way -= 1
            self.metrics.under_way.set(self._under_way)

    def _check_key(self, headers: dict[str, str], trail: Trail) -> None:
        if self.keys is None:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        key = (
            self.keys.find(token.strip().encode("latin-1")) if scheme.lower() == "bearer" else None
        )
        if key is None:
            raise Refusal(
                401, "the API key is missing or wrong", "header Authorization", "Bearer KEY",
                "send a key that the gateway's operator has given you",
            )  # fmt: skip
        trail.key = key.name
        if wait_s := key.bucket.take():
            raise Refusal(
                429, f"key {key.name} asks more often than it may", "header Authorization",
                "fewer requests a second", "come again later, or ask for a higher rate", wait_s,
            )  # fmt: skip

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        most = self.config.max_body_bytes
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > most:
            raise _too_large(most)
        parts: list[bytes] = []

        async def read() -> None:
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise CallerGone
                parts.append(message.get("body", b""))
                size, more = size + len(parts[-1]), message.get("more_body", False)
                if size > most:
                    raise _too_large(most)

        try:
            await asyncio.wait_for(read(), BODY_S)
        except asyncio.TimeoutError:
            raise Refusal(
                408, f"the body did not come within {BODY_S:g} s", "body", "the whole body at once",
                "send it again, faster",
            ) from None  # fmt: skip
        return b"".join(parts)

    def _note(self, scope: Scope, trail: Trail, status: int, seconds: float) -> None:
        path, endpoint = scope["path"], self._endpoint(scope)
        self.metrics.requests.labels(endpoint, str(status), trail.key).inc()
        self.metrics.seconds.labels(endpoint).observe(seconds)
        if path == HEALTH and status == 200:
            return
        fields: dict[str, Any] = {
            "request_id": trail.request_id, "key": trail.key, "method": scope["method"],
            "path": path[:SHOWN], "status": status, "ms": round(seconds * 1000, 2),
            "version": trail.version, "fallback": trail.fallback,
        }  # fmt: skip
        LOG.info("request", extra={"fields": fields})


def _trail(headers: dict[str, str]) -> Trail:
    given, parent = headers.get("x-request-id", ""), headers.get("traceparent", "")
    request_id = given if re.fullmatch(r"[\w.:/+=-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
    return Trail(request_id, traceparent=parent if TRACEPARENT.fullmatch(parent) else None)


def _too_large(most: int) -> Refusal:
    return Refusal(
        413, "the body is too large", "body", f"at most {most} bytes",
        "send fewer items, or raise gateway.max_body_bytes",
    )  # fmt: skip


def _unexpected(trail: Trail) -> Refusal:
    return Refusal(
        503, "the gateway made a mistake", "gateway", "an answer",
        f"try again; its log says more of request {trail.request_id}", 1,
    )  # fmt: skip
