"""The tables of an evaluation, and the command `twotower compare RUN_A RUN_B`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower.errors import UserError
from twotower.show import console, table
from twotower.train.config import EvaluateConfig


def show_evaluation(
    report: dict[str, Any], config: EvaluateConfig, items: int, heads: Sequence[str]
) -> None:
    """Print the report of an evaluation: every model's metrics, the towers' with intervals."""
    from twotower.train.evaluation.report import TOWERS

    k, results = config.monitor_k, report["results"]
    rows = {f"{m}@{cut}": f"{m}@{cut}" for cut in config.k
            for m in ("recall", "ndcg", "mrr", "hit_rate")}  # fmt: skip
    beyond = ("coverage", "gini", "novelty", "diversity", "arp", "popularity_bias")
    rows |= {f"{m}@{k}": f"{m}@{k}" for m in beyond}
    rows |= {f"recall@{k}/{n}": f"recall, {n} ({s:,})" for n, s in report["slices"].items()}
    for metric in ("recall", "ndcg"):
        rows |= {
            f"{metric}@{k}/{b['name']}": f"{metric}, {b['name']} ({b['queries']:,})"
            for b in report["decay"]
        }
    rows |= {f"{head}_{m}": f"{head}: {m}" for head in heads for m in ("auc", "mae", "rmse")}
    table(
        f"evaluate: {report['queries']:,} test queries of {report['users']:,} users, {items:,} "
        "items; 95% intervals over users (the baselines' are in metrics.json)",
        ["metric", *(f">{name}" for name in results)],
        [
            [label, *(_cell(model, name, report, model == TOWERS) for model in results)]
            for name, label in rows.items()
            if any(name in metrics for metrics in results.values())
        ],
    )


def _cell(model: str, name: str, report: dict[str, Any], with_interval: bool) -> str:
    value = report["results"][model].get(name)
    if value is None:
        return "-"
    digits = 4 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    if not with_interval or name not in report["intervals"][model]:
        return f"{value:.{digits}f}"
    low, high = report["intervals"][model][name]
    return f"{value:.{digits}f} {_short(low, digits)}-{_short(high, digits)}"


def _short(value: float, digits: int) -> str:
    """Write a number without the 0 before its point."""
    return f"{value:.{digits}f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.{digits}f}"


def add_arguments(parser: Any) -> None:
    """Add what `compare` takes."""
    for name, text in (("run_a", "First"), ("run_b", "Second")):
        parser.add_argument(name, type=str, help=f"{text} run_dir of a job, or its evaluation.")
    parser.add_argument(
        "--picture", type=str, default="comparison.png", help="PNG that is written."
    )


def compare(options: Any) -> int:
    """Compare two evaluations query by query; returns the exit code."""
    picture = Path(options.picture)
    if picture.suffix != ".png":
        raise UserError(f"--picture must be a file .png, got '{picture}'")
    from twotower.train.evaluation.comparison import compare_runs
    from twotower.train.plots import plot_comparison

    with console.status("comparing"):
        found = compare_runs(Path(options.run_a), Path(options.run_b))
        title = (
            f"A: {options.run_a}, B: {options.run_b}; {found.queries:,} queries of "
            f"{found.users:,} users"
        )
        plot_comparison(title, found.differences, found.before, picture)
    rows = []
    for name, (difference, low, high, p) in found.differences.items():
        before, after = found.before[name], found.before[name] + difference
        digits = 4 if max(abs(before), abs(after)) < 10 else 1
        share = f"{difference / before:+.1%}" if before else "-"
        rows.append([
            name, f"{before:.{digits}f}", f"{after:.{digits}f}", f"{difference:+.{digits}f}", share,
            f"{low:+.{digits}f} to {high:+.{digits}f}", f"{p:.4f}",
        ])  # fmt: skip
    table(
        f"compare: {title}",
        ["metric", ">A", ">B", ">B - A", ">of A", ">95% interval", ">p"],
        rows,
    )
    console.print(
        f"intervals by bootstrap, p-values by permutation, both over users; picture in {picture}"
    )
    for note in found.notes:
        console.print(f"[yellow]note[/yellow] {note}")
    return 0
