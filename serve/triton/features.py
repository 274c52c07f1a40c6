"""Raw features as requests bring them to a Triton model: checked, and joined to a batch.

Imports nothing of twotower's: the file is copied beside the models, into Triton. Each request is
validated by itself, since one bad row would fail its whole batch otherwise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from wire import deserialize, serialize

PAD_STRING = b""
PAD_INT64 = -(2**63)
# A vector of float32 is a unit long to about 1e-6; one that overflowed is 0 or next to it.
LENGTH_TOLERANCE = 0.01
SAMPLE = np.array([b"", "é".encode(), b"\0a\0"], dtype=object)
Columns = dict[str, np.ndarray[Any, Any]]


class Refused(ValueError):
    """A request that cannot be answered, with the reason."""


def use_fast_strings() -> None:
    """Have the stub read and write strings by `wire`, where that does what its own functions do.

    It looks them up in its module for every tensor. Those of tritonserver 2.51 call NumPy and
    `struct` for each string: of 100 ids 30 us, where ours need 10. Another version may lack them,
    or expect something else of them.
    """
    write = getattr(pb_utils, "serialize_byte_tensor", None)
    read = getattr(pb_utils, "deserialize_bytes_tensor", None)
    if write is None or read is None:
        return

    def serialize_byte_tensor(array: np.ndarray[Any, Any]) -> Any:
        strings = array.ravel().tolist()
        return serialize(strings) if set(map(type, strings)) == {bytes} else write(array)

    def deserialize_bytes_tensor(encoded: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.array(deserialize(encoded.tobytes()), dtype=object)

    written = write(SAMPLE)
    if not isinstance(written, bytes) or written != serialize(SAMPLE.tolist()):
        return
    if read(np.frombuffer(written, np.uint8)).tolist() == SAMPLE.tolist():
        pb_utils.serialize_byte_tensor = serialize_byte_tensor
        pb_utils.deserialize_bytes_tensor = deserialize_bytes_tensor


def keep_what_is_loaded() -> None:
    """Spare what stays from collections of garbage, which hold up a batch for 10 ms otherwise."""
    gc.collect()
    gc.freeze()


def refusal(reason: str) -> Any:
    """Return the response to a request that cannot be answered."""
    error = pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG)
    return pb_utils.InferenceResponse(error=error)


def cancelled(requests: list[Any]) -> list[Any]:
    """Return the responses to those of a batch, oldest first, whose clients have stopped waiting.

    They are the first ones: to ask costs a message to the server and back, about 50 us, and where
    one is still waited for, so are most that came after it.
    """
    responses = []
    for request in requests:
        if not request.is_cancelled():
            break
        error = pb_utils.TritonError("the client stopped waiting", pb_utils.TritonError.CANCELLED)
        responses.append(pb_utils.InferenceResponse(error=error))
    return responses


def parse_each(requests: list[Any], parse: Callable[[Any], Any]) -> tuple[list[Any], list[Any]]:
    """Return what requests ask for, each read by itself.

    Returns:
        A response to each request, None where it is still to be answered; and, of these, their
        places and what `parse` returned.
    """
    responses, parsed = cancelled(requests), []
    for number, request in enumerate(requests[len(responses) :], len(responses)):
        responses.append(None)
        try:
            parsed.append((number, parse(request)))
        except Refused as error:
            responses[number] = refusal(str(error))
    return responses, parsed


def tensors_of(request: Any) -> Columns:
    """Return the inputs that came, name -> rows."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


