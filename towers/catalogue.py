"""Vectors of the whole catalogue.

Shape legend: `N` items, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from twotower.data.batches import Batch, BatchBuilder


@torch.no_grad()
def catalogue_vectors(
    embed: Callable[[Batch], Tensor], builder: BatchBuilder, device: torch.device, batch_size: int
) -> Tensor:
    """Return the vectors of all items (N, D)."""
    n = len(builder.data.items)
    parts = []
    for start in range(0, n, batch_size):
        rows = np.arange(start, min(start + batch_size, n))
        parts.append(embed(builder.items(rows).to(device)))
    return torch.cat(parts)
