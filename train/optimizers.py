"""The optimizers of a training: one in the tables' backward pass, one of everything else.

Tables that are replicated (data_parallel) get the tables' optimizer too, at the step: the fused one
has no kernel for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from twotower.towers.two_tower import PREFIX, TwoTower
from twotower.train.config import TrainConfig


def fuse_table_optimizer(model: TwoTower, config: TrainConfig) -> None:
    """Let the tables of towers that are not sharded yet learn in the backward pass."""
    kind, arguments = _table_optimizer(config)
    apply_optimizer_in_backward(kind, model.table_parameters(), arguments)


def _table_optimizer(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    if config.table_optimizer == "adam":
        # One pass over a table: nine times as fast on a CPU as the default, at 38,000 rows x 256.
        return torch.optim.Adam, {"lr": config.table_lr, "fused": True}
    if config.table_optimizer == "sgd":
        return torch.optim.SGD, {"lr": config.table_lr}
    return RowWiseAdagrad, {"lr": config.table_lr, "eps": 1e-8}


class Optimizers(CombinedOptimizer):
    """The fused optimizer, the replicated tables' and the dense one, under one schedule.

    Args:
        model: the sharded towers.
        config: of training.
        steps: of the whole training, at most.
        more: parameters beside the towers', which the dense optimizer has too.
    """

    def __init__(
        self, model: Any, config: TrainConfig, steps: int, more: Mapping[str, nn.Parameter]
    ) -> None:
        self.config, self.steps = config, steps
        replicated: dict[str, nn.Parameter] = {}
        dense: dict[str, nn.Parameter] = {}
        for name, parameter in in_backward_optimizer_filter(model.named_parameters()):
            if parameter.requires_grad:
                group = replicated if f".{PREFIX}" in name else dense
                group[name] = parameter
        dense |= more
        self.dense: list[nn.Parameter] = list(dense.values())
        self.fused = model.fused_optimizer
        parts = [("", self.fused)]
        if replicated:
            kind, arguments = _table_optimizer(config)
            parts.append(("", KeyedOptimizerWrapper(replicated, lambda p: kind(p, **arguments))))
        self.tables = [part for _, part in parts]
        self.towers = KeyedOptimizerWrapper(dense, lambda p: _dense_optimizer(p, config))
        super().__init__([*parts, ("", self.towers)])

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients, in which fused tables learn, and step what is not fused."""
        loss = closure() if closure is not None else None
        for _, optimizer in self.optimizers:
            optimizer.step()
        return loss

    def set_rates(self, step: int) -> None:
        """Set all learning rates for a step; before its forward pass: fused tables learn in it."""
        factor = rate_factor(self.config, step, self.steps)
        for optimizers, rate in (
            (self.tables, self.config.table_lr), ([self.towers], self.config.dense_lr)
        ):  # fmt: skip
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
        self.fused.step()  # which tells the kernels their rate, and does nothing else

    def make_states(self) -> None:
        """Make the states that the first step would, so that loading has tensors to fill in."""
        for _, optimizer in self.optimizers:
            if isinstance(optimizer, KeyedOptimizerWrapper):
                optimizer.init_state()


def _dense_optimizer(parameters: Any, config: TrainConfig) -> torch.optim.Optimizer:
    kind: Any = torch.optim.SGD if config.dense_optimizer == "sgd" else torch.optim.AdamW
    optimizer: torch.optim.Optimizer = kind(
        parameters, lr=config.dense_lr, weight_decay=config.weight_decay
    )
    return optimizer


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """Return what both learning rates are multiplied by at a step, counted from 0.

    It rises from 1 / warmup_steps to 1 in the warm-up; then it stays, or falls to 0 at `steps`.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "linear":
        return max(0.0, 1 - done)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0
