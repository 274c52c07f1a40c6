"""Tables with dynamic ids in real trainings: the same on any number of ranks, and resumed."""

from pathlib import Path

import pytest
import torch

from twotower.data.schema import DataConfig, Feature
from twotower.data.table import Table
from twotower.errors import UserError
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint.towers import load_towers
from twotower.train.config import TableSharding, TrainConfig
from twotower.train.sharding import Hardware, plan_tables

from ..conftest import QUICKSTART
from .test_launched_training import start, wait_for_step

# Items get more ids than slots, pooled by attention; users, by a sum, wait for every third step.
# One bias for all items changes no softmax, so that AdamW would make rounding errors whole steps.
SETTINGS = [
    "--data.query=[{name: user_id, kind: id}, {name: history, kind: history, table: item_id, "
    "pooling: sum, item_features: [genre, tags]}, {name: age, kind: number}]",
    "--data.tables={item_id: {slots: 400}, user_id: {slots: 1600, admit_every: 3}}",
    "--train.max_steps=50", "--model.dropout=0", "--train.id_dropout=0",
    "--model.item_bias=false",
]  # fmt: skip


def commands(log: Path, *more: str) -> list[str]:
    return [
        "--config", str(QUICKSTART), f"--data.root={log}", "--run_dir=run", *SETTINGS, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def log(twotower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of more items than four ranks have slots for at least."""
    cwd = tmp_path_factory.mktemp("log")
    done = twotower("demo-log", "--output=log", "--users=1000", "--items=900", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "log"


@pytest.fixture(scope="module")
def prepared(log: Path, twotower, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("dynamic")
    done = twotower("prepare", *commands(log), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd / "run" / "prepared"


def test_any_number_of_ranks_gives_every_id_the_same_row(prepared, log, twotower, tmp_path) -> None:
    for name in ("one", "four", "broken"):
        (tmp_path / name / "run").mkdir(parents=True)
        (tmp_path / name / "run" / "prepared").symlink_to(prepared)
    short = ["--train.batch_size=256", "--train.checkpoint_every_steps=4", "--tracking.wandb=off"]
    for name, ranks, pipeline in (("one", 1, "off"), ("four", 4, "on")):
        more = [*short, f"--train.processes={ranks}", f"--train.pipeline={pipeline}"]
        done = twotower("train", *commands(log, *more), cwd=tmp_path / name)
        assert done.returncode == 0, done.stderr
        assert "row_wise" in done.stdout
    # Two ranks are killed, between two admissions of users or not; one goes on.
    killed = start(log, tmp_path / "broken", *SETTINGS, *short)
    wait_for_step(tmp_path / "broken" / "run", 16, killed)
    killed.kill()
    killed.communicate()
    more = [*short, "--train.processes=1"]
    done = twotower("train", *commands(log, *more), cwd=tmp_path / "broken")
    assert done.returncode == 0, done.stderr
    assert "step" in done.stdout
    expected = load_towers(tmp_path / "one" / "run" / "train")
    slots = expected.dynamic_slots("item_id")
    assert slots.open_slots().item() == 0
    assert (expected.dynamic_slots("user_id").seen > 0).sum() > 900
    for name in ("four", "broken"):
        got = load_towers(tmp_path / name / "run" / "train").state_dict()
        assert got.keys() == expected.state_dict().keys()
        for key, value in expected.state_dict().items():
            if value.dtype == torch.int64:
                assert torch.equal(got[key], value), (name, key)
            else:
                # As of tables with a vocabulary, by rowwise Adagrad.
                torch.testing.assert_close(
                    got[key], value, atol=1e-4, rtol=0, msg=lambda m, at=(name, key): f"{at}: {m}"
                )


DATA = DataConfig(
    interactions="log.parquet", query=[Feature(name="user_id", kind="id")],
    item=[Feature(name="item_id", kind="id")],
    tables={"user_id": Table(slots=1000), "item_id": Table(slots=6400)},
)  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (16, {}, r"train\.tables\.user_id: the 1,000 slots of its dynamic ids are cut into 8 "
                 r"parts, which 16 ranks cannot share equally: .*multiple of 1,600"),
        (3, {}, "cut into 8 parts, which 3 ranks cannot share equally: train on as many ranks as "
                "divide 8$"),
        (2, {"sharding": "table_wise"}, "sharding: .*dynamic ids is sharded row_wise, got table"),
        (2, {"kernel": "fused_uvm_caching"}, "kernel: rows of a table with dynamic ids change"),
    ],
)  # fmt: skip
def test_what_dynamic_ids_cannot_be_is_refused(ranks, changes, message) -> None:
    model = TwoTower(
        DATA, {"user_id": 1000, "item_id": 6400}, ModelConfig(dim=8), table_device="meta"
    )
    hardware = Hardware(
        device="cpu", ranks=ranks, local_ranks=ranks, device_bytes=0, host_bytes=10**9
    )
    config = TrainConfig(tables={"user_id": TableSharding(**changes)})
    with pytest.raises(UserError, match=message):
        plan_tables(model, config, hardware)
