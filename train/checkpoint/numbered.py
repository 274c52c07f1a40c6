"""The checkpoints of a training by step: `step=<n>` below a folder. Needs no torch."""

from __future__ import annotations

from pathlib import Path

NAME = "step="


def step_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is."""
    return folder / f"{NAME}{step}"


def numbered(folder: Path) -> dict[int, Path]:
    """Return the checkpoints that there are, the lowest step first; whether whole, is not asked."""
    names = {path.name.removeprefix(NAME): path for path in folder.glob(f"{NAME}*")}
    found = {int(name): path for name, path in names.items() if name.isdecimal()}
    return dict(sorted(found.items()))


def resume_text(folder: Path) -> str:
    """Say from where a training goes on, if the last checkpoint is whole."""
    steps = list(numbered(folder))
    return f"step {steps[-1]}" if steps else "its start, no step was saved"
