"""The steps of a job: each reads what the one before left, and leaves a whole directory or none.

A step whose inputs have not changed since it last finished is skipped: its output carries a
fingerprint of the configuration, of the step before and, for the log, of the files.

    run_dir/
      prepared/      see `twotower.data.prepare`
      train/         see `twotower.train.checkpoint`
      sweep/         see `twotower.sweep.sweep`
      evaluation/    see `twotower.train.evaluation.report`
      bundles/<n>/   see `twotower.export.bundle`
      server/        Triton's model repository, logs and server.json

Heavy libraries are imported by the steps that need them: `serve` and `recommend` never load torch.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from twotower.bundles import pruned_text
from twotower.errors import UserError
from twotower.evaluations import show_evaluation
from twotower.export.bundle import bundle_versions, latest_bundle, read_bundle
from twotower.export.manifest import SIDES
from twotower.files import (
    atomic_directory,
    fingerprint,
    only_writer,
    partial_path,
    recover,
)
from twotower.job import Job
from twotower.launching import processes_of, show_plan, train_in_processes
from twotower.show import console, facts, long_work
from twotower.train.config import QUERIES
from twotower.train.launch import LAUNCHED, end_with_parent, find_place
from twotower.train.summary import check_training, is_tracked, read_summary

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset


def prepare(job: Job) -> None:
    """Prepare the log."""
    from twotower.data.prepare.plan import make_plan, refuse_loss
    from twotower.data.prepare.prepare import prepare as prepare_log
    from twotower.data.prepared import find_prepared

    target = job.path("prepared")
    with only_writer(target.parent):
        recover(target)
        previous = find_prepared(target)
        plan = make_plan(job.data, previous)
        if previous is None:
            refuse_loss(target, plan)
        if plan.kind == "nothing":
            shutil.rmtree(partial_path(target), ignore_errors=True)
            return _unchanged("prepare", target)
        with long_work("prepare") as report, atomic_directory(target) as partial:
            summary = prepare_log(job.data, partial, previous, report)
    counts = {name.replace("_", " "): n for name, n in summary["counts"].items() if n}
    rows = {f"table {n}": f"{t['rows']:,} rows" for n, t in summary["tables"].items()}
    files = sum(len(s.files) for s in plan.sources)
    how = {"append": f"{files:,} files, appended to what was prepared", "all": f"{files:,} files"}
    facts("prepare", {"read": how[plan.kind], **counts, **rows, "written to": target})
    for reason in summary["bad_rows"]:
        console.print(f"[yellow]skipped[/yellow] {escape(reason)}")


def open_prepared(job: Job) -> PreparedDataset:
    """Open the prepared dataset of a job.

    Raises:
        UserError: when it is of other inputs.
    """
    from twotower.data.prepare.plan import make_plan
    from twotower.data.prepared import PreparedDataset

    data = PreparedDataset(job.path("prepared"))
    if make_plan(job.data, data).kind != "nothing":
        raise UserError(
            f"{data.path}: was prepared from another log or schema: run `twotower prepare` again"
        )
    return data


def train(job: Job) -> None:
    """Train the towers, resuming a killed run of the same inputs; on one process a device."""
    target = job.path("train")
    place = find_place()
    end_with_parent()
    console.quiet = place is not None and place.rank > 0
    data = open_prepared(job)
    mark = train_mark(job, data)
    if _mark_of(target / "train.json") == mark and _sound("train", check_training, target):
        return _unchanged("train", target)
    processes = processes_of(job.train)
    if place is None and processes > 1:
        train_in_processes(job, processes)
        summary = read_summary(target)
    else:
        from twotower.train.train import train as train_towers

        summary = train_towers(
            data, target, job=asdict(job), fingerprint=mark, seed=job.seed, name=job.name,
            model=job.model, config=job.train, evaluate=job.evaluate, tracking=job.tracking,
            place=place, show=show_plan,
        )  # fmt: skip
        if LAUNCHED in os.environ or not summary:
            return  # the launcher, or rank 0, says what was done
    facts("train", {
        "epochs": summary["epochs"], "steps": summary["steps"],
        "resumed from": summary["resumed_from"] or "-", "best step": summary["best_step"],
        summary["monitor"]: f"{summary['score']:.4f}", "seconds": f"{summary['seconds']:.0f}",
        "checkpoint": target / "checkpoint", "curves": target / "curves.png",
    })  # fmt: skip


# Of `train`: who trains, and what is written meanwhile. It changes the weights by rounding alone,
# so a run may go on elsewhere.
NO_INPUT = (
    "processes", "elastic", "stop_within_s", "workers", "accelerator", "pipeline", "compile",
    "sharding", "tables", "checkpoint_every_steps", "checkpoint_async", "keep_best",
    "keep_every_steps", "profile",
)  # fmt: skip


def train_mark(job: Job, data: PreparedDataset) -> str:
    """Fingerprint what the weights depend on; of the evaluation, what chooses the epoch."""
    chooses = [job.evaluate.monitor, job.evaluate.max_queries]
    training = {key: value for key, value in asdict(job.train).items() if key not in NO_INPUT}
    sections = [asdict(job.model), training, chooses]
    return fingerprint([data.fingerprint, job.seed, *sections])


def _evaluation_mark(job: Job, trained: dict[str, Any]) -> str:
    return fingerprint([trained["fingerprint"], asdict(job.evaluate)])


def _trained(job: Job) -> tuple[PreparedDataset, dict[str, Any]]:
    """Return the dataset and the summary of its training, refusing one of other inputs."""
    data, target = open_prepared(job), job.path("train")
    summary = read_summary(target)
    if summary["fingerprint"] != train_mark(job, data):
        raise UserError(
            f"{target}: was trained from other data or settings: run `twotower train` again"
        )
    return data, summary


def evaluate(job: Job) -> None:
    """Judge the towers and two baselines on the test split."""
    target = job.path("evaluation")
    data, trained = _trained(job)
    mark = _evaluation_mark(job, trained)
    # An evaluation of before there were queries in it is made again.
    if _mark_of(target / "metrics.json") == mark and (target / QUERIES).exists():
        return _unchanged("evaluate", target)
    from twotower.train.checkpoint.towers import load_heads, load_towers
    from twotower.train.evaluation import compare_with_baselines, write_report

    with console.status("evaluating over the whole catalogue"), atomic_directory(target) as partial:
        model = load_towers(job.path("train"))
        heads = load_heads(job.path("train"), data, job.model.direction_dim, job.train.heads)
        report, queries = compare_with_baselines(model, data, job.evaluate, job.seed, heads)
        write_report(partial, {"fingerprint": mark, **report}, queries, job.evaluate.monitor_k)
    show_evaluation(report, job.evaluate, len(data.items), list(job.train.heads))
    console.print(f"written to {target}, picture in {target / 'evaluation.png'}")


def export(job: Job) -> None:
    """Make the next bundle, unless the newest holds the same."""
    bundles = job.path("bundles")
    data, trained = _trained(job)
    metrics = _metrics(job, trained)
    mark = fingerprint([trained["fingerprint"], job.name, asdict(job.export), metrics])
    if versions := bundle_versions(bundles):
        newest = bundles / str(versions[-1])
        if _mark_of(newest / "manifest.json") == mark and _sound("export", read_bundle, newest):
            _track(job, newest, trained, metrics)
            return _unchanged("export", newest)
    from twotower.export.export import export as export_bundle

    with long_work("export") as report:
        bundle = export_bundle(
            data, job.path("train"), bundles, config=job.export, job=asdict(job), name=job.name,
            fingerprint=mark, metrics=metrics, seed=job.seed,
            progress=report,
        )  # fmt: skip
    _track(job, bundle.path, trained, metrics)
    m = bundle.manifest
    size = sum(f.stat().st_size for f in bundle.path.iterdir()) / 1e6
    facts("export", {
        "bundle": bundle.path, "version": m.version, "items": m.num_items, "width": m.dim,
        "golden queries": len(bundle.golden()),
        "largest score difference": f"{m.parity['scores']:.1e} (eager against ONNX Runtime)",
        **({"pruned": pruned_text(m)} if job.export.prune_vocab else {}),
        "size": f"{size:.1f} MB",
    })  # fmt: skip


def build_engines(job: Job) -> None:
    """Build the newest bundle's TensorRT engines for this host's GPU, into the user's cache.

    Raises:
        UserError: where there is no GPU or no TensorRT, or it refuses a graph.
    """
    script = latest_bundle(job.path("bundles")) / "build_engine.py"
    engines: dict[str, Any] = {}
    precisions = job.export.tensorrt.precisions
    for tower, precision in itertools.product(SIDES, precisions):
        command = [sys.executable, str(script), "--tower", tower, "--precision", precision]
        with console.status(f"building the {tower} tower's {precision} engine"):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise UserError(
                f"the bundle is whole, but no {precision} engine of the {tower} tower was built: "
                f"{reason.removeprefix('build_engine: ')} (the host that serves can run {script})"
            )
        engines[f"{tower} {precision}"] = done.stdout.splitlines()[-1]
    facts("TensorRT engines", engines)


def _track(job: Job, bundle: Path, trained: dict[str, Any], metrics: dict[str, float]) -> None:
    """Hand a bundle to the tracker, unless it has been."""
    directory, run_id = job.path("train"), trained["wandb_run"]
    if run_id is None or job.tracking.mode() == "disabled":
        return
    if is_tracked(directory, int(bundle.name)):
        return
    from twotower.train.tracking import log_bundle

    with console.status("tracking the bundle"):
        log_bundle(directory, bundle, job.tracking, run_id, metrics)


def _metrics(job: Job, trained: dict[str, Any]) -> dict[str, float]:
    """Return the towers' test metrics, if this model was evaluated."""
    file = job.path("evaluation") / "metrics.json"
    if _mark_of(file) != _evaluation_mark(job, trained):
        return {}
    metrics: dict[str, float] = json.loads(file.read_text())["results"]["two towers"]
    return metrics


def _mark_of(manifest: Path) -> str | None:
    """Return the fingerprint in a manifest, None when there is no readable one."""
    try:
        mark: str = json.loads(manifest.read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return mark


def _sound(step: str, check: Callable[[Path], object], target: Path) -> bool:
    """Whether what a step left is whole; says so where it is not."""
    try:
        check(target)
    except UserError:
        console.print(f"[yellow]{step}[/yellow]: {escape(str(target))} is damaged, made again")
        return False
    return True


def _unchanged(step: str, target: Path) -> None:
    console.print(f"[bold]{step}[/bold]: inputs unchanged since {target} was made, skipped")
