"""Training with item features in histories: the same on any number of ranks."""

from pathlib import Path

import pytest
import torch

from tests.train.ranks import run_on_ranks
from twotower.train.checkpoint.towers import load_towers

from ..conftest import QUICKSTART

QUERY = (
    "--data.query=[{name: user_id, kind: id}, {name: history, kind: history, length: 9, "
    "table: item_id, pooling: transformer, item_features: [genre, tags, price, text]}]"
)


@pytest.fixture(scope="module")
def prepared(demo_log: Path, tmp_path_factory: pytest.TempPathFactory, twotower) -> Path:
    cwd = tmp_path_factory.mktemp("entries")
    done = twotower(
        "prepare", "--config", QUICKSTART, "--run_dir=job", f"--data.root={demo_log}", QUERY,
        cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cwd / "job" / "prepared"


def test_two_ranks_train_what_one_does(prepared, tmp_path) -> None:
    common = {
        "max_epochs": 9, "max_steps": 6, "patience": 9, "table_optimizer": "sgd", "table_lr": 2.0,
        "model": {"encoder": {"dropout": 0.0, "layers": 1}}, "dense_optimizer": "sgd",
        "dense_lr": 0.1,
    }  # fmt: skip
    variants = [
        {**common, "batch_size": 100, "pipeline": "on"},
        {**common, "batch_size": 50, "every_position": True},
        {**common, "batch_size": 100, "sharding": "row_wise",
         "negatives": {"in_batch": 0.5, "uniform": 0.5}},
    ]  # fmt: skip
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        run_on_ranks(ranks, "train", {"prepared": str(prepared), "settings": variants}, cwd)
    name = "entry_features.of_history.joined.weight"
    for number in range(len(variants)):
        one, two = (
            load_towers(tmp_path / str(ranks) / str(number)).state_dict() for ranks in (1, 2)
        )
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, atol=1e-5, rtol=0, msg=lambda m, at=(number, key): f"{at}: {m}"
            )
    plain = load_towers(tmp_path / "1" / "0").state_dict()[name]
    assert (plain - load_towers(tmp_path / "1" / "1").state_dict()[name]).abs().max() > 1e-3
