"""Trainings of two processes that lose one, are told to stop, and refuse a mistake."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from twotower.train.checkpoint.towers import load_towers

from ..conftest import QUICKSTART

SETTINGS = [
    "--train.batch_size=256", "--train.max_epochs=4", "--train.patience=9",
    "--train.checkpoint_every_steps=5", "--tracking.wandb=off", "--model.dropout=0.2",
    "--train.processes=2",
]  # fmt: skip


def arguments(log: Path, run_dir: str, *more: str) -> list[str]:
    return [
        "--config", str(QUICKSTART), f"--data.root={log}", f"--run_dir={run_dir}", *SETTINGS, *more,
    ]  # fmt: skip


def start(log: Path, cwd: Path, *more: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "twotower", "train", *arguments(log, "run", *more)],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ranks_of(launcher: "subprocess.Popen[str]") -> dict[int, psutil.Process]:
    found = {}
    for child in psutil.Process(launcher.pid).children():
        try:
            if rank := child.environ().get("RANK"):
                found[int(rank)] = child
        except psutil.Error:
            continue
    return found


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[str]") -> None:
    folder = run / "train.partial" / "checkpoints"
    while max((int(p.name[5:]) for p in folder.glob("step=*[0-9]")), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.fixture(scope="module")
def prepared_log(demo_log: Path, twotower, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("launch")
    assert twotower("prepare", *arguments(demo_log, "run"), cwd=cwd).returncode == 0
    return cwd / "run" / "prepared"


@pytest.fixture
def cwd(prepared_log: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prepared").symlink_to(prepared_log)
    return tmp_path


@pytest.fixture(scope="module")
def unbroken(demo_log: Path, prepared_log: Path, twotower, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("unbroken")
    (cwd / "run").mkdir()
    (cwd / "run" / "prepared").symlink_to(prepared_log)
    done = twotower("train", *arguments(demo_log, "run"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "tables on 2 x cpu" in done.stdout
    assert done.stdout.count("best step") == 1, "one process says what was done"
    return cwd / "run" / "train"


def assert_same_weights(one: Path, other: Path) -> None:
    expected = load_towers(one).state_dict()
    for name, value in load_towers(other).state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


def test_a_killed_rank_is_made_up_for(unbroken, demo_log, cwd) -> None:
    process = start(demo_log, cwd, "--train.elastic=1")
    wait_for_step(cwd / "run", 10, process)
    ranks_of(process)[1].kill()
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert "rank 1 was ended by SIGKILL" in errors
    again = re.search(r"all 2 start again from step (\d+); restarts left: 0", errors)
    assert "Traceback" not in errors + output
    summary = json.loads((cwd / "run" / "train" / "train.json").read_text())
    assert again, errors
    assert summary["resumed_from"] == f"step={again[1]}"
    assert int(again[1]) >= 10
    assert_same_weights(unbroken, cwd / "run" / "train")


def test_the_loss_of_rank_0_ends_a_training_that_is_not_elastic(demo_log, cwd) -> None:
    process = start(demo_log, cwd)
    wait_for_step(cwd / "run", 5, process)
    ranks_of(process)[0].kill()
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert re.search(
        r"rank 0 was ended by SIGKILL \(out of memory\?\) and train.elastic is 0: give the same "
        r"command to go on from step \d+", errors,
    ), errors  # fmt: skip
    assert "Traceback" not in errors + output


def test_a_stopped_training_saves_and_goes_on_where_it_was(
    unbroken, demo_log, twotower, cwd
) -> None:
    process = start(demo_log, cwd)
    wait_for_step(cwd / "run", 5, process)
    workers = list(ranks_of(process).values())
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert not any(worker.is_running() for worker in workers)
    stopped = re.search(r"stopped at step (\d+): give the same command to go on from step (\d+)",
                        errors)  # fmt: skip
    assert stopped, errors
    assert stopped[1] == stopped[2], "all steps done are saved"
    done = twotower("train", *arguments(demo_log, "run"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert_same_weights(unbroken, cwd / "run" / "train")


def test_a_rank_that_is_lost_while_all_meet_is_said_in_one_line(demo_log, cwd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0",
    }  # fmt: skip
    comes_and_goes = (
        "import os, torch.distributed as d; d.init_process_group('gloo', rank=1, world_size=2, "
        f"init_method='tcp://127.0.0.1:{port}'); os._exit(0)"
    )
    with subprocess.Popen([sys.executable, "-c", comes_and_goes]):
        done = subprocess.run(
            [sys.executable, "-m", "twotower", "train", *arguments(demo_log, "run")],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=100,
        )  # fmt: skip
    assert done.returncode == 1
    assert re.search(r"^twotower train: rank 0 met no group of 2 ranks: .* the same command again$",
                     done.stderr, re.MULTILINE), done.stderr  # fmt: skip
    assert "Traceback" not in done.stderr


def test_a_mistake_is_one_line_and_no_restart(demo_log, twotower, cwd) -> None:
    more = ("--train.elastic=3", "--train.tables={country: {sharding: row_wise}, item: {}}")
    done = twotower("train", *arguments(demo_log, "run", *more), cwd=cwd)
    assert done.returncode == 2
    assert "start again" not in done.stderr
    assert done.stderr.count("train.tables.item: no embedding table has this name") == 1
    assert "Traceback" not in done.stderr


def test_a_training_that_cannot_save_in_time_is_ended(demo_log, cwd) -> None:
    process = start(demo_log, cwd, "--train.stop_within_s=0.001")
    wait_for_step(cwd / "run", 5, process)
    # Stopped, rank 1 takes no step, so that rank 0 waits for it.
    rank = ranks_of(process)[1]
    rank.suspend()
    try:
        os.kill(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        if rank.is_running():
            rank.kill()
    assert process.returncode == 143
    assert "did not stop within 0.001 s" in errors or "did not save within" in errors
    assert list((cwd / "run" / "train.partial" / "checkpoints").glob("step=*[0-9]"))
