"""Pictures of a run as PNG: its curves, read from the CSV logs, and its evaluation."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

Series = dict[str, dict[int, float]]


def read_metrics(directory: Path) -> Series:
    """Return metric -> step -> value over all attempts of a run; a later attempt counts."""
    series: Series = {}
    files = (directory / "csv").glob("version_*/metrics.csv")
    for file in sorted(files, key=lambda f: int(f.parent.name.split("_")[1])):
        with file.open(newline="") as handle:
            for row in csv.DictReader(handle):
                for name, value in row.items():
                    if name not in ("step", "epoch") and value:
                        series.setdefault(name, {})[int(row["step"])] = float(value)
    return series


# Of a step, from the bottom of the stack to its top, with a colour of its own each.
PARTS = {
    "data": "tab:brown", "copy": "tab:pink", "lookup": "tab:blue", "dense": "tab:orange",
    "communication": "tab:red", "other": "tab:gray",
}  # fmt: skip


def plot_curves(series: Series, monitor: str, path: Path) -> None:
    """Draw loss, accuracy, validation, speed, a step's time by part, rates and gradient norm.

    Args:
        series: of a run, as `read_metrics` returns it; what is missing is left out.
        monitor: validation metric, whose cut-off is shown.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    (loss, validation, rates), (speed, split, norm) = figure.subplots(2, 3)
    _lines(loss, series, {"train/loss": "sampled softmax"}, "training", "tab:blue")
    accuracy = {"train/accuracy": "in-batch accuracy"}
    _lines(loss.twinx(), series, accuracy, None, "tab:orange")
    k = monitor.rsplit("@", 1)[1]
    names = {f"val/{metric}@{k}": f"{metric}@{k}" for metric in ("recall", "ndcg", "mrr")}
    _lines(validation, series, names, "validation, whole catalogue", marker="o")
    validation.set_ylim(bottom=0)
    _lines(rates, series, {"lr/tables": "tables", "lr/dense": "dense"}, "learning rates")
    # Logarithmic, but for the 0 that a schedule may end at.
    rates.set_yscale("symlog", linthresh=1e-6)
    _lines(speed, series, {"speed/examples_per_s": "examples a second"}, "speed", "tab:blue")
    speed.set_ylim(bottom=0)
    _stack(split, series)
    _lines(norm, series, {"train/grad_norm": "norm, before clipping"}, "dense gradients")
    norm.set_ylim(bottom=0)
    figure.savefig(path, dpi=110)


