"""Heads: the outcomes of an event (a click, a like, a watch time), predicted beside retrieval.

    y_h = b_h + a_h + w_h . [q, c, q * c]

of the towers' vectors q and c of the event's own query and item: the inner product with a weight a
coordinate (the GMF of He et al. 2017, "Neural collaborative filtering"), and a linear term of each
side, as matrix factorisation's biases (Koren et al. 2009). A head that is linear in q * c leaves
what tells outcomes apart to the towers, in the coordinates that search multiplies (a deep one would
learn it by itself, and no better: Rendle et al. 2020, "Neural collaborative filtering vs. matrix
factorization revisited"), and costs a step one product of width 3 D. The coordinate of an item bias
is left out: it says how often an item is taken, on a scale of its own that would drown the others.

b_h is the outcome's mean in training, in log-odds of a binary one, and the rest begins at 0: a
head's first steps do not teach the towers what is true of all events alike.

Shape legend: `B` queries, `D` width, `H` heads, `F` inputs of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.train.heads_config import HeadConfig


class _OfAllRanks(torch.autograd.Function):
    """A replicated parameter, whose gradient is the mean of what the ranks have for it.

    The towers' own are averaged by their wrapper, which knows nothing of the heads.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mean = grad.clone()
        dist.all_reduce(mean)
        return mean / dist.get_world_size()


class Heads(nn.Module):
    """All heads of a training.

    Args:
        data: the prepared dataset.
        dim: width of the towers' vectors, without the coordinate of an item bias.
        configs: name -> what it predicts.

    Raises:
        UserError: for an outcome that is none of its head's kind, or always the same in training.
    """

    centre_H: Tensor
    scale_H: Tensor
    weight_of_H: Tensor
    is_binary_H: Tensor

    def __init__(self, data: PreparedDataset, dim: int, configs: Mapping[str, HeadConfig]) -> None:
        super().__init__()
        self.names, self.configs = list(configs), list(configs.values())
        stop = data.section(0).stop
        scales = [
            _scale(f"train.heads.{name}", head, data.outcome(head.column), stop)
            for name, head in configs.items()
        ]
        self.dim = dim
        self.input_scale = dim**0.5  # of a coordinate of unit vectors, to about 1
        self.weight_HF = nn.Parameter(torch.zeros(len(configs), 3 * dim + 1))
        # Not saved: these follow from the dataset and the job.
        for name, value in (
            ("centre_H", torch.tensor([centre for centre, _ in scales])),
            ("scale_H", torch.tensor([scale for _, scale in scales])),
            ("weight_of_H", torch.tensor([head.weight for head in self.configs])),
            ("is_binary_H", torch.tensor([head.kind == "binary" for head in self.configs])),
        ):
            self.register_buffer(name, value, persistent=False)

    def forward(self, query_BD: Tensor, item_BD: Tensor) -> Tensor:
        """Return what the heads say of pairs (B, H), fp32, whatever the precision around them.

        Log-odds of a binary outcome; of a regression, log(1 + x) in deviations from its mean.
        """
        weight_HF: Tensor = self.weight_HF
        if dist.is_initialized() and dist.get_world_size() > 1:
            weight_HF = _OfAllRanks.apply(weight_HF)
        with torch.autocast(query_BD.device.type, enabled=False):
            q_BD = query_BD[:, : self.dim].float() * self.input_scale
            c_BD = item_BD[:, : self.dim].float() * self.input_scale
            input_BF = torch.cat([q_BD, c_BD, q_BD * c_BD, torch.ones_like(q_BD[:, :1])], dim=1)
            said_BH = input_BF @ weight_HF.T
        return said_BH + self.centre_H * self.is_binary_H

    def losses(
        self, query_BD: Tensor, item_BD: Tensor, outcome_BH: Tensor, weight_B: Tensor
    ) -> Tensor:
        """Return each head's mean loss (H,), by sample weights, over events that have the outcome.

        Of ranks that train together, it is this rank's share: the mean over ranks is the mean
        over the events of all.
        """
        said_BH = self(query_BD, item_BD)
        known_BH = ~outcome_BH.isnan()
        outcome_BH = outcome_BH.nan_to_num()
        target_BH = (outcome_BH.clamp_min(0).log1p() - self.centre_H) / self.scale_H
        loss_BH = torch.where(
            self.is_binary_H,
            F.binary_cross_entropy_with_logits(
                said_BH, outcome_BH.clamp(0, 1), reduction="none"
            ),
            F.huber_loss(said_BH, target_BH, reduction="none"),
        )  # fmt: skip
        weight_BH = weight_B.unsqueeze(1) * known_BH
        total_H, ranks = weight_BH.double().sum(0), 1
        if dist.is_initialized() and (ranks := dist.get_world_size()) > 1:
            dist.all_reduce(total_H)
        loss_H: Tensor = (loss_BH * weight_BH).sum(0) * (ranks / total_H.clamp_min(1e-12)).float()
        return loss_H

    def weighted(self, loss_H: Tensor) -> Tensor:
        """Return what the losses add to that of retrieval."""
        return loss_H @ self.weight_of_H

    def predictions(self, query_BD: Tensor, item_BD: Tensor) -> Tensor:
        """Return predicted outcomes (B, H): a probability, or a number in the column's unit."""
        said_BH = self(query_BD, item_BD)
        number_BH = (said_BH * self.scale_H + self.centre_H).clamp_max(80).expm1().clamp_min(0)
        return torch.where(self.is_binary_H, said_BH.sigmoid(), number_BH)


def _scale(
    key: str, head: HeadConfig, outcome_E: npt.NDArray[np.float32], stop: int
) -> tuple[float, float]:
    """Return centre and deviation of an outcome in training, whose events are the first `stop`.

    Raises:
        UserError: when it is none of the head's kind, or has one value alone.
    """
    where = f"{key}: column '{head.column}'"
    known_E = outcome_E[~np.isnan(outcome_E)]
    bad_E = known_E < 0 if head.kind == "regression" else (known_E != 0) & (known_E != 1)
    if bad_E.any():
        expected = ">= 0, whose logarithm is learned" if head.kind == "regression" else (
            "0 or 1; set the kind to regression, or make it 0 or 1"
        )  # fmt: skip
        raise UserError(f"{where} holds {known_E[bad_E][0]:g}: a {head.kind} is of {expected}")
    train_E = outcome_E[:stop]
    train_E = train_E[~np.isnan(train_E)].astype(np.float64)
    if not len(train_E) or train_E.min() == train_E.max():
        what = f"the value {train_E[0]:g} alone" if len(train_E) else "no value"
        raise UserError(
            f"{where} has {what} in training, which teaches nothing: remove the head, or set "
            "data.columns.train_on to all where positive_from leaves out the events of other values"
        )
    if head.kind == "regression":
        log_E = np.log1p(train_E)
        return float(log_E.mean()), float(log_E.std())
    rate = float(train_E.mean())
    return float(np.log(rate / (1 - rate))), 1.0
