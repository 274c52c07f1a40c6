"""What a request and an answer of the model `recommend` are on the wire.

Every client encodes and decodes here, so that all of them refuse the same mistakes in the same
words, before anything is sent.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.data.schema import PAD_INT64, PAD_STRING, TensorSpec
from twotower.errors import UserError, did_you_mean

WIRE = {"string": "BYTES", "int64": "INT64", "float32": "FP32"}
VALUES = {"string": str, "int64": int, "bool": bool}
OUTPUTS = ("item_ids", "scores", "version")
Tensors = dict[str, tuple[str, npt.NDArray[Any]]]
# Of an answer's one row, the values of each tensor; strings as bytes.
Outputs = dict[str, list[Any]]
FLOAT32_MAX = float(np.finfo(np.float32).max)
# 35,000 years: what is more is in milliseconds, or another number.
MAX_SECONDS = 1 << 40
# Of what came, a line holds only the beginning.
BRIEF = reprlib.Repr()
BRIEF.maxstring = BRIEF.maxother = BRIEF.maxlong = 60


@dataclass(frozen=True)
class Recommendation:
    """An answer, best first.

    Attributes:
        item_ids: as the log has them.
        scores: inner products of unit vectors, one an item.
        version: of the bundle that answered.
        explanation: how, where it was asked for: `index`, `exact`, `filter`, `asked_for`,
            `excluded`, `k` and `catalogue`, the numbers of items.
    """

    item_ids: list[Any]
    scores: list[float]
    version: int
    explanation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Embedding:
    """A tower's vector.

    Attributes:
        vector: of D coordinates, of length 1 (but for the item's bias, the last one, if any).
        version: of the bundle that answered.
    """

    vector: list[float]
    version: int


@dataclass(frozen=True)
class Schema:
    """What the served model says of itself."""

    version: int
    item_id_dtype: str
    num_items: int
    default_k: int
    max_k: int
    dim: int
    bias: bool
    filters: dict[str, str]
    features: list[TensorSpec]


@dataclass(frozen=True)
class TowerSchema:
    """What `embed_query` or `embed_items` says of itself: the bundle, and its raw features."""

    version: int
    features: list[TensorSpec]


def parse_schema(config: dict[str, Any]) -> Schema:
    """Read the schema from a model's configuration as JSON."""
    raw = json.loads(config["parameters"]["schema"]["string_value"])
    return Schema(**(raw | {"features": [TensorSpec(**f) for f in raw["features"]]}))


def parse_tower(config: dict[str, Any]) -> TowerSchema:
    """Read what `embed_query` or `embed_items` says of itself from its configuration as JSON."""
    raw = json.loads(config["parameters"]["schema"]["string_value"])
    return TowerSchema(raw["version"], [TensorSpec(**f) for f in raw["features"]])


def encode(
    schema: Schema, features: dict[str, Any], k: int | None, exclude: Sequence[Any],
    allow: Sequence[Any] | None = None, filters: Mapping[str, Any] | None = None,
) -> Tensors:  # fmt: skip
    """Return a request's tensors: name -> (Triton type, array with a batch dimension of 1).

    Raises:
        UserError: naming the feature, what was expected and what came.
    """
    tensors = encode_features(schema.features, features)
    # Both are optional to the server, but it batches only requests that carry the same inputs.
    tensors["k"] = ("INT32", np.array([[_k(schema, k)]], np.int32))
    tensors["exclude"] = _id_list(schema, "exclude", exclude)
    if allow is not None:
        tensors["allow"] = _id_list(schema, "allow", allow)
    if filters is not None:
        text = json.dumps(_filters(schema, filters)).encode()
        tensors["filter"] = ("BYTES", np.array([[text]], dtype=object))
    return tensors


def encode_features(specs: list[TensorSpec], features: dict[str, Any]) -> Tensors:
    """Return the tensors of one row's features; see `encode`."""
    names = [spec.name for spec in specs]
    if not isinstance(features, Mapping):
        raise UserError(
            f"features must be a dict of {', '.join(names)} to their values, got {_shown(features)}"
        )
    for name in features:
        if name not in names:
            raise UserError(f"the model has no feature '{name}'{did_you_mean(str(name), names)}")
    tensors: Tensors = {}
    for spec in specs:
        if spec.kind == "times":
            history = tensors[spec.of][1]
            tensors[spec.name] = ("INT64", _times(spec, features, history))
            continue
        if spec.name not in features:
            raise UserError(
                f"feature '{spec.name}' ({spec.kind}, {spec.dtype}) is missing: send None for an "
                "unknown id, [] for an empty list"
            )
        tensors[spec.name] = (WIRE[spec.dtype], _feature(spec, features[spec.name]))
    return tensors


def _id_list(schema: Schema, name: str, value: Any) -> tuple[str, npt.NDArray[Any]]:
    dtype = schema.item_id_dtype
    ids = [_id(name, dtype, entry) for entry in _list(f"'{name}'", value, ordered=False)]
    return WIRE[dtype], _ids(dtype, ids)


def _filters(schema: Schema, filters: Any) -> dict[str, Any]:
    """Return attribute filters as they are sent, checked by what the model has."""
    if not isinstance(filters, Mapping):
        raise UserError(
            f"filters must be a dict of attributes to their values, got {_shown(filters)}"
        )
    sent: dict[str, Any] = {}
    for name, condition in filters.items():
        if name not in schema.filters:
            known = ", ".join(schema.filters) or "none; export.filters of the job names them"
            near = did_you_mean(str(name), schema.filters) or f": it has {known}"
            raise UserError(f"filters: the model has no attribute '{name}'{near}")
        kind, excluded = VALUES[schema.filters[name]], False
        if isinstance(condition, Mapping):
            if set(condition) != {"not"}:
                raise UserError(
                    f"filters: '{name}' must be a value, a list of values or {{'not': …}}, got "
                    f"{_shown(condition)}"
                )
            condition, excluded = condition["not"], True
        values = [condition]
        if not isinstance(condition, (str, bool, int)):
            values = _list(f"filters: '{name}'", condition, ordered=False)
        for value in values:
            if type(value) is not kind:
                raise UserError(
                    f"filters: '{name}' must hold values of type {schema.filters[name]}, got "
                    f"{_shown(value)}"
                )
        sent[name] = {"not": values} if excluded else values
    return sent


def _k(schema: Schema, k: Any) -> int:
    if k is None:
        return schema.default_k
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)):
        raise UserError(f"k must be an integer, got {_shown(k)}")
    if not 1 <= k <= schema.max_k:
        raise UserError(
            f"k must be in 1..{schema.max_k} (catalogue: {schema.num_items} items), "
            f"got {_shown(int(k))}"
        )
    return int(k)


