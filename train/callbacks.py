"""What happens around the steps of a training: validation, checkpoints, a clean stop, progress."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks.progress import RichProgressBar

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.train.config import EvaluateConfig
from twotower.train.evaluation import evaluate_towers, judged_queries


class CatalogueValidation(L.Callback):
    """Judges the towers over the whole catalogue after every epoch."""

    def __init__(self, data: PreparedDataset, config: EvaluateConfig, seed: int) -> None:
        self.config = config
        self.builder = BatchBuilder(data)
        self.queries = judged_queries(data, 1, config, seed)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log `val/<metric>` for the checkpoint and early stopping to read."""
        model: Any = pl_module.model
        model.eval()
        metrics = evaluate_towers(
            model.module, self.builder, self.queries, self.config.k, self.config.batch_size,
            pl_module.device,
        )  # fmt: skip
        model.train()
        for name, value in metrics.items():
            if "/" not in name:
                pl_module.log(f"val/{name}", value, prog_bar=name == self.config.monitor)


class ResumeCheckpoint(Checkpoint):
    """Keeps one checkpoint that a killed run resumes from: every n steps, and after each epoch.

    An epoch's own is written once its validation has been judged, so that no run resumes behind
    the last batch of an epoch that nothing has chosen from.

    SIGTERM stops the training behind a step, or behind an epoch and its validation, with a
    checkpoint of just there; a second one stops it at once. Lightning's own handling may leave
    without a checkpoint, and as if the training had succeeded.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps
        self.told_to_stop = False

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Let SIGTERM stop the training in the block, or end the process behind the block."""
        previous = _on_sigterm(self._stop)
        try:
            yield
        finally:
            _on_sigterm(previous)
        self._leave_if_told()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.told_to_stop:
            raise SystemExit(128 + number)
        self.told_to_stop = True

    def _leave_if_told(self) -> None:
        if self.told_to_stop:
            raise SystemExit(128 + signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stay stopped when a run was killed behind its last epoch; Lightning forgets that."""
        # Lightning has put its own handler around ours by now.
        _on_sigterm(self._stop)
        stopping = trainer.early_stopping_callbacks
        trainer.should_stop = any(s.wait_count >= s.patience for s in stopping)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave between two epochs, when the loggers have written the one before."""
        self._leave_if_told()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save in the middle of an epoch, and leave there."""
        last = batch_idx + 1 == trainer.num_training_batches
        if last:
            return
        if trainer.global_step % self.every_n_steps == 0 or self.told_to_stop:
            self._save(trainer)
        self._leave_if_told()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after an epoch."""
        self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave behind the last epoch; the next run only publishes."""
        self._leave_if_told()

    def _save(self, trainer: L.Trainer) -> None:
        # Named by step, so that the new one is whole before the old one goes.
        old = list(self.folder.glob("last-step=*.ckpt"))
        new = self.folder / f"last-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(new)
        for path in old:
            if path != new:
                trainer.strategy.remove_checkpoint(path)


def _on_sigterm(handler: Any) -> Any:
    """Set what SIGTERM does and return what it did; only a process's main thread may."""
    if threading.current_thread() is not threading.main_thread():
        return signal.SIG_DFL
    return signal.signal(signal.SIGTERM, handler)


class TrainingProgress(RichProgressBar):
    """Leaves out the loggers' version, which says nothing of the run."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Return what is shown."""
        shown: dict[str, Any] = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown
