"""A killed run resumes and ends as one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from twotower.train.checkpoint import load_towers

from ..conftest import QUICKSTART

SETTINGS = [
    "--train.batch_size=256", "--train.max_epochs=4", "--train.patience=9",
    "--train.checkpoint_every_steps=5", "--tracking.wandb=off",
]  # fmt: skip


def arguments(log: Path, run_dir: str) -> list[str]:
    return ["--config", str(QUICKSTART), f"--data.root={log}", f"--run_dir={run_dir}", *SETTINGS]


@pytest.fixture(scope="module")
def unbroken(demo_log, twotower, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("unbroken")
    for step in ("prepare", "train"):
        done = twotower(step, *arguments(demo_log, "run"), cwd=cwd)
        assert done.returncode == 0, done.stderr
    return cwd / "run" / "train"


def newest_step(folder: Path) -> int:
    steps = [int(p.stem.rsplit("=", 1)[1]) for p in folder.glob("last-step=*.ckpt")]
    return max(steps, default=0)


def test_a_run_killed_twice_ends_like_an_unbroken_one(
    unbroken, demo_log, twotower, tmp_path
) -> None:
    assert twotower("prepare", *arguments(demo_log, "run"), cwd=tmp_path).returncode == 0
    partial = tmp_path / "run" / "train.partial"
    seed = int(os.environ.get("TWOTOWER_TEST_SEED", random.randrange(10**6)))
    print(f"TWOTOWER_TEST_SEED={seed}")
    rng = random.Random(seed)
    last = json.loads((unbroken / "train.json").read_text())["steps"]
    targets = sorted(rng.sample(range(1, last - 8), 2))
    for target, workers in zip(targets, (2, 0), strict=True):
        process = subprocess.Popen(
            [sys.executable, "-m", "twotower", "train", *arguments(demo_log, "run"),
             f"--train.workers={workers}"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while newest_step(partial / "checkpoints") < target and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was to be killed on the way"
        assert not (tmp_path / "run" / "train").exists(), "nothing looks finished"
    done = twotower("train", *arguments(demo_log, "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "train" / "train.json").read_text())
    assert summary["resumed_from"] is not None
    assert summary["steps"] == last
    expected, got = (
        load_towers(folder).state_dict() for folder in (unbroken, tmp_path / "run" / "train")
    )
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=0, msg=name)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["prepared", "train"]


def test_a_run_killed_behind_its_last_epoch_trains_no_further(demo_log, twotower, tmp_path) -> None:
    early = ["--train.max_epochs=30", "--train.patience=1", "--train.table_lr=0.5"]
    for name in ("whole", "killed"):
        assert twotower("prepare", *arguments(demo_log, name), cwd=tmp_path).returncode == 0
    assert twotower("train", *arguments(demo_log, "whole"), *early, cwd=tmp_path).returncode == 0
    last = json.loads((tmp_path / "whole" / "train" / "train.json").read_text())["steps"]
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "train", *arguments(demo_log, "killed"), *early],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while newest_step(tmp_path / "killed" / "train.partial" / "checkpoints") < last:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = twotower("train", *arguments(demo_log, "killed"), *early, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summaries = [
        json.loads((tmp_path / name / "train" / "train.json").read_text())
        for name in ("whole", "killed")
    ]
    for key in ("steps", "epochs", "best_step", "score"):
        assert summaries[0][key] == summaries[1][key]


def test_other_settings_start_anew(unbroken, demo_log, twotower, tmp_path) -> None:
    assert twotower("prepare", *arguments(demo_log, "run"), cwd=tmp_path).returncode == 0
    stale = tmp_path / "run" / "train.partial" / "checkpoints" / "last-step=99.ckpt"
    stale.mkdir(parents=True)
    inputs = {"fingerprint": "of other settings"}
    (stale.parent.parent / "inputs.json").write_text(json.dumps(inputs))
    done = twotower("train", *arguments(demo_log, "run"), "--train.max_epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "train" / "train.json").read_text())
    assert summary["resumed_from"] is None


def test_early_stopping_keeps_the_best_epoch(demo_log, twotower, tmp_path) -> None:
    from twotower.train.plots import read_metrics

    assert twotower("prepare", *arguments(demo_log, "run"), cwd=tmp_path).returncode == 0
    done = twotower(
        "train", *arguments(demo_log, "run"), "--train.max_epochs=30", "--train.patience=1",
        "--train.table_lr=0.5", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "train" / "train.json").read_text())
    scores = read_metrics(tmp_path / "run" / "train")[summary["monitor"]]
    assert summary["epochs"] < 30
    assert summary["score"] == pytest.approx(max(scores.values()), abs=1e-6)
    assert len(scores) == summary["epochs"]


def test_a_damaged_checkpoint_is_explained(unbroken, demo_log, twotower, tmp_path) -> None:
    import shutil

    shutil.copytree(unbroken.parent, tmp_path / "run")
    for file in (tmp_path / "run" / "train" / "checkpoint").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    done = twotower("evaluate", *arguments(demo_log, "run"), cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "the checkpoint is damaged" in done.stderr
    assert "Traceback" not in done.stderr
