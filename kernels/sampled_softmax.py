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

A query may exclude candidates, for instance what its user has taken before: they count as hits do.
A bit says so of each, 32 in a word, so that the words are 1/32 of what the logits would be.

Blocks of the logits are computed, used and forgotten, as flash attention does (Dao et al. 2022).

On a GPU: forward 2 B N D operations, backward 8 B N D: the logits are computed again for the
queries' gradient and for the candidates', each followed by its product. Every sum has a fixed
order, so results repeat to the bit. Memory is O((B + N) D), traffic O(B N D / block). At D = 128 a
logit costs the tensor cores as long as some ten plain operations cost the others, so the loops hold
as few as there can be: logits are in base 2; a positive has its own id and so is no negative of its
query, whatever becomes of it is added behind the loop, once a query; nothing is compared with the
edges, beyond which logQ is infinite.

fp32 products run on tensor cores as three TF32 ones, which leaves their error near that of fp32
(Ootomo and Yokota 2022); an FMA loop would spill its registers.

On a CPU a block holds whole rows, so its softmax is known at once: the gradients are computed in
the forward pass, 6 B N D operations in all, and backward only scales them.

Shape legend: `B` queries, `N` candidates, `D` width, `S` splits of the candidates, `W` words of
exclusions, at least N / 32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.exclusions import unpacked
from twotower.kernels.launch import (
    Blocks,
    check_matrices,
    operator,
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
# The loss, and what the backward pass needs: on a GPU what its kernels read, on a CPU the three
# gradients and two tensors of nothing. A list would cost each call 0.15 ms of walking.
Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
LOG2_E = tl.constexpr(1.4426950408889634)
LARGEST_TILE = 128
# Numbers of a tile of vectors in the kernel that joins the splits.
FINISHED = 4096


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
    exclude_BW: Tensor | None = None,
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
    if exclude_BW is not None:
        hit_BN = hit_BN | unpacked(exclude_BW, candidate_ND.shape[0])
    hit_BN[rows, positive_B] = hit_BN.new_zeros(())
    if positive == "outside":
        hit_BN[rows, positive_B] = hit_BN.new_ones(())
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
def _candidates(lowered, candidate_id, row, N, HAS_ID: tl.constexpr):
    """Return what candidates' logits are lowered by, in base 2, and their ids.

    Beyond the last candidate it is infinite: nothing there ever counts. Without ids, a candidate's
    is its row.
    """
    ids = row
    if HAS_ID:
        ids = tl.load(candidate_id + row, mask=row < N, other=0)
    return tl.load(lowered + row), ids


@triton.jit
def _positives(at, candidate_id, row, B, DIAGONAL: tl.constexpr, HAS_ID: tl.constexpr):
    """Return the candidates that are queries' positives, and their ids."""
    place = row
    if not DIAGONAL:
        place = tl.load(at + row, mask=row < B, other=0)
    ids = place
    if HAS_ID:
        ids = tl.load(candidate_id + place, mask=row < B, other=0)
    return place, ids


@triton.jit
def _counts(
    exclude, query_row, first, B, WORDS,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, QUERIES_FIRST: tl.constexpr,
):  # fmt: skip
    """Return which of BLOCK_N candidates from `first` on queries do not exclude.

    That is (BLOCK_B, BLOCK_N) or, turned, (BLOCK_N, BLOCK_B). A word is loaded once for its 32
    candidates.
    """
    place = query_row.to(tl.int64) * WORDS + first // 32
    word = tl.arange(0, BLOCK_N // 32)
    bit = 1 << tl.arange(0, 32)
    inside = word < WORDS - first // 32
    if QUERIES_FIRST:
        words = tl.load(
            exclude + place[:, None] + word[None, :],
            mask=(query_row < B)[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        excluded = tl.reshape(words[:, :, None] & bit[None, None, :], [BLOCK_B, BLOCK_N])
    else:
        words = tl.load(
            exclude + place[None, :] + word[:, None],
            mask=(query_row < B)[None, :] & inside[:, None], other=0,
        )  # fmt: skip
        excluded = tl.reshape(words[:, None, :] & bit[None, :, None], [BLOCK_N, BLOCK_B])
    return excluded == 0


@triton.jit
def _forward_kernel(
    query, candidate, scale_pointer, lowered, candidate_id, at, exclude, lse, total, count,
    B, N, D, WORDS, split_size,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ID: tl.constexpr,
    DIAGONAL: tl.constexpr, EXCLUDE: tl.constexpr, SMOOTH: tl.constexpr, UPCAST: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries' negatives in one split of the candidates, in base 2."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    scale = tl.load(scale_pointer) * LOG2_E
    q = _load(query, row, B, D, BLOCK_D, UPCAST)
    _, own_id = _positives(at, candidate_id, row, B, DIAGONAL, HAS_ID)
    highest = tl.full([BLOCK_B], -float("inf"), tl.float32)
    mass = tl.zeros([BLOCK_B], tl.float32)
    summed, counted = mass, mass
    first = split * split_size
    # Named here, the stages are also those of the loads that no product takes.
    for start in tl.range(first, tl.minimum(first + split_size, N), BLOCK_N, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_N)
        c = _load(candidate, column, N, D, BLOCK_D, UPCAST)
        lower, ids = _candidates(lowered, candidate_id, column, N, HAS_ID)
        x = tl.dot(q, tl.trans(c), input_precision="tf32x3") * scale - lower[None, :]
        negative = own_id[:, None] != ids[None, :]
        if EXCLUDE:
            negative &= _counts(exclude, row, start, B, WORDS, BLOCK_B, BLOCK_N, True)
        if SMOOTH:
            counts = negative & (column < N)[None, :]
            summed += tl.sum(tl.where(counts, x, 0.0), 1)
            counted += tl.sum(counts.to(tl.float32), 1)
        x = tl.where(negative, x, -float("inf"))
        new = tl.maximum(highest, tl.max(x, 1))
        # Nothing has counted yet where both are -inf, whose difference is no number.
        shift = tl.where(new == -float("inf"), 0.0, new)
        mass = mass * tl.exp2(highest - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
        highest = new
    place = split.to(tl.int64) * B + row
    tl.store(lse + place, highest + tl.log2(mass), mask=row < B)
    if SMOOTH:
        tl.store(total + place, summed, mask=row < B)
        tl.store(count + place, counted, mask=row < B)


@triton.jit
def _finish_kernel(
    query, candidate, scale_pointer, lowered, at, weight, of_split, total, count,
    loss, lse, weighted_lse, slope, uniform, B, N, D, smoothing,
    SPLITS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    DIAGONAL: tl.constexpr, CORRECTED: tl.constexpr, OUTSIDE: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """Join the splits and the positive: each query's loss, lse, slope at its positive, uniform."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    place, _ = _positives(at, at, row, B, DIAGONAL, False)
    q = _load(query, row, B, D, BLOCK_D, True)
    c = _load(candidate, place, N, D, BLOCK_D, True)
    own = tl.sum(q * c, 1) * tl.load(scale_pointer) * LOG2_E
    if CORRECTED:
        own -= tl.load(lowered + place, mask=row < B, other=0.0)
    highest = tl.full([BLOCK_B], -float("inf"), tl.float32)
    for split in range(SPLITS):
        part = tl.load(of_split + split * B + row, mask=row < B, other=0.0)
        highest = tl.maximum(highest, part)
    if not OUTSIDE:
        highest = tl.maximum(highest, own)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    mass = tl.zeros([BLOCK_B], tl.float32)
    if not OUTSIDE:
        mass = tl.exp2(own - highest)
    summed, counted = own, tl.full([BLOCK_B], 1.0, tl.float32)
    for split in range(SPLITS):
        part = tl.load(of_split + split * B + row, mask=row < B, other=0.0)
        mass += tl.exp2(part - highest)
        if SMOOTH:
            summed += tl.load(total + split * B + row, mask=row < B, other=0.0)
            counted += tl.load(count + split * B + row, mask=row < B, other=0.0)
    # Outside, a query may have no negative left: nothing is compared with.
    all_lse = tl.where(mass == 0, 0.0, highest + tl.log2(mass))
    share, rest = smoothing / counted, 1.0 - smoothing
    value = all_lse - rest * own
    if SMOOTH:
        value -= share * summed
    at_positive = tl.full([BLOCK_B], -1.0, tl.float32)
    if not OUTSIDE:
        at_positive = tl.exp2(own - all_lse) - rest
        if SMOOTH:
            at_positive -= share
    w = tl.load(weight + row, mask=row < B, other=0.0)
    tl.store(loss + row, tl.where(w > 0, value * w / LOG2_E, 0.0), mask=row < B)
    # Beyond the last query both are infinite: no slope there is other than 0.
    all_lse = tl.where(row < B, all_lse, float("inf"))
    tl.store(lse + row, all_lse)
    tl.store(weighted_lse + row, all_lse - tl.log2(w))
    tl.store(slope + row, at_positive, mask=row < B)
    if SMOOTH:
        tl.store(uniform + row, share, mask=row < B)


@triton.jit
def _query_gradient_kernel(
    query, candidate, scale_pointer, grad_pointer, lowered, candidate_id, at, exclude, weight,
    lse, slope, uniform, out, dot,
    B, N, D, WORDS, split_size,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ID: tl.constexpr,
    DIAGONAL: tl.constexpr, EXCLUDE: tl.constexpr, SMOOTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum slope x candidate over one split of the candidates, for a block of queries."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    split = tl.program_id(1)
    plain = tl.load(scale_pointer)
    scale = plain * LOG2_E
    q = _load(query, row, B, D, BLOCK_D, UPCAST)
    own_at, own_id = _positives(at, candidate_id, row, B, DIAGONAL, HAS_ID)
    lse_row = tl.load(lse + row)
    uniform_row = lse_row
    if SMOOTH:
        uniform_row = tl.load(uniform + row, mask=row < B, other=0.0)
    first_split = row < tl.where(split == 0, B, 0)
    sums = tl.load(slope + row, mask=first_split, other=0.0)[:, None] * _load(
        candidate, own_at, tl.where(split == 0, N, 0), D, BLOCK_D, True
    )
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, N), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        c = _load(candidate, column, N, D, BLOCK_D, UPCAST)
        lower, ids = _candidates(lowered, candidate_id, column, N, HAS_ID)
        x = tl.dot(q, tl.trans(c), input_precision="tf32x3") * scale - lower[None, :]
        negative = own_id[:, None] != ids[None, :]
        if EXCLUDE:
            negative &= _counts(exclude, row, start, B, WORDS, BLOCK_B, BLOCK_N, True)
        x = tl.where(negative, x, -float("inf"))
        p = tl.exp2(x - lse_row[:, None])
        if SMOOTH:
            p = tl.where(x == -float("inf"), 0.0, p - uniform_row[:, None])
        sums = tl.dot(p.to(c.dtype), c, sums, input_precision="tf32x3")
    # The weight comes last, in fp32: slopes alone fill the range of bf16 best.
    factor = tl.load(weight + row, mask=row < B, other=0.0) * tl.load(grad_pointer)
    sums = sums * factor[:, None]
    column_d = tl.arange(0, BLOCK_D)
    place = split.to(tl.int64) * B + row
    inside = (row < B)[:, None] & (column_d < D)[None, :]
    tl.store(out + place[:, None] * D + column_d[None, :], sums * plain, mask=inside)
    # d loss / d scale of these rows: sum_j slope_ij <q_i, c_j>.
    tl.store(dot + place, tl.sum(q.to(tl.float32) * sums, 1), mask=row < B)


@triton.jit
def _candidate_gradient_kernel(
    query, candidate, scale_pointer, grad_pointer, lowered, candidate_id, at, exclude, weight,
    lse, slope, uniform, out,
    B, N, D, WORDS, split_size,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_ID: tl.constexpr,
    DIAGONAL: tl.constexpr, EXCLUDE: tl.constexpr, SMOOTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum weight x slope x query over one split of the queries, for a block of candidates.

    `lse` holds the weights: exp2(x - lse) is the weighted slope of a negative.

    Where positives do not lie on the diagonal, theirs are added behind, by `triton_backward`.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    plain = tl.load(scale_pointer)
    scale = plain * LOG2_E
    c = _load(candidate, row, N, D, BLOCK_D, UPCAST)
    lower, own_id = _candidates(lowered, candidate_id, row, N, HAS_ID)
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if DIAGONAL:
        rows = tl.where(split == 0, B, 0)
        at_positive = tl.load(slope + row, mask=row < rows, other=0.0)
        at_positive *= tl.load(weight + row, mask=row < rows, other=0.0)
        sums = at_positive[:, None] * _load(query, row, rows, D, BLOCK_D, True)
    first = split * split_size
    for start in range(first, tl.minimum(first + split_size, B), BLOCK_B):
        column = start + tl.arange(0, BLOCK_B)
        q = _load(query, column, B, D, BLOCK_D, UPCAST)
        _, ids = _positives(at, candidate_id, column, B, DIAGONAL, HAS_ID)
        lse_row = tl.load(lse + column)
        x = tl.dot(c, tl.trans(q), input_precision="tf32x3") * scale - lower[:, None]
        negative = own_id[:, None] != ids[None, :]
        if EXCLUDE:
            first_row = tl.program_id(0) * BLOCK_N
            negative &= _counts(exclude, column, first_row, B, WORDS, BLOCK_B, BLOCK_N, False)
        x = tl.where(negative, x, -float("inf"))
        p = tl.exp2(x - lse_row[None, :])
        if SMOOTH:
            w = tl.load(weight + column, mask=column < B, other=0.0)
            share = w * tl.load(uniform + column, mask=column < B, other=0.0)
            p = tl.where(x == -float("inf"), 0.0, p - share[None, :])
        sums = tl.dot(p.to(q.dtype), q, sums, input_precision="tf32x3")
    column_d = tl.arange(0, BLOCK_D)
    place = split.to(tl.int64) * N + row
    inside = (row < N)[:, None] & (column_d < D)[None, :]
    factor = plain * tl.load(grad_pointer)
    tl.store(out + place[:, None] * D + column_d[None, :], sums * factor, mask=inside)


def forward_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Return the tiles of the forward pass.

    In bf16 up to D = 128 the fastest of 24 on an H200 (`benchmarks/gpu.py --sweep`): a warp of
    two rows' worth of tile reads each candidate's numbers half as often. Wider ones and fp32 are
    reasoned: the query tile and `stages` candidate tiles lie in Hopper's 227 KB of shared memory,
    the logits in registers. What spills is small in bf16 up to D = 256, and counted
    (tests/kernels/test_compile.py); fp32 spills beyond D = 128.
    """
    if dtype == torch.float32:
        if width <= 128:
            return Blocks(64, 64, 4 if width <= 64 else 8, 2)
        return Blocks(64, 32, 8, 1) if width <= 256 else Blocks(32, 16, 8, 1)
    if width <= 128:
        return Blocks(128, 64, 4, 3) if width <= 64 else Blocks(128, 128, 4, 2)
    return Blocks(128, 64, 8, 3) if width <= 256 else Blocks(64, 64, 8, 2)


def backward_blocks(width: int, dtype: torch.dtype) -> Blocks:
    """Return the tiles of both gradients: rows that are kept, columns that pass by."""
    if dtype == torch.float32:
        if width <= 128:
            return Blocks(64, 32, 4 if width <= 64 else 8, 2)
        return Blocks(64, 32, 8, 1) if width <= 256 else Blocks(32, 16, 8, 1)
    if width <= 128:
        return Blocks(64, 128, 4, 3 if width <= 64 else 2)
    return Blocks(64, 64, 8, 2) if width <= 256 else Blocks(64, 32, 8, 2)


def with_exclusions(tiles: Blocks) -> Blocks:
    """Return tiles that hold whole words of exclusions."""
    return replace(tiles, columns=max(32, tiles.columns))


def triton_forward(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor | None, exclude: Tensor | None,
    positive: int, smoothing: float,
) -> Forward:  # fmt: skip
    """Return the loss and what the backward pass needs beside the inputs.

    That is, in base 2, what each candidate's logits are lowered by, and each query's lse without
    and with its weight, all three up to whole tiles; and its slope at the positive and `uniform`.
    """
    (b, d), n = query.shape, candidate.shape[0]
    tiles = forward_blocks(d, query.dtype)
    if exclude is not None:
        tiles = with_exclusions(tiles)
    lowered = query.new_full((_whole_tiles(n),), float("inf"), dtype=torch.float32)
    lowered[:n] = 0 if log_q is None else log_q * LOG2_E.value
    programs = triton.cdiv(b, tiles.rows)
    splits = splits_for(programs, n, tiles.columns)
    of_split, total, count = query.new_empty(3, splits, b, dtype=torch.float32)
    options = {"BLOCK_D": power_of_two(d), "DIAGONAL": at is None, "SMOOTH": smoothing > 0}
    _forward_kernel[(programs, splits)](
        query, candidate, scale, lowered, pointer(candidate_id, scale), pointer(at, scale),
        pointer(exclude, scale), of_split, total, count, b, n, d, _words(exclude),
        _split_size(n, splits, tiles.columns),
        BLOCK_B=tiles.rows, BLOCK_N=tiles.columns, HAS_ID=candidate_id is not None,
        EXCLUDE=exclude is not None, UPCAST=upcast(query.dtype), STAGES=tiles.stages,
        num_warps=tiles.warps, num_stages=tiles.stages, **options,
    )  # fmt: skip
    loss, slope, uniform = (query.new_empty(b, dtype=torch.float32) for _ in range(3))
    lse, weighted_lse = (query.new_empty(_whole_tiles(b), dtype=torch.float32) for _ in range(2))
    rows = min(LARGEST_TILE, max(1, FINISHED // power_of_two(d)))
    _finish_kernel[(len(lse) // rows,)](
        query, candidate, scale, lowered, pointer(at, scale), weight, of_split, total, count,
        loss, lse, weighted_lse, slope, uniform, b, n, d, smoothing, SPLITS=splits, BLOCK_B=rows,
        CORRECTED=POSITIVES[positive] == "corrected", OUTSIDE=positive == OUTSIDE, **options,
    )  # fmt: skip
    return loss.sum(), lowered, lse, weighted_lse, slope, uniform


def triton_backward(
    query: Tensor, candidate: Tensor, scale: Tensor, grad: Tensor, candidate_id: Tensor | None,
    weight: Tensor, at: Tensor | None, exclude: Tensor | None, kept: list[Tensor],
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of queries (B, D), candidates (N, D) and the scale.

    `grad` is that of the loss; `kept` is what the forward pass returned.
    """
    (b, d), n = query.shape, candidate.shape[0]
    lowered, lse, weighted_lse, slope, uniform = kept
    tiles = backward_blocks(d, query.dtype)
    if exclude is not None:
        tiles = with_exclusions(tiles)
    shared = (query, candidate, scale, grad, lowered, pointer(candidate_id, scale),
              pointer(at, scale), pointer(exclude, scale), weight)  # fmt: skip
    options = {
        "BLOCK_D": power_of_two(d), "HAS_ID": candidate_id is not None, "DIAGONAL": at is None,
        "EXCLUDE": exclude is not None, "SMOOTH": smoothing > 0,
        "UPCAST": upcast(query.dtype), "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    programs = triton.cdiv(b, tiles.rows)
    splits = splits_for(programs, n, tiles.columns)
    of_query = query.new_empty(splits, b, d, dtype=torch.float32)
    dot = query.new_empty(splits, b, dtype=torch.float32)
    _query_gradient_kernel[(programs, splits)](
        *shared, lse, slope, uniform, of_query, dot, b, n, d, _words(exclude),
        _split_size(n, splits, tiles.columns),
        BLOCK_B=tiles.rows, BLOCK_N=tiles.columns, **options,
    )  # fmt: skip
    programs = triton.cdiv(n, tiles.rows)
    splits = splits_for(programs, b, tiles.columns)
    of_candidate = candidate.new_empty(splits, n, d, dtype=torch.float32)
    _candidate_gradient_kernel[(programs, splits)](
        *shared, weighted_lse, slope, uniform, of_candidate, b, n, d, _words(exclude),
        _split_size(b, splits, tiles.columns),
        BLOCK_B=tiles.columns, BLOCK_N=tiles.rows, **options,
    )  # fmt: skip
    of_candidate = _summed(of_candidate)
    if at is not None:
        of_positive = query.float() * (slope * weight * scale * grad)[:, None]
        # Of one order, unlike index_add_: results repeat to the bit.
        of_candidate.index_put_((at,), of_positive, accumulate=True)
    return _summed(of_query).to(query.dtype), of_candidate.to(candidate.dtype), dot.sum()


def _whole_tiles(length: int) -> int:
    """Return the length up to whole tiles of the largest kind."""
    return int(triton.cdiv(length, LARGEST_TILE)) * LARGEST_TILE


def _split_size(length: int, splits: int, block: int) -> int:
    """Return the length of a split: whole blocks."""
    return int(triton.cdiv(triton.cdiv(length, splits), block)) * block


def _words(exclude: Tensor | None) -> int:
    """Return the number of words a query."""
    return 0 if exclude is None else exclude.shape[1]


def _summed(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def cpu_forward(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor | None, exclude: Tensor | None,
    positive: int, smoothing: float, with_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the loss and, if asked for, the gradients of queries, candidates and the scale."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    queries, candidates, by = query.to(wide), candidate.to(wide), float(scale)
    if not 0 < by < float("inf"):
        # Reading it would make a GPU wait: there, the loss is NaN.
        raise ValueError(f"temperature must be > 0 and finite, got {1 / by if by else by}")
    at = torch.arange(len(queries)) if at is None else at
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
        if exclude is not None:
            excluded = unpacked(exclude[rows], n)
            hit = excluded if hit is None else hit.logical_or_(excluded)
        if hit is not None:
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


def _forward_now(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor | None, exclude: Tensor | None,
    positive: int, smoothing: float, with_gradients: bool,
) -> Forward:  # fmt: skip
    """Return the loss and what is kept."""
    inputs = (
        query, candidate, scale, log_q, candidate_id, weight, at, exclude, positive, smoothing
    )  # fmt: skip
    with torch.autocast(query.device.type, enabled=False):
        if runs_triton(query.device):
            return triton_forward(*inputs)
        kept = cpu_forward(*inputs, with_gradients)
        return *kept, query.new_empty(0), query.new_empty(0)


def _forward_fake(
    query: Tensor, candidate: Tensor, scale: Tensor, log_q: Tensor | None,
    candidate_id: Tensor | None, weight: Tensor, at: Tensor | None, exclude: Tensor | None,
    positive: int, smoothing: float, with_gradients: bool,
) -> Forward:  # fmt: skip
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    b, n = query.shape[0], candidate.shape[0]
    loss = query.new_empty((), dtype=wide)
    if runs_triton(query.device):
        lowered, lse, weighted_lse, slope, uniform = (
            query.new_empty(length, dtype=wide)
            for length in (_whole_tiles(n), _whole_tiles(b), _whole_tiles(b), b, b)
        )
        return loss, lowered, lse, weighted_lse, slope, uniform
    of_query, of_candidate, of_scale, *none = (query.new_empty(0) for _ in range(5))
    if with_gradients:
        of_query, of_candidate = torch.empty_like(query), torch.empty_like(candidate)
        of_scale = query.new_empty((), dtype=wide)
    return loss, of_query, of_candidate, of_scale, none[0], none[1]


_forward = operator("sampled_softmax", _forward_now, _forward_fake)


def _backward_now(
    query: Tensor, candidate: Tensor, scale: Tensor, grad: Tensor, candidate_id: Tensor | None,
    weight: Tensor, at: Tensor | None, exclude: Tensor | None, kept: list[Tensor],
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the logits again, or scale what the CPU has kept; return the three gradients."""
    if not runs_triton(query.device):
        of_query, of_candidate, of_scale = (g * grad.to(g.dtype) for g in kept[:3])
        return of_query, of_candidate, of_scale
    with torch.autocast(query.device.type, enabled=False):
        return triton_backward(
            query, candidate, scale, grad, candidate_id, weight, at, exclude, kept, smoothing
        )


def _backward_fake(
    query: Tensor, candidate: Tensor, scale: Tensor, grad: Tensor, candidate_id: Tensor | None,
    weight: Tensor, at: Tensor | None, exclude: Tensor | None, kept: list[Tensor],
    smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    of_scale = query.new_empty((), dtype=wide)
    return torch.empty_like(query), torch.empty_like(candidate), of_scale


_backward = operator("sampled_softmax_backward", _backward_now, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    query, candidate, scale, _, candidate_id, weight, at, exclude, _, smoothing, _ = inputs
    ctx.set_materialize_grads(False)  # of what is kept there are none
    ctx.smoothing = smoothing
    ctx.save_for_backward(query, candidate, scale, candidate_id, weight, at, exclude, *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    query, candidate, scale, candidate_id, weight, at, exclude, *kept = ctx.saved_tensors
    of_query, of_candidate, of_scale = _backward(
        query, candidate, scale, grad.to(scale.dtype), candidate_id, weight, at, exclude, kept,
        ctx.smoothing,
    )  # fmt: skip
    return of_query, of_candidate, of_scale.to(scale.dtype), *[None] * 8


torch.library.register_autograd(_forward, _differentiate, setup_context=_setup_context)


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
    exclude_BW: Tensor | None = None,
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
        candidate_id_N: int64 or, which takes a GPU half the comparing, int32; candidates of equal
            id are accidental hits of each other.
        weight_B: sample weights, 1 by default; they get no gradient.
        positive_B: int64 candidate row of each query's positive; 0 to B - 1 by default.
        positive: corrected, uncorrected or outside: its own term in the sum, see above.
        label_smoothing: share of the target that is spread over all candidates that count.
        exclude_BW: int32 words whose bits (see `exclusion_words`) say which candidates do not
            count for a query; its positive does.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _validate(
        query_BD, candidate_ND, temperature, log_q_N, candidate_id_N, weight_B, positive_B,
        positive, label_smoothing, exclude_BW,
    )  # fmt: skip
    b = query_BD.shape[0]
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
        positive_B.contiguous() if positive_B is not None else None,
        exclude_BW.contiguous() if exclude_BW is not None else None,
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
    exclude_BW: Tensor | None,
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
    if positive_B is not None and positive_B.dtype != torch.int64:
        raise ValueError(f"positive_B must be int64, got {positive_B.dtype}")
    if candidate_id_N is not None and candidate_id_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"candidate_id must be int64 or int32, got {candidate_id_N.dtype}")
    if exclude_BW is not None:
        least = (n + 31) // 32
        if exclude_BW.dim() != 2 or len(exclude_BW) != b or exclude_BW.shape[1] < least:
            raise ValueError(
                f"exclude_BW must have shape ({b}, {least} or more), got {tuple(exclude_BW.shape)}"
            )
        if exclude_BW.dtype != torch.int32:
            raise ValueError(f"exclude_BW must be int32, got {exclude_BW.dtype}")
    others = {
        "candidate": candidate_ND, "temperature": temperature, "log_q": log_q_N,
        "candidate_id": candidate_id_N, "weight": weight_B, "positive_B": positive_B,
        "exclude_BW": exclude_BW,
    }  # fmt: skip
    for name, value in others.items():
        if value is not None and value.device != query_BD.device:
            raise ValueError(
                f"{name} must be on the queries' device {query_BD.device}, got {value.device}"
            )
