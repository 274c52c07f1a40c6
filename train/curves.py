"""The curves of a run: read from its CSV logs, drawn as PNG."""

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
