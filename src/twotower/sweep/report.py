"""What a sweep leaves: the trials as a table, a CSV and a picture, and the best job as YAML."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.errors import UserError
from twotower.files import partial_path
from twotower.job import Job, write_job
from twotower.show import console, table
from twotower.sweep.config import SweepConfig
from twotower.sweep.space import draw, with_values

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

# Trials that are shown; the CSV holds all.
SHOWN = 20
# Fewer finished trials say nothing of what a key matters.
IMPORTANCE_TRIALS = 10


def objective_name(job: Job) -> str:
    """Return what is made as high as can be."""
    return f"val/{job.evaluate.monitor}"


def finished(study: Study) -> list[FrozenTrial]:
    """Return the trials with a value, the best first."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(done, key=lambda t: (-(t.value or 0.0), t.number))


def best_of(study: Study) -> FrozenTrial | None:
    """Return the best trial that was trained to its end."""
    return next(iter(finished(study)), None)


def write_best(study: Study, job: Job, path: Path) -> None:
    """Write the whole job with the values of the best trial, where there is one."""
    best = best_of(study)
    if best is None or best.value is None:
        return
    values = draw(best, job)
    base = {key: value_of(job, key) for key in values}
    changes = [f"{key}: {base[key]} -> {value}" for key, value in values.items()]
    header = "\n".join([
        f"The best of {len(study.trials)} trials of a sweep of {job.name}.", "",
        f"  command   twotower run --config {path}",
        f"  quality   {objective_name(job)} {best.value:.4f} in trial {best.number}, whose weights "
        f"trial={best.number}/job.yaml goes on from", *(f"  changed   {text}" for text in changes),
    ])  # fmt: skip
    write_job(with_values(replace(job, sweep=SweepConfig()), values), path, values, header)


def value_of(job: Any, key: str) -> Any:
    """Return the value of a dotted key."""
    for name in key.split("."):
        job = getattr(job, name)
    return job


def _row(trial: FrozenTrial) -> list[Any]:
    values = trial.intermediate_values
    reached = trial.value if trial.value is not None else (max(values.values()) if values else None)
    seconds = trial.duration.total_seconds() if trial.duration else None
    return [trial.number, trial.state.name.lower(), reached, len(values), seconds]


def write_trials(study: Study, job: Job, path: Path) -> None:
    """Write all trials as CSV, atomically."""
    keys, partial = list(job.sweep.space), partial_path(path)
    with partial.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["trial", "state", objective_name(job), "epochs", "seconds", *keys, "reason"])
        for trial in study.get_trials(deepcopy=False):
            reason = trial.user_attrs.get("reason", "")
            out.writerow([*_row(trial), *(trial.params.get(key) for key in keys), reason])
    partial.replace(path)


def show_sweep(study: Study, job: Job, folder: Path) -> None:
    """Print the best trials and draw all.

    Raises:
        UserError: when no trial was trained to its end.
    """
    from twotower.train.plots import plot_sweep

    done, trials = finished(study), study.get_trials(deepcopy=False)
    if not done:
        raise UserError(
            f"{folder}: no trial was trained to its end: raise sweep.trials or sweep.timeout_s, or "
            "set sweep.pruner to none"
        )
    rest = [t for t in trials if t not in done]
    keys, name = list(job.sweep.space), objective_name(job)
    rows = []
    for trial in [*done, *rest][:SHOWN]:
        number, state, reached, epochs, seconds = _row(trial)
        rows.append([
            number, state, "-" if reached is None else f"{reached:.4f}", epochs,
            "-" if seconds is None else f"{seconds:.0f}",
            *(_short(trial.params.get(key)) for key in keys),
        ])  # fmt: skip
    labels = [key.removeprefix("train.").removeprefix("model.") for key in keys]
    title = f"sweep: the best {len(rows)} of {len(trials)} trials"
    table(title, [">trial", "state", f">{name}", ">epochs", ">s", *labels], rows)
    importance = _importance(study, len(done))
    objective = [(t.number, t.state.name.lower(), _row(t)[2]) for t in trials]
    plot_sweep(name, objective, importance, folder / "sweep.png")
    best = done[0]
    console.print(
        f"best: trial {best.number} with {name} {best.value:.4f}; twotower run --config "
        f"{folder / 'best.yaml'}; trials in {folder / 'trials.csv'}, picture in "
        f"{folder / 'sweep.png'}"
    )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _importance(study: Study, done: int) -> dict[str, float]:
    """Return how much each key matters for being among the best; none of too few trials.

    PED-ANOVA (Watanabe et al. 2023), which needs no model of the objective.
    """
    if done < IMPORTANCE_TRIALS:
        return {}
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    evaluator = PedAnovaImportanceEvaluator(target_quantile=0.25)
    return dict(get_param_importances(study, evaluator=evaluator))
