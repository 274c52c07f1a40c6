"""Sampled softmax over in-batch and extra negatives, with logQ correction, never holding B x N.

    loss = sum_i w_i (lse_i - (1 - e) x_ip(i) - e mean_j x_ij) / sum_i w_i
    x_ij = <q_i, c_j> / temperature - logQ_j,   lse_i = logsumexp_j(x_ij)

Candidate p(i) is query i's positive; every other candidate is a negative, except an accidental hit:
one with the positive's id. Subtracting the log of the probability with which a candidate was
sampled makes the expected gradient that of the full softmax (Bengio and Senecal 2008; Yi et al.
2019, "Sampling-bias-corrected neural modeling"). e is label smoothing over the candidates that are
no hits (Szegedy et al. 2016).

A positive is there whatever is sampled. `uncorrected`, its own term has no logQ, and the others'
must be the log of how often they are expected among the candidates, not up to a constant
(Khrylchenko et al. 2025, "Correcting the LogQ correction"). `outside`, it has no part in the sum
that it is compared with, as in bilateral softmax (Wu et al. 2024, "BSL").

Blocks of the logits are computed, used and forgotten, as flash attention does (Dao et al. 2022).

On a GPU: forward 2 B N D operations, backward 8 B N D: the logits are computed again for the
queries' gradient and for the candidates', each followed by its product. Every sum has a fixed
order, so results repeat to the bit. Memory is O((B + N) D), traffic O(B N D / block).

fp32 products run on tensor cores as three TF32 ones, which leaves their error near that of fp32
(Ootomo and Yokota 2022); an FMA loop would spill its registers.

On a CPU a block holds whole rows, so its softmax is known at once: the gradients are computed in
the forward pass, 6 B N D operations in all, and backward only scales them.

Shape legend: `B` queries, `N` candidates, `D` width, `S` splits of the candidates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.launch import (
    Blocks,
    check_matrices,
    pointer,
    power_of_two,
    runs_triton,
    splits_for,
    upcast,
)

# What becomes of a positive's own term in the sum; the kernels know it by its number.
POSITIVES = ("corrected", "uncorrected", "outside")
OUTSIDE = POSITIVES.index("outside")
# Rows of logits that fit: measured on 2 cores at B = N = 8,192, where 8 to 32 MB were equally fast
# (benchmarks/kernels_cpu.py --sweep).
BLOCK_BYTES = 16 << 20


def sampled_softmax_reference(
    query_BD: Tensor,
    candidate_ND: Tensor,
    temperature: Tensor,
    *,
    log_q_N: Tensor | None = None,
    candidate_id_N: Tensor | None = None,
    weight_B: Tensor | None = None,
    positive_B: Tensor | None = None,
    positive: str = "corrected",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the loss by its formula, in the inputs' precision; it holds the B x N logits."""
    rows = torch.arange(query_BD.shape[0], device=query_BD.device)
    positive_B = rows if positive_B is None else positive_B
    logits_BN = query_BD @ candidate_ND.T / temperature
    plain_B = logits_BN[rows, positive_B]
    if log_q_N is not None:
        logits_BN = logits_BN - log_q_N
        if positive != "corrected":
            logits_BN = logits_BN.index_put((rows, positive_B), plain_B.to(logits_BN.dtype))
    hit_BN = torch.zeros_like(logits_BN, dtype=torch.bool)
    if candidate_id_N is not None:
        hit_BN = candidate_id_N[positive_B, None] == candidate_id_N[None, :]
        hit_BN[rows, positive_B] = False
    if positive == "outside":
        hit_BN[rows, positive_B] = True
        lse_B = logits_BN.masked_fill(hit_BN, float("-inf")).logsumexp(1)
        # Where no negative is left, nothing is compared with.
        loss_B = torch.where(hit_BN.all(1), 0, lse_B) - plain_B
        return _weighted_mean(loss_B, weight_B)
    log_p_BN = F.log_softmax(logits_BN.masked_fill(hit_BN, float("-inf")), dim=1)
    loss_B = -log_p_BN[rows, positive_B]
    if label_smoothing:
        mean_B = log_p_BN.masked_fill(hit_BN, 0).sum(1) / (~hit_BN).sum(1)
        loss_B = (1 - label_smoothing) * loss_B - label_smoothing * mean_B
    return _weighted_mean(loss_B, weight_B)


