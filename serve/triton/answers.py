"""What the Triton models `recommend` and `similar` share: from vectors to item ids and scores.

Runs in Triton's Python backend, in the version directory with the bundle's files and copies of the
files beside it and of `twotower.export.search`, with NumPy and ONNX Runtime and without twotower.
Rows of all requests of a batch are answered together; each request is validated by itself first,
since one bad row would fail its whole batch otherwise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from features import (
    PAD_INT64,
    PAD_STRING,
    Columns,
    Refused,
    keep_what_is_loaded,
    parse_each,
    refusal,
    tensors_of,
    use_fast_strings,
)
from filters import Filters
from search import open_search

# Of fewer rows than this, or than this part of the catalogue, each score is computed.
FEW_ROWS = 4096
FEW_SHARE = 1 / 8
# A further run of the index costs as much as so many further results of a row do in a run: of
# 100,000 x 64 on one thread it took 1.2 ms, and 1,000 results of a row 0.9 ms.
RUN_RESULTS, RUN_RESULTS_AN_ITEM = 100, 1 / 75
NONE = np.empty(0, np.int64)


class Answers:
    """Answers batches of requests from one bundle; a model says whose vectors are searched by."""

    def open(self, folder: Path, target: str, threads: int) -> None:
        """Open what the vectors come from."""
        raise NotImplementedError

    def asked(self, tensors: Columns) -> tuple[Any, int]:
        """Return what a request's inputs ask by, and their number of rows, or raise `Refused`."""
        raise NotImplementedError

    def vectors(self, asked: list[Any]) -> np.ndarray[Any, Any]:
        """Return the vectors (B, D) of several requests' rows."""
        raise NotImplementedError

    def fits(self, vectors: np.ndarray[Any, Any]) -> bool:
        """Return whether all vectors of a batch are of use."""
        raise NotImplementedError

    def wrong(self, asked: Any, vectors: np.ndarray[Any, Any]) -> str | None:
        """Return why a request's vectors are of no use, if they are."""
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graphs of this version's directory."""
        use_fast_strings()
        folder = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        self.schema = json.loads(parameters["schema"]["string_value"])
        self.spec = json.loads(parameters["index"]["string_value"])
        target, threads = (parameters[name]["string_value"] for name in ("target", "threads"))
        self.open(folder, target, int(threads))
        self.index: Any
        if target == "gpu":
            from fused import FusedSearch

            self.spec = {"kind": "exact", "width": self.schema["dim"]}
            self.index = FusedSearch(folder, f"cuda:{args['model_instance_device_id']}")
        else:
            self.index = open_search(folder, self.spec, int(threads))
        # Still of the file; a plain array's entries are read faster than a map's.
        self.ids = np.asarray(np.load(folder / "item_ids.npy", mmap_mode="r", allow_pickle=False))
        self.text_ids = self.ids.dtype.kind == "S"
        self.version = np.full((config["max_batch_size"], 1), self.schema["version"])
        self.excluded = np.zeros(len(self.ids), bool)
        self.filters = Filters(folder, self.schema["filters"], len(self.ids))
        keep_what_is_loaded()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, or say by itself why not."""
        responses: list[Any]
        responses, parsed = parse_each(requests, self.parse)
        if parsed:
            answers = self.answer([p for _, p in parsed])
            for (number, _), response in zip(parsed, answers, strict=True):
                responses[number] = response
        return responses

    def parse(self, request: Any) -> dict[str, Any]:
        """Return what a request asks by, k, and which rows it leaves out or asks for.

        Raises:
            Refused: naming what cannot be answered.
        """
        tensors = tensors_of(request)
        asked, count = self.asked(tensors)
        k = self.schema["default_k"]
        if "k" in tensors:
            wanted = set(tensors["k"].ravel().tolist())
            if len(wanted) != 1:
                raise Refused("k must be the same for all rows of a request")
            k = wanted.pop()
        if not 1 <= k <= self.schema["max_k"]:
            raise Refused(
                f"k must be in 1..{self.schema['max_k']} (catalogue: "
                f"{self.schema['num_items']} items), got {k}"
            )
        lists: dict[str, list[Any]] = {}
        for name in ("exclude", "allow", "filter"):
            value = tensors.get(name)
            lists[name] = [None] * count if value is None else list(value)
            if len(lists[name]) != count:
                raise Refused(f"{name} has {len(lists[name])} rows, the request has {count}")
        return {
            "asked": asked, "count": count, "k": k,
            "exclude": [NONE if e is None else self.rows_of(e) for e in lists["exclude"]],
            "only": [self.only(*p) for p in zip(lists["allow"], lists["filter"], strict=True)],
            "filter": [_text(f) for f in lists["filter"]],
            "explain": "explanation" in request.requested_output_names(),
        }  # fmt: skip

    def only(self, allow: Any, condition: Any) -> np.ndarray[Any, Any] | None:
        """Return the rows that a request's row asks for; None for all.

        Raises:
            Refused: for a filter that cannot be.
        """
        rows = None if allow is None else self.rows_of(allow)
        text = _text(condition)
        if text:
            left = self.filters.rows(text)
            rows = left if rows is None else np.intersect1d(rows, left, assume_unique=True)
        return rows

    def rows_of(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the distinct catalogue rows of raw ids; ids it does not hold are left out."""
        if len(ids) == 1 and ids[0] in (PAD_INT64, PAD_STRING):  # no id at all
            return NONE
        if self.text_ids:
            # One longer than any of them would be cut, and zeros be left off, to look like one.
            width = self.ids.dtype.itemsize
            fit = [i for i in ids.tolist() if len(i) <= width and i[-1:] != b"\0"]
            ids = np.array(fit, dtype=self.ids.dtype)
        found = np.searchsorted(self.ids, ids)
        inside = found < len(self.ids)
        found, ids = found[inside], ids[inside]
        return np.unique(found[self.ids[found] == ids])

    def answer(self, parsed: list[dict[str, Any]]) -> list[Any]:
        """Answer valid requests in one pass of the tower and one of the index."""
        vectors = self.vectors([p["asked"] for p in parsed])
        exclude = [rows for p in parsed for rows in p["exclude"]]
        only = [rows for p in parsed for rows in p["only"]]
        wanted = np.repeat([p["k"] for p in parsed], [p["count"] for p in parsed])
        results = self.search(vectors, wanted, exclude, only)
        fits, responses, start = self.fits(vectors), [], 0
        for p in parsed:
            rows = slice(start, start + p["count"])
            error = None if fits else self.wrong(p["asked"], vectors[rows])
            responses.append(refusal(error) if error else self.response(p, results[rows]))
            start += p["count"]
        return responses

    def search(
        self, vectors: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any],
        exclude: list[np.ndarray[Any, Any]], only: list[np.ndarray[Any, Any] | None],
    ) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:  # fmt: skip
        """Return each row's best scores and catalogue rows, of those asked for and not excluded."""
        results: list[Any] = [None] * len(vectors)
        for number, asked in enumerate(only):
            if asked is not None:
                left = np.setdiff1d(asked, exclude[number], assume_unique=True)
                results[number] = self.among(vectors[number], left, int(wanted[number]))
        # The best k + |excluded| hold the best k that are left.
        need = np.minimum(wanted + [len(e) for e in exclude], len(self.ids))
        for members in self.runs(need, [i for i, rows in enumerate(only) if rows is None]):
            scores, rows = self.index.search(vectors[members], int(need[members[0]]))
            for found, near, i in zip(scores, rows, members, strict=True):
                if len(exclude[i]):
                    # A mark on each row is read faster than a list is searched for it.
                    self.excluded[exclude[i]] = True
                    keep = (~self.excluded[near]).nonzero()[0]
                    self.excluded[exclude[i]] = False
                    found, near = found[keep], near[keep]
                results[i] = (found[: wanted[i]], near[: wanted[i]])
        return results

    def runs(self, need: np.ndarray[Any, Any], asked: list[int]) -> list[list[int]]:
        """Return which rows share a run of the index, each time the one that needs most first.

        So one long list of exclusions does not slow all others, and lists that differ by a few do
        not cost a run each.
        """
        most = RUN_RESULTS + int(len(self.ids) * RUN_RESULTS_AN_ITEM)
        needs, runs, top, spare = need.tolist(), list[list[int]](), 0, 0
        for i in sorted(asked, key=needs.__getitem__, reverse=True):
            spare += top - needs[i]
            if not runs or spare > most:
                runs.append([])
                top, spare = needs[i], 0
            runs[-1].append(i)
        return runs

    def among(
        self, vector: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], k: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the best scores and rows of some rows of the catalogue."""
        k, n = min(k, len(rows)), len(self.ids)
        if len(rows) > max(FEW_ROWS, FEW_SHARE * n):
            # The index finds more than are asked for until enough of them may be answered.
            asked = np.zeros(n, bool)
            asked[rows] = True
            most = 2 * k * n // len(rows)
            while most < FEW_SHARE * n:
                scores, near = self.index.search(vector[None], most)
                keep = asked[near[0]].nonzero()[0][:k]
                if len(keep) == k:
                    return scores[0][keep], near[0][keep]
                most *= 4
        found: tuple[Any, Any] = self.index.among(vector, rows, k)
        return found

    def response(self, parsed: dict[str, Any], results: list[tuple[Any, Any]]) -> Any:
        """Return one request's tensors."""
        scores, rows = results[0]
        ids, scores = self.ids[rows][None], scores[None]
        if len(results) > 1:
            ids, scores = self.padded(results)
        if self.text_ids:
            ids = ids.astype(object)
        tensors = [
            pb_utils.Tensor("item_ids", ids),
            pb_utils.Tensor("scores", scores),
            pb_utils.Tensor("version", self.version[: len(results)]),
        ]
        if parsed["explain"]:
            texts = [[self.explanation(parsed, i)] for i in range(len(results))]
            tensors.append(pb_utils.Tensor("explanation", np.array(texts, dtype=object)))
        return pb_utils.InferenceResponse(tensors)

    def padded(
        self, results: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return the ids and scores of several rows; one with fewer results ends with padding."""
        shape = len(results), max(len(rows) for _, rows in results)
        ids = np.full(shape, PAD_STRING if self.text_ids else PAD_INT64, dtype=self.ids.dtype)
        scores = np.full(shape, -np.inf, dtype=np.float32)
        for i, (score, rows) in enumerate(results):
            ids[i, : len(rows)] = self.ids[rows]
            scores[i, : len(rows)] = score
        return ids, scores

    def explanation(self, parsed: dict[str, Any], row: int) -> bytes:
        """Return as JSON how one row was answered."""
        only, excluded = parsed["only"][row], len(parsed["exclude"][row])
        text = parsed["filter"][row]
        return json.dumps({
            "version": self.schema["version"],
            "index": self.spec["kind"],
            "exact": self.spec["kind"] == "exact" and self.spec["width"] == self.schema["dim"],
            "catalogue": len(self.ids),
            "filter": json.loads(text) if text else None,
            "asked_for": None if only is None else len(only),
            "excluded": excluded,
            "k": parsed["k"],
        }).encode()  # fmt: skip


def _text(value: Any) -> str:
    """Return a filter's text; none, where none came."""
    if value is None:
        return ""
    entry = value.ravel()[0]
    try:
        return entry.decode() if isinstance(entry, bytes) else str(entry)
    except UnicodeDecodeError:
        raise Refused("filter holds bytes that are not UTF-8") from None
