"""Embedding tables as graphs store them: checked, without rows that were pruned, large in a file.

Protobuf refuses messages of 2 GB, and reading a graph copies what it holds. So large weights lie
beside the graphs as external data, which ONNX Runtime maps: `query.weights`, and `item.weights` for
those that the query graph does not have. They are written block by block, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from twotower.errors import UserError
from twotower.export.prune import EVERY_ROW, Kept
from twotower.towers.two_tower import PREFIX, TwoTower

# Weights of both graphs together that are still written into each of them.
INSIDE_BYTES = 1 << 30
# A layer's stay in the graph: the optimiser may fold what it can read.
LEAST_OUTSIDE = 1 << 20
# As ONNX Runtime maps; https://onnx.ai/onnx/repo-docs/ExternalData.html asks for pages.
ALIGNMENT = 1 << 12
BLOCK_BYTES = 1 << 26
FIRST_BAD = 3


class StoredWeights:
    """Where the weights of a bundle's graphs are, and which rows of its tables.

    Args:
        model: the towers.
        kept: rows of its tables.
        folder: of files for large weights; None writes all into the graphs.
        release: lets go of the memory of what was written.
    """

    def __init__(
        self, model: TwoTower, kept: Kept = EVERY_ROW, folder: Path | None = None,
        release: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.kept, self.folder, self.release = kept, folder, release
        self._rows = {model.table_weight(n).data_ptr(): rows for n, rows in kept.rows.items()}
        self._places: dict[int, tuple[str, int, int]] = {}

    def store(self, graph: ir.Model, side: str) -> None:
        """Replace initializers of a side's graph that lose rows or lie outside it.

        Raises:
            OSError: naming the file, for instance when the disk is full.
        """
        for value in graph.graph.initializers.values():
            weight = getattr(value.const_value, "raw", None)
            if not isinstance(weight, Tensor):
                continue
            rows = self._rows.get(weight.data_ptr())
            shape = weight.shape if rows is None else (len(rows), *weight.shape[1:])
            value.shape = ir.Shape(shape)
            if self.folder is not None and weight.nbytes >= LEAST_OUTSIDE:
                location, offset, length = self._outside(weight.detach(), rows, side)
                assert value.const_value is not None
                value.const_value = ir.ExternalTensor(
                    location, offset, length, value.const_value.dtype, shape=ir.Shape(shape),
                    name=value.name or "", base_dir=self.folder,
                )  # fmt: skip
            elif rows is not None:
                value.const_value = ir.tensor(weight.detach().numpy()[rows], name=value.name)

    def _outside(
        self, weight: Tensor, rows: npt.NDArray[np.int64] | None, side: str
    ) -> tuple[str, int, int]:
        """Return the file, offset and length of a weight, which is written if it is not there."""
        assert self.folder is not None
        key = weight.data_ptr()
        if key not in self._places:
            name = f"{side}.weights"
            path = self.folder / name
            with path.open("ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                start = file.tell()
                self._write(file, weight, rows)
                self._places[key] = (name, start, file.tell() - start)
        return self._places[key]

    def _write(self, file: BinaryIO, weight: Tensor, rows: npt.NDArray[np.int64] | None) -> None:
        for block in _blocks(weight):
            part = weight[block]
            if rows is not None:
                first, end = np.searchsorted(rows, [block.start, block.stop])
                part = part[torch.from_numpy(rows[first:end] - block.start)]
            file.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            self.release()


def _blocks(weight: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_BYTES * len(weight) // max(1, weight.nbytes))
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def weight_bytes(model: TwoTower, *others: Tensor) -> int:
    """Return the size of the towers' weights, and of others."""
    return sum(weight.nbytes for weight in (*model.parameters(), *others))


def check_weights(model: TwoTower) -> None:
    """Refuse towers whose weights are not all numbers.

    Raises:
        UserError: naming the table and its first such rows, or the layer.
    """
    remedy = "look at train/curves.png for where training diverged, and train with a lower rate"
    tables = {id(weight) for weight in model.table_parameters()}
    for path, weight in model.named_parameters():
        if id(weight) not in tables:
            if not _is_finite(weight):
                raise UserError(f"the weights of layer {path} hold NaN or infinity: {remedy}")
            continue
        bad, count = list[int](), 0
        for block in _blocks(weight):
            if _is_finite(weight[block]):
                continue
            found = torch.nonzero(~torch.isfinite(weight[block]).all(dim=1)).flatten()
            bad += (found[: FIRST_BAD - len(bad)] + block.start).tolist()
            count += len(found)
        if count:
            name = path.removesuffix(".weight").rpartition(".")[2].removeprefix(PREFIX)
            raise UserError(
                f"table '{name}': {count:,} of {len(weight):,} rows hold NaN or infinity, rows "
                f"{', '.join(map(str, bad))} first: {remedy}"
            )


def _is_finite(weight: Tensor) -> bool:
    """Whether all are numbers: NaN is the least and the largest of what it is among."""
    return bool(torch.isfinite(torch.stack(weight.detach().aminmax())).all())
