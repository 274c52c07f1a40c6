"""Training at every position of a history: the same on any number of ranks, and worth it."""

import json
from pathlib import Path

import pytest
import torch

from tests.train.ranks import run_on_ranks
from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.train.checkpoint.towers import load_towers
from twotower.train.config import TrainConfig
from twotower.train.negatives_config import NegativesConfig

from ..conftest import QUICKSTART

QUERY = (
    "--data.query=[{name: user_id, kind: id}, {name: age, kind: number}, {name: history, "
    "kind: history, length: 12, table: item_id, pooling: POOLING}]"
)


@pytest.fixture(scope="module", params=["transformer", "attention", "timed_sum"])
def prepared(
    request: pytest.FixtureRequest, demo_log: Path, tmp_path_factory: pytest.TempPathFactory,
    twotower,
) -> Path:  # fmt: skip
    cwd = tmp_path_factory.mktemp("positions")
    done = twotower(
        "prepare", "--config", QUICKSTART, "--run_dir=job", f"--data.root={demo_log}",
        QUERY.replace("POOLING", request.param), cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cwd / "job" / "prepared"


def test_two_ranks_train_what_one_does(prepared, tmp_path) -> None:
    # In steps of 0.1, the weights of a timed sum, which are powers of e, run away.
    timed = PreparedDataset(prepared).config.timed_histories()
    common = {
        "batch_size": 50, "every_position": True, "max_epochs": 9, "max_steps": 20, "patience": 9,
        "model": {"encoder": {"dropout": 0.0, "layers": 1}}, "table_optimizer": "sgd",
        "table_lr": 5.0, "dense_optimizer": "sgd", "dense_lr": 0.01 if timed else 0.1,
    }  # fmt: skip
    variants = [
        common,
        {
            **common,
            "pipeline": "on",
            "negatives": {"in_batch": 0.5, "uniform": 0.5, "exclude_seen": True},
        },
        {
            **common,
            "negatives": {"catalogue": True, "exclude_seen": True, "exclude_unreleased": True},
        },
    ]
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        run_on_ranks(ranks, "train", {"prepared": str(prepared), "settings": variants}, cwd)
    found = {
        (ranks, number): load_towers(tmp_path / str(ranks) / str(number)).state_dict()
        for ranks in (1, 2) for number in range(len(variants))
    }  # fmt: skip
    for number in range(len(variants)):
        for key, value in found[1, number].items():
            torch.testing.assert_close(
                found[2, number][key], value, atol=1e-5, rtol=0,
                msg=lambda m, at=(number, key): f"{at}: {m}",
            )  # fmt: skip
    moved = max((v - found[1, 0][k]).abs().max() for k, v in found[1, 2].items())
    assert moved > 1e-3, "the catalogue is another set of candidates"


def test_a_pass_over_histories_teaches_what_many_events_do(prepared, tmp_path) -> None:
    common = {"max_epochs": 4, "patience": 9}
    variants = [
        {**common, "batch_size": 256},
        {**common, "batch_size": 64, "every_position": True},
    ]
    arguments = {"prepared": str(prepared), "settings": variants}
    run_on_ranks(1, "train", arguments, tmp_path)
    events, positions = (
        json.loads((tmp_path / str(number) / "train.json").read_text()) for number in range(2)
    )
    assert positions["steps"] < events["steps"]
    assert positions["score"] > 0.7 * events["score"]


@pytest.mark.parametrize(
    "negatives", [{"in_batch": 0, "uniform": 1, "candidates": 9}, {"in_batch": 0.5, "memory": 0.5}]
)
def test_sources_that_windows_do_not_have_are_refused(negatives) -> None:
    config = TrainConfig(
        every_position=True, correct_positive=False, negatives=NegativesConfig(**negatives)
    )
    with pytest.raises(UserError, match=r"train\.negatives needs an in_batch share, and none of"):
        config.validate()
