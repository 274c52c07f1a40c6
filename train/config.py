"""Settings of training, evaluation and tracking; free of torch, so that any host can read a job."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from twotower.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How the towers are trained."""

    batch_size: int = 1024
    """Events a step; all but one of its items are a query's negatives."""
    max_epochs: int = 20
    """Passes over the training events, at most."""
    patience: int = 3
    """Epochs without a better validation before training stops."""
    table_lr: float = 0.05
    """Learning rate of the embedding tables (rowwise Adagrad)."""
    dense_lr: float = 0.001
    """Learning rate of everything else (AdamW)."""
    weight_decay: float = 0.0001
    """AdamW's weight decay."""
    log_q: bool = True
    """Correct for popular items being sampled as negatives more often."""
    checkpoint_every_steps: int = 200
    """Steps between checkpoints that a killed run resumes from."""
    workers: int | None = None
    """Processes that build batches ahead of training; by default 0 on a CPU, 2 on CUDA."""
    accelerator: str = "auto"
    """auto, cpu or cuda."""

    def validate(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            UserError: naming the key.
        """
        least = {"batch_size": 2, "max_epochs": 1, "patience": 1, "checkpoint_every_steps": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise UserError(f"train.{name} must be >= {minimum}, got {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"train.workers must be >= 0, got {self.workers}")
        for name in ("table_lr", "dense_lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"train.{name} must be > 0, got {getattr(self, name)}")
        if self.accelerator not in ("auto", "cpu", "cuda"):
            raise UserError(f"train.accelerator must be auto, cpu or cuda, got {self.accelerator}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """How the towers are judged; always over the whole catalogue."""

    k: list[int] = field(default_factory=lambda: [10, 20, 50])
    """Cut-offs of the metrics."""
    monitor: str = "ndcg@20"
    """Validation metric that chooses the checkpoint, best when highest."""
    max_queries: int = 20_000
    """Most queries of a split; more are sampled with the job's seed."""
    batch_size: int = 2048
    """Queries or items a forward pass."""

    def validate(self) -> None:
        """Refuse cut-offs and metrics that do not exist.

        Raises:
            UserError: naming the key.
        """
        if not self.k or min(self.k) < 1:
            raise UserError(f"evaluate.k must be cut-offs >= 1, got {self.k}")
        names = [f"{m}@{k}" for m in ("recall", "ndcg", "mrr", "hit_rate") for k in self.k]
        if self.monitor not in names:
            raise UserError(
                f"evaluate.monitor must be one of {', '.join(names)}, got '{self.monitor}'"
            )
        for name in ("max_queries", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"evaluate.{name} must be >= 1, got {getattr(self, name)}")


Mode = Literal["online", "offline", "disabled"]
# What WANDB_MODE may say; the last two are W&B's older names.
WANDB_MODES: dict[str, Mode] = {
    "online": "online", "offline": "offline", "disabled": "disabled",
    "run": "online", "dryrun": "offline",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where runs are tracked, beside the CSV files that are always written.

    The environment variable WANDB_MODE (online, offline or disabled) goes before `wandb`, unless
    that is off. Where W&B cannot be reached, a run is tracked offline; `wandb sync` uploads it.
    """

    wandb: str = "auto"
    """auto (online with an API key, else offline), offline, online or off; see WANDB_MODE."""
    project: str = "twotower"
    """W&B project."""

    def validate(self) -> None:
        """Refuse an unknown mode.

        Raises:
            UserError: naming the key.
        """
        if self.wandb not in ("auto", "offline", "online", "off"):
            raise UserError(
                f"tracking.wandb must be auto, offline, online or off, got '{self.wandb}'"
            )
        self.mode()

    def mode(self) -> Mode:
        """Return W&B's own mode: online, offline or disabled.

        Raises:
            UserError: when WANDB_MODE is none.
        """
        if self.wandb == "off":
            return "disabled"
        if given := os.environ.get("WANDB_MODE"):
            if given not in WANDB_MODES:
                raise UserError(
                    f"the environment variable WANDB_MODE must be one of {', '.join(WANDB_MODES)}, "
                    f"got '{given}': correct it, or set tracking.wandb to off"
                )
            return WANDB_MODES[given]
        if self.wandb == "online" or (self.wandb == "auto" and os.environ.get("WANDB_API_KEY")):
            return "online"
        return "offline"
