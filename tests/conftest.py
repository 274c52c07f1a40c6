"""What the tests share: the command as a process, a small log, and one finished run of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import DataConfig, Feature

ROOT = Path(__file__).resolve().parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
# Small enough for seconds, large enough that a model beats popularity.
SMALL = {"users": 600, "items": 300, "events": 12_000}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


Run = Callable[..., "subprocess.CompletedProcess[str]"]


def run_twotower(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "twotower", *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, check=False, timeout=400,
        env=os.environ | {"WANDB_MODE": "offline", "COLUMNS": "200"},
    )  # fmt: skip


@cache
def run_parser() -> Any:
    from twotower.cli import build_parser  # which a GPU machine for kernels may lack libraries of

    # Without the arguments of all other commands, which take seconds.
    return build_parser(["run"])


def read_job(path: Path) -> Any:
    from twotower.job import Job

    parser = run_parser()
    options = parser.instantiate(parser.parse_args(["run", "--config", str(path)]))["run"]
    return Job(**{k: v for k, v in vars(options).items() if k != "config"})


@dataclass(frozen=True)
class FinishedRun:
    """A run of the whole job on a small log."""

    cwd: Path
    arguments: list[str]
    output: str

    @property
    def run_dir(self) -> Path:
        return self.cwd / "run"

    @property
    def bundle(self) -> Path:
        return self.run_dir / "bundles" / "1"


@pytest.fixture(scope="session")
def demo_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic log."""
    cwd = tmp_path_factory.mktemp("demo")
    sizes = [f"--{name}={value}" for name, value in SMALL.items()]
    done = run_twotower("demo-log", "--output=log", *sizes, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "log"


@pytest.fixture(scope="session")
def finished_run(demo_log: Path, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The whole job, as `twotower run` leaves it."""
    cwd = tmp_path_factory.mktemp("job")
    arguments = [
        "--config", str(QUICKSTART), "--run_dir=run", f"--data.root={demo_log}",
        "--train.batch_size=256", "--train.max_epochs=6",
    ]  # fmt: skip
    done = run_twotower("run", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return FinishedRun(cwd, arguments, done.stdout)


@pytest.fixture(scope="session")
def given_data() -> Path:
    """The folder of real data: $TWOTOWER_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("TWOTOWER_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TWOTOWER_DATA")
    return folder


@pytest.fixture(scope="session")
def twotower() -> Run:
    """The command, run in a process of its own."""
    return run_twotower


Make = Callable[..., PreparedDataset]
EVENTS = {
    "user_id": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3],
    "item_id": ["a", "b", "c", "a", "c", "d", "b", "a", "d", "e"],
    "timestamp": [10, 20, 90, 15, 25, 95, 30, 35, 92, 99],
}
HISTORY = Feature(name="history", kind="history", table="item_id", length=3)
ITEM = Feature(name="item_id", kind="id")


def maker(root: Path) -> Make:
    """Return what prepares a log given as columns below a folder, and returns the dataset."""
    number = 0

    def prepared(
        events: dict[str, Any],
        users: dict[str, Any] | None = None,
        items: dict[str, Any] | None = None,
        **changes: Any,
    ) -> PreparedDataset:
        nonlocal number
        number += 1
        folder = root / str(number)
        (folder / "prepared").mkdir(parents=True)
        for name, columns in (("log", events), ("users", users), ("items", items)):
            if columns is not None:
                pq.write_table(pa.table(columns), folder / f"{name}.parquet")
        config = DataConfig(
            root=str(folder), interactions="log.parquet", query=[HISTORY], item=[ITEM],
            users="users.parquet" if users else None, items="items.parquet" if items else None,
        )  # fmt: skip
        prepare(replace(config, **changes), folder / "prepared")
        return PreparedDataset(folder / "prepared")

    return prepared


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Prepare a log given as columns and return the dataset."""
    return maker(tmp_path)
