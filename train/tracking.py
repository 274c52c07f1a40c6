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
    if config.wandb == "online" or (config.wandb == "auto" and os.environ.get("WANDB_API_KEY")):
        return "online"
    return "offline"


def _start(directory: Path, tracking: TrackingConfig, **arguments: Any) -> wandb.Run:
    return wandb.init(
        project=tracking.project,
        dir=str(directory),
        mode=wandb_mode(tracking),
        settings=wandb.Settings(silent=True),
        **arguments,
    )


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
    if wandb_mode(config) == "disabled":
        return None
    return WandbLogger(experiment=_start(directory, config, name=name, config=job))


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
    resume = {"resume": "allow"} if mode == "online" else {}
    run = _start(directory, config, id=run_id, **resume)
    run.summary.update(metrics)
    artifact = wandb.Artifact(f"{run.project}-bundle", type="bundle", metadata=metrics)
    for file in sorted(bundle.iterdir()):
        artifact.add_file(str(file))
    run.log_artifact(artifact, aliases=[f"v{bundle.name}"])
    run.finish()
