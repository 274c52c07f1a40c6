"""Candidates of all ranks for the loss of each, with exact gradients.

Every rank scores its queries against the items of all ranks' batches. Its share of the joined
batch's loss is scaled so that the mean over ranks, which DDP and TorchRec take of gradients, is
the gradient of the loss that one process would compute on the joined batch.

Shape legend: `B` queries of a rank, the same number on all; `N` candidates = ranks x B, `D` width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks; a row's gradient is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        return _all_rows(rows_BD)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> Tensor:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        kind = grad_ND.dtype
        # Of many ranks' gradients in bf16, a sum in bf16 would lose the small ones.
        sum_ND = grad_ND.to(torch.promote_types(kind, torch.float32), copy=True).contiguous()
        mine_BD = sum_ND.new_empty(sum_ND.shape[0] // ranks, sum_ND.shape[1])
        if dist.get_backend() == "nccl":
            dist.reduce_scatter_tensor(mine_BD, sum_ND)
        else:  # gloo has no reduce-scatter that is faster
            dist.all_reduce(sum_ND)
            mine_BD = sum_ND.chunk(ranks)[rank]
        return mine_BD.to(kind)


def _all_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, which each has as many of."""
    ranks = dist.get_world_size()
    gathered = rows.new_empty(rows.shape[0] * ranks, *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


def gather_candidates(item_BD: Tensor, id_B: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the candidates of all ranks.

    Args:
        item_BD: item vectors of this rank; they get the sum of all ranks' gradients.
        id_B: their ids.

    Returns:
        The vectors (N, D), the ids (N,), and the place of this rank's first among them.
    """
    candidate_ND: Tensor = _Gather.apply(item_BD)
    return candidate_ND, _all_rows(id_B), dist.get_rank() * item_BD.shape[0]


def share_of_weight(weight_B: Tensor) -> Tensor:
    """Return the factor that makes a rank's weighted mean its share of the joined batch's.

    The mean over ranks of (factor x a rank's weighted mean) is the weighted mean over all.
    """
    own = weight_B.double().sum()
    total = own.clone()
    dist.all_reduce(total)
    return (own * dist.get_world_size() / total.clamp_min(1e-12)).float()
