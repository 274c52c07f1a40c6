"""Exact maximum inner product search with rows left out per query.

This is the eager version: queries are scored in blocks, so that memory stays O(block x N).

Shape legend: `B` queries, `N` items, `D` width, `K` results, `X` excluded pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_BYTES = 64 << 20


def top_k_inner_product(
    query_BD: Tensor,
    item_ND: Tensor,
    k: int,
    *,
    exclude_row_X: Tensor | None = None,
    exclude_offset_B1: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the scores (B, K) and rows (B, K) of the best items, best first.

    Args:
        query_BD: query vectors.
        item_ND: item vectors.
        k: results a query, at most N.
        exclude_row_X: item rows that may not be answered, query after query.
        exclude_offset_B1: (B + 1) where each query's part of `exclude_row_X` begins.

    Returns:
        Places that exclusion leaves empty hold score -inf and row -1.

    Raises:
        ValueError: when k is not in 1..N.
    """
    n = item_ND.shape[0]
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n} (items), got {k}")
    block = max(1, BLOCK_BYTES // (4 * n))
    scores, rows = [], []
    for start in range(0, query_BD.shape[0], block):
        score_bN = query_BD[start : start + block].float() @ item_ND.float().T
        if exclude_row_X is not None and exclude_offset_B1 is not None:
            offset = exclude_offset_B1[start : start + score_bN.shape[0] + 1]
            owner = torch.repeat_interleave(offset.diff())
            score_bN[owner, exclude_row_X[offset[0] : offset[-1]]] = float("-inf")
        best_bK, row_bK = score_bN.topk(k)
        scores.append(best_bK)
        rows.append(row_bK.masked_fill(best_bK == float("-inf"), -1))
    return torch.cat(scores), torch.cat(rows)
