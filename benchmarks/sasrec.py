"""SASRec in plain torch, the peer of the next-item recipes: what the towers must do better than.

Kang and McAuley 2018: a causal Transformer of two blocks, 64 wide, with one head, trained at every
position; by the softmax over the whole catalogue instead of one sampled negative, which is what
makes it strong (Klenitskiy and Vasilev 2023). Adam at 0.001, 128 sequences a step; the epoch with
the best validation is kept, and training ends when eight in turn were no better.

Shape legend: `B` batch, `L` places of the history, `D` width, `N` items, `Q` queries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries

WIDTH, BLOCKS, BATCH, EPOCHS, PATIENCE = 64, 2, 128, 100, 8
# Items are counted from 1, so that 0 is a place without one.
NOTHING = 0


class SASRec(nn.Module):
    """The Transformer; its states (B, L, D) score items by their embeddings.

    Args:
        items: of the catalogue.
        length: places of a history.
        dropout: of embeddings, attention and layers.
    """

    def __init__(self, items: int, length: int, dropout: float) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, WIDTH, padding_idx=NOTHING)
        self.place = nn.Embedding(length, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.attention, self.before, self.between, self.layers = (nn.ModuleList() for _ in range(4))
        for _ in range(BLOCKS):
            self.attention.append(
                nn.MultiheadAttention(WIDTH, 1, dropout=dropout, batch_first=True)
            )
            self.before.append(nn.LayerNorm(WIDTH, 1e-8))
            self.between.append(nn.LayerNorm(WIDTH, 1e-8))
            self.layers.append(nn.Sequential(
                nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout), nn.ReLU(), nn.Linear(WIDTH, WIDTH),
                nn.Dropout(dropout),
            ))  # fmt: skip
        self.last = nn.LayerNorm(WIDTH, 1e-8)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    def forward(self, item_BL: Tensor) -> Tensor:
        """Return the states of histories that end at the last place."""
        there_BL1 = (item_BL != NOTHING).unsqueeze(-1)
        length = item_BL.shape[1]
        # Places are counted from the newest, so that a short batch needs no more of them.
        x_BLD = self.item(item_BL) * WIDTH**0.5 + self.place.weight[-length:]
        x_BLD = self.dropout(x_BLD) * there_BL1
        later_LL = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)
        for attention, before, between, layers in zip(
            self.attention, self.before, self.between, self.layers, strict=True
        ):
            query_BLD = before(x_BLD)
            found_BLD, _ = attention(
                query_BLD, x_BLD, x_BLD, attn_mask=later_LL, need_weights=False
            )
            x_BLD = between(query_BLD + found_BLD)
            x_BLD = (x_BLD + layers(x_BLD)) * there_BL1
        states_BLD: Tensor = self.last(x_BLD)
        return states_BLD


def padded(sequences: Sequence[Any], length: int) -> Tensor:
    """Return the newest items of sequences (B, L), the last of each at the end."""
    longest = min(length, max(1, *map(len, sequences)))
    out = np.full((len(sequences), longest), NOTHING, np.int64)
    for row, items in enumerate(sequences):
        newest = items[-longest:]
        out[row, longest - len(newest) :] = newest
    return torch.from_numpy(out)


def windows(data: PreparedDataset, length: int) -> list[Any]:
    """Return users' training items, oldest first, cut into windows of `length` + 1 from the end."""
    c, stop = data.event_columns, data.section(0).stop
    order = np.lexsort((c["time"][:stop], c["user"][:stop]))
    user, item = c["user"][:stop][order], c["item"][:stop][order].astype(np.int64) + 1
    out = []
    for taken in np.split(item, np.flatnonzero(np.diff(user)) + 1):
        for end in range(len(taken), 1, -length):
            out.append(taken[max(0, end - length - 1) : end])
    return out


def fit_sasrec(
    data: PreparedDataset, judge: Callable[[Any], float], *, length: int, dropout: float
) -> Callable[[Queries, int], Any]:
    """Train; returns what answers queries with `k` items each (Q, K), without those seen.

    Args:
        data: the dataset.
        judge: says how good answers are on validation.
        length: places of a history.
        dropout: of the Transformer.
    """
    torch.manual_seed(0)
    model = SASRec(len(data.items), length, dropout)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.9, 0.98))
    known = windows(data, length)

    def answer(queries: Queries, k: int) -> Any:
        model.eval()
        had = np.split(queries.seen + 1, queries.seen_offset[1:-1])
        rows = []
        for start in range(0, len(had), 512):
            block = had[start : start + 512]
            with torch.no_grad():
                score_BN = model(padded(block, length))[:, -1] @ model.item.weight.T
            score_BN[:, NOTHING] = -torch.inf
            for row, seen in zip(score_BN, block, strict=True):
                row[seen] = -torch.inf
            rows.append(score_BN.topk(k).indices.numpy() - 1)
        model.train()
        return np.concatenate(rows)

    best, kept, waited = -1.0, model.state_dict(), 0
    for _ in range(EPOCHS):
        order = torch.randperm(len(known)).tolist()
        for start in range(0, len(order), BATCH):
            items_BL = padded([known[i] for i in order[start : start + BATCH]], length + 1)
            asked_BL, next_BL = items_BL[:, :-1], items_BL[:, 1:]
            there_BL = asked_BL != NOTHING
            score_PN = model(asked_BL)[there_BL] @ model.item.weight[1:].T
            loss = F.cross_entropy(score_PN, next_BL[there_BL] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found, waited = judge(answer), waited + 1
        if found > best:
            best, kept, waited = found, copy.deepcopy(model.state_dict()), 0
        if waited == PATIENCE:
            break
    model.load_state_dict(kept)
    return answer
