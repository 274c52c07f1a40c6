"""Encoders of a history train the same weights on any number of ranks, compiled, and in bf16."""

import torch
import yaml

from tests.train.ranks import run_on_ranks
from twotower.train.checkpoint.towers import load_towers

from ..conftest import QUICKSTART

BOTH = [
    {"name": "history", "kind": "history", "length": 50, "table": "item_id",
     "pooling": "transformer"},
    {"name": "recent", "kind": "history", "length": 20, "table": "item_id", "pooling": "hstu"},
]  # fmt: skip


def test_encoders_train_alike_on_two_ranks(demo_log, tmp_path, twotower) -> None:
    job = tmp_path / "job.yaml"
    config = yaml.safe_load(QUICKSTART.read_text())
    query = config["data"]["query"]
    config["data"]["query"] = BOTH + [f for f in query if f["name"] != "history"]
    job.write_text(yaml.safe_dump(config))
    options = ["--config", job, "--run_dir=job", f"--data.root={demo_log}"]
    done = twotower("prepare", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # What is dropped each rank draws for itself.
    common = {
        "batch_size": 250, "max_epochs": 9, "max_steps": 20, "patience": 9,
        "model": {"encoder": {"heads": 2, "dropout": 0.0}},
    }  # fmt: skip
    variants = {
        "plain": common, "compile": {**common, "compile": True},
        "bf16": {**common, "precision": "bf16"},
    }  # fmt: skip
    weights: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        arguments = {
            "prepared": str(tmp_path / "job" / "prepared"), "settings": list(variants.values())
        }  # fmt: skip
        run_on_ranks(ranks, "train", arguments, cwd)
        for number, name in enumerate(variants):
            weights[ranks, name] = load_towers(cwd / str(number)).state_dict()
    expected = weights[1, "plain"]
    for feature in ("history", "recent"):
        assert any(f"pool_{feature}.blocks" in name for name in expected)
    for at, got in weights.items():
        apart = max((got[name] - value).abs().max().item() for name, value in expected.items())
        if at[1] == "bf16":
            # As of the other towers (`test_sharding`): a few steps of bf16.
            assert 1e-5 < apart < 4 * 2**-8, at
        else:
            assert apart < 1e-5, at