def _stack(axis: Any, series: Series) -> None:
    """Draw what the time of the profiled steps was spent on, with the shares of all of them."""
    steps = sorted(series.get("step/other_ms", {}))
    spent = {
        part: [series[f"step/{part}_ms"].get(step, 0.0) for step in steps]
        for part in PARTS
        if f"step/{part}_ms" in series
    }
    total = sum(sum(ms) for ms in spent.values())
    bottom = [0.0] * len(steps)
    places = [str(step) for step in steps]
    for part, ms in spent.items():
        label = f"{part} {sum(ms) / total:.0%}" if total else part
        axis.bar(places, ms, 0.8, bottom, label=label, color=PARTS[part])
        bottom = [b + m for b, m in zip(bottom, ms, strict=True)]
    axis.set_title("a profiled step by part", fontsize=10)
    axis.set_xlabel("step")
    axis.set_ylabel("ms")
    axis.set_xticks(places[:: len(places) // 8 + 1])
    axis.grid(axis="y", alpha=0.3)
    if steps:
        # Above the bars, which fill the panel.
        axis.set_ylim(top=1.35 * max(bottom))
        axis.legend(loc="upper center", fontsize=8, ncols=3)


def _lines(
    axis: Any, series: Series, names: dict[str, str], title: str | None,
    color: str | None = None, marker: str | None = None,
) -> None:  # fmt: skip
    """Draw metrics by step; a title makes it the panel's first axis, with the grid."""
    for name, label in names.items():
        points = sorted(series.get(name, {}).items())
        x, y = [s for s, _ in points], [v for _, v in points]
        axis.plot(x, y, color=color, marker=marker, label=label, alpha=0.9)
    if title is not None:
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if len(names) == 1:
        axis.set_ylabel(next(iter(names.values())), color=color or "black")
    else:
        axis.legend(loc="best", fontsize=9)


def plot_evaluation(report: dict[str, Any], k: int, path: Path) -> None:
    """Draw the towers beside the baselines at k, with 95% intervals: accuracy, slices and decay.

    Args:
        report: as `twotower.train.evaluation.report` makes it.
        k: the cut-off.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    names = ("recall", "ndcg", "mrr", "hit_rate", "coverage", "gini", "diversity")
    panels = [(
        "test split, whole catalogue, seen items removed",
        {f"{m}@{k}": m.replace("_", " ") for m in names},
    ), (
        f"recall@{k} by popularity in training, and of users without a history",
        {f"recall@{k}/{n}": f"{n}\nn={size:,}" for n, size in report["slices"].items() if size},
    )]  # fmt: skip
    if report["decay"]:
        days = {b["name"]: f"{b['name']}\nn={b['queries']:,}" for b in report["decay"]}
        panels.append((
            f"recall@{k} by days since the last training event",
            {f"recall@{k}/{name}": label for name, label in days.items()},
        ))  # fmt: skip
    figure = Figure(figsize=(12, 3.6 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, shown) in zip(axes, panels, strict=True):
        _bars(axis, report, shown)
        axis.set_title(title, fontsize=10)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def _bars(axis: Any, report: dict[str, Any], shown: dict[str, str]) -> None:
    """Draw metrics of every model side by side, each with its interval."""
    results = report["results"]
    width = 0.8 / len(results)
    for place, (model, metrics) in enumerate(results.items()):
        bounds = report["intervals"][model]
        x = [i + place * width for i in range(len(shown))]
        y = [metrics.get(name, 0.0) for name in shown]
        ends = [bounds.get(name, (v, v)) for name, v in zip(shown, y, strict=True)]
        # A skewed few users may leave the value outside of the percentiles.
        reach = [[max(0.0, v - low) for v, (low, _) in zip(y, ends, strict=True)],
                 [max(0.0, high - v) for v, (_, high) in zip(y, ends, strict=True)]]  # fmt: skip
        axis.bar(x, y, width, yerr=reach, label=model, error_kw={"elinewidth": 1, "capsize": 2})
    middle = [i + 0.4 - width / 2 for i in range(len(shown))]
    axis.set_xticks(middle, list(shown.values()), fontsize=9)
    axis.grid(axis="y", alpha=0.3)


def plot_comparison(
    title: str, differences: dict[str, tuple[float, float, float, float]],
    before: dict[str, float], path: Path,
) -> None:  # fmt: skip
    """Draw by how much of the first run's value each metric of the second differs.

    Args:
        title: what is compared.
        differences: metric -> difference, low and high end of its interval, and p-value.
        before: metric -> value of the first run; one of 0 has no share and is left out.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    shown = [name for name in differences if before[name] > 0]
    figure = Figure(figsize=(9, 1.5 + 0.4 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for place, name in enumerate(reversed(shown)):
        middle, low, high = (100 * v / before[name] for v in differences[name][:3])
        sure = low > 0 or high < 0
        axis.plot([low, high], [place, place], color="tab:blue" if sure else "tab:gray", lw=3)
        axis.plot(middle, place, "o", color="black")
        axis.annotate(
            f"p = {differences[name][3]:.4f}", (1.01, place), fontsize=9, va="center",
            xycoords=("axes fraction", "data"),
        )  # fmt: skip
    axis.set_yticks(range(len(shown)), list(reversed(shown)))
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel("difference, % of the first run's value, with its 95% interval over users")
    axis.set_title(title, fontsize=10)
    axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_sweep(
    objective: str, trials: list[tuple[int, str, float | None]], importance: dict[str, float],
    path: Path,
) -> None:  # fmt: skip
    """Draw what each trial of a sweep reached, the best so far, and what each key matters.

    Args:
        objective: what is made as high as can be.
        trials: number, state and the objective reached, in order.
        importance: key -> share; none where it is not known.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11 if importance else 7, 4), layout="constrained")
    axes = figure.subplots(1, 2 if importance else 1, squeeze=False)[0]
    colors = {"complete": "tab:blue", "pruned": "tab:gray"}
    for state, color in colors.items():
        found = [(n, v) for n, s, v in trials if s == state and v is not None]
        axes[0].plot([n for n, _ in found], [v for _, v in found], "o", color=color, label=state)
    best, so_far = float("-inf"), []
    for number, state, value in trials:
        if state == "complete" and value is not None:
            best = max(best, value)
            so_far.append((number, best))
    axes[0].step(*zip(*so_far, strict=True), where="post", color="tab:orange", label="best so far")
    axes[0].set_xlabel("trial")
    axes[0].set_ylabel(objective)
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=9)
    if importance:
        names = sorted(importance, key=lambda name: importance[name])
        axes[1].barh(names, [importance[name] for name in names])
        axes[1].set_title("importance for being in the best quarter (PED-ANOVA)", fontsize=10)
    figure.savefig(path, dpi=110)
