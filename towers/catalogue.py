"""Vectors of the whole catalogue.

Shape legend: `N` items, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from twotower.data.batches import Batch, BatchBuilder


@torch.no_grad()
def catalogue_vectors(
    embed: Callable[[Batch], Tensor], builder: BatchBuilder, device: torch.device, batch_size: int
) -> Tensor:
    """Return the vectors of all items (N, D), on every rank of those that work together."""
    return torch.cat(list(catalogue_batches(embed, builder, device, batch_size)))


@torch.no_grad()
def catalogue_batches(
    embed: Callable[[Batch], Tensor], builder: BatchBuilder, device: torch.device, batch_size: int
) -> Iterator[Tensor]:
    """Yield what `catalogue_vectors` returns, in batches of items (`batch_size`, D)."""
    n = len(builder.data.items)
    for start in range(0, n, batch_size):
        rows = np.arange(start, min(start + batch_size, n))
        part = embed(builder.items(rows[part_of_rank(len(rows))]).to(device))
        yield gather_parts(part, len(rows))


def part_of_rank(size: int) -> slice:
    """Return this rank's part of a block: as large as any other's, so parts may overlap.

    Sharded tables are looked up by all ranks at once, and an empty batch is none.
    """
    if not _together():
        return slice(0, size)
    length = -(-size // dist.get_world_size())
    start = min(dist.get_rank() * length, size - length)
    return slice(start, start + length)


def gather_parts(part: Tensor, size: int) -> Tensor:
    """Return a block's rows (size, ...) of the parts that ranks have of it."""
    if not _together():
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    whole = part.new_empty(size, *part.shape[1:])
    for rank, rows in enumerate(parts):
        start = min(rank * len(part), size - len(part))
        whole[start : start + len(part)] = rows
    return whole


def _together() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
