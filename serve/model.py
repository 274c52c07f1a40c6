"""The Triton model `recommend`: raw features in, item ids and scores out.

Runs in Triton's Python backend, in the version directory with the bundle's files and a copy of
`twotower.export.search`, with NumPy and ONNX Runtime and without twotower. Rows of all requests of
a batch are answered together; each request is validated by itself first, since one bad row would
fail its whole batch otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from search import open_search

PAD_STRING = b""
PAD_INT64 = -(2**63)
# A vector of float32 is a unit long to about 1e-6; one that overflowed is 0 or next to it.
LENGTH_TOLERANCE = 0.01


class Refused(ValueError):
    """A request that cannot be answered, with the reason."""


class TritonPythonModel:
    """Answers batches of requests from one bundle."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graphs of this version's directory."""
        folder = Path(args["model_repository"]) / args["model_version"]
        parameters = json.loads(args["model_config"])["parameters"]
        self.schema = json.loads(parameters["schema"]["string_value"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = int(parameters["threads"]["string_value"])
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        cpu = ["CPUExecutionProvider"]
        self.query = ort.InferenceSession(str(folder / "query.onnx"), options, providers=cpu)
        spec = json.loads(parameters["index"]["string_value"])
        self.index = open_search(folder, spec, options.intra_op_num_threads)
        self.ids = np.load(folder / "item_ids.npy", mmap_mode="r", allow_pickle=False)
        self.text_ids = self.ids.dtype.kind == "S"

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, or say by itself why not."""
        parsed: list[Any] = []
        for request in requests:
            try:
                parsed.append(self.parse(request))
            except Refused as error:
                parsed.append(error)
        valid = [p for p in parsed if not isinstance(p, Refused)]
        answers = iter(self.answer(valid)) if valid else iter(())
        return [self.refusal(str(p)) if isinstance(p, Refused) else next(answers) for p in parsed]

    @staticmethod
    def refusal(reason: str) -> Any:
        """Return the response to a request that cannot be answered."""
        error = pb_utils.TritonError(reason, pb_utils.TritonError.INVALID_ARG)
        return pb_utils.InferenceResponse(error=error)

    def parse(self, request: Any) -> dict[str, Any]:
        """Return a request's columns, k and excluded rows, or raise `Refused`."""
        columns: dict[str, np.ndarray[Any, Any]] = {}
        for spec in self.schema["features"]:
            tensor = pb_utils.get_input_tensor_by_name(request, spec["name"])
            if spec["kind"] == "times":
                history = columns[spec["of"]]
                columns[spec["name"]] = self.times(spec, history, tensor)
                continue
            if tensor is None:
                raise Refused(f"{spec['name']} is missing: send every feature of the model")
            columns[spec["name"]] = self.column(spec, tensor.as_numpy())
        rows = {name: len(value) for name, value in columns.items()}
        count = max(rows.values())
        if len(set(rows.values())) > 1:
            raise Refused(f"features differ in their number of rows: {rows}")
        tensor = pb_utils.get_input_tensor_by_name(request, "k")
        k = self.schema["default_k"] if tensor is None else tensor.as_numpy().ravel()
        if tensor is not None:
            if len(set(k.tolist())) != 1:
                raise Refused("k must be the same for all rows of a request")
            k = int(k[0])
        if not 1 <= k <= self.schema["max_k"]:
            raise Refused(
                f"k must be in 1..{self.schema['max_k']} (catalogue: "
                f"{self.schema['num_items']} items), got {k}"
            )
        tensor = pb_utils.get_input_tensor_by_name(request, "exclude")
        exclude = [np.empty(0, np.int64)] * count
        if tensor is not None:
            exclude = [self.rows_of(row) for row in tensor.as_numpy()]
            if len(exclude) != count:
                raise Refused(f"exclude has {len(exclude)} rows, the features have {count}")
        return {"columns": columns, "k": k, "exclude": exclude, "count": count}

    def column(self, spec: dict[str, Any], value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Check one feature's rows."""
        name, length = spec["name"], spec["length"]
        if spec["dtype"] == "float32":
            if not np.isfinite(value).all():
                raise Refused(f"{name} holds NaN or infinity: send finite numbers")
            return value
        if spec["dtype"] == "string":
            value = self.strings(name, value)
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

    def times(
        self, spec: dict[str, Any], history: np.ndarray[Any, Any], tensor: Any
    ) -> np.ndarray[Any, Any]:
        """Return the seconds of a history's entries; none are known of times that do not come."""
        if tensor is None:
            return np.full(history.shape, PAD_INT64)
        value = self.column(spec, tensor.as_numpy())
        if value.shape != history.shape:
            raise Refused(
                f"{spec['name']} has the shape {list(value.shape)}, {spec['of']} "
                f"{list(history.shape)}: send one time an entry"
            )
        return value

    @staticmethod
    def strings(name: str, value: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Decode UTF-8 ids."""
        out = np.empty(value.shape, dtype=object)
        flat = out.reshape(-1)
        try:
            for i, entry in enumerate(value.reshape(-1)):
                flat[i] = entry.decode() if isinstance(entry, bytes) else str(entry)
        except UnicodeDecodeError:
            raise Refused(f"{name} holds bytes that are not UTF-8") from None
        return out

    def rows_of(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the distinct catalogue rows of raw ids; ids it does not hold are left out."""
        if self.text_ids:
            # A longer id than any in the catalogue would be cut to look like one.
            width = self.ids.dtype.itemsize
            raw = [i if isinstance(i, bytes) else str(i).encode() for i in ids]
            ids = np.array([i for i in raw if len(i) <= width], dtype=self.ids.dtype)
        found = np.searchsorted(self.ids, ids)
        found = found[found < len(self.ids)]
        ids = ids[np.searchsorted(self.ids, ids) < len(self.ids)]
        return np.unique(found[self.ids[found] == ids])

    def answer(self, parsed: list[dict[str, Any]]) -> list[Any]:
        """Answer valid requests in one pass of the query graph and one of the index."""
        feed = {}
        for spec in self.schema["features"]:
            name = spec["name"]
            feed[name] = stack([p["columns"][name] for p in parsed], spec["dtype"])
        vectors = self.query.run(["vector"], feed)[0]
        exclude = [rows for p in parsed for rows in p["exclude"]]
        wanted = np.repeat([p["k"] for p in parsed], [p["count"] for p in parsed])
        results = self.search(vectors, wanted, exclude)
        responses, start = [], 0
        for p in parsed:
            rows = slice(start, start + p["count"])
            error = self.overflow(p["columns"], vectors[rows])
            responses.append(self.refusal(error) if error else self.response(results[rows]))
            start += p["count"]
        return responses

    def overflow(
        self, columns: dict[str, np.ndarray[Any, Any]], vectors: np.ndarray[Any, Any]
    ) -> str | None:
        """Return what is wrong with finite numbers that a tower could not compute with.

        Where they overflow its float32, eager PyTorch and ONNX Runtime give other vectors, none of
        them of length 1. What overflows depends on the weights, so the outcome is what tells.
        """
        numbers = [s["name"] for s in self.schema["features"] if s["dtype"] == "float32"]
        direction = vectors.astype(np.float64)
        # A query's coordinate for the items' bias is 1, and the others have length 1 then.
        direction[direction[:, -1] == 1, -1] = 0
        length = np.linalg.norm(direction, axis=1)
        # Also true of NaN.
        bad = ~(np.abs(length - 1) < LENGTH_TOLERANCE)
        if not numbers or not bad.any():
            return None
        largest = {name: np.abs(columns[name][bad]).max() for name in numbers}
        name = max(largest, key=largest.__getitem__)
        return (
            f"{name} holds a number of size {largest[name]:.3g}, which overflows the model's "
            "float32: send numbers such as the training log's"
        )

    def search(
        self,
        vectors: np.ndarray[Any, Any],
        wanted: np.ndarray[Any, Any],
        exclude: list[np.ndarray[Any, Any]],
    ) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
        """Return each row's best scores and catalogue rows, without the excluded ones."""
        # The best k + |excluded| hold the best k that are left. Rows with like needs share a run
        # of the index, so that one long list of exclusions does not slow all others.
        need = np.minimum(wanted + [len(e) for e in exclude], len(self.ids))
        group = np.ceil(np.log2(need)).astype(int)
        results: list[Any] = [None] * len(vectors)
        for g in np.unique(group):
            members = np.flatnonzero(group == g)
            scores, rows = self.index.search(vectors[members], int(need[members].max()))
            for place, i in enumerate(members):
                keep = np.isin(rows[place], exclude[i], invert=True).nonzero()[0][: wanted[i]]
                results[i] = (scores[place][keep], rows[place][keep])
        return results

    def response(self, results: list[tuple[Any, Any]]) -> Any:
        """Return one request's tensors; rows with fewer results are padded."""
        width = max(len(rows) for _, rows in results)
        pad = PAD_STRING if self.text_ids else PAD_INT64
        ids = np.full((len(results), width), pad, dtype=object if self.text_ids else np.int64)
        scores = np.full((len(results), width), -np.inf, dtype=np.float32)
        for i, (score, rows) in enumerate(results):
            ids[i, : len(rows)] = self.ids[rows]
            scores[i, : len(rows)] = score
        version = np.full((len(results), 1), self.schema["version"], dtype=np.int64)
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("item_ids", ids),
            pb_utils.Tensor("scores", scores),
            pb_utils.Tensor("version", version),
        ])  # fmt: skip


def stack(parts: list[np.ndarray[Any, Any]], dtype: str) -> np.ndarray[Any, Any]:
    """Join the rows of several requests, padding lists to the longest."""
    if dtype == "float32":
        return np.concatenate(parts)
    width = max(1, *(p.shape[1] for p in parts))
    rows = sum(len(p) for p in parts)
    text = dtype == "string"
    out = np.full(
        (rows, width), PAD_STRING.decode() if text else PAD_INT64, object if text else np.int64
    )
    start = 0
    for part in parts:
        out[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return out
