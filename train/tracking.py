"""Tracking in Weights & Biases: online with a key, else offline; never asks for one.

Tracking never stops the work that it tracks: what W&B cannot do is one line of warning.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import WandbLogger

from twotower.train.config import Mode, TrackingConfig
from twotower.train.summary import note_tracked

if TYPE_CHECKING:  # importing it takes half a second, which runs that are not tracked are spared
    import wandb

# W&B's own 90 s are long for a run that goes on offline; WANDB_INIT_TIMEOUT sets others.
INIT_TIMEOUT_S = 30.0


def _start(directory: Path, tracking: TrackingConfig, **arguments: Any) -> wandb.Run:
    """Start a W&B run, offline where W&B cannot be reached or refuses the key."""
    import wandb

    timeout_s = float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S))
    modes: tuple[Mode, ...] = (tracking.mode(), "offline")
    for mode in modes:
        # An offline run cannot know whether there is one to resume.
        more: dict[str, Any] = {}
        if mode == "online" and "id" in arguments:
            more["resume"] = "allow"
        try:
            return wandb.init(
                project=tracking.project,
                dir=str(directory),
                mode=mode,
                settings=wandb.Settings(silent=True, init_timeout=timeout_s),
                **arguments,
                **more,
            )
        except (wandb.Error, ValueError) as error:
            if mode == "offline":
                raise
            wandb.teardown()  # what has failed still holds the run's id
            _warn(f"W&B is not reached, so this run is tracked offline ({_line(error)})")
    raise AssertionError


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
    if config.mode() == "disabled":
        return None
    return WandbLogger(experiment=_start(directory, config, name=name, config=job))


def log_bundle(
    directory: Path, bundle: Path, config: TrackingConfig, run_id: str, metrics: dict[str, Any]
) -> None:
    """Add a bundle and its metrics to the run that trained it, and remember that it was done.

    A failure is a warning: the bundle is published, and the next `twotower export` tries again.

    Args:
        directory: of the training.
        bundle: its directory, named by its version.
        config: of tracking.
        run_id: of the W&B run that trained it.
        metrics: of the test split.
    """
    import wandb

    try:
        run = _start(directory, config, id=run_id)
        try:
            run.summary.update(metrics)
            artifact = wandb.Artifact(f"{run.project}-bundle", type="bundle", metadata=metrics)
            for file in sorted(bundle.iterdir()):
                artifact.add_file(str(file))
            run.log_artifact(artifact, aliases=[f"v{bundle.name}"])
        finally:
            run.finish()
        note_tracked(directory, int(bundle.name))
    # Whatever it is: the bundle is published, and the exit code says so.
    except Exception as error:
        _warn(
            f"{bundle} was not tracked in W&B ({_line(error)}): the next `twotower export` tries "
            "again"
        )


def _line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _warn(message: str) -> None:
    print(f"twotower: warning: {message}", file=sys.stderr)
