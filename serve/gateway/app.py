"""The gateway's endpoints.

POST /v1/recommend   items for a user          GET /healthz        whether answers come
POST /v1/similar     items near another        GET /metrics        for Prometheus
POST /v1/embed       a tower's vector          GET /openapi.json, /docs
POST /v1/events      what a user has taken

/v1/similar and /v1/embed are there where the server has the models `similar`, and `embed_query` or
`embed_items`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from twotower.serve.client import ServerUnavailable
from twotower.serve.config import EMBED as EMBED_MODELS
from twotower.serve.config import SIMILAR as SIMILAR_MODEL
from twotower.serve.gateway.errors import ErrorAnswer, Refusal, explain_errors, json_response
from twotower.serve.gateway.front import HEALTH
from twotower.serve.gateway.keys import Keys
from twotower.serve.gateway.observe import Metrics, Trail
from twotower.serve.gateway.recommender import Ask, Recommender
from twotower.serve.gateway.schemas import (
    EMBED,
    EVENTS,
    ITEM_FEATURES,
    RECOMMEND,
    SIMILAR,
    Bodies,
    EmbedAnswer,
    EventsAnswer,
    Health,
)
from twotower.serve.gateway.store import StoreUnavailable

DESCRIPTION = "Two-tower retrieval over JSON."
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The body is no JSON."},
    401: {"model": ErrorAnswer, "description": "The API key is missing or wrong."},
    408: {"model": ErrorAnswer, "description": "The body did not come in time."},
    413: {"model": ErrorAnswer, "description": "The body is too large."},
    422: {"model": ErrorAnswer, "description": "The request does not fit."},
    429: {"model": ErrorAnswer, "description": "Too many requests; see Retry-After."},
    503: {"model": ErrorAnswer, "description": "No answer for now; see Retry-After."},
}
# A probe of every second costs one query a second, whoever asks and however often.
HEALTH_S = 1.0


class Endpoints:
    """Handlers of the requests.

    Args:
        recommender: answers them.
        bodies: their types.
        models: that the server has beside `recommend`.
    """

    def __init__(self, recommender: Recommender, bodies: Bodies, models: Sequence[str]) -> None:
        self._recommender, self._bodies, self._models = recommender, bodies, models
        self._health: tuple[bool, bool] = (False, False)
        self._asked_at, self._asking = float("-inf"), asyncio.Lock()

    def add_to(self, app: FastAPI) -> None:
        """Give the application its paths."""
        recommend, events = self.recommend_endpoint(), self.events_endpoint()
        app.add_api_route(
            RECOMMEND, recommend, methods=["POST"], response_model=self._bodies.answer,
            responses=REFUSALS, summary="Recommend items",
        )  # fmt: skip
        if SIMILAR_MODEL in self._models:
            app.add_api_route(
                SIMILAR, self.similar_endpoint(), methods=["POST"],
                response_model=self._bodies.answer, responses=REFUSALS,
                summary="Find items near another",
            )  # fmt: skip
        if EMBED_MODELS.keys() & set(self._models):
            app.add_api_route(
                EMBED, self.embed_endpoint(), methods=["POST"], response_model=EmbedAnswer,
                responses=REFUSALS, summary="Embed a query, or an item",
            )  # fmt: skip
        app.add_api_route(
            EVENTS, events, methods=["POST"], response_model=EventsAnswer,
            responses=REFUSALS, summary="Add to a user's history",
        )  # fmt: skip
        app.add_api_route(
            HEALTH, self.health, methods=["GET"], response_model=Health, summary="Health",
            responses={503: {"model": Health, "description": "Nothing can be answered."}},
        )  # fmt: skip

    def recommend_endpoint(self) -> Any:
        """Return the handler of `POST /v1/recommend`."""

        async def recommend(request: Request, body: Any) -> Response:
            ask = Ask(
                **_asker(body), **_wanted(body), filter_seen=body.filter_seen,
                timeout_ms=body.timeout_ms,
            )  # fmt: skip
            return json_response(await self._recommender.recommend(ask, _trail(request)))

        recommend.__annotations__["body"] = self._bodies.recommend
        return recommend

    def similar_endpoint(self) -> Any:
        """Return the handler of `POST /v1/similar`."""

        async def similar(request: Request, body: Any) -> Response:
            ask = Ask(
                features={}, **_wanted(body), filter_seen=False, timeout_ms=body.timeout_ms
            )  # fmt: skip
            found = await self._recommender.similar(body.item, ask, _trail(request))
            return json_response(found)

        similar.__annotations__["body"] = self._bodies.similar
        return similar

    def embed_endpoint(self) -> Any:
        """Return the handler of `POST /v1/embed`."""

        async def embed(request: Request, body: Any) -> Response:
            try:
                return json_response(await self._embedded(body, _trail(request)))
            except (ServerUnavailable, StoreUnavailable) as error:
                late = "the store" if isinstance(error, StoreUnavailable) else "the model"
                raise Refusal(
                    503, f"{late} did not answer in time", "gateway", "an answer within "
                    "gateway.deadline_ms", "ask again", 1,
                ) from None  # fmt: skip

        embed.__annotations__["body"] = self._bodies.embed
        return embed

    async def _embedded(self, body: Any, trail: Trail) -> dict[str, Any]:
        item = getattr(body, ITEM_FEATURES, None)
        if item is None:
            ask = Ask(
                **_asker(body), k=1, exclude=[], filter_seen=False, timeout_ms=body.timeout_ms
            )  # fmt: skip
            return await self._recommender.embed(ask, trail)
        if others := body.model_fields_set - {ITEM_FEATURES, "timeout_ms"}:
            raise Refusal(
                422, f"{ITEM_FEATURES} stands beside {', '.join(sorted(others))}", "body",
                "an item, or a query", "leave one of them out: a request has one vector",
            )  # fmt: skip
        features = item.model_dump(by_alias=True)
        return await self._recommender.embed_item(features, body.timeout_ms, trail)

    def events_endpoint(self) -> Any:
        """Return the handler of `POST /v1/events`."""

        async def events(body: Any) -> Response:
            items, times = [e.item for e in body.events], [e.time for e in body.events]
            try:
                await self._recommender.users.append(body.user, items, times)
            except StoreUnavailable:
                raise Refusal(
                    503, "the store has not taken the events", "gateway.store", "a store that "
                    "answers", "send them again; where it was late, it may have them already", 1,
                ) from None  # fmt: skip
            return json_response({"accepted": len(items)})

        events.__annotations__["body"] = self._bodies.events
        return events

    async def health(self) -> Response:
        """Say whether a real request is answered: `degraded` where only popularity is left."""
        async with self._asking:
            if time.monotonic() - self._asked_at > HEALTH_S:
                self._health = await self._recommender.health()
                self._asked_at = time.monotonic()
        model, store = self._health
        able = model or bool(self._recommender.defaults.popular)
        status = "ok" if model and store else "degraded"
        content = {"status": status, "model": model, "store": store}
        return json_response(content, 200 if able else 503)


def _asker(body: Any) -> dict[str, Any]:
    """Return who asks: the part of `Ask` that says it.

    Raises:
        Refusal: for times that are not those of the history.
    """
    times = getattr(body, "history_times", None)
    if times is not None and len(times) != len(body.history or ()):
        raise Refusal(
            422, f"{len(times)} times for {len(body.history or ())} items of history",
            "body.history_times", "one an item, null where it is not known",
            "send as many as items, or leave the list out",
        )  # fmt: skip
    features = body.features.model_dump(by_alias=True, exclude_unset=True)
    return {
        "user": body.user, "features": features, "history": body.history, "history_times": times,
    }  # fmt: skip


def _wanted(body: Any) -> dict[str, Any]:
    """Return which items are asked for: the part of `Ask` that says it."""
    filters = getattr(body, "filters", None)
    if filters is not None:
        filters = filters.model_dump(by_alias=True, exclude_unset=True)
    return {
        "k": body.k, "exclude": body.exclude, "allow": body.allow, "filters": filters,
        "explain": body.explain,
    }  # fmt: skip


def build_app(
    recommender: Recommender, bodies: Bodies, models: Sequence[str], keys: Keys | None,
    metrics: Metrics,
) -> FastAPI:  # fmt: skip
    """Return what answers behind the `Front`."""
    app = FastAPI(
        title="twotower gateway", description=DESCRIPTION, redoc_url=None,
        # Newer ones would make spans of their own beside `Front`'s; older ones know no such key.
        telemetry={"tracing": False},
    )  # fmt: skip
    Endpoints(recommender, bodies, models).add_to(app)

    async def show_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.add_api_route("/metrics", show_metrics, methods=["GET"], include_in_schema=False)
    explain_errors(app, bodies)
    if keys is not None:
        _document_keys(app)
    return app


def _trail(request: Request) -> Trail:
    trail: Trail = request.state.trail
    return trail


def _document_keys(app: FastAPI) -> None:
    """Say in the OpenAPI document that requests carry a key."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version=app.version, description=app.description,
                routes=app.routes,
            )  # fmt: skip
            made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            for path, methods in made["paths"].items():
                for method in methods.values():
                    method["security"] = [] if path == HEALTH else [{"key": []}]
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
