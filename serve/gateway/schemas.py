"""Bodies of requests and answers, typed by the served model: OpenAPI shows its features."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, create_model

from twotower.data.schema import PAD_INT64, TensorSpec
from twotower.serve.config import EMBED_QUERY
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.request import FLOAT32_MAX, MAX_SECONDS, Schema

RECOMMEND, EVENTS = "/v1/recommend", "/v1/events"
SIMILAR, EMBED = "/v1/similar", "/v1/embed"
ITEM_FEATURES = "item_features"
STRICT = ConfigDict(extra="forbid", strict=True)
IDS: dict[str, Any] = {
    "int64": Annotated[int, Field(gt=PAD_INT64, lt=2**63)],
    # The empty string, and what a NUL ends, stand for no id on the wire.
    "string": Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[^\x00]*$")],
}
VALUES = {"string": Annotated[str, Field(max_length=1024)], "int64": int, "bool": StrictBool}
NUMBER = Annotated[float, Field(ge=-FLOAT32_MAX, le=FLOAT32_MAX, allow_inf_nan=False)]
SECONDS = Annotated[int, Field(gt=-MAX_SECONDS, lt=MAX_SECONDS)]
MAX_EXCLUDE = 1000
MAX_EVENTS = 100


@dataclass(frozen=True)
class Bodies:
    """The types of one gateway's bodies.

    Attributes:
        features: the model's, without histories; each may be left out.
        record: what a store holds of a user.
        recommend: of `POST /v1/recommend`.
        filters: of items, in both.
        similar: of `POST /v1/similar`.
        embed: of `POST /v1/embed`.
        item_features: of an item, in it; each must be given.
        answer: to the first two.
        event: one of a user's.
        events: of `POST /v1/events`.
    """

    features: type[BaseModel]
    record: type[BaseModel]
    recommend: type[BaseModel]
    filters: type[BaseModel]
    similar: type[BaseModel]
    embed: type[BaseModel]
    item_features: type[BaseModel]
    answer: type[BaseModel]
    event: type[BaseModel]
    events: type[BaseModel]

    def names(self, path: str, place: Sequence[str]) -> list[str]:
        """Return the fields that an object of a body may have.

        Args:
            path: of the request.
            place: from the body down to the object, as pydantic gives it.
        """
        inner = place[-1] != "body"
        bodies = {RECOMMEND: self.recommend, SIMILAR: self.similar, EMBED: self.embed}
        model = bodies.get(path, self.events)
        if inner:
            model = self.event if path == EVENTS else self.features
            model = self.filters if "filters" in place else model
            model = self.item_features if ITEM_FEATURES in place else model
        return [field.alias or name for name, field in model.model_fields.items()]


class EmbedAnswer(BaseModel):
    """The vector of a query, or of an item."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    vector: list[float]
    """Its coordinates; a score is the inner product of a query's and an item's."""
    version: int
    """Of the bundle that answered."""


class EventsAnswer(BaseModel):
    """What became of events."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    accepted: int
    """Number of events added to the user's history."""


