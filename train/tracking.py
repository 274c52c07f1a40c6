"""Tracking in Weights & Biases: online with a key, else offline; never asks for one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import wandb
from lightning.pytorch.loggers import WandbLogger

from twotower.train.config import TrackingConfig


def wandb_mode(config: TrackingConfig) -> Literal["online", "offline", "disabled"]:
    """Return online, offline or disabled."""
    if config.wandb == "off":
        return "disabled"
    if config.wandb == "auto" and os.environ.get("WANDB_API_KEY"):
        return "online"
    return "online" if config.wandb == "online" else "offline"


def wandb_logger(
    directory: Path, config: TrackingConfig, name: str, job: dict[str, Any]
) -> WandbLogger | None:
    """Return Lightning's logger for a new run, or None when tracking is off.

    Args:
        directory: W&B's files go to `wandb/` below it.
        config: of tracking.
        name: the run's name.
        job: the whole configuration.
    """
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    logger = WandbLogger(
        name=name,
        save_dir=str(directory),
        offline=mode == "offline",
        project=config.project,
        settings=wandb.Settings(silent=True),
    )
    logger.experiment.config.update(job, allow_val_change=True)
    return logger


def log_bundle(
    directory: Path,
    bundle: Path,
    config: TrackingConfig,
    run_id: str | None,
    metrics: dict[str, Any],
) -> None:
    """Add a bundle and its metrics to the run that trained it."""
    mode = wandb_mode(config)
    if mode == "disabled" or run_id is None:
        return
    run = wandb.init(
        project=config.project, id=run_id, dir=str(directory), mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=True),
    )  # fmt: skip
    run.summary.update(metrics)
    artifact = wandb.Artifact(f"{run.project}-bundle", type="bundle", metadata=metrics)
    for file in sorted(bundle.iterdir()):
        artifact.add_file(str(file))
    run.log_artifact(artifact, aliases=[f"v{bundle.name}"])
    run.finish()
