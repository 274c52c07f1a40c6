"""What happens around the steps of a training: validation, checkpoints, a clean stop, progress."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks.progress import RichProgressBar

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.train.checkpoint.numbered import numbered, step_path
from twotower.train.config import EvaluateConfig, TrainConfig
from twotower.train.evaluation import evaluate_towers, judged_queries
from twotower.train.evaluation.outcomes import judge_heads
from twotower.train.heads import Heads


class CatalogueValidation(L.Callback):
    """Judges the towers over the whole catalogue, and their heads, after every epoch."""

    def __init__(
        self, data: PreparedDataset, config: EvaluateConfig, seed: int, heads: Heads | None
    ) -> None:
        self.config, self.seed, self.heads = config, seed, heads
        self.builder = BatchBuilder(data)
        self.queries = judged_queries(data, 1, config, seed)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log `val/<metric>`, the same on every rank, for what chooses and stops to read."""
        module: Any = pl_module
        model = module.model
        if module.pipeline is not None:
            module.pipeline.detach()
        model.eval()
        metrics = evaluate_towers(
            model.module, self.builder, self.queries, self.config.k, self.config.batch_size,
            pl_module.device,
        )  # fmt: skip
        if self.heads is not None:
            metrics |= judge_heads(
                self.heads, model.module, self.builder.data, 1, self.config, self.seed,
                pl_module.device,
            )  # fmt: skip
        model.train()
        for name, value in metrics.items():
            if "/" not in name:
                pl_module.log(f"val/{name}", value, prog_bar=name == self.config.monitor)


class Checkpoints(Checkpoint):
    """Saves what a killed run resumes from and what is kept: `step=<n>` below a folder.

    It saves every n steps, and after each epoch once its validation has been judged, so that no
    run resumes after the last batch of an epoch that nothing has chosen from. Of these it keeps
    the last, the best by a metric, and those of every m-th step.

    SIGTERM stops the training after a step, or after an epoch and its validation, with a
    checkpoint of just there; a second one, or a given time, ends it at once. Lightning's own
    handling may leave without a checkpoint, and as if the training had succeeded.
    """

    def __init__(self, folder: Path, config: TrainConfig, monitor: str) -> None:
        self.folder, self.config, self.monitor = folder, config, monitor
        self.scores: dict[str, float] = {}
        self.told_to_stop = False
        self._deadline: threading.Timer | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the metric at each step that was judged."""
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what an earlier process knew of the checkpoints."""
        self.scores = dict(state_dict["scores"])

    def best(self) -> tuple[int, float] | None:
        """Return the step with the best metric and the metric, of the checkpoints there are."""
        ranked = self._ranked()
        return (ranked[0], self.scores[str(ranked[0])]) if ranked else None

    def _ranked(self) -> list[int]:
        """Return the steps that were judged and have a checkpoint, the best first."""
        judged = [step for step in numbered(self.folder) if str(step) in self.scores]
        return sorted(judged, key=lambda step: (-self.scores[str(step)], step))

    @contextmanager
    def heeding_sigterm(self) -> Iterator[None]:
        """Let SIGTERM stop the training in the block, or end the process after the block."""
        previous = _on_sigterm(self._stop)
        try:
            yield
        finally:
            _on_sigterm(previous)
            if self._deadline is not None:
                self._deadline.cancel()
        if self.told_to_stop:
            raise SystemExit(128 + signal.SIGTERM)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.told_to_stop:
            raise SystemExit(128 + number)
        self.told_to_stop = True
        # A thread: a signal's handler would wait while this one waits for another rank.
        self._deadline = threading.Timer(self.config.stop_within_s, _too_late)
        self._deadline.daemon = True
        self._deadline.start()

    def _leave_if_told(self, trainer: L.Trainer) -> None:
        """Leave where every rank leaves."""
        strategy: Any = trainer.strategy
        if strategy.any_rank(self.told_to_stop):
            _leave(strategy)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stay stopped when a run was killed after its last epoch; Lightning forgets that."""
        # Lightning has put its own handler around ours by now.
        _on_sigterm(self._stop)
        stopping = trainer.early_stopping_callbacks
        if any(s.wait_count >= s.patience for s in stopping):
            trainer.should_stop = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave between two epochs, when the loggers have written the one before."""
        self._leave_if_told(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save in the middle of an epoch, and leave there."""
        step, config = trainer.global_step, self.config
        # Between two halves of an update the gradients would have to be saved as well.
        whole = (batch_idx + 1) % config.accumulate == 0
        if not whole or batch_idx + 1 == trainer.num_training_batches or step == trainer.max_steps:
            return
        strategy: Any = trainer.strategy
        told = strategy.any_rank(self.told_to_stop)
        if told or any(
            step % n == 0 for n in (config.checkpoint_every_steps, config.keep_every_steps) if n
        ):
            self._save(trainer)
        if told:
            _leave(strategy)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after an epoch."""
        self.scores[str(trainer.global_step)] = float(trainer.callback_metrics[self.monitor])
        self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave after the last epoch; the next run only publishes."""
        strategy: Any = trainer.strategy
        strategy.finish_saving()
        self._leave_if_told(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(step_path(self.folder, trainer.global_step))
        if trainer.is_global_zero:
            self._prune(trainer)

    def _prune(self, trainer: L.Trainer) -> None:
        """Remove what nothing asks to keep; the last whole one always stays."""
        checkpoints, every = numbered(self.folder), self.config.keep_every_steps
        keep = {*list(checkpoints)[-1:], *self._ranked()[: self.config.keep_best]}
        for step, path in checkpoints.items():
            if step not in keep and not (every and step % every == 0):
                trainer.strategy.remove_checkpoint(path)


def _leave(strategy: Any) -> NoReturn:
    """Leave once what is being saved is."""
    strategy.finish_saving()
    raise SystemExit(128 + signal.SIGTERM)


def _too_late() -> None:
    """End a process that could not save in time; the checkpoint before stays."""
    os.write(
        2,
        b"twotower train: was told to stop and did not save within train.stop_within_s: ended; "
        b"the next run goes on from the checkpoint before\n",
    )
    os._exit(128 + signal.SIGTERM)


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
