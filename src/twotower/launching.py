"""The step `train` on several processes, and its plan as it is shown."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from twotower.errors import gigabytes
from twotower.files import partial_path, write_json
from twotower.job import Job
from twotower.show import table
from twotower.train.checkpoint.numbered import resume_text
from twotower.train.config import TrainConfig
from twotower.train.launch import launch

if TYPE_CHECKING:
    from twotower.train.sharding import Plan


def processes_of(config: TrainConfig) -> int:
    """Return how many processes train where no launcher says it: one a device."""
    if config.processes is not None or config.accelerator == "cpu":
        return config.processes or 1
    import torch

    return max(1, torch.cuda.device_count())


def train_in_processes(job: Job, processes: int) -> None:
    """Train in processes of this very command, which find their place among each other.

    Raises:
        SystemExit: when they did not succeed, which they have said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.json"
        write_json(file, asdict(job))
        code = launch(
            [sys.executable, "-m", "twotower", "train", f"--config={file}"], processes,
            restarts=job.train.elastic, stop_within_s=job.train.stop_within_s,
            resume_point=lambda: resume_text(partial_path(job.path("train")) / "checkpoints"),
        )  # fmt: skip
    if code:
        raise SystemExit(code)


def show_plan(plan: Plan) -> None:
    """Print where the tables are and what share of a rank's memory each takes."""
    hardware = plan.hardware
    rows = []
    for placed in plan.tables:
        share = max(placed.rank_bytes.values()) / hardware.table_bytes
        rows.append([
            placed.name, f"{placed.rows:,} x {placed.width}", gigabytes(placed.bytes),
            placed.sharding, placed.kernel, _ranges(sorted(placed.rank_bytes)), f"{share:.1%}",
        ])  # fmt: skip
    filled = [
        sum(placed.rank_bytes.get(rank, 0) for placed in plan.tables) / hardware.table_bytes
        for rank in range(hardware.ranks)
    ]
    table(
        f"tables on {hardware.ranks} x {hardware.device} with {gigabytes(hardware.table_bytes)} "
        f"for them each; filled {min(filled):.1%} to {max(filled):.1%}",
        ["table", ">rows x width", ">weights", "sharding", "kernel", "ranks", ">of a rank"],
        rows,
    )


def _ranges(ranks: list[int]) -> str:
    """Write ranks as text: 0-3 when they follow each other."""
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"{ranks[0]}-{ranks[-1]}"
    return ", ".join(map(str, ranks))
