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
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from twotower.data.loader import TrainLoader
from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.files import partial_path, publish, recover, write_json
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.callbacks import CatalogueValidation, ResumeCheckpoint, TrainingProgress
from twotower.train.checkpoint import write_model_spec
from twotower.train.config import EvaluateConfig, TrackingConfig, TrainConfig
from twotower.train.module import RetrievalModule
from twotower.train.plots import plot_curves, read_metrics
from twotower.train.strategy import TorchRecStrategy
from twotower.train.summary import write_summary
from twotower.train.tracking import wandb_logger


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
        SystemExit: of code 143, at a SIGTERM, with a checkpoint that the next run resumes from.
        KeyboardInterrupt: at Ctrl-C; the next run resumes from the last checkpoint there is.
    """
    started = time.monotonic()
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.accelerator is cuda, but torch finds no CUDA device: set it to auto or cpu, "
            "or install the CUDA builds (`make CUDA=1 install`)"
        )
    validation = CatalogueValidation(data, evaluate, seed)
    recover(directory)
    partial = partial_path(directory)
    resume = _resume_point(partial, fingerprint)
    if resume is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_model_spec(partial, data, model)
        write_json(partial / "inputs.json", {"fingerprint": fingerprint, "job": job, "seed": seed})
    L.seed_everything(seed, verbose=False)
    rows = {table: info["rows"] for table, info in data.summary["tables"].items()}
    towers = TwoTower(data.config, rows, model)
    cuda = config.accelerator != "cpu" and torch.cuda.is_available()
    workers = config.workers if config.workers is not None else 2 * cuda
    loader = TrainLoader(data, config.batch_size, seed, workers=workers, pin_memory=cuda)
    module = RetrievalModule(towers, config, torch.from_numpy(data.train_count.copy()), seed)
    wandb = wandb_logger(partial, tracking, name, job)
    trainer = _trainer(partial, config, evaluate, validation, wandb, len(loader))
    checkpoints: Any = next(c for c in trainer.callbacks if isinstance(c, ResumeCheckpoint))
    with checkpoints.heeding_sigterm():
        _fit(trainer, module, loader, resume, checkpoints)
        return _finish(trainer, partial, directory, fingerprint, resume, started, wandb)


def _fit(
    trainer: L.Trainer, module: RetrievalModule, loader: TrainLoader, resume: Path | None,
    checkpoints: ResumeCheckpoint,
) -> None:  # fmt: skip
    """Train; when it is told to stop, say how to go on."""
    try:
        trainer.fit(module, loader, ckpt_path=str(resume) if resume else None)
    except (SystemExit, RuntimeError) as stop:
        if isinstance(stop, RuntimeError):
            # A signal to the whole process group ends the loader's workers before the step.
            if not checkpoints.told_to_stop:
                raise
            stop = SystemExit(128 + signal.SIGTERM)
        saved = _newest(checkpoints.folder)
        there = "its start, no step was saved" if saved is None else f"step {_step(saved)}"
        print(
            f"twotower train: stopped at step {trainer.global_step}: give the same command to go "
            f"on from {there}",
            file=sys.stderr,
        )
        # Lightning makes a 1 of Ctrl-C.
        raise (stop if stop.code != 1 else KeyboardInterrupt) from None


def _resume_point(partial: Path, fingerprint: str) -> Path | None:
    """Return the newest checkpoint of a killed run of the same inputs."""
    try:
        inputs = json.loads((partial / "inputs.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if inputs["fingerprint"] != fingerprint:
        return None
    return _newest(partial / "checkpoints")


def _newest(checkpoints: Path) -> Path | None:
    return max(checkpoints.glob("last-step=*.ckpt"), key=_step, default=None)


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
        TrainingProgress(leave=False),
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
    # The run stays one that can be resumed until it is published.
    shutil.rmtree(partial / "checkpoint", ignore_errors=True)
    shutil.copytree(best.best_model_path, partial / "checkpoint", copy_function=_link)
    summary = write_summary(partial, summary)
    publish(partial, directory)
    shutil.rmtree(directory / "checkpoints")
    return summary


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)
