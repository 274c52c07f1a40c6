"""Metrics of what was answered: accuracy, and what accuracy does not show.

Accuracy follows the usual definitions: recall@k is the share of a query's relevant items among its
first k, NDCG@k has binary gains and the ideal order of min(k, relevant) items below it, MRR@k is
the inverse rank of the first hit, hit rate@k says whether there is one; each is the mean over
queries. Beyond it, of the first k answered:

- coverage: share of the catalogue that is answered to anyone;
- gini: of how often each item of the catalogue is answered; 0 when all alike, near 1 when few take
  all (Fleder & Hosanagar 2009, "Blockbuster culture's next rise or fall");
- novelty: mean self-information, -log2 of an item's share of training events, in bits (Zhou et al.
  2010, "Solving the apparent diversity-accuracy dilemma"), each item counted once more than seen,
  so that a cold one has a share;
- diversity: 1 - the mean cosine of two of a query's items (Ziegler et al. 2005), by the item
  vectors of the towers, for every model;
- arp: mean training events of the items answered (Yin et al. 2012, "Challenging the long tail
  recommendation"); popularity_bias: that over the mean of the items that were then taken, so 1
  where answers are as popular as what users take.

Every one is a ratio of two sums over queries, see `twotower.train.evaluation.bootstrap`.

Shape legend: `Q` queries, `N` items, `D` width, `K` results.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries
from twotower.train.evaluation.bootstrap import F64, I64, Ratio, Ratios, values

Metrics = dict[str, float]
ACCURACY = ("recall", "ndcg", "mrr", "hit_rate")
BEYOND = ("coverage", "gini", "novelty", "diversity", "arp", "popularity_bias")
# Answers whose item vectors are held at once.
BLOCK = 1 << 16


def popularity_slices(train_count: I64) -> dict[str, npt.NDArray[np.bool_]]:
    """Return which items are head, torso and tail (a third of training events each) and cold."""
    order = np.argsort(-train_count, kind="stable")
    before = np.cumsum(train_count[order]) - train_count[order]
    third = np.minimum(3 * before // max(int(train_count.sum()), 1), 2)
    part = np.empty(len(order), np.int64)
    part[order] = third
    part[train_count == 0] = 3
    return {name: part == i for i, name in enumerate(("head", "torso", "tail", "cold"))}


def slice_sizes(queries: Queries, data: PreparedDataset) -> dict[str, int]:
    """Return how many relevant items, or queries of new users, the recall of a slice is over."""
    slices = popularity_slices(data.train_count)
    sizes = {name: int(members[queries.relevant].sum()) for name, members in slices.items()}
    return sizes | {"new users": int((np.diff(queries.seen_offset) == 0).sum())}


def score_answers(answers: I64, queries: Queries, data: PreparedDataset, ks: list[int]) -> Metrics:
    """Return accuracy and coverage of answers (Q, K), for each k, and recall by slice."""
    metrics = values(accuracy(answers, queries, data, ks))
    for k in ks:
        metrics[f"coverage@{k}"] = coverage(answers[:, :k], len(data.items))
    return metrics


def accuracy(answers: I64, queries: Queries, data: PreparedDataset, ks: list[int]) -> Ratios:
    """Return recall, NDCG, MRR and hit rate of answers (Q, K), for each k, and recall by slice."""
    n, q = len(data.items), len(answers)
    counts = np.diff(queries.relevant_offset)
    owner = np.repeat(np.arange(q), counts)
    hits = np.isin(np.arange(q)[:, None] * n + answers, owner * n + queries.relevant)
    hits &= answers >= 0
    discount = 1 / np.log2(np.arange(answers.shape[1]) + 2)
    ideal = np.concatenate([[0], np.cumsum(discount)])
    slices = popularity_slices(data.train_count)
    asked = {
        name: np.bincount(owner, members[queries.relevant], q).astype(float)
        for name, members in slices.items()
    }
    new = (np.diff(queries.seen_offset) == 0).astype(float)
    one = np.ones(q)
    out: dict[str, Ratio] = {}
    for k in ks:
        top = hits[:, :k]
        rank = np.where(top.any(1), top.argmax(1) + 1, np.inf)
        recall = top.sum(1) / counts
        ndcg = (top * discount[:k]).sum(1) / ideal[np.minimum(counts, top.shape[1])]
        out[f"recall@{k}"] = recall, one
        out[f"ndcg@{k}"] = ndcg, one
        out[f"mrr@{k}"] = 1 / rank, one
        out[f"hit_rate@{k}"] = top.any(1).astype(float), one
        for name, members in slices.items():
            found = (top & members[answers[:, :k]]).sum(1).astype(float)
            out[f"recall@{k}/{name}"] = found, asked[name]
        out[f"recall@{k}/new users"] = recall * new, new
    return out


def beyond_accuracy(
    answers: I64, queries: Queries, data: PreparedDataset, ks: list[int], user_Q: I64,
    item_ND: Tensor,
) -> Ratios:  # fmt: skip
    """Return coverage, Gini, novelty, diversity and popularity bias of answers (Q, K), for each k.

    Args:
        answers: item rows, -1 for none.
        queries: that were answered.
        data: the dataset.
        ks: cut-offs.
        user_Q: whose each query is, from 0 without a gap.
        item_ND: vectors of the catalogue, whose cosines diversity is of.
    """
    taken = data.train_count.astype(float)
    bits = -np.log2((taken + 1) / (taken.sum() + len(taken)))
    counts = np.diff(queries.relevant_offset)
    owner = np.repeat(np.arange(len(answers)), counts)
    relevant = np.bincount(owner, taken[queries.relevant], len(answers)) / counts
    one = np.ones(len(answers))
    out: dict[str, Ratio] = {}
    for k in ks:
        top = answers[:, :k]
        there = top >= 0
        some = there.any(1).astype(float)
        size = np.maximum(there.sum(1), 1)
        popular = (taken[top] * there).sum(1) / size
        out |= spread(top, user_Q, len(taken), k)
        out[f"novelty@{k}"] = (bits[top] * there).sum(1) / size, some
        pairs = (there.sum(1) > 1).astype(float)
        out[f"diversity@{k}"] = _diversity(top, item_ND) * pairs, pairs
        out[f"arp@{k}"] = popular, some
        out[f"popularity_bias@{k}"] = popular, relevant * one
    return out


def coverage(answers: I64, items: int) -> float:
    """Return the share of the catalogue among answers (Q, K)."""
    return len(np.unique(answers[answers >= 0])) / items


def spread(answers: I64, user_Q: I64, items: int, k: int) -> dict[str, Ratio]:
    """Return coverage and Gini of answers (Q, K) as means over users.

    Neither is a mean: a resample, which has some users twice, shows fewer items whatever the
    model. So each stands as its value and, around it, the jackknife's influence of every user
    (Efron & Stein 1981, "The jackknife estimate of variance"): how far it falls without them. For
    Gini, the derivative is that.
    """
    row, column = np.nonzero(answers >= 0)
    user, item = user_Q[row], answers[row, column]
    users = int(user_Q.max(initial=-1)) + 1
    shown = np.bincount(item, minlength=items).astype(float)
    total = max(shown.sum(), 1)
    order = np.sort(shown)
    # Items shown alike share the mean of their ranks.
    low, high = np.searchsorted(order, shown), np.searchsorted(order, shown, side="right")
    weight = (low + high - items) / items
    gini = float((weight * shown).sum() / total)
    pairs = np.unique(user * items + item)
    by_one = np.bincount(pairs % items, minlength=items) == 1
    alone = pairs[by_one[pairs % items]] // items
    influence = {
        f"coverage@{k}": (float((shown > 0).mean()), np.bincount(alone, minlength=users) / items),
        f"gini@{k}": (gini, np.bincount(user, (weight[item] - gini) / total, users)),
    }
    # A user's one value stands at the first of their queries.
    first = np.unique(user_Q, return_index=True)[1]
    out = {}
    for name, (value, moved) in influence.items():
        numerator, denominator = np.zeros(len(answers)), np.zeros(len(answers))
        numerator[first], denominator[first] = value + users * (moved - moved.mean()), 1
        out[name] = numerator, denominator
    return out


def _diversity(answers: I64, item_ND: Tensor) -> F64:
    """Return 1 - the mean cosine of two items of each list (Q, K); 0 of fewer than two."""
    unit_ND = torch.nn.functional.normalize(item_ND.float(), dim=1)
    out = []
    step = max(1, BLOCK // answers.shape[1])
    for start in range(0, len(answers), step):
        rows = torch.from_numpy(answers[start : start + step])
        there = (rows >= 0).to(unit_ND.device, unit_ND.dtype)
        sum_BD = (unit_ND[rows.clamp(min=0).to(unit_ND.device)] * there[..., None]).sum(1)
        size = there.sum(1)
        # The square of the sum holds every ordered pair, and each item with itself.
        pairs = (size * (size - 1)).clamp(min=1)
        out.append((1 - (sum_BD.square().sum(1) - size) / pairs).double().cpu().numpy())
    return np.concatenate(out)
