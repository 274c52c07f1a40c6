"""One trial: a training of its own process, in a folder of its own, watched epoch by epoch.

run_dir/sweep/trial=<n>/
job.yaml    the trial's whole job
prepared    link to the dataset that all share
train.log   what the training said
train/      see `twotower.train.train`
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from twotower.errors import UserError
from twotower.files import partial_path
from twotower.job import Job, write_job
from twotower.sweep.config import SweepConfig
from twotower.sweep.space import with_values
from twotower.train.launch import LAUNCHED
from twotower.train.plots import read_metrics
from twotower.train.summary import read_summary

POLL_S = 0.5
# Told to stop, not failed: Ctrl-C and SIGTERM, as the training ends with and as a signal's number.
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


class TrialFailed(Exception):
    """A trial that ended without a result, with the reason."""


def trial_job(job: Job, number: int, values: dict[str, Any]) -> Job:
    """Return the job of a trial."""
    folder = trial_folder(job, number)
    own = replace(
        job, name=f"{job.name}-trial-{number}", run_dir=str(folder), sweep=SweepConfig()
    )  # fmt: skip
    return with_values(own, values)


def trial_folder(job: Job, number: int) -> Path:
    """Return where a trial is kept."""
    return job.path("sweep") / f"trial={number}"


def train_trial(
    job: Job, number: int, values: dict[str, Any], judge: Callable[[dict[int, float]], bool]
) -> float | None:
    """Train a trial, or go on with one that was killed, and return its best validation.

    Args:
        job: whose sweep it is.
        number: of the trial.
        values: of the keys that are searched.
        judge: is given the validation by step, so far, and says whether the trial is to end.

    Returns:
        evaluate.monitor; None where `judge` ended it.

    Raises:
        TrialFailed: when the training failed.
        SystemExit: when somebody stopped it.
    """
    own, folder = trial_job(job, number, values), trial_folder(job, number)
    try:
        own.validate()
    except UserError as error:
        raise TrialFailed(str(error)) from None
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prepared").is_symlink():
        (folder / "prepared").symlink_to(os.path.relpath(job.path("prepared"), folder))
    write_job(own, folder / "job.yaml", values, f"Trial {number} of a sweep of {job.name}.")
    monitor, before = f"val/{job.evaluate.monitor}", dict[int, float]()
    with _training(folder, job.train.stop_within_s) as process:
        while _running(process):
            now = read_metrics(partial_path(folder / "train")).get(monitor, {})
            # The file may be read while it is written: what is there twice is whole.
            if judge({step: v for step, v in now.items() if before.get(step) == v}):
                _stop(process, job.train.stop_within_s)
                return None
            before = now
    if process.returncode in STOPPED:
        raise SystemExit(128 + signal.SIGTERM)
    if process.returncode:
        raise TrialFailed(_last_line(folder / "train.log", process.returncode))
    # Epoch by epoch here too, so that nothing depends on when the file was looked at.
    if judge(read_metrics(folder / "train").get(monitor, {})):
        return None
    return float(read_summary(folder / "train")["score"])


def remove_weights(folder: Path) -> None:
    """Keep of a trial what it said and measured, and nothing of what takes space."""
    for name in ("train/checkpoint", "train/checkpoints", "train.partial"):
        shutil.rmtree(folder / name, ignore_errors=True)


@contextmanager
def _training(folder: Path, stop_within_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """Run `twotower train` in a process that ends when this one does."""
    command = [sys.executable, "-m", "twotower", "train", f"--config={folder / 'job.yaml'}"]
    with (folder / "train.log").open("ab") as log:
        # A session of its own: Ctrl-C reaches this process alone, which then lets it save.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            env=os.environ | {LAUNCHED: str(os.getpid())}, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            _stop(process, stop_within_s)


def _running(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _stop(process: subprocess.Popen[bytes], within_s: float) -> None:
    """Let a training save and end; end it where it does not."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(within_s + 10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path, code: int) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    said = lines[-1].removeprefix("twotower: error: ") if lines else "said nothing"
    return f"exit code {code}: {said} ({log})"
