"""Pictures of a run as PNG: its curves, read from the CSV logs, and its evaluation."""

from __future__ import annotations

import csv
from pathlib import Path

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


def plot_curves(series: Series, monitor: str, path: Path) -> None:
    """Draw the loss and the validation metrics against the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss = sorted(series.get("train/loss", {}).items())
    left.plot([s for s, _ in loss], [v for _, v in loss], color="tab:blue")
    left.set(title="training loss", xlabel="step", ylabel="sampled softmax")
    k = monitor.rsplit("@", 1)[1]
    for name in (f"val/{metric}@{k}" for metric in ("recall", "ndcg", "mrr")):
        points = sorted(series.get(name, {}).items())
        right.plot([s for s, _ in points], [v for _, v in points], marker="o", label=name)
    right.set(title="validation, whole catalogue", xlabel="step")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_evaluation(
    results: dict[str, dict[str, float]], slices: dict[str, int], k: int, path: Path
) -> None:
    """Draw the towers beside the baselines: accuracy at k, and recall by slice.

    Args:
        results: model -> metric -> value.
        slices: slice -> how many relevant items or queries it holds.
        k: the cut-off.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    whole = [f"{m}@{k}" for m in ("recall", "ndcg", "mrr", "hit_rate", "coverage")]
    prefix = f"recall@{k}/"
    shown = [name for name, size in slices.items() if size]
    width = 0.8 / len(results)
    for place, (name, metrics) in enumerate(results.items()):
        for axis, names in ((left, whole), (right, [prefix + n for n in shown])):
            x = [i + place * width for i in range(len(names))]
            axis.bar(x, [metrics.get(n, 0.0) for n in names], width, label=name)
    sized = [f"{name}\nn={slices[name]:,}" for name in shown]
    for axis, labels in ((left, whole), (right, sized)):
        axis.set_xticks([i + 0.4 - width / 2 for i in range(len(labels))], labels)
        axis.grid(axis="y", alpha=0.3)
    left.set_title("test split, whole catalogue, seen items removed")
    right.set_title(f"recall@{k} by popularity in training, and of users without a history")
    left.legend()
    figure.savefig(path, dpi=120)