def _feature(spec: TensorSpec, value: Any) -> npt.NDArray[Any]:
    if spec.dtype == "float32":
        values = [value] if spec.kind == "number" else _list(f"feature '{spec.name}'", value)
        if len(values) != spec.length:
            raise UserError(
                f"feature '{spec.name}' must be a vector of width {spec.length}, got {len(values)}"
            )
        return np.array([[_number(spec, v) for v in values]], np.float32)
    if not spec.is_list:
        return _ids(spec.dtype, [] if value is None else [_id(spec.name, spec.dtype, value)])
    entries = _list(f"feature '{spec.name}'", value, ordered=spec.kind != "ids")
    if len(entries) > spec.length:
        newest = "newest" if spec.kind == "history" else "first"
        raise UserError(
            f"feature '{spec.name}' has {len(entries)} entries, the model's window is "
            f"{spec.length}: send the {newest} {spec.length}"
        )
    return _ids(spec.dtype, [_id(spec.name, spec.dtype, v) for v in entries])


def _times(
    spec: TensorSpec, features: Mapping[str, Any], history: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    """Return when each entry of a history happened; none is known of times that do not come."""
    if spec.name not in features:
        return np.full(history.shape, PAD_INT64)
    key = f"feature '{spec.name}'"
    entries = _list(key, features[spec.name])
    for value in entries:
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and not (whole and abs(int(value)) < MAX_SECONDS):
            raise UserError(
                f"{key} must hold whole seconds since 1970, or None where it is not known, got "
                f"{_shown(value)}"
            )
    times = _ids("int64", [PAD_INT64 if value is None else int(value) for value in entries])
    if times.shape != history.shape:
        raise UserError(
            f"{key} has {len(entries)} entries, the {spec.of} another number: send one an entry, "
            "None where it is not known, or leave the list out"
        )
    return times


def _list(name: str, value: Any, *, ordered: bool = True) -> list[Any]:
    """Return the entries of a list; of what also could be gone through, none is one."""
    unfit = (str, bytes, Mapping, Set) if ordered else (str, bytes, Mapping)
    try:
        if not isinstance(value, unfit):
            return list(value)
    except TypeError:
        pass
    raise UserError(f"{name} must be a list, got {_shown(value)}: send [] for an empty one")


def _number(spec: TensorSpec, value: Any) -> float:
    if isinstance(value, (bool, str, bytes)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise UserError(f"feature '{spec.name}' must hold numbers, got {_shown(value)}")
    number = int(value) if isinstance(value, (int, np.integer)) else float(value)
    # Holds for integers of any size, and not for NaN.
    if not abs(number) <= FLOAT32_MAX:
        raise UserError(
            f"feature '{spec.name}' must hold finite numbers, got {_shown(value)}: towers read "
            f"float32, of at most {FLOAT32_MAX:.1e}"
        )
    return float(number)


def _id(name: str, dtype: str, value: Any) -> Any:
    if dtype == "string":
        if not isinstance(value, str) or "\0" in value:
            raise UserError(f"'{name}' must hold string ids, got {_shown(value)}")
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"'{name}': the id {_shown(value)} is no text (half of a surrogate pair): decode "
                "it with the encoding that it was written in"
            ) from None
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise UserError(f"'{name}' must hold integer ids, got {_shown(value)}")
    if not PAD_INT64 < int(value) < 2**63:
        raise UserError(f"'{name}': the id {_shown(value)} does not fit 64 bits")
    return int(value)


def _shown(value: Any) -> str:
    """Return the beginning of a value's text, as messages quote it."""
    try:
        return BRIEF.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return f"a value of type {type(value).__name__}"


def _ids(dtype: str, values: list[Any]) -> npt.NDArray[Any]:
    # An empty tensor is not safe on the wire: one entry of padding says the same.
    if dtype == "string":
        return np.array([values or [PAD_STRING.encode()]], dtype=object)
    return np.array([values or [PAD_INT64]], dtype=np.int64)


def decode(schema: Schema, outputs: Outputs) -> Recommendation:
    """Return the answer in Triton's outputs.

    Raises:
        UserError: for an empty one.
    """
    _refuse_empty(outputs, "item_ids")
    ids = outputs["item_ids"]
    if schema.item_id_dtype == "string":
        ids = [i.decode() for i in ids]
    (explanation,) = outputs.get("explanation", [None])
    return Recommendation(
        ids, outputs["scores"], outputs["version"][0],
        None if explanation is None else json.loads(explanation),
    )  # fmt: skip


def _refuse_empty(outputs: Outputs, name: str) -> None:
    # tritonserver 2.51's response cache keeps of a request that was refused an empty answer.
    if name not in outputs:
        raise UserError(
            "the server refused this request before, and its response cache has not kept why "
            "(serve.response_cache_mb): send it once with another k to read the reason"
        )


def decode_vector(outputs: Outputs) -> Embedding:
    """Return the vector in Triton's outputs; raises as `decode`."""
    _refuse_empty(outputs, "vector")
    return Embedding(outputs["vector"], outputs["version"][0])
