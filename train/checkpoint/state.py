"""The state of a training as tensors, which are sharded, and the rest, which is JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

SEPARATOR = "/"
# Marks of what JSON has no form for; each is the only key of its object.
FLOAT, TUPLE, PAIRS, TENSOR = "__float__", "__tuple__", "__pairs__", "__tensor__"
MARKS = (FLOAT, TUPLE, PAIRS, TENSOR)


def tensors_of(nested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors in nested state, sharded or plain, by path: keys joined by '/'.

    They are the same objects: to fill them is to fill the state. What is no tensor, such as
    learning rates, follows from the configuration.
    """
    tensors: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, (Mapping, list, tuple)):
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, inner in pairs:
                walk(inner, f"{path}{SEPARATOR}{key}" if path else str(key))
        elif isinstance(value, Tensor) or hasattr(value, "local_shards"):
            if path in tensors:
                raise TypeError(f"two tensors have the path {path}")
            tensors[path] = value

    walk(nested, "")
    return tensors


def encode(value: Any) -> Any:
    """Return a form of state that JSON holds and `decode` reads; tensors in it are to be small.

    Raises:
        TypeError: for what has none.
    """
    if isinstance(value, (np.generic,)):
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else {FLOAT: repr(value)}
    if isinstance(value, list):
        return [encode(inner) for inner in value]
    if isinstance(value, tuple):
        return {TUPLE: [encode(inner) for inner in value]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and not (
            len(value) == 1 and next(iter(value)) in MARKS
        ):
            return {key: encode(inner) for key, inner in value.items()}
        return {PAIRS: [[encode(key), encode(inner)] for key, inner in value.items()]}
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        values = plain.reshape(-1).view(torch.uint8).tolist() if plain.numel() else []
        kind = str(plain.dtype).removeprefix("torch.")
        return {TENSOR: {"type": kind, "shape": list(plain.shape), "bytes": values}}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}")


def decode(value: Any) -> Any:
    """Return what `encode` was given.

    Raises:
        ValueError, KeyError, TypeError, AttributeError: when it was not.
    """
    if isinstance(value, list):
        return [decode(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((mark, inner),) = value.items()
        if mark == FLOAT:
            return float(inner)
        if mark == TUPLE:
            return tuple(decode(entry) for entry in inner)
        if mark == PAIRS:
            return {decode(key): decode(entry) for key, entry in inner}
        if mark == TENSOR:
            kind = getattr(torch, inner["type"])
            whole = torch.tensor(inner["bytes"], dtype=torch.uint8)
            return whole.view(kind).reshape(inner["shape"])
    return {key: decode(inner) for key, inner in value.items()}
