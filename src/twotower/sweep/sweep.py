"""The command `twotower sweep --config JOB.yaml`: the settings of a job that validate best.

Optuna draws and judges (Akiba et al. 2019); every trial is a training in a process of its own, one
after another, on the prepared dataset that all share. Everything drawn and measured goes to a
journal file at once, so a sweep that is killed goes on where it was, in the middle of a trial too,
and draws what it would have drawn.

    run_dir/sweep/
      journal.log   Optuna's storage
      trial=<n>/    see `twotower.sweep.trial`; only the best one's weights are kept
      trials.csv    all trials
      best.yaml     the whole job with the best values
      sweep.png
"""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.markup import escape

from twotower import steps
from twotower.errors import UserError
from twotower.files import fingerprint, only_writer
from twotower.job import Job
from twotower.show import console
from twotower.sweep.report import best_of, objective_name, show_sweep, write_best, write_trials
from twotower.sweep.space import draw
from twotower.sweep.trial import TrialFailed, remove_weights, train_trial, trial_folder
from twotower.train.launch import find_place

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import Trial

STUDY = "sweep"


def sweep(job: Job) -> None:
    """Search the job's space, and write the best job."""
    if not job.sweep.space:
        raise UserError(
            "sweep.space is empty: name the keys to search, for instance "
            "sweep: {space: {train.table_lr: {low: 0.01, high: 0.5, log: true}}}"
        )
    if find_place() is not None:
        raise UserError(
            "twotower sweep was started as one of several processes: start it once, without a "
            "launcher; each trial starts train.processes of its own"
        )
    steps.prepare(job)
    mark = _mark(job)
    folder, started = job.path("sweep"), time.monotonic()
    with only_writer(folder):
        study = _open(job, folder, mark)
        while (trial := _next(study, job, started)) is not None:
            _try(study, trial, job)
            write_trials(study, job, folder / "trials.csv")
            write_best(study, job, folder / "best.yaml")
        show_sweep(study, job, folder)


def _mark(job: Job) -> str:
    """Fingerprint what makes the trials of two commands those of one sweep."""
    data = steps.open_prepared(job)
    space = {key: vars(dimension) for key, dimension in job.sweep.space.items()}
    return fingerprint([steps.train_mark(job, data), space, job.sweep.sampler, job.sweep.seed])


def _open(job: Job, folder: Path, mark: str) -> Study:
    """Open the study in a folder, or begin one.

    Raises:
        UserError: when it is of another job, log or space.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    journal = folder / "journal.log"
    _mend(journal)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))), study_name=STUDY,
            direction="maximize", load_if_exists=True, pruner=_pruner(job),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{journal}: damaged ({error}): remove {folder} to begin anew") from None
    if study.user_attrs.get("mark", mark) != mark:
        raise UserError(
            f"{folder}: holds the trials of another job, log or space: remove it to begin anew, or "
            "give another run_dir"
        )
    study.set_user_attr("mark", mark)
    return study


def _mend(journal: Path) -> None:
    """Settle what a killed sweep left: a line cut short, and a lock. This is the only writer."""
    for lock in journal.parent.glob(f"{journal.name}.lock*"):
        lock.unlink()
    if journal.exists():
        content = journal.read_bytes()
        os.truncate(journal, content.rfind(b"\n") + 1)


def _pruner(job: Job) -> Any:
    from optuna.pruners import MedianPruner, NopPruner

    if job.sweep.pruner == "none":
        return NopPruner()
    # The first epoch says little; a median of fewer trials less.
    return MedianPruner(n_startup_trials=max(1, min(5, job.sweep.trials // 4)), n_warmup_steps=1)


def _sampler(job: Job, number: int) -> Any:
    """Return what draws a trial: seeded by trial, so that a resumed sweep draws the same."""
    from optuna.samplers import RandomSampler, TPESampler

    seed = int(np.random.SeedSequence([job.sweep.seed, number]).generate_state(1)[0])
    return RandomSampler(seed) if job.sweep.sampler == "random" else TPESampler(seed=seed)


def _next(study: Study, job: Job, started: float) -> Trial | None:
    """Return the trial that was killed, or else a new one while there is number and time."""
    from optuna.trial import Trial, TrialState

    begun = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    if begun:
        study.sampler = _sampler(job, begun[0].number)
        return Trial(study, begun[0]._trial_id)
    limit, spent = job.sweep.timeout_s, time.monotonic() - started
    number = len(study.get_trials(deepcopy=False))
    if number >= job.sweep.trials or (limit is not None and spent >= limit):
        return None
    study.sampler = _sampler(job, number)
    return study.ask()


def _try(study: Study, trial: Trial, job: Job) -> None:
    """Train a trial and tell the study what came of it.

    Raises:
        UserError: when it failed, and none before it has succeeded.
    """
    from optuna.trial import TrialState

    name, number, told = objective_name(job), trial.number, dict[int, float]()
    values = draw(trial, job)
    of = f"trial {number} of {job.sweep.trials}"
    with console.status(of) as status:

        def judge(by_step: dict[int, float]) -> bool:
            for epoch, step in enumerate(sorted(by_step)):
                if epoch not in told:
                    told[epoch] = by_step[step]
                    if epoch not in study.trials[number].intermediate_values:
                        trial.report(by_step[step], epoch)
                    status.update(f"{of}: epoch {epoch + 1}, {name} {by_step[step]:.4f}")
                    if trial.should_prune():
                        return True
            return False

        try:
            value = train_trial(job, number, values, judge)
        except TrialFailed as error:
            trial.set_user_attr("reason", str(error))
            study.tell(trial, state=TrialState.FAIL)
            remove_weights(trial_folder(job, number))
            if best_of(study) is None:
                raise UserError(f"sweep: trial {number} failed: {error}") from None
            console.print(f"[yellow]trial {number} failed[/yellow] {escape(str(error))}")
            return
    before = best_of(study)
    study.tell(trial, value, state=TrialState.PRUNED if value is None else None)
    best = best_of(study)
    for other in {number, before.number if before else number}:
        if best is None or other != best.number:
            remove_weights(trial_folder(job, other))
    reached = "pruned" if value is None else f"{name} {value:.4f}"
    so_far = f", best {best.value:.4f} of trial {best.number}" if best else ""
    console.print(f"trial {number}: {reached}{so_far}")
