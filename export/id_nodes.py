"""ONNX nodes from raw ids to rows of an embedding table, and from times to ages or spans.

Padding becomes -1. No feature's name holds a colon, so names made with one meet none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from twotower.data.schema import PAD_INT64, PAD_STRING, TensorSpec
from twotower.data.vocabulary import HALF, KEY_SEEDS, Vocabulary

if TYPE_CHECKING:
    from twotower.towers.dynamic import DynamicSlots

OPSET = 20
IR_VERSION = 9
OPSETS = [
    helper.make_opsetid("", OPSET),
    helper.make_opsetid("ai.onnx.ml", 3),
    helper.make_opsetid("com.microsoft", 1),
]
# No id is known by these; a label encoder needs a value for what it lacks, and at least one key.
UNSEEN = -2
NO_KEY = -1


def row_nodes(
    spec: TensorSpec, vocabulary: Vocabulary, out: str, initializers: list[Any]
) -> list[Any]:
    """Return nodes for: padding -> -1, a known id -> its row, an unseen one -> hash mod rows."""
    name = spec.name
    rows = [-1, *range(vocabulary.oov_rows, vocabulary.rows)]
    keys = vocabulary.keys.to_pylist()
    if spec.dtype == "string":
        known = {"keys_strings": [PAD_STRING, *keys]}
    else:
        known = {"keys_int64s": [PAD_INT64, *keys]}
    oov = constant(f"{name}:oov_rows", np.array(vocabulary.oov_rows, np.int64), initializers)
    return [
        helper.make_node(
            "LabelEncoder", [name], [f"{name}:known"], domain="ai.onnx.ml",
            values_int64s=rows, default_int64=UNSEEN, **known,
        ),
        *_hash_nodes(name, 0, f"{name}:hash64"),
        helper.make_node("Mod", [f"{name}:hash64", oov], [f"{name}:fallback"]),
        *_or_nodes(name, f"{name}:known", f"{name}:fallback", out, initializers),
    ]  # fmt: skip


def catalogue_node(spec: TensorSpec, ids: list[Any], out: str) -> Any:
    """Return a node for: an id of the catalogue -> its row, padding and others -> their number."""
    text = spec.dtype == "string"
    keys = {"keys_strings" if text else "keys_int64s": ids}
    return helper.make_node(
        "LabelEncoder", [spec.name], [out], domain="ai.onnx.ml", values_int64s=range(len(ids)),
        default_int64=len(ids), **keys,
    )  # fmt: skip


def age_nodes(name: str, out: str, initializers: list[Any]) -> list[Any]:
    """Return nodes for: times in seconds -> `twotower.data.encode.entry_ages`."""
    pad = constant(f"{name}:pad", np.array(PAD_INT64, np.int64), initializers)
    axis = constant(f"{name}:axis", np.array([1], np.int64), initializers)
    unknown = constant(f"{name}:unknown", np.array(-1, np.float32), initializers)
    return [
        helper.make_node("ReduceMax", [name, axis], [f"{name}:latest"], keepdims=1),
        helper.make_node("Sub", [f"{name}:latest", name], [f"{name}:since"]),
        helper.make_node("Cast", [f"{name}:since"], [f"{name}:age"], to=TensorProto.FLOAT),
        helper.make_node("Equal", [name, pad], [f"{name}:is_pad"]),
        helper.make_node("Where", [f"{name}:is_pad", unknown, f"{name}:age"], [out]),
    ]


def span_nodes(
    name: str, span_starts: Sequence[int], out: str, initializers: list[Any]
) -> list[Any]:
    """Return nodes for: times in seconds -> `twotower.data.encode.entry_spans`."""
    pad = constant(f"{name}:pad", np.array(PAD_INT64, np.int64), initializers)
    starts = constant(f"{name}:starts", np.array(span_starts, np.int64), initializers)
    axis = constant(f"{name}:axis", np.array([-1], np.int64), initializers)
    newest = constant(f"{name}:newest", np.array(len(span_starts), np.float32), initializers)
    return [
        helper.make_node("Unsqueeze", [name, axis], [f"{name}:each"]),
        helper.make_node("GreaterOrEqual", [f"{name}:each", starts], [f"{name}:is_behind"]),
        helper.make_node("Cast", [f"{name}:is_behind"], [f"{name}:behind"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", [f"{name}:behind", axis], [f"{name}:span"], keepdims=0),
        helper.make_node("Equal", [name, pad], [f"{name}:is_pad"]),
        helper.make_node("Where", [f"{name}:is_pad", newest, f"{name}:span"], [out]),
    ]


def slot_nodes(
    spec: TensorSpec, slots: DynamicSlots, kept: npt.NDArray[np.int64] | None, out: str,
    initializers: list[Any],
) -> list[Any]:  # fmt: skip
    """Return nodes for: padding -> -1, an id with a slot -> it, another -> that of its part.

    Args:
        spec: of the ids.
        slots: the table's.
        kept: slots that the graph's table has as rows; None for all.
        out: name of the result.
        initializers: get the nodes' constants.
    """
    name = spec.name

    def number(word: str, value: int) -> str:
        return constant(f"{name}:{word}", np.array(value, np.int64), initializers)

    half, shift = number("half", HALF), number("shift", 2 * HALF)
    part_keys, part_slots = number("part_keys", slots.part_keys), slots.part_slots
    keys, rows = (tensor.numpy() for tensor in slots.assigned())
    shared = np.arange(part_slots - 1, slots.parts * part_slots, part_slots)
    if kept is not None:
        rows, shared = (np.searchsorted(kept, found) for found in (rows, shared))
    shared_name = constant(f"{name}:shared", shared, initializers)
    text = spec.dtype == "string"
    pad = np.array(PAD_STRING if text else PAD_INT64, object if text else np.int64)
    padding = constant(f"{name}:pad", pad, initializers)
    missing = number("missing", -1)
    return [
        *_hash_nodes(name, KEY_SEEDS[0], f"{name}:high"),
        *_hash_nodes(name, KEY_SEEDS[1], f"{name}:low"),
        helper.make_node("Mod", [f"{name}:high", half], [f"{name}:high31"]),
        helper.make_node("Mod", [f"{name}:low", half], [f"{name}:low31"]),
        helper.make_node("Mul", [f"{name}:high31", shift], [f"{name}:high_part"]),
        helper.make_node("Mul", [f"{name}:low31", number("two", 2)], [f"{name}:low_part"]),
        helper.make_node("Add", [f"{name}:high_part", f"{name}:low_part"], [f"{name}:key"]),
        helper.make_node(
            "LabelEncoder", [f"{name}:key"], [f"{name}:known"], domain="ai.onnx.ml",
            keys_int64s=[NO_KEY, *keys], values_int64s=[NO_KEY, *rows], default_int64=UNSEEN,
        ),
        # The last slot of the key's part.
        helper.make_node("Div", [f"{name}:key", part_keys], [f"{name}:part"]),
        helper.make_node("Gather", [shared_name, f"{name}:part"], [f"{name}:fallback"]),
        *_or_nodes(name, f"{name}:known", f"{name}:fallback", f"{name}:row", initializers),
        helper.make_node("Equal", [name, padding], [f"{name}:is_pad"]),
        helper.make_node("Where", [f"{name}:is_pad", missing, f"{name}:row"], [out]),
    ]  # fmt: skip


def _hash_nodes(name: str, seed: int, out: str) -> list[Any]:
    hashed = f"{out}:u32"
    return [
        helper.make_node(
            "MurmurHash3", [name], [hashed], domain="com.microsoft", seed=seed, positive=1
        ),
        helper.make_node("Cast", [hashed], [out], to=TensorProto.INT64),
    ]


def _or_nodes(name: str, known: str, fallback: str, out: str, initializers: list[Any]) -> list[Any]:
    """Return nodes that choose `known` where it is no UNSEEN."""
    unseen = constant(f"{name}:unseen", np.array(UNSEEN, np.int64), initializers)
    return [
        helper.make_node("Equal", [known, unseen], [f"{name}:is_unseen"]),
        helper.make_node("Where", [f"{name}:is_unseen", fallback, known], [out]),
    ]


def constant(name: str, value: np.ndarray[Any, Any], initializers: list[Any]) -> str:
    """Add an initializer and return its name."""
    initializers.append(onnx.numpy_helper.from_array(value, name))
    return name
