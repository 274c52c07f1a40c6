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

from twotower.data.batches import Batch
from twotower.kernels.exclusions import exclusion_words
from twotower.train.config import TrainConfig


class _Gather(torch.autograd.Function):
    """Rows of all ranks; a row's gradient is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, rows_BD: Tensor) -> Tensor:
        return all_rows(rows_BD)

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


def all_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, which each has as many of."""
    ranks = dist.get_world_size()
    gathered = rows.new_empty(rows.shape[0] * ranks, *rows.shape[1:])
    dist.all_gather_into_tensor(gathered, rows.contiguous())
    return gathered


# exp(-1e4) is 0, and 0 times a loss of 1e4 is too, which of infinity it is not.
FILLER_LOG_Q = 1e4
# Of the newest gap in a learned rate's average, which so remembers about 20 occurrences.
RATE_MOMENTUM = 0.05


def log_q(rate_N: Tensor, config: TrainConfig, queries: float) -> Tensor:
    """Return the log of how often each item is expected among a step's candidates.

    Where sources are mixed their expectations add up, so one candidate's correction does not
    depend on its source (the balance heuristic of Veach and Guibas 1995).

    Args:
        rate_N: how often each item is a positive of a step, in the mean.
        config: of training; its exponent is applied.
        queries: of a step, of all ranks together.

    Returns:
        (N + 1,): the last is of item -1, the loader's filler, which no softmax is to count.
    """
    log_q_N = log_q_of(rate_N, config, queries, len(rate_N))
    return torch.cat([log_q_N, log_q_N.new_tensor([FILLER_LOG_Q])])


def log_q_of(
    rate_N: Tensor, config: TrainConfig, queries: float, items: int, listed_N: Tensor | float = 0
) -> Tensor:
    """Return what `log_q` does of some of a catalogue's items, whose rates they are, (N,).

    To their expectation that of a step's own lists (`twotower.data.listed`), `listed_N`, is added.
    """
    now_N, before_N = expected(rate_N, config, queries, items, listed_N)
    return config.log_q * (now_N + before_N).log().float()


def push_of(
    rate_N: Tensor, config: TrainConfig, queries: float, items: int, listed_N: Tensor | float = 0
) -> Tensor:
    """Return what the gradients of candidates of a step are multiplied by as negatives, (N,).

    Those of the memory have none: an item would be pulled by all of its positives, but pushed only
    by the part of its negatives that is not there, and popular items would rise without end. The
    candidates of the step itself push for them too, so that the mean push is that of all. The
    arguments are those of `log_q_of`.
    """
    now_N, before_N = expected(rate_N, config, queries, items, listed_N)
    return (1 + before_N / now_N.clamp_min(1e-12)).float()


