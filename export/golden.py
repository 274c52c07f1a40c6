"""Golden queries: answered by a bundle's graphs in ONNX Runtime, and any answers judged.

Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from twotower.data.schema import PAD_INT64, PAD_STRING, TensorSpec
from twotower.export.bundle import Golden, answer_difference

Row = dict[str, Any]
Answer = tuple[list[Any], list[float]]
# Of a million items, more queries at once would take more memory and no less time.
TOGETHER = 32
Search = Callable[[npt.NDArray[np.float32], int], Any]


@dataclass(frozen=True)
class Verdict:
    """How a runtime answers golden queries, beside eager PyTorch.

    Attributes:
        runtime: that answered.
        tolerance: largest score difference that is none.
        answers: ids and scores, best first, one a query.
        differences: of the scores; infinite where the answers differ beyond ties.
        reordered: answers with other ids or another order, ties included.
    """

    runtime: str
    tolerance: float
    answers: list[Answer]
    differences: list[float]
    reordered: int

    @property
    def worst(self) -> int:
        """Place of the query that differs most."""
        return int(np.argmax(self.differences))

    @property
    def passes(self) -> bool:
        """Whether no query differs beyond the tolerance."""
        return all(d <= self.tolerance for d in self.differences)


def catalogue_ids(directory: Path, dtype: str) -> list[Any]:
    """Return the item ids of a bundle's directory, in row order; `dtype` is the manifest's."""
    ids = np.load(directory / "item_ids.npy", allow_pickle=False)
    return [i.decode() if dtype == "string" else int(i) for i in ids]


def judge(
    golden: Sequence[Golden], answers: Sequence[Answer], tolerance: float, runtime: str
) -> Verdict:
    """Compare a runtime's answers with the golden ones; an id is as good as one it ties with."""
    pairs = list(zip(golden, answers, strict=True))
    return Verdict(
        runtime, tolerance, list(answers),
        [answer_difference(g.item_ids, g.scores, *a, tolerance) for g, a in pairs],
        sum(g.item_ids != ids for g, (ids, _) in pairs),
    )  # fmt: skip


def raw_tensors(specs: Sequence[TensorSpec], rows: Sequence[Row]) -> dict[str, npt.NDArray[Any]]:
    """Return raw features as a graph takes them: lists padded to the longest."""
    out: dict[str, npt.NDArray[Any]] = {}
    for spec in specs:
        values = [row[spec.name] for row in rows]
        if spec.dtype == "float32":
            out[spec.name] = np.asarray(values, np.float32).reshape(len(rows), -1)
            continue
        lists = [v if spec.is_list else [] if v is None else [v] for v in values]
        width = max(1, *(len(v) for v in lists))
        text = spec.dtype == "string"
        padded = np.full(
            (len(rows), width), PAD_STRING if text else PAD_INT64, object if text else np.int64
        )
        for i, entries in enumerate(lists):
            if spec.kind == "times":
                entries = [PAD_INT64 if e is None else e for e in entries]
            padded[i, : len(entries)] = entries
        out[spec.name] = padded
    return out


def session(path: Path) -> ort.InferenceSession:
    """Open a graph for the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_answers(
    bundle: Path, specs: Sequence[TensorSpec], golden: Sequence[Golden], ids: list[Any], k: int,
    search: Search, together: int = 1,
) -> list[Answer]:  # fmt: skip
    """Answer golden queries with the bundle's query graph in ONNX Runtime, and a search.

    Args:
        bundle: directory of the graph.
        specs: of its inputs.
        golden: of which the features and the excluded ids are taken.
        ids: of the catalogue, in row order.
        k: most answers a query.
        search: from vectors (B, D) and a number to scores and rows, best first.
        together: queries in a search, which all get what the one with most exclusions needs: of a
            lossy search, other answers than alone.
    """
    tensors = raw_tensors(specs, [g.features for g in golden])
    (vector,) = session(bundle / "query.onnx").run(["vector"], tensors)
    return vector_answers(vector, golden, ids, k, search, together)


def vector_answers(
    vector_BD: npt.NDArray[np.float32], golden: Sequence[Golden], ids: list[Any], k: int,
    search: Search, together: int = 1,
) -> list[Answer]:  # fmt: skip
    """Answer golden queries whose vectors are given; see `onnx_answers`."""
    answers: list[Answer] = []
    for start in range(0, len(golden), together):
        part = golden[start : start + together]
        most = min(len(ids), k + max(len(set(g.exclude)) for g in part))
        found = search(vector_BD[start : start + together], most)
        for scores, rows, g in zip(*found, part, strict=True):
            excluded = set(g.exclude)
            best = [(ids[r], float(s)) for r, s in zip(rows, scores, strict=True)]
            best = [(i, s) for i, s in best if i not in excluded][:k]
            answers.append(([i for i, _ in best], [s for _, s in best]))
    return answers


def answered(golden: Sequence[Golden], answers: Sequence[Answer]) -> list[Golden]:
    """Return golden queries with other answers."""
    pairs = zip(golden, answers, strict=True)
    return [replace(g, item_ids=ids, scores=scores) for g, (ids, scores) in pairs]


def index_recall(golden: Sequence[Golden], answers: Sequence[Answer]) -> float:
    """Return the share of the golden answers' items that are answered."""
    wanted = sum(len(g.item_ids) for g in golden)
    found = sum(
        len(set(g.item_ids) & set(ids)) for g, (ids, _) in zip(golden, answers, strict=True)
    )
    return found / wanted if wanted else 1.0
