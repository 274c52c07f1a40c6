"""What the towers and two baselines answer to the queries of a split.

Always from the whole catalogue, never from a sample of it. What a query is,
`twotower.data.queries` says.

Shape legend: `Q` queries, `N` items, `D` width, `K` results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.data.batches import Batch, BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries, split_queries
from twotower.errors import UserError
from twotower.kernels.top_k_inner_product import top_k_inner_product
from twotower.towers.catalogue import gather_parts, part_of_rank
from twotower.train.config import EvaluateConfig

I64 = npt.NDArray[np.int64]

# By split: how to come by events of items that their users have not taken before.
REMEDIES = {
    "temporal": "raise data.split.{name}, or give an earlier data.split.{name}_from",
    "leave_last_out": "leave out repeated events of a user and an item, or use a temporal split",
    "given": "mark events of items new to their users as {name} in data.split.column, or put such "
    "events into data.split.{name}_files; data.split.held_out takes validation from training",
}


def judged_queries(
    data: PreparedDataset, split: int, config: EvaluateConfig, seed: int
) -> Queries:  # fmt: skip
    """Return the queries that judge the towers on validation (1) or test (2).

    Raises:
        UserError: when there is none, or a cut-off exceeds the catalogue.
    """
    items = len(data.items)
    if max(config.k) > items:
        fitting = [k for k in config.k if k < items] or [max(1, items // 4)]
        raise UserError(
            f"evaluate.k must be cut-offs <= {items}, the number of items in the catalogue of "
            f"{data.path}, got {config.k}: with more, every item is answered; set it to {fitting}"
        )
    queries = split_queries(data, split, config.max_queries, seed)
    if not len(queries.event):
        name = ("training", "validation", "test")[split]
        raise UserError(
            f"{data.path}: the {name} split holds no query, that is no event of an item that its "
            f"user had not taken before: {REMEDIES[data.config.split.kind].format(name=name)}"
        )
    return queries


@torch.no_grad()
def answer(
    embed: Callable[[Batch], Tensor],
    item_ND: Tensor,
    builder: BatchBuilder,
    queries: Queries,
    k: int,
    batch_size: int,
) -> I64:
    """Return the rows (Q, K) that a query tower and the item vectors answer.

    Ranks that evaluate together each answer a part of every block of queries.
    """
    answers = []
    for block, seen, offset in _blocks(queries, batch_size):
        part = part_of_rank(len(block))
        first, last = offset[part.start], offset[part.stop]
        query_BD = embed(builder.queries(block[part]).to(item_ND.device))
        _, rows = top_k_inner_product(
            query_BD,
            item_ND,
            k,
            exclude_row_X=torch.from_numpy(seen[first:last]).to(item_ND.device),
            exclude_offset_B1=torch.from_numpy(offset[part.start : part.stop + 1] - first).to(
                item_ND.device
            ),
        )
        answers.append(gather_parts(rows, len(block)).cpu().numpy())
    return np.concatenate(answers)


def _blocks(queries: Queries, size: int) -> Iterator[tuple[I64, I64, I64]]:
    for start in range(0, len(queries.event), size):
        end = min(start + size, len(queries.event))
        offset = queries.seen_offset[start : end + 1]
        yield queries.event[start:end], queries.seen[offset[0] : offset[-1]], offset - offset[0]


def answer_by_popularity(data: PreparedDataset, queries: Queries, k: int, size: int) -> I64:
    """Return the rows (Q, K) of the items most often taken in training."""
    count_N1 = torch.from_numpy(data.train_count.astype(np.float32))[:, None]
    answers = []
    for block, seen, offset in _blocks(queries, size):
        _, rows = top_k_inner_product(
            torch.ones(len(block), 1), count_N1, k,
            exclude_row_X=torch.from_numpy(seen), exclude_offset_B1=torch.from_numpy(offset),
        )  # fmt: skip
        answers.append(rows.numpy())
    return np.concatenate(answers)


def answer_by_cooccurrence(data: PreparedDataset, queries: Queries, k: int, size: int) -> I64:
    """Return the rows (Q, K) of the items most often taken with those of the history.

    The weight of a pair is the cosine of the two items' columns in the training user-item matrix
    (Sarwar et al. 2001, "Item-based collaborative filtering"); a score is the sum over the history.
    """
    import scipy.sparse as sp

    c, n = data.event_columns, len(data.items)
    train = slice(0, data.section(0).stop)
    ones = np.ones(train.stop, np.float32)
    taken = sp.csr_matrix((ones, (c["user"][train], c["item"][train])), (len(data.users), n))
    taken.data[:] = 1
    norm = np.sqrt(np.maximum(np.asarray(taken.power(2).sum(0)).ravel(), 1))
    unit = (taken @ sp.diags(1 / norm)).tocsr().astype(np.float32)
    # The same product either way, through the side that has fewer rows. An item's cosine with
    # itself adds to seen items alone, which are not answered.
    others = unit.T.tocsr()
    cosine = others @ unit if n <= unit.shape[0] else None
    answers = []
    for block, seen, offset in _blocks(queries, max(1, min(size, (256 << 20) // (4 * n)))):
        history = sp.csr_matrix((np.ones(len(seen), np.float32), seen, offset), (len(block), n))
        product = history @ cosine if cosine is not None else (history @ others) @ unit
        score = torch.from_numpy(product.toarray())
        score[
            torch.from_numpy(np.repeat(np.arange(len(block)), np.diff(offset))), seen
        ] = -torch.inf
        best, rows = score.topk(k)
        answers.append(rows.masked_fill(best == -torch.inf, -1).numpy())
    return np.concatenate(answers)
