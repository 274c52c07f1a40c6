"""The command `twotower tune-serving`: the settings of the server for a latency goal.

    twotower tune-serving --config JOB.yaml --p99-ms=20
    twotower serve --config JOB.yaml --config RUN_DIR/tuning/serve.yaml

Every setting is measured on a server of its own, with the requests of `twotower load`.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import yaml
from jsonargparse import Namespace

from twotower.export.bundle import Bundle, latest_bundle, read_bundle
from twotower.files import atomic_directory, write_json
from twotower.job import Job
from twotower.load_testing import read_options, traffic
from twotower.serve.load.asker import Request, Target
from twotower.serve.load.config import TuneConfig
from twotower.serve.load.generator import LoadGenerator
from twotower.serve.load.measurement import Measurement
from twotower.serve.load.tuning import (
    Setting,
    Trial,
    chosen,
    median,
    setting_of,
    settings_to_try,
    tune,
)
from twotower.serve.supervisor import passing_server
from twotower.show import console, long_work, table

MISSED = 1  # the exit code


def tune_serving(job: Job, options: Namespace) -> int:
    """Measure settings, show them all, and write the section `serve` of the best; the exit code."""
    config = read_options(TuneConfig, options)
    config.validate()
    own = setting_of(job.serve)
    settings = settings_to_try(config, job.serve, os.cpu_count() or 1)
    for setting in settings:
        setting.applied(job.serve).validate()
    bundle = read_bundle(latest_bundle(job.path("bundles")), signed_by=job.serve.require_signature)
    requests, origin = traffic(job, config.requests)

    def measure(setting: Setting) -> Measurement:
        return _measure(job, bundle, setting, requests, config)

    with long_work("tune-serving") as report:
        trials = tune(settings, measure, config, job.seed, report)
    best, better = chosen(trials, own, config.p99_ms)
    reached = best.merits(config.p99_ms)[(len(best.runs) - 1) // 2][0]
    said = _say(best, better, reached, config)
    target = job.path("tuning")
    with atomic_directory(target) as partial:
        _write(partial / "serve.yaml", target, best.setting, [
            f"Of {len(trials)} settings for {job.name} on {os.cpu_count()} cores, by "
            "`twotower tune-serving`.", _load(config), said,
        ])  # fmt: skip
        write_json(partial / "trials.json", {
            "config": asdict(config), "requests": f"{len(requests):,} of {origin}",
            "reached": reached, "best": asdict(best.setting), "own": asdict(own),
            "trials": [{**asdict(t.setting), "runs": [asdict(m) for m in t.runs]} for t in trials],
        })  # fmt: skip
    _show(trials, best, config)
    console.print(f"{_load(config)}; {len(requests):,} requests of {origin}", markup=False)
    console.print(said, markup=False)
    console.print(
        f"twotower serve --config JOB.yaml --config {target / 'serve.yaml'}", markup=False
    )
    return 0 if reached else MISSED


def _measure(
    job: Job, bundle: Bundle, setting: Setting, requests: list[Request], config: TuneConfig
) -> Measurement:
    with passing_server(bundle, setting.applied(job.serve)) as server:
        target = Target(
            url=server.grpc_url, proxy=False, deadline_s=config.deadline_ms / 1000, k=config.k,
            requests=requests, tls=job.serve.tls.client(),
        )  # fmt: skip
        with LoadGenerator(target, config.processes, job.seed) as generator:
            warmup = config.warmup_seconds
            if config.rate is None:
                return generator.closed_loop(config.clients, config.seconds, warmup_seconds=warmup)
            return generator.open_loop(
                config.rate, config.seconds, warmup_seconds=warmup, arrivals=config.arrivals
            )


def _command(folder: Path) -> str:
    return f"twotower serve --config JOB.yaml --config {folder / 'serve.yaml'}"


def _load(config: TuneConfig) -> str:
    if config.rate is None:
        return f"{config.clients} requests under way, {config.seconds:g} s a run"
    return f"{config.rate:g} requests a second ({config.arrivals}), {config.seconds:g} s a run"


def _say(best: Trial, better: bool, reached: bool, config: TuneConfig) -> str:
    what = (
        f"p99 {median(best.p99s_ms()):.1f} ms and {median(best.rates()):,.0f} answers a second, "
        f"medians of {len(best.runs)} runs"
    )
    goal = "within" if reached else "NOT within"
    why = (
        "better than the job's own settings in every run"
        if better
        else "the job's own settings, which no other beat beyond the noise of the runs"
    )
    return f"{what}: {goal} the goal of {config.p99_ms:g} ms; {why}."


def _write(path: Path, final: Path, setting: Setting, lines: list[str]) -> None:
    comment = [*lines, "", f"  command   {_command(final)}"]
    text = yaml.safe_dump({"serve": asdict(setting)}, sort_keys=False)
    path.write_text("".join(f"# {line}".rstrip() + "\n" for line in comment) + text)


def _show(trials: list[Trial], best: Trial, config: TuneConfig) -> None:
    rows = []
    for trial in trials:
        s, reached = trial.setting, trial.merits(config.p99_ms)[(len(trial.runs) - 1) // 2][0]
        rows.append([
            s.instances, s.threads, f"{s.max_queue_delay_us:,}", s.max_batch_size, len(trial.runs),
            _spread(trial.rates(), 0), _spread(trial.p99s_ms(), 1), "yes" if reached else "no",
            "<" if trial is best else "",
        ])  # fmt: skip
    columns = [">inst.", ">thr.", ">delay us", ">batch", ">runs", ">answers/s", ">p99 ms",
               ">goal", ""]  # fmt: skip
    table("tune-serving: median and half of the range of a setting's runs", columns, rows)


def _spread(ascending: list[float], digits: int) -> str:
    middle = median(ascending)
    if ascending[-1] == float("inf"):
        return "failed" if middle == float("inf") else f"{middle:,.{digits}f} ±failed"
    half = (ascending[-1] - ascending[0]) / 2
    return f"{middle:,.{digits}f} ±{half:,.{digits}f}" if len(ascending) > 1 else (
        f"{middle:,.{digits}f}"
    )  # fmt: skip