def _weighted_mean(loss_B: Tensor, weight_B: Tensor | None) -> Tensor:
    if weight_B is None:
        return loss_B.mean()
    return (loss_B * weight_B).sum() / weight_B.sum().clamp_min(1e-12)


@triton.jit
def _tile(
    a, b, a_row, b_row, bias, query_at, a_id, b_id, scale,
    A_ROWS, B_ROWS, QUERIES_ARE_A: tl.constexpr, HAS_ID: tl.constexpr, UNCORRECTED: tl.constexpr,
):  # fmt: skip
    """Return a block of logits, which of them are positives and which count."""
    x = tl.dot(a, tl.trans(b), input_precision="tf32x3") * scale
    if QUERIES_ARE_A:
        positive = query_at[:, None] == b_row[None, :]
        bias = bias[None, :]
    else:
        positive = a_row[:, None] == query_at[None, :]
        bias = bias[:, None]
    x = x - (tl.where(positive, 0.0, bias) if UNCORRECTED else bias)
    counts = (a_row < A_ROWS)[:, None] & (b_row < B_ROWS)[None, :]
    if HAS_ID:
        counts = counts & (positive | (a_id[:, None] != b_id[None, :]))
    return x, positive, counts


@triton.jit
def _load(pointer, row, ROWS, D, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Load rows (…, D) of a contiguous matrix, zeros beyond its edges."""
    column = tl.arange(0, BLOCK_D)
    inside = (row < ROWS)[:, None] & (column < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + column[None, :]
    block = tl.load(pointer + place, mask=inside, other=0.0)
    if UPCAST:
        block = block.to(tl.float32)
    return block


@triton.jit
def _corrections(
    log_q, candidate_id, row, N, BLOCK: tl.constexpr, HAS_LOG_Q: tl.constexpr, HAS_ID: tl.constexpr
):
    """Return logQ and ids of candidates, zeros where there are none."""
    bias = tl.zeros([BLOCK], tl.float32)
    ids = tl.zeros([BLOCK], tl.int64)
    if HAS_LOG_Q:
        bias = tl.load(log_q + row, mask=row < N, other=0.0)
    if HAS_ID:
        ids = tl.load(candidate_id + row, mask=row < N, other=0)
    return bias, ids


@triton.jit
def _positives(at, candidate_id, row, B, BLOCK: tl.constexpr, HAS_ID: tl.constexpr):
    """Return the candidates that are queries' positives, and their ids, zeros without ids."""
    place = tl.load(at + row, mask=row < B, other=0)
    ids = tl.zeros([BLOCK], tl.int64)
    if HAS_ID:
        ids = tl.load(candidate_id + place, mask=row < B, other=0)
    return place, ids


@triton.jit
def _forward_kernel(
    query, candidate, scale_pointer, log_q, candidate_id, at, lse, positive, total, count,
    B, N, D, split_size,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LOG_Q: tl.constexpr,
    HAS_ID: tl.constexpr, POSITIVE: tl.constexpr, SMOOTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over one split of the candidates."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    scale = tl.load(scale_pointer)
    q = _load(query, row, B, D, BLOCK_D, UPCAST)
    nothing = tl.zeros([BLOCK_B], tl.float32)
    own_at, own_id = _positives(at, candidate_id, row, B, BLOCK_B, HAS_ID)
    highest = tl.full([BLOCK_B], -float("inf"), tl.float32)
    mass, at_positive = nothing, nothing
    summed, counted = nothing, nothing
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, N), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        c = _load(candidate, column, N, D, BLOCK_D, UPCAST)
        bias, ids = _corrections(log_q, candidate_id, column, N, BLOCK_N, HAS_LOG_Q, HAS_ID)
        x, is_positive, counts = _tile(
            q, c, row, column, bias, own_at, own_id, ids, scale, B, N, True, HAS_ID, POSITIVE != 0
        )
        at_positive += tl.sum(tl.where(is_positive & counts, x, 0.0), 1)
        if SMOOTH:
            summed += tl.sum(tl.where(counts, x, 0.0), 1)
            counted += tl.sum(counts.to(tl.float32), 1)
        if POSITIVE == 2:
            counts = counts & (is_positive == 0)
        x = tl.where(counts, x, -float("inf"))
        new = tl.maximum(highest, tl.max(x, 1))
        # Nothing has counted yet where both are -inf, whose difference is no number.
        shift = tl.where(new == -float("inf"), 0.0, new)
        mass = mass * tl.exp(highest - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        highest = new
    place = split.to(tl.int64) * B + row
    tl.store(lse + place, highest + tl.log(mass), mask=row < B)
    tl.store(positive + place, at_positive, mask=row < B)
    if SMOOTH:
        tl.store(total + place, summed, mask=row < B)
        tl.store(count + place, counted, mask=row < B)


@triton.jit
def _slope(
    x, is_positive, counts, lse, uniform, positive_share,
    POSITIVE: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """Return the derivative of a query's loss by its logits."""
    p = tl.exp(x - lse)
    if POSITIVE == 2:
        p = tl.where(is_positive, -1.0, p)
    elif SMOOTH:
        p = p - tl.where(is_positive, positive_share, 0.0) - uniform
    else:
        p = tl.where(is_positive, p - 1.0, p)
    return tl.where(counts, p, 0.0)


@triton.jit
def _query_gradient_kernel(
    query, candidate, scale_pointer, log_q, candidate_id, at, weight, lse, uniform, out, dot,
    B, N, D, positive_share, split_size,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LOG_Q: tl.constexpr,
    HAS_ID: tl.constexpr, POSITIVE: tl.constexpr, SMOOTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum slope x candidate over one split of the candidates, for a block of queries."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    scale = tl.load(scale_pointer)
    q = _load(query, row, B, D, BLOCK_D, UPCAST)
    own_at, own_id = _positives(at, candidate_id, row, B, BLOCK_B, HAS_ID)
    lse_row = tl.load(lse + row, mask=row < B, other=0.0)
    uniform_row = lse_row
    if SMOOTH:
        uniform_row = tl.load(uniform + row, mask=row < B, other=0.0)
    sums = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, N), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        c = _load(candidate, column, N, D, BLOCK_D, UPCAST)
        bias, ids = _corrections(log_q, candidate_id, column, N, BLOCK_N, HAS_LOG_Q, HAS_ID)
        x, is_positive, counts = _tile(
            q, c, row, column, bias, own_at, own_id, ids, scale, B, N, True, HAS_ID, POSITIVE == 1
        )
        p = _slope(
            x, is_positive, counts, lse_row[:, None], uniform_row[:, None], positive_share,
            POSITIVE, SMOOTH,
        )  # fmt: skip
        sums = tl.dot(p.to(c.dtype), c, sums, input_precision="tf32x3")
    # The weight comes last, in fp32: slopes alone fill the range of bf16 best.
    sums = sums * tl.load(weight + row, mask=row < B, other=0.0)[:, None]
    column_d = tl.arange(0, BLOCK_D)
    place = split.to(tl.int64) * B + row
    inside = (row < B)[:, None] & (column_d < D)[None, :]
    tl.store(out + place[:, None] * D + column_d[None, :], sums * scale, mask=inside)
    # d loss / d scale of these rows: sum_j slope_ij <q_i, c_j>.
    tl.store(dot + place, tl.sum(q.to(tl.float32) * sums, 1), mask=row < B)


@triton.jit
def _candidate_gradient_kernel(
    query, candidate, scale_pointer, log_q, candidate_id, at, weight, lse, uniform, out,
    B, N, D, positive_share, split_size,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LOG_Q: tl.constexpr,
    HAS_ID: tl.constexpr, POSITIVE: tl.constexpr, SMOOTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum slope x query over one split of the queries, for a block of candidates."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    scale = tl.load(scale_pointer)
    c = _load(candidate, row, N, D, BLOCK_D, UPCAST)
    bias, own_id = _corrections(log_q, candidate_id, row, N, BLOCK_N, HAS_LOG_Q, HAS_ID)
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, B), BLOCK_B):
        column = start + tl.arange(0, BLOCK_B)
        q = _load(query, column, B, D, BLOCK_D, UPCAST)
        query_at, ids = _positives(at, candidate_id, column, B, BLOCK_B, HAS_ID)
        lse_row = tl.load(lse + column, mask=column < B, other=0.0)
        uniform_row = lse_row
        if SMOOTH:
            uniform_row = tl.load(uniform + column, mask=column < B, other=0.0)
        w = tl.load(weight + column, mask=column < B, other=0.0)
        x, is_positive, counts = _tile(
            c, q, row, column, bias, query_at, own_id, ids, scale, N, B, False, HAS_ID,
            POSITIVE == 1,
        )  # fmt: skip
        p = _slope(
            x, is_positive, counts, lse_row[None, :], uniform_row[None, :], positive_share,
            POSITIVE, SMOOTH,
        )  # fmt: skip
        sums = tl.dot((p * w[None, :]).to(q.dtype), q, sums, input_precision="tf32x3")
    column_d = tl.arange(0, BLOCK_D)
    place = split.to(tl.int64) * N + row
    inside = (row < N)[:, None] & (column_d < D)[None, :]
    tl.store(out + place[:, None] * D + column_d[None, :], sums * scale, mask=inside)


def forward_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Return the tiles of the forward pass.

    Reasoned for Hopper (227 KB of shared memory and 64 K registers a multiprocessor): the query
    tile and `stages` candidate tiles lie in shared memory, the logits in registers. In bf16 nothing
    spills up to D = 256 (tests/kernels/test_compile.py); fp32 spills beyond D = 128.
    `benchmarks/gpu.py --sweep` measures the alternatives.
    """
    if dtype == torch.float32:
        if width <= 128:
            return Blocks(64, 64, 4 if width <= 64 else 8, 2)
        return Blocks(64, 32, 8, 1) if width <= 256 else Blocks(32, 16, 8, 1)
    if width <= 128:
        return Blocks(128, 128, 8, 3)
    return Blocks(128, 64, 8, 3) if width <= 256 else Blocks(64, 64, 8, 2)


def backward_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Return the tiles of both gradients: rows that are kept, columns that pass by."""
    if dtype == torch.float32:
        if width <= 128:
            return Blocks(64, 32, 4 if width <= 64 else 8, 2)
        return Blocks(64, 32, 8, 1) if width <= 256 else Blocks(32, 16, 8, 1)
    if width <= 128:
        return Blocks(128, 64, 8, 3)
    return Blocks(64, 64, 8, 2) if width <= 256 else Blocks(64, 32, 8, 2)


def triton_forward(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor, positive: int, smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss, each query's lse (B,) and its smoothing share of a candidate (B,)."""
    (b, d), n = query.shape, candidate.shape[0]
    tiles = forward_blocks(d, query.dtype)
    programs = triton.cdiv(b, tiles.rows)
    splits = splits_for(programs, n, tiles.columns)
    lse, own, total, count = query.new_empty(4, splits, b, dtype=torch.float32)
    _forward_kernel[(programs, splits)](
        query, candidate, scale, pointer(log_q, scale), pointer(candidate_id, scale), at.int(),
        lse, own, total, count, b, n, d, _split_size(n, splits, tiles.columns),
        BLOCK_B=tiles.rows, BLOCK_N=tiles.columns, BLOCK_D=power_of_two(d),
        HAS_LOG_Q=log_q is not None, HAS_ID=candidate_id is not None, POSITIVE=positive,
        SMOOTH=smoothing > 0, UPCAST=upcast(query.dtype), num_warps=tiles.warps,
        num_stages=tiles.stages,
    )  # fmt: skip
    lse, own = lse.logsumexp(0), own.sum(0)
    # Outside, a query may have no negative left: nothing is compared with.
    lse = lse.masked_fill(lse == -float("inf"), 0)
    uniform = torch.zeros_like(lse)
    loss = lse - (1 - smoothing) * own
    if smoothing > 0:
        uniform = smoothing / count.sum(0)
        loss = loss - uniform * total.sum(0)
    return (loss * weight).sum(), lse, uniform


def triton_backward(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor, lse: Tensor, uniform: Tensor,
    positive: int, smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries (B, D), candidates (N, D) and the scale."""
    (b, d), n = query.shape, candidate.shape[0]
    tiles = backward_blocks(d, query.dtype)
    shared = (query, candidate, scale, pointer(log_q, scale), pointer(candidate_id, scale),
              at.int(), weight, lse, uniform)  # fmt: skip
    options = {
        "BLOCK_D": power_of_two(d), "HAS_LOG_Q": log_q is not None,
        "HAS_ID": candidate_id is not None, "POSITIVE": positive, "SMOOTH": smoothing > 0,
        "UPCAST": upcast(query.dtype),
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    programs = triton.cdiv(b, tiles.rows)
    splits = splits_for(programs, n, tiles.columns)
    of_query = query.new_empty(splits, b, d, dtype=torch.float32)
    dot = query.new_empty(splits, b, dtype=torch.float32)
    _query_gradient_kernel[(programs, splits)](
        *shared, of_query, dot, b, n, d, 1 - smoothing,
        _split_size(n, splits, tiles.columns),
        BLOCK_B=tiles.rows, BLOCK_N=tiles.columns, **options,
    )  # fmt: skip
    programs = triton.cdiv(n, tiles.rows)
    splits = splits_for(programs, b, tiles.columns)
    of_candidate = candidate.new_empty(splits, n, d, dtype=torch.float32)
    _candidate_gradient_kernel[(programs, splits)](
        *shared, of_candidate, b, n, d, 1 - smoothing,
        _split_size(b, splits, tiles.columns),
        BLOCK_B=tiles.columns, BLOCK_N=tiles.rows, **options,
    )  # fmt: skip
    return (
        _summed(of_query).to(query.dtype), _summed(of_candidate).to(candidate.dtype), dot.sum()
    )  # fmt: skip


def _split_size(length: int, splits: int, block: int) -> int:
    """Return the length of a split: whole blocks."""
    return int(triton.cdiv(triton.cdiv(length, splits), block)) * block


def _summed(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def cpu_forward(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor, positive: int, smoothing: float,
    with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss and, if asked for, the gradients of queries, candidates and the scale."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries, candidates, by = query.to(wide), candidate.to(wide), float(scale)
    if not 0 < by < float("inf"):
        # Reading it would make a GPU wait: there, the loss is NaN.
        raise ValueError(f"temperature must be > 0 and finite, got {1 / by if by else by}")
    low, high = (int(bound) for bound in at.aminmax())
    if low < 0 or high >= len(candidates):
        raise ValueError(f"positive_B must be rows < {len(candidates)}, got {low} to {high}")
    transposed = candidates.T.contiguous()
    bias = -log_q.to(wide) if log_q is not None else candidates.new_zeros(())
    n = candidates.shape[0]
    loss = candidates.new_zeros(())
    of_query = torch.empty_like(queries) if with_gradients else queries.new_empty(0)
    of_candidate = torch.zeros_like(candidates) if with_gradients else queries.new_empty(0)
    block = max(16, BLOCK_BYTES // (n * queries.element_size()))
    for start in range(0, len(queries), block):
        rows = slice(start, min(start + block, len(queries)))
        place, own = torch.arange(rows.stop - rows.start), at[rows]
        x = torch.addmm(bias, queries[rows], transposed, alpha=by)
        if positive and log_q is not None:
            x[place, own] -= bias[own]
        at_positive, hit = x[place, own], None
        uniform = x.new_full((len(x),), smoothing / n)
        if candidate_id is not None:
            hit = candidate_id[own, None] == candidate_id[None, :]
            hit[place, own] = positive == OUTSIDE
            x.masked_fill_(hit, float("-inf"))
        elif positive == OUTSIDE:
            x[place, own] = float("-inf")
        if smoothing > 0:
            if hit is not None:
                uniform = smoothing / (n - hit.sum(1)).to(wide)
            total = (x if hit is None else x.masked_fill(hit, 0)).sum(1)
        highest = x.amax(1)
        if positive == OUTSIDE:
            # A query may have no negative left: nothing is compared with.
            none = highest == float("-inf")
            highest.masked_fill_(none, 0)
        mass = x.sub_(highest[:, None]).exp_().sum(1)
        if positive == OUTSIDE:
            mass.masked_fill_(none, 1)
        loss_rows = highest + mass.log() - (1 - smoothing) * at_positive
        if smoothing > 0:
            loss_rows -= uniform * total
        w = weight[rows].to(wide)
        loss += (loss_rows * w).sum()
        if not with_gradients:
            continue
        # From here on x is the slope of the loss by its logits.
        x.mul_((w / mass)[:, None])
        x[place, own] -= (1 - smoothing) * w
        if smoothing > 0:
            x.sub_((uniform * w)[:, None])
            if hit is not None:
                x.masked_fill_(hit, 0)
        torch.mm(x, candidates, out=of_query[rows])
        of_candidate.addmm_(x.T, queries[rows])
    of_scale = (queries * of_query).sum() if with_gradients else query.new_empty(0)
    return (
        loss, of_query.mul_(by).to(query.dtype), of_candidate.mul_(by).to(query.dtype), of_scale
    )  # fmt: skip


Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("twotower::sampled_softmax", mutates_args=())
def _forward(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor, positive: int, smoothing: float,
    with_gradients: bool,
) -> Forward:  # fmt: skip
    """Return loss, lse, uniform and, on a CPU, the three gradients; the rest is empty."""
    inputs = (query, candidate, scale, log_q, candidate_id, weight, at, positive, smoothing)
    none = query.new_empty(0)
    with torch.autocast(query.device.type, enabled=False):
        if runs_triton(query.device):
            loss, lse, uniform = triton_forward(*inputs)
            return loss, lse, uniform, none, none.clone(), none.clone()
        loss, *of = cpu_forward(*inputs, with_gradients)
        return loss, none, none.clone(), of[0], of[1], of[2]


@_forward.register_fake
def _forward_fake(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor, positive: int, smoothing: float,
    with_gradients: bool,
) -> Forward:  # fmt: skip
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    on_triton = runs_triton(query.device)
    rows = query.shape[0] if on_triton else 0
    of = not on_triton and with_gradients
    return (
        query.new_empty((), dtype=wide),
        query.new_empty(rows, dtype=wide if on_triton else query.dtype),
        query.new_empty(rows, dtype=wide if on_triton else query.dtype),
        torch.empty_like(query) if of else query.new_empty(0),
        torch.empty_like(candidate) if of else query.new_empty(0),
        query.new_empty((), dtype=wide) if of else query.new_empty(0),
    )


@torch.library.custom_op("twotower::sampled_softmax_backward", mutates_args=())
def _backward(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor, lse: Tensor, uniform: Tensor,
    positive: int, smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the logits again and return the three gradients."""
    with torch.autocast(query.device.type, enabled=False):
        return triton_backward(
            query, candidate, scale, log_q, candidate_id, weight, at, lse, uniform, positive,
            smoothing,
        )  # fmt: skip


@_backward.register_fake
def _backward_fake(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor, lse: Tensor, uniform: Tensor,
    positive: int, smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(candidate), lse.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    query, candidate, scale, log_q, candidate_id, weight, at, positive, smoothing, _ = inputs
    _, lse, uniform, *gradients = output
    ctx.positive, ctx.smoothing = positive, smoothing
    ctx.ready = not runs_triton(query.device)
    if ctx.ready:
        ctx.save_for_backward(*gradients, scale)
    else:
        ctx.save_for_backward(
            query, candidate, scale, log_q, candidate_id, weight, at, lse, uniform
        )  # fmt: skip


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.ready:
        *gradients, scale = ctx.saved_tensors
        of_query, of_candidate, of_scale = (g * grad.to(g.dtype) for g in gradients)
    else:
        *tensors, weight, at, lse, uniform = ctx.saved_tensors
        scale = tensors[2]
        of_query, of_candidate, of_scale = _backward(
            *tensors, weight * grad, at, lse, uniform, ctx.positive, ctx.smoothing
        )
    return of_query, of_candidate, of_scale.to(scale.dtype), *[None] * 7


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def sampled_softmax(
    query_BD: Tensor,
    candidate_ND: Tensor,
    temperature: Tensor,
    *,
    log_q_N: Tensor | None = None,
    candidate_id_N: Tensor | None = None,
    weight_B: Tensor | None = None,
    positive_B: Tensor | None = None,
    positive: str = "corrected",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the weighted mean loss, a scalar.

    Differentiable, once, by queries, candidates and the temperature. fp32 and bf16 are summed in
    fp32, fp64 (on a CPU) in fp64.

    Args:
        query_BD: query vectors, fp32 or bf16; fp64 on a CPU.
        candidate_ND: positives of the queries and any other candidates, of the same type.
        temperature: scalar > 0; its gradient is computed too.
        log_q_N: log of each candidate's sampling probability, up to a constant where the positive
            is corrected; else of how often it is expected among the candidates.
        candidate_id_N: int64; candidates of equal id are accidental hits of each other.
        weight_B: sample weights, 1 by default; they get no gradient.
        positive_B: int64 candidate row of each query's positive; 0 to B - 1 by default.
        positive: corrected, uncorrected or outside: its own term in the sum, see above.
        label_smoothing: share of the target that is spread over all candidates that count.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _validate(
        query_BD, candidate_ND, temperature, log_q_N, candidate_id_N, weight_B, positive_B,
        positive, label_smoothing,
    )  # fmt: skip
    b = query_BD.shape[0]
    if positive_B is None:
        positive_B = torch.arange(b, device=query_BD.device)
    if weight_B is None:
        weight_B = query_BD.new_full((b,), 1 / b, dtype=torch.float32)
    else:
        weight_B = weight_B.detach().float()
        weight_B = weight_B / weight_B.sum().clamp_min(1e-12)
    wide = torch.float64 if query_BD.dtype == torch.float64 else torch.float32
    with_gradients = torch.is_grad_enabled() and any(
        t.requires_grad for t in (query_BD, candidate_ND, temperature)
    )
    loss: Tensor = _forward(
        query_BD.contiguous(),
        candidate_ND.contiguous(),
        temperature.to(wide).reciprocal(),
        log_q_N.detach().to(wide).contiguous() if log_q_N is not None else None,
        candidate_id_N.contiguous() if candidate_id_N is not None else None,
        weight_B,
        positive_B.contiguous(),
        POSITIVES.index(positive),
        label_smoothing,
        with_gradients,
    )[0]
    return loss


def _validate(
    query_BD: Tensor,
    candidate_ND: Tensor,
    temperature: Tensor,
    log_q_N: Tensor | None,
    candidate_id_N: Tensor | None,
    weight_B: Tensor | None,
    positive_B: Tensor | None,
    positive: str,
    label_smoothing: float,
) -> None:
    check_matrices("query", query_BD, "candidate", candidate_ND)
    b, n = query_BD.shape[0], candidate_ND.shape[0]
    allowed = [torch.float32, torch.bfloat16]
    if not runs_triton(query_BD.device):
        allowed.append(torch.float64)
    if query_BD.dtype not in allowed or candidate_ND.dtype != query_BD.dtype:
        raise ValueError(
            f"query and candidate must both be one of {', '.join(str(t) for t in allowed)}, got "
            f"{query_BD.dtype} and {candidate_ND.dtype}"
        )
    if temperature.numel() != 1:
        raise ValueError(f"temperature must be a scalar, got shape {tuple(temperature.shape)}")
    if positive_B is None and b > n:
        raise ValueError(f"without positive_B, queries ({b}) must be <= candidates ({n})")
    if positive not in POSITIVES:
        raise ValueError(f"positive must be one of {', '.join(POSITIVES)}, got '{positive}'")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing and positive == "outside":
        raise ValueError("label_smoothing must be 0 where the positive is outside")
    for name, value, size in (
        ("log_q", log_q_N, n), ("candidate_id", candidate_id_N, n), ("weight", weight_B, b),
        ("positive_B", positive_B, b),
    ):  # fmt: skip
        if value is not None and value.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(value.shape)}")
    for name, value in (("candidate_id", candidate_id_N), ("positive_B", positive_B)):
        if value is not None and value.dtype != torch.int64:
            raise ValueError(f"{name} must be int64, got {value.dtype}")
    others = {
        "candidate": candidate_ND, "temperature": temperature, "log_q": log_q_N,
        "candidate_id": candidate_id_N, "weight": weight_B, "positive_B": positive_B,
    }  # fmt: skip
    for name, value in others.items():
        if value is not None and value.device != query_BD.device:
            raise ValueError(
                f"{name} must be on the queries' device {query_BD.device}, got {value.device}"
            )
