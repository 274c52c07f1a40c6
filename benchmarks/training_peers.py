"""What `train_cpu.py` compares training with: the same two towers, as teams write them without us.

Both compute the loss from the B x B logits, with logQ correction and accidental hits masked as
ours. Plain torch keeps the tables in `nn.EmbeddingBag(sparse=True)` under SparseAdam; TorchRec in
an EmbeddingBagCollection under DistributedModelParallel with the fused rowwise Adagrad. Dense
parameters learn by AdamW in each.

Shape legend: `B` batch, `D` width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from step_profile import stage, stage_of_module
from torch import Tensor, nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from twotower.data.batches import Batch
from twotower.towers.two_tower import TwoTower
from twotower.train.config import TrainConfig


def naive_loss(
    query_BD: Tensor, item_BD: Tensor, temperature: Tensor, log_q_B: Tensor, id_B: Tensor
) -> Tensor:
    """Return the softmax loss over the batch's items."""
    logits_BB = query_BD @ item_BD.T / temperature - log_q_B
    hit_BB = id_B[:, None] == id_B[None, :]
    hit_BB.fill_diagonal_(False)
    logits_BB = logits_BB.masked_fill(hit_BB, float("-inf"))
    return F.cross_entropy(logits_BB, torch.arange(len(id_B)))


class PlainTowers(nn.Module):
    """Tables of plain torch in front of the towers of `model`, whose features are ids."""

    def __init__(self, model: TwoTower, table_rows: dict[str, int]) -> None:
        super().__init__()
        self.query, self.item = model.query, model.item
        self.log_temperature = model.log_temperature
        width = model.query.layers[-1].out_features
        self.tables = nn.ModuleDict({
            name: nn.EmbeddingBag(rows, width, mode="sum", sparse=True)
            for name, rows in table_rows.items()
        })  # fmt: skip

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query vectors (B, D), the item vectors (B, D) and the temperature."""
        vectors = []
        for side, tower in (("query", self.query), ("item", self.item)):
            inputs = {}
            for f in tower.features:
                id_B = batch.ids[f"{side}.{f.name}"].values()
                inputs[f.name] = self.tables[f.table_name](id_B[:, None])
            vectors.append(tower(inputs))
        return vectors[0], vectors[1], self.log_temperature.exp()


class Peer:
    """A model, its loss and its optimizers, stepped by a plain loop.

    Args:
        model: gives query vectors, item vectors and the temperature of a batch.
        optimizers: that are stepped.
        log_q_N: log of each item's share of the training events.
    """

    def __init__(
        self, model: Callable[[Batch], Any], optimizers: list[Any], log_q_N: Tensor
    ) -> None:
        self.model, self.optimizers, self.log_q_N = model, optimizers, log_q_N

    def loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""
        query_BD, item_BD, temperature, _ = self.model(batch)
        with stage("loss"):
            log_q_B = self.log_q_N[batch.item_N]
            return naive_loss(query_BD, item_BD, temperature, log_q_B, batch.item_N)

    def step(self, batch: Batch) -> float:
        """Learn from a batch and return its loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return float(loss)


def plain_peer(
    model: TwoTower, table_rows: dict[str, int], config: TrainConfig, log_q_N: Tensor,
    table_weights: dict[str, Tensor],
) -> Peer:  # fmt: skip
    """Return plain torch's, which begins with the given weights.

    Args:
        model: whose towers it takes over; its tables may be on the meta device.
        table_rows: rows of each table.
        config: the rates.
        log_q_N: see `Peer`.
        table_weights: of each table.
    """
    towers = PlainTowers(model, table_rows)
    with torch.no_grad():
        for name, weight in table_weights.items():
            towers.tables[name].weight.copy_(weight)
    for table in towers.tables.values():
        stage_of_module(table, "lookup")
    for tower in (towers.query, towers.item):
        stage_of_module(tower, "towers")
    dense = [p for n, p in towers.named_parameters() if not n.startswith("tables.")]
    dense = [p for p in dense if p.requires_grad]
    optimizers = [
        torch.optim.SparseAdam(towers.tables.parameters(), lr=config.table_lr),
        torch.optim.AdamW(dense, lr=config.dense_lr, weight_decay=config.weight_decay),
    ]
    return Peer(towers, optimizers, log_q_N)


def torchrec_peer(
    model: TwoTower, config: TrainConfig, log_q_N: Tensor, state: dict[str, Any]
) -> Peer:
    """Return TorchRec's, sharded as TorchRec itself plans it, which begins with the given state.

    Args:
        model: whose tables are on the meta device.
        config: the rates.
        log_q_N: see `Peer`.
        state: of another DistributedModelParallel of these towers.
    """
    rates = {"lr": config.table_lr, "eps": 1e-8}
    apply_optimizer_in_backward(RowWiseAdagrad, model.table_parameters(), rates)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"))
    sharded.load_state_dict(state)
    stage_of_module(sharded.module.bags, "lookup")
    for tower in (sharded.module.query, sharded.module.item):
        stage_of_module(tower, "towers")
    named = in_backward_optimizer_filter(sharded.named_parameters())
    dense = {name: p for name, p in named if p.requires_grad}
    towers = KeyedOptimizerWrapper(
        dense, lambda p: torch.optim.AdamW(p, lr=config.dense_lr, weight_decay=config.weight_decay)
    )
    return Peer(sharded, [CombinedOptimizer([sharded.fused_optimizer, towers])], log_q_N)
