"""The Lightning module: a step is the two towers and the loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import record_function

from twotower.data.batches import Batch
from twotower.data.listed import Listed
from twotower.towers.tower import cut
from twotower.towers.two_tower import TwoTower
from twotower.train.config import TrainConfig
from twotower.train.heads import Heads
from twotower.train.losses import retrieval_loss
from twotower.train.meters import RANGE, Latest
from twotower.train.mining import HardNegatives
from twotower.train.negatives import (
    FILLER_LOG_Q,
    CandidateMemory,
    Candidates,
    PositiveRates,
    all_rows,
    catalogue_sum,
    excluded,
    expected,
    log_q,
    log_q_of,
    push_of,
    share_of_weight,
)
from twotower.train.optimizers import Optimizers, fuse_table_optimizer
from twotower.train.pipeline import SparsePipeline


class RetrievalModule(L.LightningModule):
    """Trains two towers with a sampled softmax over the items of all ranks' batches.

    Args:
        model: the towers; the strategy replaces it by its sharded form.
        config: of training.
        rates: how often items are positives.
        queries: of a step, of all ranks together.
        steps: of the whole training, at most, for the learning rates' schedule. Lightning's own
            estimate would load the loader's batches before its place is restored.
        seed: of what a step draws at random (dropout).
        heads: what predicts the outcomes of events, if anything does.
        first_N: when there first was each item, where batches hold times; see `excluded`.
    """

    first_N: Tensor | None

    def __init__(
        self, model: TwoTower, config: TrainConfig, rates: PositiveRates, queries: float,
        steps: int, seed: int, heads: Heads | None = None, first_N: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.config = config
        self.steps, self.seed = steps, seed
        self.widths, self.item_bias = model.widths, model.item_bias
        self.pipeline: SparsePipeline | None = None
        self.latest: Latest | None = None
        self.mining: HardNegatives | None = None
        self.rates, self.queries, self.heads = rates, queries, heads
        # Not saved: it follows from the rates.
        self.register_buffer("log_q_N", log_q(rates.rate_N, config, queries), persistent=False)
        self.register_buffer("first_N", first_N, persistent=False)
        self.memory: CandidateMemory | None = None
        if size := config.negatives.sizes(queries)["memory"]:
            self.memory = CandidateMemory(size, model.dim)
        fuse_table_optimizer(model, config)

    def on_train_epoch_start(self) -> None:
        """Turn the loader to the epoch; after a whole one, Lightning restores no place in it."""
        self.trainer.train_dataloader.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the learning rates, and seed what the step draws by the step and the rank.

        No checkpoint holds streams of random numbers: a resumed run draws what an unbroken one
        would have drawn, and every rank something else.
        """
        self.optimizers(use_pl_optimizer=False).set_rates(self.global_step)
        place = [self.seed, self.global_step, self.global_rank]
        if self.config.accumulate > 1:
            place.append(batch_idx)
        number = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        else:
            # Not torch.manual_seed, which takes 0.1 ms to note where CUDA would be seeded from.
            torch.default_generator.manual_seed(number)

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        """Copy a batch without waiting for it, unless the pipeline has; the loader pins it."""
        if batch.item_N.device == device:
            return batch
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this rank's share of the loss of the step's batch."""
        with record_function(RANGE + "towers"):
            query_BD, item_ND, temperature, own_ND = self.model(batch)
        if self.config.precision == "bf16":
            # Autocast leaves the vectors in fp32, in which no fused op would be fast.
            query_BD, item_ND = query_BD.bfloat16(), item_ND.bfloat16()
        candidates, positive_B = self._candidates(batch, item_ND)
        with record_function(RANGE + "loss"):
            if batch.seen is not None or batch.time_B is not None:
                candidates, positive_B = candidates.by_id(positive_B)
            loss = self._loss(batch, query_BD, candidates, temperature, positive_B)
        if self.step_is_logged:
            self.latest = Latest(
                query_BD.detach(), candidates, positive_B, temperature.detach(),
                self.config.correct_positive,
            )  # fmt: skip
        if self.trainer.world_size > 1:
            loss = loss * share_of_weight(batch.weight_B)
        if self.config.item_l2:
            loss = loss + self.config.item_l2 * self._item_l2(batch, own_ND)
        if self.heads is not None and batch.outcome_BH is not None:
            own_BD = candidates.vector_ND[positive_B]
            loss_H = self.heads.losses(query_BD, own_BD, batch.outcome_BH, batch.weight_B)
            for name, value in zip(self.heads.names, loss_H.detach(), strict=True):
                self._log_loss(f"train/{name}_loss", value)
            loss = loss + self.heads.weighted(loss_H)
        self._log_loss("train/loss", loss.detach(), shown=True)
        return loss

    def _loss(
        self, batch: Batch, query_BD: Tensor, candidates: Candidates, temperature: Tensor,
        positive_B: Tensor,
    ) -> Tensor:  # fmt: skip
        """Return the loss, the mean over the widths that vectors may be cut to."""
        exclude_BW = excluded(batch, candidates.id_N, self.first_N)
        losses = []
        for width in (*self.widths, query_BD.shape[1]):
            shorter = replace(
                candidates, vector_ND=cut(candidates.vector_ND, width, self.item_bias)
            )  # fmt: skip
            losses.append(
                retrieval_loss(
                    self.config, cut(query_BD, width, self.item_bias), shorter, temperature,
                    positive_B, batch.weight_B, len(self.log_q_N) - 1, exclude_BW,
                )
            )  # fmt: skip
        return torch.stack(losses).mean()

    def _item_l2(self, batch: Batch, own_ND: Tensor) -> Tensor:
        """Return this rank's share of the catalogue's squared embeddings, by training event.

        What an epoch adds up to is the log of a normal prior of each item's embedding, beside the
        likelihood of its events. Of a step's items it is an estimate, see `catalogue_sum`.
        """
        expected_N = expected(**self._rates(batch.item_N, batch.listed))[0]
        # Of fillers, and of positives where they are no candidates, nothing is expected to count.
        expected_N = expected_N.masked_fill(batch.item_N < 0, torch.inf)
        if self.config.negatives.in_batch == 0 and not self._shares_positives:
            expected_N[: len(batch.weight_B)] = torch.inf
        sum_of_rank = catalogue_sum(own_ND.float().square().sum(1), expected_N)
        # The mean over ranks of what each multiplies by their number is their sum.
        share: Tensor = sum_of_rank * self.trainer.world_size / (self.queries * self.rates.steps)
        return share

    @property
    def _shares_positives(self) -> bool:
        """Whether positives are places among the items of all ranks, which each has once."""
        return self.config.negatives.catalogue or self.config.every_position

    def _candidates(self, batch: Batch, item_ND: Tensor) -> tuple[Candidates, Tensor]:
        """Return what the queries are scored against, and which of it are their positives."""
        negatives, own = self.config.negatives, len(batch.weight_B)
        shared = self._shares_positives
        log_q_N = self._log_q(batch.item_N, batch.listed)
        if negatives.in_batch == 0 and not shared:
            # Its own query's positive alone, which is not corrected.
            log_q_N[:own] = FILLER_LOG_Q
        push_N = None
        if self.memory is not None:
            push_N = push_of(**self._rates(batch.item_N, batch.listed))
        found, positive_B = Candidates(item_ND, batch.item_N, log_q_N, push_N), batch.positive_B
        if self.trainer.world_size > 1:
            found = found.of_all_ranks()
            if not shared:
                positive_B = positive_B + self.global_rank * len(item_ND)
        if self.memory is not None:
            found = self._with_memory(self.memory, found, own, batch.listed)
        if self.rates.learned:
            # Last: a step is corrected by what those before it have shown.
            item_B = batch.item_N[:own]
            self.rates.observe(all_rows(item_B) if self.trainer.world_size > 1 else item_B)
        return found, positive_B

    def _log_q(self, id_N: Tensor, listed: Listed | None) -> Tensor:
        """Return the correction of candidates; of rates that are learned, by those of now."""
        if not self.rates.learned and listed is None:
            counted_N: Tensor = self.log_q_N[id_N]
            return counted_N
        now_N = log_q_of(**self._rates(id_N, listed))
        return now_N.masked_fill(id_N < 0, FILLER_LOG_Q)

    def _rates(self, id_N: Tensor, listed: Listed | None) -> dict[str, Any]:
        """Return how often items are positives, as `expected`, `log_q_of` and `push_of` take it."""
        return {
            "rate_N": self.rates.gap_N[id_N].reciprocal(), "config": self.config,
            "queries": self.queries, "items": len(self.rates.gap_N),
            "listed_N": 0 if listed is None else listed.of(id_N),
        }  # fmt: skip

    def _with_memory(
        self, memory: CandidateMemory, now: Candidates, own: int, listed: Listed | None
    ) -> Candidates:
        """Return candidates with those of the steps before, and remember this step's positives."""
        id_M = memory.id_M.clone()
        assert now.push_N is not None
        found = Candidates(
            torch.cat([now.vector_ND, memory.vector_MD.to(now.vector_ND.dtype)]),
            torch.cat([now.id_N, id_M]),
            torch.cat([now.log_q_N, self._log_q(id_M, listed)]),
            torch.cat([now.push_N, torch.ones_like(memory.vector_MD[:, 0])]),
        )
        # Every rank's own queries' are its first.
        ranks = self.trainer.world_size
        memory.push(
            now.vector_ND.view(ranks, -1, now.vector_ND.shape[1])[:, :own].flatten(0, 1),
            now.id_N.view(ranks, -1)[:, :own].flatten(),
        )
        return found

    @property
    def step_is_logged(self) -> bool:
        """Whether the loggers take what this step logs; elsewhere nothing is worth its cost."""
        return bool((self.global_step + 1) % self.trainer.log_every_n_steps == 0)

    def _log_loss(self, name: str, loss: Tensor, *, shown: bool = False) -> None:
        if not self.step_is_logged:
            return
        if self.trainer.world_size > 1:
            loss = loss.clone()
            dist.all_reduce(loss)
            loss /= self.trainer.world_size
        self.log(name, loss, prog_bar=shown)

    def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
        """Clip the dense parameters' gradients, which are those of the joined batch by now."""
        if self.config.clip_norm is not None:
            dense = self.optimizers(use_pl_optimizer=False).dense
            torch.nn.utils.clip_grad_norm_(dense, self.config.clip_norm)

    def configure_optimizers(self) -> Any:
        """Return the tables' optimizers beside that of the dense parameters."""
        more = {} if self.heads is None else {"heads.weight_HF": self.heads.weight_HF}
        return Optimizers(self.model, self.config, self.steps, more)