class Features:
    """The raw features of one tower.

    Args:
        specs: name, kind, dtype, length, is_list and of, of each tensor.
        bias: whether a vector's last coordinate is the items' bias, outside its length of 1.
    """

    def __init__(self, specs: list[dict[str, Any]], bias: bool) -> None:
        self.specs, self.bias = specs, bias

    def parse(self, tensors: Columns) -> tuple[Columns, int]:
        """Return the columns of a request's inputs and their number of rows.

        Raises:
            Refused: naming the feature.
        """
        columns: Columns = {}
        for spec in self.specs:
            value = tensors.get(spec["name"])
            if spec["kind"] == "times":
                columns[spec["name"]] = _times(spec, columns[spec["of"]], value)
            elif value is None:
                raise Refused(f"{spec['name']} is missing: send every feature of the model")
            else:
                columns[spec["name"]] = _column(spec, value)
        rows = {name: len(value) for name, value in columns.items()}
        if len(set(rows.values())) > 1:
            raise Refused(f"features differ in their number of rows: {rows}")
        return columns, max(rows.values())

    def join(self, parts: list[Columns]) -> Columns:
        """Return the rows of several requests, lists padded to the longest."""
        return {s["name"]: _stack([p[s["name"]] for p in parts], s["dtype"]) for s in self.specs}

    def unfit(self, vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return which rows have a vector that is none of a tower's."""
        direction = vectors[:, :-1] if self.bias else vectors
        length = np.sqrt(np.einsum("bd,bd->b", direction, direction))
        # Also true of NaN.
        bad: np.ndarray[Any, Any] = ~(np.abs(length - 1) < LENGTH_TOLERANCE)
        return bad

    def overflow(self, columns: Columns, vectors: np.ndarray[Any, Any]) -> str | None:
        """Return what is wrong with finite numbers that a tower could not compute with.

        Where they overflow its float32, eager PyTorch and ONNX Runtime give other vectors, none of
        them of length 1. What overflows depends on the weights, so the outcome is what tells.
        """
        numbers = [s["name"] for s in self.specs if s["dtype"] == "float32"]
        bad = self.unfit(vectors)
        if not numbers or not bad.any():
            return None
        largest = {name: np.abs(columns[name][bad]).max() for name in numbers}
        name = max(largest, key=largest.__getitem__)
        return (
            f"{name} holds a number of size {largest[name]:.3g}, which overflows the model's "
            "float32: send numbers such as the training log's"
        )


def _column(spec: dict[str, Any], value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Check one feature's rows."""
    name, length = spec["name"], spec["length"]
    if spec["dtype"] == "float32":
        if not np.isfinite(value).all():
            raise Refused(f"{name} holds NaN or infinity: send finite numbers")
        return value
    if spec["dtype"] == "string":
        value = strings(name, value)
    if value.shape[1] > length:
        # Padding beyond the window is no entry.
        pad = PAD_INT64 if spec["dtype"] == "int64" else PAD_STRING.decode()
        most = int((value != pad).sum(axis=1).max())
        if most > length or (value[:, length:] != pad).any():
            newest = "newest" if spec["kind"] == "history" else "first"
            raise Refused(
                f"{name} has {value.shape[1]} entries, the model's window is {length}: "
                f"send the {newest} {length}"
            )
        value = value[:, :length]
    return value


def _times(
    spec: dict[str, Any], history: np.ndarray[Any, Any], value: np.ndarray[Any, Any] | None
) -> np.ndarray[Any, Any]:
    """Return the seconds of a history's entries; none are known of times that do not come."""
    if value is None:
        return np.full(history.shape, PAD_INT64)
    value = _column(spec, value)
    if value.shape != history.shape:
        raise Refused(
            f"{spec['name']} has the shape {list(value.shape)}, {spec['of']} "
            f"{list(history.shape)}: send one time an entry"
        )
    return value


def strings(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Decode UTF-8.

    Raises:
        Refused: where it is none.
    """
    try:
        texts = [entry.decode() for entry in value.ravel().tolist()]
    except UnicodeDecodeError:
        raise Refused(f"{name} holds bytes that are not UTF-8") from None
    return np.array(texts, dtype=object).reshape(value.shape)


def _stack(parts: list[np.ndarray[Any, Any]], dtype: str) -> np.ndarray[Any, Any]:
    widths = {part.shape[1] for part in parts}
    if len(widths) == 1 and 0 not in widths:
        return np.concatenate(parts)
    rows = sum(map(len, parts))
    text = dtype == "string"
    out = np.full(
        (rows, max(widths) or 1), PAD_STRING.decode() if text else PAD_INT64,
        object if text else np.int64,
    )  # fmt: skip
    start = 0
    for part in parts:
        out[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return out
