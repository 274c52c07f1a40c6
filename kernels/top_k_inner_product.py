"""Exact maximum inner product search with filters, never holding B x N scores.

    rows_bk = the k rows n of largest <q_b, c_n> s_n that query b may be answered, best first

Of equal scores the lower row comes first. A row may not be answered when the query excludes it
(items seen) or when it lacks one of the bits that the query requires (availability, age rating …).

On a GPU, in two passes. The first reads every item once, scores it and keeps only the maximum of
each group of consecutive rows. The k best groups, ties to the lower, must hold the k best rows:
each group before a row's own holds a better row. The second pass scores those groups again and
sorts. Bytes: N D once, k x GROUP x D a query; operations: 2 B N D. Below about 150 queries in bf16
the first pass is bound by memory.

On a CPU, blocks of scores are compared with the k-th best so far, and the few that pass are merged;
where k is no small part of the items, all scores of a few queries are selected from instead.

Shape legend: `B` queries, `N` items, `D` width, `K` results, `X` excluded pairs, `G` groups.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.launch import (
    INTERPRET,
    check_matrices,
    check_together,
    operator,
    pointer,
    power_of_two,
    runs_triton,
)

LARGEST_GROUP = 16 if INTERPRET else 128
GROUP_BYTES = 64 << 10
# Scores that one round may hold: on a CPU a block should stay in its caches.
CPU_BLOCK_BYTES = 2 << 20
CPU_GROUP = 64
# Items a result up to which every score may win: there, a plain selection is faster.
CPU_DIRECT = 512
CPU_DIRECT_BYTES = 16 << 20
GPU_BLOCK_BYTES = 256 << 20
# Least keys of which a program finds the best, its warps, and the most results for which it does.
# On an H200 the fastest of twelve: 0.02 ms for the 100 best of 78,125 keys, where 4,096 keys a
# program took 0.07 and torch.topk 0.18 (benchmarks/gpu.py --sweep).
SELECT_BLOCK, SELECT_WARPS = 512, 8
MOST_SELECTED = 256
# Groups of which the best key is looked at first: on an H200 the fastest of 16, 32, 64 and 128
# for 1, 16 and 64 queries.
RUN = 64
LOW_32 = 0xFFFFFFFF
LEAST_KEY = -2139095041 << 32  # of the score -inf, beyond every row
NO_KEY = -(2**63)  # below every key
MAX_ITEMS = 2**32 - 1

Result = tuple[Tensor, Tensor]


def top_k_inner_product_reference(
    query_BD: Tensor,
    item_ND: Tensor,
    k: int,
    *,
    item_scale_N: Tensor | None = None,
    item_bits_N: Tensor | None = None,
    required_bits_B: Tensor | None = None,
    exclude_row_X: Tensor | None = None,
    exclude_offset_B1: Tensor | None = None,
) -> Result:
    """Return the same by a full sort of all scores, in the precision of the inputs."""
    score_BN = query_BD @ item_ND.to(query_BD.dtype).T
    if item_scale_N is not None:
        score_BN = score_BN * item_scale_N
    if item_bits_N is not None and required_bits_B is not None:
        lacks_BN = (item_bits_N & required_bits_B[:, None]) != required_bits_B[:, None]
        score_BN = score_BN.masked_fill(lacks_BN, float("-inf"))
    if exclude_row_X is not None and exclude_offset_B1 is not None:
        owner_X = torch.repeat_interleave(exclude_offset_B1.diff())
        score_BN[owner_X, exclude_row_X] = float("-inf")
    best_BN, row_BN = score_BN.sort(dim=1, descending=True, stable=True)
    return best_BN[:, :k].float(), row_BN[:, :k].masked_fill(best_BN[:, :k] == float("-inf"), -1)


@triton.jit
def _scores(
    query, item, item_scale, item_bits, required_bits, query_row, item_row, B, N, D,
    BLOCK_D: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BITS: tl.constexpr,
    QUERIES_FIRST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return the scores (items, queries) of a tile, -inf for what may not be answered.

    Items that are the rows of the product waste nothing on few queries. Queries that are its rows
    leave most scores of a query in one thread, where a maximum over items is cheap.
    """
    column = tl.arange(0, BLOCK_D)
    q = tl.load(
        query + query_row.to(tl.int64)[:, None] * D + column[None, :],
        mask=(query_row < B)[:, None] & (column < D)[None, :], other=0.0,
    )  # fmt: skip
    c = tl.load(
        item + item_row.to(tl.int64)[:, None] * D + column[None, :],
        mask=(item_row < N)[:, None] & (column < D)[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    c = c.to(q.dtype)  # int8 fits the 8 bits that bf16 has
    if QUERIES_FIRST:
        x = tl.trans(tl.dot(q, tl.trans(c), input_precision="tf32x3"))
    else:
        x = tl.dot(c, tl.trans(q), input_precision="tf32x3")
    if HAS_SCALE:
        x = x * tl.load(item_scale + item_row, mask=item_row < N, other=0.0)[:, None]
    allowed = (item_row < N)[:, None] & (query_row < B)[None, :] & (x == x)
    if HAS_BITS:
        bits = tl.load(item_bits + item_row, mask=item_row < N, other=0)
        required = tl.load(required_bits + query_row, mask=query_row < B, other=0)
        allowed = allowed & ((bits[:, None] & required[None, :]) == required[None, :])
    return tl.where(allowed, x, -float("inf"))


@triton.jit
def _key(score, row):
    """Pack scores and rows as `_keys` does."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - row.to(tl.int64))


@triton.jit
def _group_maximum_kernel(
    query, item, item_scale, item_bits, required_bits, out, B, N, D, stride, groups_a_program,
    GROUP: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the key of each group of rows, of its best score, for a block of queries.

    That is out (B, stride), of which the first G of a query are written.
    """
    groups = tl.cdiv(N, GROUP)
    query_row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.program_id(1) * groups_a_program
    for group in range(first, tl.minimum(first + groups_a_program, groups)):
        item_row = group * GROUP + tl.arange(0, GROUP)
        x = _scores(
            query, item, item_scale, item_bits, required_bits, query_row, item_row, B, N, D,
            BLOCK_D, HAS_SCALE, HAS_BITS, BLOCK_B >= 64, UPCAST,
        )  # fmt: skip
        # Consecutive groups follow in time: their keys meet in the cache.
        place = query_row.to(tl.int64) * stride + group
        tl.store(out + place, _key(tl.max(x, 0), query_row * 0 + group), mask=query_row < B)


@triton.jit
def _group_scores(
    query, item, item_scale, item_bits, required_bits, exclude_row, exclude_offset,
    owner, group, B, N, D,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BITS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Return one query's scores (GROUP,) of one group, exclusions left out.

    The product has the shape of the first pass, with the query repeated, so that it rounds alike.
    """
    item_row = group * GROUP + tl.arange(0, GROUP)
    copies = tl.arange(0, 16)
    x = _scores(
        query, item, item_scale, item_bits, required_bits, owner + copies * 0, item_row, B, N, D,
        BLOCK_D, HAS_SCALE, HAS_BITS, False, UPCAST,
    )  # fmt: skip
    # All columns are the same query's.
    x = tl.max(x, 1)
    if HAS_EXCLUDED:
        start = tl.load(exclude_offset + owner)
        end = tl.load(exclude_offset + owner + 1)
        for at in range(start, end, BLOCK_X):
            place = at + tl.arange(0, BLOCK_X)
            row = tl.load(exclude_row + place, mask=place < end, other=-1)
            hit = tl.max((row[None, :] == item_row[:, None]).to(tl.int32), 1)
            x = tl.where(hit > 0, -float("inf"), x)
    return x


@triton.jit
def _exclude_kernel(
    query, item, item_scale, item_bits, required_bits, exclude_row, exclude_offset, exclude_owner,
    out, B, N, D, stride,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BITS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Correct the maximum of the group of each excluded row; two of one group write the same."""
    place = tl.program_id(0)
    owner = tl.load(exclude_owner + place)
    group = tl.load(exclude_row + place) // GROUP
    x = _group_scores(
        query, item, item_scale, item_bits, required_bits, exclude_row, exclude_offset,
        owner, group, B, N, D, GROUP, BLOCK_D, BLOCK_X, HAS_SCALE, HAS_BITS, True, UPCAST,
    )  # fmt: skip
    tl.store(out + owner * stride + group, _key(tl.max(x, 0), group))


@triton.jit
def _rescore_kernel(
    query, item, item_scale, item_bits, required_bits, exclude_row, exclude_offset, chosen, out,
    first_query, B, N, D, CHOSEN,
    GROUP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_X: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BITS: tl.constexpr, HAS_EXCLUDED: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the keys of the rows of a query's chosen groups: out (queries, CHOSEN, GROUP)."""
    place = tl.program_id(0).to(tl.int64)
    group = 0xFFFFFFFF - (tl.load(chosen + place) & 0xFFFFFFFF)
    owner = first_query + place // CHOSEN
    x = _group_scores(
        query, item, item_scale, item_bits, required_bits, exclude_row, exclude_offset,
        owner, group, B, N, D, GROUP, BLOCK_D, BLOCK_X, HAS_SCALE, HAS_BITS, HAS_EXCLUDED, UPCAST,
    )  # fmt: skip
    row = group * GROUP + tl.arange(0, GROUP)
    tl.store(out + place * GROUP + tl.arange(0, GROUP), _key(x, row))


@triton.jit
def _select_kernel(key, out, M, parts, BLOCK: tl.constexpr, K: tl.constexpr):
    """Write the K largest keys of each part of a query's M, sorted: out (B, parts, K)."""
    part = tl.program_id(0)
    query = tl.program_id(1).to(tl.int64)
    place = part * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(key + query * M + place, mask=place < M, other=-(2**63))
    best = tl.topk(found, K)
    tl.store(out + (query * parts + part) * K + tl.arange(0, K), best)


def _keys(score: Tensor, row: Tensor) -> Tensor:
    """Pack fp32 scores and rows below 2**32 into int64 that sort as (score, lower row first)."""
    # As integers, floats sort by magnitude: the bits of negative ones are turned. No number counts
    # as the least, and -0 as 0.
    bits = torch.where(score.isnan(), float("-inf"), score + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(torch.int64) << 32) | (LOW_32 - row)


def _unpack(key: Tensor) -> Result:
    """Return scores and rows of keys, row -1 where nothing may be answered."""
    ordered = (key >> 32).to(torch.int32)
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return score, torch.where(score == float("-inf"), -1, LOW_32 - (key & LOW_32))


def _best(key: Tensor, k: int) -> Tensor:
    """Return the k largest keys of each row, sorted."""
    return key.topk(k, dim=1, sorted=True).values


def _select(key: Tensor, k: int) -> Tensor:
    """Return what `_best` does, on a GPU, where torch.topk walks int64 keys eight times.

    Blocks of keys are reduced to their k best until there is one block. Triton's interpreter
    cannot run `tl.topk`.
    """
    kept = power_of_two(k)
    if kept > MOST_SELECTED or INTERPRET:
        return _best(key, k)
    while True:
        b, m = key.shape
        block = max(kept, min(max(SELECT_BLOCK, 4 * kept), int(triton.next_power_of_2(m))))
        parts = int(triton.cdiv(m, block))
        out = torch.empty(b, parts, kept, dtype=torch.int64, device=key.device)
        _select_kernel[(parts, b)](
            key, out, m, parts, BLOCK=block, K=kept, num_warps=SELECT_WARPS
        )  # fmt: skip
        key = out.flatten(1)
        if parts == 1:
            return key[:, :k]


def _best_groups(maximum: Tensor, k: int) -> Tensor:
    """Return the k largest keys of groups (B, whole runs), sorted.

    The k best groups lie in the k best runs, as the k best rows lie in the k best groups: where
    groups are many, far fewer keys are sorted.
    """
    b, stride = maximum.shape
    if stride <= 2 * RUN * k:
        return _select(maximum, k)
    of_run = maximum.view(b, -1, RUN)
    best = LOW_32 - (_select(of_run.amax(2), k) & LOW_32)  # a key tells its group
    inside = of_run.gather(1, (best // RUN)[:, :, None].expand(-1, -1, RUN))
    return _select(inside.flatten(1), k)


def merge_top_k(score_BM: Tensor, row_BM: Tensor, k: int) -> Result:
    """Merge the results of shards of the items.

    Args:
        score_BM: the shards' scores side by side.
        row_BM: their rows in the whole catalogue, -1 for none.
        k: results a query, at most M.

    Returns:
        Scores (B, K) and rows (B, K), best first, of equal scores the lower row first.

    Raises:
        ValueError: when shapes differ, or k is not in 1..M.
    """
    if score_BM.shape != row_BM.shape or score_BM.ndim != 2:
        raise ValueError(
            f"score and row must have one shape (B, M), got {tuple(score_BM.shape)} and "
            f"{tuple(row_BM.shape)}"
        )
    if not 1 <= k <= score_BM.shape[1]:
        raise ValueError(f"k must be in 1..{score_BM.shape[1]} (results to merge), got {k}")
    score = torch.where(row_BM < 0, float("-inf"), score_BM.float())
    return _unpack(_best(_keys(score, row_BM.clamp_min(0)), k))


def group_size(width: int, query_bytes: int) -> tuple[int, int]:
    """Return rows a group and stages of the load pipeline.

    Reasoned for Hopper: up to three groups of 64 KB at most, and the queries, lie in the 227 KB of
    shared memory; `benchmarks/gpu.py --sweep` measures the alternatives.
    """
    row_bytes = power_of_two(width) * query_bytes  # int8 items are widened to the queries' type
    group = min(LARGEST_GROUP, max(16, GROUP_BYTES // row_bytes))
    return group, 3 if group * row_bytes <= GROUP_BYTES // 2 else 2


def query_block(queries: int, width: int, fp32: bool) -> int:
    """Return the queries of a tile: at most 64, fewer where wide ones would fill shared memory."""
    most = 16 if fp32 and width > 128 else 64 if width <= 256 else 32
    return min(most, power_of_two(queries))


def triton_top_k(
    query: Tensor, item: Tensor, k: int, item_scale: Tensor | None, item_bits: Tensor | None,
    required_bits: Tensor | None, exclude_row: Tensor | None, exclude_offset: Tensor | None,
) -> Result:  # fmt: skip
    """Search by maxima of groups; see the module's docstring."""
    (b, d), n = query.shape, item.shape[0]
    group_rows, stages = group_size(d, query.element_size())
    groups = int(triton.cdiv(n, group_rows))
    filters = (pointer(item_scale, query), pointer(item_bits, query), pointer(required_bits, query))
    options: dict[str, Any] = {
        "GROUP": group_rows, "BLOCK_D": power_of_two(d), "HAS_SCALE": item_scale is not None,
        "HAS_BITS": item_bits is not None, "UPCAST": INTERPRET, "num_warps": 4,
    }  # fmt: skip
    block_b = query_block(b, d, query.dtype == torch.float32)
    stride = int(triton.cdiv(groups, RUN)) * RUN
    maximum = torch.empty(b, stride, dtype=torch.int64, device=query.device)
    maximum[:, groups:] = NO_KEY
    # Few enough programs that each pipelines its loads, enough that all multiprocessors read.
    groups_a_program = max(1, min(16, groups // 2048))
    grid = (triton.cdiv(b, block_b), triton.cdiv(groups, groups_a_program))
    _group_maximum_kernel[grid](
        query, item, *filters, maximum, b, n, d, stride, groups_a_program, BLOCK_B=block_b,
        num_stages=stages, **options,
    )  # fmt: skip
    excluded = (pointer(exclude_row, query), pointer(exclude_offset, query))
    if exclude_row is not None and exclude_offset is not None and len(exclude_row):
        owner = torch.repeat_interleave(exclude_offset.diff(), output_size=len(exclude_row))
        _exclude_kernel[(len(exclude_row),)](
            query, item, *filters, *excluded, owner, maximum, b, n, d, stride, BLOCK_X=32,
            **options,
        )  # fmt: skip
    chosen_count = min(k, groups)
    keys = []
    size = max(1, GPU_BLOCK_BYTES // (8 * chosen_count * max(group_rows, RUN)))
    for start in range(0, b, size):
        chosen = _best_groups(maximum[start : start + size], chosen_count).contiguous()
        again = torch.empty(*chosen.shape, group_rows, dtype=torch.int64, device=query.device)
        _rescore_kernel[(chosen.numel(),)](
            query, item, *filters, *excluded, chosen, again, start, b, n, d, chosen_count,
            BLOCK_X=32, HAS_EXCLUDED=exclude_row is not None, **options,
        )  # fmt: skip
        keys.append(_select(again.flatten(1), k))
    return _unpack(torch.cat(keys))


def cpu_top_k(
    query: Tensor, item: Tensor, k: int, item_scale: Tensor | None, item_bits: Tensor | None,
    required_bits: Tensor | None, exclude_row: Tensor | None, exclude_offset: Tensor | None,
) -> Result:  # fmt: skip
    """Search block by block, keeping what beats the k-th best so far."""
    queries = query.float()
    b, n = len(query), len(item)
    if n <= CPU_DIRECT * k:
        return _direct(
            queries, item, k, item_scale, item_bits, required_bits, exclude_row, exclude_offset
        )
    rows = torch.empty(0, dtype=torch.int64)
    owners = rows
    if exclude_row is not None and exclude_offset is not None:
        rows, order = exclude_row.sort()
        owners = torch.repeat_interleave(exclude_offset.diff())[order]
    best = torch.empty(b, 0, dtype=torch.int64)
    worst = torch.full((b,), float("-inf"))
    start, size = 0, max(4 * k, 1024)  # a small first block already tells most of the worst
    while start < n:
        block = slice(start, min(start + size, n))
        items = item[block].float()
        if item_scale is not None:
            items = items * item_scale[block, None]
        score = items @ queries.T
        if item_bits is not None and required_bits is not None:
            lacks = (item_bits[block, None] & required_bits) != required_bits
            score.masked_fill_(lacks, float("-inf"))
        first, last = torch.searchsorted(rows, torch.tensor([block.start, block.stop])).tolist()
        score[rows[first:last] - start, owners[first:last]] = float("-inf")
        key = _survivors(score, worst, start)
        best = _best(torch.cat([best, key], 1), min(k, best.shape[1] + key.shape[1]))
        if best.shape[1] == k:
            worst = _unpack(best[:, -1])[0]
        start, size = block.stop, max(4 * k, CPU_BLOCK_BYTES // (4 * b), 1024)
    missing = k - best.shape[1]
    if missing:
        best = torch.nn.functional.pad(best, (0, missing), value=LEAST_KEY)
    return _unpack(best)


def _direct(
    queries: Tensor, item: Tensor, k: int, item_scale: Tensor | None, item_bits: Tensor | None,
    required_bits: Tensor | None, exclude_row: Tensor | None, exclude_offset: Tensor | None,
) -> Result:  # fmt: skip
    """Search a few queries at a time over all items."""
    items = item.float() if item_scale is None else item.float() * item_scale[:, None]
    size = max(1, CPU_DIRECT_BYTES // (4 * len(items)))
    keys = []
    for start in range(0, len(queries), size):
        part = slice(start, min(start + size, len(queries)))
        score = queries[part] @ items.T
        if item_bits is not None and required_bits is not None:
            required = required_bits[part, None]
            score.masked_fill_((item_bits & required) != required, float("-inf"))
        if exclude_row is not None and exclude_offset is not None:
            offset = exclude_offset[part.start : part.stop + 1]
            owner = torch.repeat_interleave(offset.diff())
            score[owner, exclude_row[offset[0] : offset[-1]]] = float("-inf")
        keys.append(_selected(score, k))
    return _unpack(torch.cat(keys))


def _selected(score: Tensor, k: int) -> Tensor:
    """Return the k best keys of each row of scores (B, N)."""
    value, row = score.topk(k)
    worst = value[:, -1:]
    # Which of several equal scores come in is left to chance, and NaN counts as the best: such rows
    # are selected again, by keys.
    tied = (score == worst).sum(1) > (value == worst).sum(1)
    again = (tied & (worst[:, 0] > float("-inf"))) | value[:, 0].isnan()
    key = _keys(value, row).sort(1, descending=True).values
    if again.any():
        key[again] = _best(_keys(score[again], torch.arange(score.shape[1])), k)
    return key


def _survivors(score: Tensor, worst: Tensor, start: int) -> Tensor:
    """Return the keys (B, M) of scores (rows, B) above each query's worst, padded with the least.

    Maxima of groups of rows tell cheaply where to look: finding single scores takes ten times as
    long (benchmarks/kernels_cpu.py).
    """
    rows, b = score.shape
    whole = rows // CPU_GROUP * CPU_GROUP
    groups = score[:whole].view(-1, CPU_GROUP, b)
    group, owner = (groups.amax(1) > worst).nonzero(as_tuple=True)
    inside, place = (groups[group, :, owner] > worst[owner, None]).nonzero(as_tuple=True)
    row, owner = group[inside] * CPU_GROUP + place, owner[inside]
    rest, rest_owner = (score[whole:] > worst).nonzero(as_tuple=True)
    row, owner = torch.cat([row, rest + whole]), torch.cat([owner, rest_owner])
    order = owner.argsort(stable=True)
    row, owner = row[order], owner[order]
    count = torch.bincount(owner, minlength=b)
    place = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    keys = torch.full((b, int(count.max())), LEAST_KEY)
    keys[owner, place] = _keys(score[row, owner], row + start)
    return keys


def _top_k_now(
    query: Tensor, item: Tensor, k: int, item_scale: Tensor | None, item_bits: Tensor | None,
    required_bits: Tensor | None, exclude_row: Tensor | None, exclude_offset: Tensor | None,
) -> Result:  # fmt: skip
    """Return scores (B, K) fp32 and rows (B, K) int64."""
    search = triton_top_k if runs_triton(query.device) else cpu_top_k
    with torch.autocast(query.device.type, enabled=False):
        return search(
            query, item, k, item_scale, item_bits, required_bits, exclude_row, exclude_offset
        )


def _top_k_fake(
    query: Tensor, item: Tensor, k: int, item_scale: Tensor | None, item_bits: Tensor | None,
    required_bits: Tensor | None, exclude_row: Tensor | None, exclude_offset: Tensor | None,
) -> Result:  # fmt: skip
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.float32), query.new_empty(shape, dtype=torch.int64)


_top_k = operator("top_k_inner_product", _top_k_now, _top_k_fake)


def top_k_inner_product(
    query_BD: Tensor,
    item_ND: Tensor,
    k: int,
    *,
    item_scale_N: Tensor | None = None,
    item_bits_N: Tensor | None = None,
    required_bits_B: Tensor | None = None,
    exclude_row_X: Tensor | None = None,
    exclude_offset_B1: Tensor | None = None,
) -> Result:
    """Return the scores (B, K) and rows (B, K) of the best items, best first; no gradients.

    Args:
        query_BD: query vectors, fp32 or bf16.
        item_ND: item vectors of the queries' type, or int8.
        k: results a query, at most N.
        item_scale_N: fp32 factor of each item's score, for int8 items.
        item_bits_N: int64 properties of each item, one a bit.
        required_bits_B: int64 properties that a query's answers must all have.
        exclude_row_X: int64 item rows that may not be answered, query after query.
        exclude_offset_B1: (B + 1) int64, where each query's part of `exclude_row_X` begins.

    Returns:
        fp32 scores, summed in fp32, and int64 rows; of equal scores the lower row comes first.
        Places that filters leave empty hold score -inf and row -1.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _validate(query_BD, item_ND, k, item_scale_N, item_bits_N, required_bits_B, exclude_row_X,
              exclude_offset_B1)  # fmt: skip
    scores, rows = _top_k(
        query_BD.detach().contiguous(), item_ND.detach().contiguous(), k, item_scale_N,
        item_bits_N, required_bits_B, exclude_row_X, exclude_offset_B1,
    )  # fmt: skip
    return scores, rows


def _validate(
    query: Tensor, item: Tensor, k: int, item_scale: Tensor | None, item_bits: Tensor | None,
    required_bits: Tensor | None, exclude_row: Tensor | None, exclude_offset: Tensor | None,
) -> None:  # fmt: skip
    check_matrices("query", query, "item", item)
    b, n = query.shape[0], item.shape[0]
    if query.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"query must be float32 or bfloat16, got {query.dtype}")
    if item.dtype not in (query.dtype, torch.int8):
        raise ValueError(f"item must be {query.dtype}, like query, or int8, got {item.dtype}")
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n} (items), got {k}")
    if n > MAX_ITEMS:
        raise ValueError(f"item must have at most {MAX_ITEMS} rows, got {n}: search it in shards")
    check_together("item_bits", item_bits, "required_bits", required_bits)
    check_together("exclude_row", exclude_row, "exclude_offset", exclude_offset)
    rows = exclude_row.shape[0] if exclude_row is not None and exclude_row.ndim else 0
    for name, value, size, dtype in (
        ("item_scale", item_scale, n, torch.float32), ("item_bits", item_bits, n, torch.int64),
        ("required_bits", required_bits, b, torch.int64),
        ("exclude_row", exclude_row, rows, torch.int64),
        ("exclude_offset", exclude_offset, b + 1, torch.int64),
    ):  # fmt: skip
        if value is None:
            continue
        if value.shape != (size,) or value.dtype != dtype or not value.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {dtype} of shape ({size},), got {value.dtype} of "
                f"{tuple(value.shape)}"
            )
        if value.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, like query, got {value.device}")
    if item.device != query.device:
        raise ValueError(f"item must be on {query.device}, like query, got {item.device}")