def expected(
    rate_N: Tensor, config: TrainConfig, queries: float, items: int, listed_N: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return how often items are expected among the candidates of a step, and in the memory.

    The arguments are those of `log_q_of`.
    """
    if config.negatives.catalogue:
        return torch.ones_like(rate_N), torch.zeros_like(rate_N)
    sizes = config.negatives.sizes(queries)
    share_N = rate_N / queries
    # A query's own positive is none of its negatives.
    in_batch = max(0, sizes["in_batch"] - 1)
    expected_N = in_batch * share_N
    if config.every_position:  # each once, however many queries have it
        expected_N = -torch.expm1(in_batch * torch.log1p(-share_N.clamp_max(1 - 1e-9)))
    return expected_N + sizes["uniform"] / items + listed_N, sizes["memory"] * share_N


def catalogue_sum(value_N: Tensor, expected_N: Tensor) -> Tensor:
    """Return an estimate of a sum over the catalogue from the items that a step has.

    Each counts by the inverse of how often it is expected there, so that the mean over steps is the
    sum over all items (Horvitz and Thompson 1952).
    """
    return (value_N / expected_N.to(value_N.dtype)).sum()


class PositiveRates(nn.Module):
    """How often each item is a positive of a step: counted before, or learned from the steps.

    Learned rates (Yi et al. 2019, "Sampling-bias-corrected neural modeling", algorithm 2) follow a
    log that drifts: a moving average of the steps between an item's occurrences, here divided by
    how many a step has, since each of them is a candidate.

    Args:
        count_N: how often each item is a positive of an epoch.
        steps: of an epoch.
        learned: whether rates are learned; else they are the counts', at least one an epoch.
    """

    gap_N: Tensor
    last_N: Tensor
    step: Tensor

    def __init__(self, count_N: Tensor, steps: int, learned: bool) -> None:
        super().__init__()
        self.steps: int
        self.steps, self.learned = steps, learned
        gap_N = steps / count_N.double().clamp_min(1)
        if learned:
            gap_N = torch.full_like(gap_N, float(steps))
        # What is counted follows from the prepared dataset.
        self.register_buffer("gap_N", gap_N, persistent=learned)
        self.register_buffer("last_N", torch.zeros_like(count_N), persistent=learned)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=learned)

    @property
    def rate_N(self) -> Tensor:
        """Occurrences a step (N,), fp64."""
        return self.gap_N.reciprocal()

    def observe(self, id_B: Tensor) -> None:
        """Learn from a step's positives, of all ranks; -1 is none."""
        self.step += 1
        item_C, count_C = torch.unique(id_B[id_B >= 0], return_counts=True)
        gap_C = (self.step - self.last_N[item_C]) / count_C
        # The first occurrence says nothing of what lies between two.
        known_C = self.last_N[item_C] > 0
        moved_C = self.gap_N[item_C].lerp(gap_C.double(), RATE_MOMENTUM)
        self.gap_N[item_C] = torch.where(known_C, moved_C, self.gap_N[item_C])
        self.last_N[item_C] = self.step


@dataclass
class Candidates:
    """What queries are scored against.

    Attributes:
        vector_ND: their vectors.
        id_N: their catalogue rows, -1 for fillers.
        log_q_N: the log of how often each one's item is expected among them.
        push_N: what its gradient is multiplied by as a negative, see `push_of`; None for 1.
    """

    vector_ND: Tensor
    id_N: Tensor
    log_q_N: Tensor
    push_N: Tensor | None = None

    def by_id(self, positive_B: Tensor) -> tuple[Candidates, Tensor]:
        """Return them sorted by catalogue row, and which of them then are the positives."""
        id_N, order_N = self.id_N.sort(stable=True)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
        vector_ND = self.vector_ND.index_select(0, order_N)
        push_N = None if self.push_N is None else self.push_N[order_N]
        return Candidates(vector_ND, id_N, self.log_q_N[order_N], push_N), place_N[positive_B]

    def of_all_ranks(self) -> Candidates:
        """Return those of all ranks, rank by rank; vectors get the sum of all ranks' gradients."""
        vector_ND: Tensor = _Gather.apply(self.vector_ND)
        push_N = None if self.push_N is None else all_rows(self.push_N)
        return Candidates(vector_ND, all_rows(self.id_N), all_rows(self.log_q_N), push_N)


class _ScaledGradient(torch.autograd.Function):
    """See `scaled_gradient`."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, factor_N: Tensor) -> Tensor:
        ctx.save_for_backward(factor_N)
        return rows_ND.view_as(rows_ND)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        (factor_N,) = ctx.saved_tensors
        return (grad_ND * factor_N[:, None]).to(grad_ND.dtype), None


def scaled_gradient(rows_ND: Tensor, factor_N: Tensor) -> Tensor:
    """Return rows (N, D) as they are, whose gradients are multiplied by factors (N,)."""
    rows: Tensor = _ScaledGradient.apply(rows_ND, factor_N)
    return rows


def excluded(batch: Batch, id_N: Tensor, first_N: Tensor | None) -> Tensor | None:
    """Return which candidates do not count for a query, as words of bits (B, W); None for none.

    They are those that the batch says that the query's user had taken before, and those that were
    not there yet at its time, as `exclusion_words` writes them.

    Args:
        batch: of the queries of this rank.
        id_N: catalogue rows of the candidates, sorted; -1 for fillers.
        first_N: when there first was each item of the catalogue, where the batch has times. Of
            fillers, which no softmax counts, it does not matter.
    """
    left_out: dict[str, Tensor] = {}
    if batch.seen is not None:
        left_out |= {"taken_query_S": batch.seen.query_S, "taken_id_S": batch.seen.item_S}
    if batch.time_B is not None and first_N is not None:
        left_out |= {"first_N": first_N[id_N], "time_B": batch.time_B}
    return exclusion_words(id_N, len(batch.weight_B), **left_out) if left_out else None


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
