"""Training: a prepared dataset to a checkpoint, resumable at the exact batch.

    twotower train --config JOB.yaml

Everything is written under `train.partial/` and renamed to `train/` at the end, so that a killed
run leaves its checkpoints where the next one resumes, and nothing that looks finished.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.progress import RichProgressBar
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from twotower.data.batches import BatchBuilder
from twotower.data.loader import TrainLoader
from twotower.data.prepared import PreparedDataset
from twotower.data.queries import split_queries
from twotower.errors import UserError
from twotower.files import partial_path, publish, write_json
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint import write_model_spec
from twotower.train.config import EvaluateConfig, TrackingConfig, TrainConfig
from twotower.train.evaluation import evaluate_towers
from twotower.train.module import RetrievalModule
from twotower.train.plots import plot_curves, read_metrics
from twotower.train.strategy import TorchRecStrategy
from twotower.train.tracking import wandb_logger


class CatalogueValidation(L.Callback):
    """Judges the towers over the whole catalogue after every epoch."""

    def __init__(self, data: PreparedDataset, config: EvaluateConfig, seed: int) -> None:
        self.config = config
        self.builder = BatchBuilder(data)
        self.queries = split_queries(data, 1, config.max_queries, seed)

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
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        self.folder, self.every_n_steps = folder, every_n_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stay stopped when a run was killed behind its last epoch; Lightning forgets that."""
        stopping = trainer.early_stopping_callbacks
        trainer.should_stop = any(s.wait_count >= s.patience for s in stopping)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Save in the middle of an epoch."""
        last = batch_idx + 1 == trainer.num_training_batches
        if trainer.global_step % self.every_n_steps == 0 and not last:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after an epoch."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        # Named by step, so that the new one is whole before the old one goes.
        old = list(self.folder.glob("last-step=*.ckpt"))
        new = self.folder / f"last-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(new)
        for path in old:
            if path != new:
                trainer.strategy.remove_checkpoint(path)


class _Progress(RichProgressBar):
    """Leaves out the loggers' version, which says nothing of the run."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        shown: dict[str, Any] = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return shown


def train(
    data: PreparedDataset,
    directory: Path,
    *,
    job: dict[str, Any],
    fingerprint: str,
    seed: int,
    name: str,
    model: ModelConfig,
    config: TrainConfig,
    evaluate: EvaluateConfig,
    tracking: TrackingConfig,
) -> dict[str, Any]:
    """Train, or resume a killed run of the same inputs, and publish `directory`.

    Returns:
        The content of `train.json`.

    Raises:
        UserError: when the dataset cannot be trained on.
    """
    started = time.monotonic()
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.accelerator is cuda, but torch finds no CUDA device: set it to auto or cpu, "
            "or install the CUDA builds (`make CUDA=1 install`)"
        )
    partial = partial_path(directory)
    resume = _resume_point(partial, fingerprint)
    if resume is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model_spec(partial, data, model)
        write_json(partial / "inputs.json", {"fingerprint": fingerprint, "job": job, "seed": seed})
    validation = _validation(data, evaluate, seed)
    L.seed_everything(seed, verbose=False)
    rows = {table: info["rows"] for table, info in data.summary["tables"].items()}
    towers = TwoTower(data.config, rows, model)
    cuda = config.accelerator != "cpu" and torch.cuda.is_available()
    workers = config.workers if config.workers is not None else 2 * cuda
    loader = TrainLoader(data, config.batch_size, seed, workers=workers, pin_memory=cuda)
    module = RetrievalModule(towers, config, torch.from_numpy(data.train_count.copy()))
    wandb = wandb_logger(partial, tracking, name, job)
    trainer = _trainer(partial, config, evaluate, validation, wandb, len(loader))
    trainer.fit(module, loader, ckpt_path=str(resume) if resume else None)
    if trainer.interrupted:
        raise KeyboardInterrupt
    return _finish(trainer, partial, directory, fingerprint, resume, started, wandb)


def _validation(data: PreparedDataset, config: EvaluateConfig, seed: int) -> CatalogueValidation:
    validation = CatalogueValidation(data, config, seed)
    if not len(validation.queries.event):
        raise UserError(
            "the validation split holds no query (no event of an item that its user had not seen), "
            "so no epoch can be chosen by it: give data.split a larger validation part"
        )
    return validation


def _resume_point(partial: Path, fingerprint: str) -> Path | None:
    """Return the newest checkpoint of a killed run of the same inputs."""
    try:
        inputs = json.loads((partial / "inputs.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if inputs["fingerprint"] != fingerprint:
        return None
    found = (partial / "checkpoints").glob("last-step=*.ckpt")
    return max(found, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.rsplit("=", 1)[1])


def _trainer(
    partial: Path, config: TrainConfig, evaluate: EvaluateConfig,
    validation: CatalogueValidation, wandb: WandbLogger | None, steps_per_epoch: int,
) -> L.Trainer:  # fmt: skip
    _quiet()
    monitor = f"val/{evaluate.monitor}"
    folder = partial / "checkpoints"
    callbacks = [
        validation,
        EarlyStopping(monitor, mode="max", patience=config.patience, check_on_train_epoch_end=True),
        ModelCheckpoint(
            folder, "best-{step}", monitor=monitor, mode="max", save_on_train_epoch_end=True,
            enable_version_counter=False,
        ),
        ResumeCheckpoint(folder, config.checkpoint_every_steps),
        _Progress(leave=False),
    ]  # fmt: skip
    return L.Trainer(
        accelerator="gpu" if config.accelerator == "cuda" else config.accelerator,
        devices=1,
        strategy=TorchRecStrategy(process_group_backend=None),
        max_epochs=config.max_epochs,
        callbacks=callbacks,
        logger=[CSVLogger(partial, name="csv"), *([wandb] if wandb else [])],
        log_every_n_steps=min(10, steps_per_epoch),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def _quiet() -> None:
    # What these say at every start is true of every run of ours and asks for nothing.
    for name in ("lightning.pytorch", "lightning.fabric", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        for source in ("lightning", "torch", "torchrec"):
            warnings.filterwarnings("ignore", category=category, module=rf"{source}\..*")
    os.environ.setdefault("NCCL_DEBUG", "ERROR")


def _finish(
    trainer: L.Trainer, partial: Path, directory: Path, fingerprint: str,
    resume: Path | None, started: float, wandb: WandbLogger | None,
) -> dict[str, Any]:  # fmt: skip
    best: Any = next(c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    score = float(best.best_model_score)
    history = read_metrics(partial)
    summary = {
        "fingerprint": fingerprint,
        "best_step": _step(Path(best.best_model_path)),
        "monitor": best.monitor,
        "score": score,
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "resumed_from": resume.name if resume else None,
        "seconds": round(time.monotonic() - started, 1),
        "wandb_run": wandb.experiment.id if wandb else None,
    }
    plot_curves(history, best.monitor, partial / "curves.png")
    if wandb:
        wandb.experiment.finish()
    Path(best.best_model_path).rename(partial / "checkpoint")
    shutil.rmtree(partial / "checkpoints")
    write_json(partial / "train.json", summary)
    publish(partial, directory)
    return summary
