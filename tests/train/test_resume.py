"""A killed run resumes and ends as one that was never killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.train.checkpoint.towers import load_towers

from ..conftest import EVENTS, QUICKSTART

SETTINGS = [
    "--train.batch_size=256", "--train.max_epochs=4", "--train.patience=9",
    "--train.checkpoint_every_steps=5", "--tracking.wandb=off", "--model.dropout=0.2",
    "--model.learn_temperature=true", "--train.correct_positive=false", "--model.item_bias=true",
    "--train.negatives={in_batch: 0.5, uniform: 0.1, memory: 0.2, mined: 0.2}",
    "--train.negatives.mining={every: 7, skip: 5, depth: 20}", "--train.log_q_from=stream",
]  # fmt: skip
# Overfits within a few epochs, and so stops early.
EARLY = [
    "--train.max_epochs=30", "--train.patience=1", "--train.table_lr=0.5", "--model.dropout=0",
    "--model.learn_temperature=false", "--train.checkpoint_every_steps=100",
    "--model.item_bias=false", "--train.log_q_from=counts",
    "--train.negatives={in_batch: 1, uniform: 0, memory: 0, mined: 0}",
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
    steps = [int(p.name[5:]) for p in folder.glob("step=*[0-9]")]
    return max(steps, default=0)


def heed_interrupts() -> None:
    """Take SIGINT again, which a shell lets its background jobs ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_run_stopped_three_times_ends_like_an_unbroken_one(
    unbroken, demo_log, twotower, tmp_path
) -> None:
    assert twotower("prepare", *arguments(demo_log, "run"), cwd=tmp_path).returncode == 0
    partial = tmp_path / "run" / "train.partial"
    seed = int(os.environ.get("TWOTOWER_TEST_SEED", random.randrange(10**6)))
    print(f"TWOTOWER_TEST_SEED={seed}")
    rng = random.Random(seed)
    last = json.loads((unbroken / "train.json").read_text())["steps"]
    # Far enough apart that none is passed, by up to two checkpoints, before its turn.
    targets = [rng.randrange(third * last // 3, (third + 1) * last // 3 - 15) for third in range(3)]
    stops = [
        (signal.SIGKILL, -signal.SIGKILL, 2),
        (signal.SIGINT, 130, 0),
        (signal.SIGTERM, 143, 2),
    ]
    for target, (number, code, workers) in zip(targets, stops, strict=True):
        process = subprocess.Popen(
            [sys.executable, "-m", "twotower", "train", *arguments(demo_log, "run"),
             f"--train.workers={workers}"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=heed_interrupts,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        before = newest_step(partial / "checkpoints")
        while newest_step(partial / "checkpoints") < max(target, before + 1):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.random() * 0.05)
        process.send_signal(number)
        _, errors = process.communicate()
        assert process.returncode == code, f"it was to be stopped on the way: {errors}"
        assert not (tmp_path / "run" / "train").exists(), "nothing looks finished"
        if number != signal.SIGKILL:
            assert "Traceback" not in errors
            saved = newest_step(partial / "checkpoints")
            assert f"go on from step {saved}" in errors
        if number == signal.SIGTERM:
            assert f"stopped at step {saved}:" in errors, "all steps done are saved"
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
    for name in ("whole", "killed"):
        assert twotower("prepare", *arguments(demo_log, name), cwd=tmp_path).returncode == 0
    assert twotower("train", *arguments(demo_log, "whole"), *EARLY, cwd=tmp_path).returncode == 0
    last = json.loads((tmp_path / "whole" / "train" / "train.json").read_text())["steps"]
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "train", *arguments(demo_log, "killed"), *EARLY],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while newest_step(tmp_path / "killed" / "train.partial" / "checkpoints") < last:
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = twotower("train", *arguments(demo_log, "killed"), *EARLY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summaries = [
        json.loads((tmp_path / name / "train" / "train.json").read_text())
        for name in ("whole", "killed")
    ]
    for key in ("steps", "epochs", "best_step", "score"):
        assert summaries[0][key] == summaries[1][key]


def test_other_settings_start_anew(unbroken, demo_log, twotower, tmp_path) -> None:
    assert twotower("prepare", *arguments(demo_log, "run"), cwd=tmp_path).returncode == 0
    stale = tmp_path / "run" / "train.partial" / "checkpoints" / "step=99"
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
        "train", *arguments(demo_log, "run"), *EARLY, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "train" / "train.json").read_text())
    scores = read_metrics(tmp_path / "run" / "train")[summary["monitor"]]
    assert summary["epochs"] < 30
    assert summary["score"] == pytest.approx(max(scores.values()), abs=1e-6)
    assert len(scores) == summary["epochs"]


def test_what_is_damaged_is_explained_and_made_again(
    unbroken, demo_log, twotower, tmp_path
) -> None:
    shutil.copytree(unbroken.parent, tmp_path / "run")
    (weights,) = (tmp_path / "run" / "train" / "checkpoint").glob("*.safetensors")
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    events = tmp_path / "run" / "prepared" / "events.arrow"
    events.write_bytes(events.read_bytes()[:-9])

    def run(step: str) -> subprocess.CompletedProcess[str]:
        return twotower(step, *arguments(demo_log, "run"), cwd=tmp_path)

    for step, file, remedy in (("train", events, "prepare"), ("evaluate", weights, "train")):
        done = run(step)
        assert done.returncode == 2, done.stderr
        assert f"{file.relative_to(tmp_path)}: " in done.stderr
        assert "damaged" in done.stderr
        assert f"run `twotower {remedy}` again" in done.stderr
        assert "Traceback" not in done.stderr
        done = run(remedy)
        assert done.returncode == 0, done.stderr
        assert "unchanged" not in done.stdout
    expected = load_towers(unbroken).state_dict()
    for name, value in load_towers(tmp_path / "run" / "train").state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("name", ["events.arrow", "users.arrow", "tables/item_id.arrow"])
def test_a_damaged_arrow_file_of_the_right_size_is_explained(name, make) -> None:
    data = make(EVENTS)
    file = data.path / name
    content = file.read_bytes()
    file.write_bytes(content[:8] + bytes(len(content) - 8))
    with pytest.raises(UserError, match=rf"{name}: damaged .*remove .* run `twotower prepare`"):
        _ = PreparedDataset(data.path).events, data.users, data.encoder
