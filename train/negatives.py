"""Candidates of all ranks for the loss of each, with exact gradients.

Every rank scores its queries against the items of all ranks' batches. Its share of the joined
batch's loss is scaled so that the mean over ranks, which DDP and TorchRec take of gradients, is
the gradient of the loss that one process would compute on the joined batch.

Shape legend: `B` queries of a rank, `N` candidates, the same number on all ranks, `M` of the
memory, `D` width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from twotower.train.config import TrainConfig


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


# exp(-1e4) is 0, and 0 times a loss of 1e4 is too, which of infinity it is not.
FILLER_LOG_Q = 1e4


def log_q(count_N: Tensor, config: TrainConfig, queries: float) -> Tensor:
    """Return the log of how often each item is expected among a step's candidates.

    An item's positives are drawn as often as training has it, at least once; where sources are
    mixed their expectations add up, so one candidate's correction does not depend on its source
    (the balance heuristic of Veach and Guibas 1995).

    Args:
        count_N: how often each item is a positive of an epoch.
        config: of training; its exponent is applied.
        queries: of a step, of all ranks together.

    Returns:
        (N + 1,): the last is of item -1, the loader's filler, which no softmax is to count.
    """
    if config.negatives.catalogue:
        expected_N = torch.ones(len(count_N), dtype=torch.float64)
    else:
        sizes = config.negatives.sizes(queries)
        frequency_N = count_N.double().clamp_min(1) / count_N.sum()
        # A query's own positive is none of its negatives.
        in_batch = max(0, sizes["in_batch"] - 1)
        expected_N = in_batch * frequency_N
        if config.every_position:  # each once, however many queries have it
            expected_N = -torch.expm1(in_batch * torch.log1p(-frequency_N.clamp_max(1 - 1e-9)))
        expected_N += sizes["memory"] * frequency_N + sizes["uniform"] / len(count_N)
    log_q_N = config.log_q * expected_N.log().float()
    return torch.cat([log_q_N, torch.tensor([FILLER_LOG_Q])])


@dataclass
class Candidates:
    """What queries are scored against.

    Attributes:
        vector_ND: their vectors.
        id_N: their catalogue rows, -1 for fillers.
        log_q_N: the log of how often each one's item is expected among them.
    """

    vector_ND: Tensor
    id_N: Tensor
    log_q_N: Tensor

    def of_all_ranks(self) -> Candidates:
        """Return those of all ranks, rank by rank; vectors get the sum of all ranks' gradients."""
        vector_ND: Tensor = _Gather.apply(self.vector_ND)
        return Candidates(vector_ND, _all_rows(self.id_N), _all_rows(self.log_q_N))


class CandidateMemory(nn.Module):
    """The positives of the steps before, as they were then: candidates that cost no tower.

    Wang et al. 2021, "Cross-Batch Negative Sampling for Training Two-Tower Recommenders". Every
    rank holds those of all ranks.

    Args:
        size: candidates kept, the newest.
        width: of their vectors.
    """

    vector_MD: Tensor
    id_M: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("vector_MD", torch.zeros(size, width))
        self.register_buffer("id_M", torch.full((size,), -1))

    def push(self, vector_ND: Tensor, id_N: Tensor) -> None:
        """Keep candidates in place of the oldest."""
        size = len(self.id_M)
        self.vector_MD.copy_(torch.cat([self.vector_MD, vector_ND.detach().float()])[-size:])
        self.id_M.copy_(torch.cat([self.id_M, id_N])[-size:])


def share_of_weight(weight_B: Tensor) -> Tensor:
    """Return the factor that makes a rank's weighted mean its share of the joined batch's.

    The mean over ranks of (factor x a rank's weighted mean) is the weighted mean over all.
    """
    own = weight_B.double().sum()
    total = own.clone()
    dist.all_reduce(total)
    return (own * dist.get_world_size() / total.clamp_min(1e-12)).float()
