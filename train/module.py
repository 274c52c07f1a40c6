"""The Lightning module: a step is the two towers and the loss."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_optimizer_in_backward,
)
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from twotower.data.batches import Batch
from twotower.kernels.sampled_softmax import sampled_softmax
from twotower.towers.two_tower import TwoTower
from twotower.train.config import TrainConfig


class RetrievalModule(L.LightningModule):
    """Trains two towers with an in-batch sampled softmax.

    Args:
        model: the towers; the strategy replaces it by its sharded form.
        config: of training.
        train_count_N: training events of each item, for the logQ correction.
        seed: of what a step draws at random (dropout).
    """

    def __init__(
        self, model: TwoTower, config: TrainConfig, train_count_N: Tensor, seed: int = 0
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.seed = seed
        frequency_N = train_count_N.double().clamp_min(1) / train_count_N.sum()
        # Not saved: it follows from the prepared dataset.
        self.register_buffer("log_q_N", frequency_N.log().float(), persistent=False)
        apply_optimizer_in_backward(
            RowWiseAdagrad, model.table_parameters(), {"lr": config.table_lr, "eps": 1e-8}
        )

    def on_train_epoch_start(self) -> None:
        """Turn the loader to the epoch; behind a whole one, Lightning restores no place in it."""
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed what the step draws by the step and the rank, so that no checkpoint holds streams.

        A resumed run draws what an unbroken one would have drawn, and every rank something else.
        """
        place = [self.seed, self.global_step, self.global_rank]
        number = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        else:
            # Not torch.manual_seed, which takes 0.1 ms to note where CUDA would be seeded from.
            torch.default_generator.manual_seed(number)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copy a batch without waiting for it; the loader pins its memory."""
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        query_BD, item_BD, temperature = self.model(batch)
        loss = sampled_softmax(
            query_BD,
            item_BD,
            temperature,
            log_q_N=self.log_q_N[batch.item_B] if self.config.log_q else None,
            candidate_id_N=batch.item_B,
            weight_B=batch.weight_B,
        )
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW for the dense parameters beside the tables' fused optimizer."""
        dense = {
            name: parameter
            for name, parameter in in_backward_optimizer_filter(self.model.named_parameters())
            if parameter.requires_grad
        }
        config = self.config
        adamw = KeyedOptimizerWrapper(
            dense,
            lambda params: torch.optim.AdamW(
                params, lr=config.dense_lr, weight_decay=config.weight_decay
            ),
        )
        return CombinedOptimizer([self.model.fused_optimizer, adamw])
