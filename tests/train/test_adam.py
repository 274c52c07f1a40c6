"""Tables that learn by Adam: on any number of ranks, after a stop, and not where it cannot be."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.train.ranks import run_on_ranks
from twotower.data.schema import DataConfig, Feature
from twotower.errors import UserError
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint.towers import load_towers
from twotower.train.config import TableSharding, TrainConfig
from twotower.train.sharding import Hardware, plan_tables

from ..conftest import QUICKSTART

ADAM = {"table_optimizer": "adam", "table_lr": 0.01}
COMMON = {"batch_size": 250, "max_epochs": 9, "patience": 9}
MEAN = (
    "--data.query=[{name: history, kind: history, length: 20, table: item_id, pooling: mean}, "
    "{name: country, kind: id}]",
    "--data.item=[{name: item_id, kind: id}, {name: genre, kind: id}, {name: tags, kind: ids, "
    "length: 5}, {name: price, kind: number}]",
)


@pytest.fixture(scope="module")
def cwd(demo_log: Path, tmp_path_factory: pytest.TempPathFactory, twotower) -> Path:
    """A folder with a job whose lists are pooled by the mean, prepared and trained by Adam."""
    cwd = tmp_path_factory.mktemp("adam")
    for step in ("prepare", "train"):
        done = twotower(step, *arguments(demo_log, "unbroken"), cwd=cwd)
        assert done.returncode == 0, done.stderr
    return cwd


def arguments(log: Path, run_dir: str) -> list[str]:
    return [
        "--config", str(QUICKSTART), f"--data.root={log}", f"--run_dir={run_dir}", *MEAN,
        "--tracking.wandb=off", "--train.batch_size=250", "--train.max_epochs=2",
        "--train.table_optimizer=adam", "--train.table_lr=0.01", "--train.checkpoint_every_steps=5",
    ]  # fmt: skip


def test_two_ranks_train_what_one_does(cwd, tmp_path) -> None:
    settings = [{**COMMON, **ADAM, "max_steps": 30}, {**COMMON, "max_steps": 30}]
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        arguments = {"prepared": str(cwd / "unbroken" / "prepared"), "settings": settings}
        run_on_ranks(ranks, "train", arguments, folder)
    one, two, other = (load_towers(tmp_path / name).state_dict() for name in ("1/0", "2/0", "1/1"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=0, msg=name)
    moved = max((other[name] - value).abs().max() for name, value in one.items() if "table" in name)
    assert moved > 0.01, "the optimizers were to train different tables"


def test_a_killed_run_ends_like_an_unbroken_one(cwd, demo_log, twotower) -> None:
    assert twotower("prepare", *arguments(demo_log, "killed"), cwd=cwd).returncode == 0
    command = [sys.executable, "-m", "twotower", "train", *arguments(demo_log, "killed")]
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL)
    folder, deadline = cwd / "killed" / "train.partial" / "checkpoints", time.monotonic() + 120
    while not any(folder.glob("step=*[0-9]")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = twotower("train", *arguments(demo_log, "killed"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    summary = json.loads((cwd / "killed" / "train" / "train.json").read_text())
    assert summary["resumed_from"] is not None
    expected, got = (load_towers(cwd / n / "train").state_dict() for n in ("unbroken", "killed"))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=0, msg=name)


def test_adam_is_refused_where_tables_cannot_be_whole_on_every_rank() -> None:
    config = TrainConfig(table_optimizer="adam")
    with pytest.raises(UserError, match=r"train\.sharding is row_wise, but .* is adam"):
        replace(config, sharding="row_wise").validate()
    with pytest.raises(UserError, match=r"tables\.a\.sharding is table_wise, but .* is adam"):
        replace(config, tables={"a": TableSharding(sharding="table_wise")}).validate()
    with pytest.raises(UserError, match=r"table_precision is fp16, and adam's"):
        replace(config, table_precision="fp16").validate()
    history = Feature(name="history", kind="history", length=9, table="item_id")
    data = DataConfig(
        interactions="log.parquet", query=[replace(history, pooling="attention")],
        item=[Feature(name="item_id", kind="id")],
    )  # fmt: skip
    model = TwoTower(data, {"item_id": 99}, ModelConfig(dim=8, hidden=[]), table_device="meta")
    hardware = Hardware(device="cpu", ranks=1, local_ranks=1, device_bytes=0, host_bytes=1 << 30)
    with pytest.raises(UserError, match=r"tables\.item_id: .* pooled by attention .* rowwise_ada"):
        plan_tables(model, config, hardware)
