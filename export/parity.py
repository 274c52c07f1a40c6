"""Parity: eager PyTorch and ONNX Runtime must give the same answers, or there is no bundle.

The same golden queries travel in the bundle; a server is ready once it has answered them too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.export.bundle import Golden
from twotower.export.golden import Answer, Row, judge, raw_tensors, session
from twotower.kernels.top_k_inner_product import top_k_inner_product
from twotower.towers.two_tower import TwoTower

ITEM_SAMPLE = 1000
UNSEEN_ID = {"string": "an id that no log holds", "int64": 2**62 + 1}


class ParityError(UserError):
    """Two runtimes disagree about the same query."""


def golden_rows(data: PreparedDataset, specs: list[TensorSpec], count: int, seed: int) -> list[Row]:
    """Return raw queries: users at events of the test split, some with nothing but unseen ids.

    Unlike a query that judges the towers, a golden one needs no item that its user had not taken
    before, so any log has some. Each row is a request's features plus `exclude`, the item ids seen
    before.
    """
    rows = event_rows(data, 2, count, seed)
    # Every other query filters what the user has seen.
    for row in rows[1::2]:
        row["exclude"] = []
    for i, row in enumerate(rows[: max(1, len(rows) // 20)]):
        for spec in specs:
            if spec.kind == "id":
                row[spec.name] = UNSEEN_ID[spec.dtype]
            elif spec.kind == "times":
                row[spec.name] = [None] * (i % 2)
            elif spec.is_list:
                row[spec.name] = [UNSEEN_ID[spec.dtype]] * (i % 2)
    return rows


def event_rows(data: PreparedDataset, split: int, count: int, seed: int) -> list[Row]:
    """Return the raw queries at a sample of a split's events, `exclude` what was seen before."""
    events, c = data.section(split), data.event_columns
    chosen = np.random.default_rng(seed).choice(len(events), min(count, len(events)), replace=False)
    ids, rows = data.items["id"], []
    for event in events.start + np.sort(chosen):
        user = int(c["user"][event])
        line = slice(data.history_from[user], c["history_to"][event])
        seen = data.timeline[line]
        seconds = data.timeline_seconds[line] if data.config.timed_histories() else None
        row = data.raw_query(user, int(event), seen, seconds)
        row["exclude"] = ids.take(np.unique(seen)).to_pylist()
        rows.append(row)
    return rows


@torch.no_grad()
def eager_answers(
    model: TwoTower, vectors: npt.NDArray[np.float32], data: PreparedDataset,
    rows: list[Row], k: int,
) -> list[Golden]:  # fmt: skip
    """Answer raw queries with PyTorch: encode, embed, search."""
    query_BD = model.query_vectors(BatchBuilder(data).requests("query", rows))
    ids = data.items["id"].to_pylist()
    row_of = {item: i for i, item in enumerate(ids)}
    golden = []
    for query_D, row in zip(query_BD, rows, strict=True):
        exclude = torch.tensor([row_of[i] for i in row["exclude"] if i in row_of])
        scores, found = top_k_inner_product(
            query_D[None], torch.from_numpy(vectors), k,
            exclude_row_X=exclude.to(torch.int64),
            exclude_offset_B1=torch.tensor([0, len(exclude)]),
        )  # fmt: skip
        kept = found[0] >= 0
        golden.append(Golden(
            features={n: v for n, v in row.items() if n != "exclude"},
            exclude=row["exclude"],
            item_ids=[ids[i] for i in found[0][kept].tolist()],
            scores=scores[0][kept].tolist(),
        ))  # fmt: skip
    return golden


def check_answers(
    golden: Sequence[Golden],
    answers: Sequence[Answer],
    tolerance: float,
    runtime: str,
    key: str = "export.tolerance",
) -> float:
    """Return the largest score difference; `key` is where the tolerance is set.

    Raises:
        ParityError: naming the worst query and by how much it differs.
    """
    verdict = judge(golden, answers, tolerance, runtime)
    number = verdict.worst
    if not verdict.passes:
        g, (ids, scores) = golden[number], answers[number]
        raise ParityError(
            f"golden query {number}: {runtime} answers {ids[:3]}… with {scores[:3]}, eager "
            f"PyTorch {g.item_ids[:3]}… with {g.scores[:3]} ({key} {tolerance:g}): "
            "no bundle was made"
        )
    return verdict.differences[number]


@torch.no_grad()
def check_item_graph(
    bundle: Path, specs: Sequence[TensorSpec], data: PreparedDataset,
    vectors: npt.NDArray[np.float32], tolerance: float,
) -> float:  # fmt: skip
    """Return the largest difference between `item.onnx` and the item vectors, over a sample.

    Raises:
        ParityError: when it exceeds the tolerance.
    """
    rows, raw = item_rows(data, ITEM_SAMPLE)
    (got,) = session(bundle / "item.onnx").run(["vector"], raw_tensors(specs, raw))
    return check_vectors_of(got, vectors[rows], tolerance, "item graph")


def item_rows(data: PreparedDataset, count: int) -> tuple[npt.NDArray[np.int64], list[Row]]:
    """Return catalogue rows spread over it, and their raw features."""
    n = len(data.items)
    rows = np.linspace(0, n - 1, min(count, n)).astype(np.int64)
    names = [s.name for s in data.encoder.specs(data.config, "item")]
    raw = data.items.take(rows).select([f"raw.{name}" for name in names])
    return rows, raw.rename_columns(names).to_pylist()


def check_vectors_of(
    got_ND: npt.NDArray[np.float32], wanted_ND: npt.NDArray[np.float32], tolerance: float,
    runtime: str, key: str = "export.tolerance",
) -> float:  # fmt: skip
    """Return the largest difference of a coordinate.

    Raises:
        ParityError: when it exceeds the tolerance.
    """
    difference = float(np.abs(got_ND - wanted_ND).max())
    if not difference <= tolerance:
        raise ParityError(
            f"{runtime}: vectors differ by {difference:.2e} from eager PyTorch "
            f"({key} {tolerance:g}): no bundle was made"
        )
    return difference