class Health(BaseModel):
    """What answers."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    status: Literal["ok", "degraded"]
    """degraded: requests are answered, but from popularity, or without what the store knows."""
    model: bool
    """Whether a server of the model answered a real request within the deadline."""
    store: bool
    """Whether the store answered, and the feature store where there is one."""


def make_bodies(
    schema: Schema, user_id_dtype: str, config: GatewayConfig, models: Collection[str] = (),
    item_specs: Sequence[TensorSpec] = (),
) -> Bodies:  # fmt: skip
    """Return the types for a model.

    Args:
        schema: of the model.
        user_id_dtype: string or int64.
        config: of the gateway.
        models: that the server has beside `recommend`.
        item_specs: features that its `embed_items` takes.
    """
    user, item = IDS[user_id_dtype], IDS[schema.item_id_dtype]
    own = [s for s in schema.features if s.kind not in ("history", "times")]
    features = _model(
        "Features", "Features of the query; what is left out is as the store knows it.",
        # Under names of ours, since a feature may be called what pydantic's own attributes are.
        {f"feature_{i}": (_type(spec), _field(spec)) for i, spec in enumerate(own)},
    )  # fmt: skip
    items = Annotated[list[item], Field(max_length=config.history_length)]  # type: ignore[valid-type]
    excluded = Annotated[list[item], Field(max_length=MAX_EXCLUDE)]  # type: ignore[valid-type]
    asker: dict[str, Any] = {
        "user": (user | None, Field(None, description="Id of the user, whom the store knows.")),
        "features": (features, Field(default_factory=features, description=features.__doc__)),
        "history": (items | None, Field(
            None, description="Items taken, oldest first, instead of the store's."
        )),
    }  # fmt: skip
    if any(s.kind == "times" for s in schema.features):
        times = Annotated[list[SECONDS | None], Field(max_length=config.history_length)]
        asker["history_times"] = (times | None, Field(
            None, description="Seconds since 1970 of each item of history, null where not known."
        ))  # fmt: skip
    timeout: dict[str, Any] = {
        "timeout_ms": (Annotated[float, Field(gt=0, le=config.deadline_ms)], Field(
            config.deadline_ms, description="Time after which popularity answers."
        )),
    }  # fmt: skip
    items_wanted: dict[str, Any] = {
        "k": (Annotated[int, Field(ge=1, le=schema.max_k)], Field(
            schema.default_k, description="Number of items."
        )),
        "exclude": (excluded, Field(
            default_factory=list, description="Items that may not be answered."
        )),
        "allow": (excluded | None, Field(
            None, description="The only items that may be answered, say candidates to be scored."
        )),
        "explain": (StrictBool, Field(
            False, description="Whether the answer says how it came about."
        )),
    }  # fmt: skip
    filters = _filters(schema.filters)
    if schema.filters:
        items_wanted["filters"] = (filters | None, Field(None, description=filters.__doc__))
    seen: dict[str, Any] = {
        "filter_seen": (StrictBool, Field(
            True, description="Leave out what the store and `history` say was taken."
        )),
    }  # fmt: skip
    event = _model("Event", "An item that a user took.", {
        "item": (item, Field(description="Its id.")),
        "time": (SECONDS | None, Field(None, description="When, in seconds since 1970.")),
    })  # fmt: skip
    event_list = Annotated[list[event], Field(min_length=1, max_length=MAX_EVENTS)]  # type: ignore[valid-type]
    record = _model("Record", "What a store holds of a user.", {
        "features": (features, ...), "items": (list[item], ...),  # type: ignore[valid-type]
        "times": (list[SECONDS | None], ...),
    })  # fmt: skip
    item_features = _model(
        "ItemFeatures", "Every feature of an item, which need not be in the catalogue.",
        {f"feature_{i}": (_type(spec), _described(spec)) for i, spec in enumerate(item_specs)},
    )  # fmt: skip
    return Bodies(
        features,
        record,
        _model(
            "Recommend", "Whom to recommend for; without anything, an unknown user.",
            asker | items_wanted | seen | timeout,
        ),
        filters,
        _model("Similar", "An item, to which the nearest are sought.", {
            "item": (item, Field(description="Its id.")), **items_wanted, **timeout,
        }),
        _embed(asker if EMBED_QUERY in models else {}, item_features, timeout),
        item_features,
        _answer(item),
        event,
        _model("Events", "What a user has just taken.", {
            "user": (user, Field(description="Id of the user.")),
            "events": (event_list, Field(description="The events, oldest first.")),
        }),
    )  # fmt: skip


def _embed(
    asker: dict[str, Any], item: type[BaseModel], timeout: dict[str, Any]
) -> type[BaseModel]:
    """Return the body of `POST /v1/embed`, by the models that the server has."""
    fields = asker | timeout
    if item.model_fields:
        text = "Features of an item, whose vector is sought"
        fields[ITEM_FEATURES] = (
            (item | None, Field(None, description=f"{text}, instead of all that says who asks."))
            if asker else (item, Field(description=f"{text}."))
        )  # fmt: skip
    return _model("Embed", "Whose vector is sought; without anything, an unknown user's.", fields)


def _filters(kinds: dict[str, str]) -> type[BaseModel]:
    """Return the type of attribute filters."""
    fields: dict[str, Any] = {}
    for i, (name, kind) in enumerate(kinds.items()):
        value: Any = VALUES[kind]
        values = Annotated[list[value], Field(max_length=MAX_EXCLUDE)]
        turned = _model(f"Not{i}", "Values that items may not have.", {
            "not_": (value | values, Field(alias="not")),
        })  # fmt: skip
        fields[f"filter_{i}"] = (value | values | turned, Field(None, alias=name))
    text = (
        'Attributes that items must have: a value, one of a list, or {"not": …}. Where the model '
        "is silent, nothing stands in."
    )
    return _model("Filters", text, fields)


def _model(name: str, doc: str, fields: dict[str, Any]) -> type[BaseModel]:
    made: type[BaseModel] = create_model(name, __config__=STRICT, __doc__=doc, **fields)
    return made


def _answer(item: Any) -> type[BaseModel]:
    scored = _model("ScoredItem", "An item of an answer.", {
        "id": (item, Field(description="As the log has it.")),
        "score": (float | None, Field(description="Inner product; null from popularity.")),
    })  # fmt: skip
    return _model("Recommendations", "Items, best first.", {
        "items": (list[scored], Field(description="At most k; fewer where no more are left.")),  # type: ignore[valid-type]
        "version": (int | None, Field(description="Of the bundle that answered; null: none did.")),
        "fallback": (Literal["popularity"] | None, Field(
            description="popularity: of the user's segment, as the store or the model was silent."
        )),
        "reason": (Literal["store", "features", "model"] | None, Field(
            description="Which of them was; features: the feature store."
        )),
        "explanation": (dict[str, Any] | None, Field(
            description="How it came about, where `explain` asked for it."
        )),
    })  # fmt: skip


def _type(spec: TensorSpec) -> Any:
    if spec.kind == "number":
        return NUMBER
    if spec.kind == "vector":
        return Annotated[list[NUMBER], Field(min_length=spec.length, max_length=spec.length)]
    entry: Any = IDS[spec.dtype]
    if spec.kind == "ids":
        return Annotated[list[entry], Field(max_length=spec.length)]
    return entry | None


def _field(spec: TensorSpec) -> Any:
    # Left out and null differ: null is an id that is not known.
    return _described(spec, default=None, json_schema_extra=_without_default)


def _described(spec: TensorSpec, **options: Any) -> Any:
    return Field(alias=spec.name, description=f"{spec.kind}, {spec.dtype}", **options)


def _without_default(schema: dict[str, Any]) -> None:
    del schema["default"]
