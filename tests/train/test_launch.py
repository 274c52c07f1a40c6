"""Places that launchers give, and processes that train together, lose one, and are stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import UserError
from twotower.train.checkpoint.towers import load_towers
from twotower.train.launch import Place, find_place, first_host, meeting_point

from ..conftest import QUICKSTART

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_ID": "123", "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
INDEXED = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train"}


def test_every_launcher_gives_a_place() -> None:
    fifth = Place(rank=5, ranks=8, local_rank=1, local_ranks=4)
    assert find_place(TORCHRUN) == fifth
    assert find_place(SLURM) == fifth
    assert find_place(INDEXED) == Place(rank=3, ranks=4, local_rank=0, local_ranks=1)
    assert find_place({}) is None
    assert find_place({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None, "an interactive shell"
    assert find_place({"JOB_COMPLETION_INDEX": "0"}) is None, "an indexed Job of other work"


def test_every_launcher_says_where_to_meet() -> None:
    assert meeting_point({"MASTER_ADDR": "a", "MASTER_PORT": "7"}) == ("a", 7)
    assert meeting_point(INDEXED) == ("train-0.train", 29_500)
    assert meeting_point(SLURM) == ("gpu07", 20_123)
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        meeting_point(TORCHRUN)


@pytest.mark.parametrize("missing", list(TORCHRUN))
def test_an_incomplete_environment_is_named(missing) -> None:
    left = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UserError, match=rf"torchrun, but {missing} is missing"):
        find_place(left)


def test_impossible_numbers_are_named() -> None:
    with pytest.raises(UserError, match="rank 9 of 8"):
        find_place(TORCHRUN | {"RANK": "9"})
    with pytest.raises(UserError, match="WORLD_SIZE is 'many'"):
        find_place(TORCHRUN | {"WORLD_SIZE": "many"})


HOST = st.from_regex(r"[a-z]([a-z0-9-]*[a-z])?", fullmatch=True)


@given(HOST, st.integers(0, 99), st.integers(0, 50), st.sampled_from(["", "-ib"]))
def test_the_first_host_of_a_list(name, first, more, suffix) -> None:
    assert first_host(f"{name}[{first:02d}-{first + more:02d},{first + more + 2}]{suffix}") == (
        f"{name}{first:02d}{suffix}"
    )
    assert first_host(f"{name}{first}{suffix},other") == f"{name}{first}{suffix}"


# From here on, real trainings of two processes.
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
    assert "all 2 start again from the last checkpoint" in errors
    assert "Traceback" not in errors + output
    summary = json.loads((cwd / "run" / "train" / "train.json").read_text())
    assert int(summary["resumed_from"].removeprefix("step=")) >= 10
    assert_same_weights(unbroken, cwd / "run" / "train")


def test_a_lost_rank_ends_a_training_that_is_not_elastic_and_it_can_go_on(
    unbroken, demo_log, twotower, cwd
) -> None:
    process = start(demo_log, cwd)
    wait_for_step(cwd / "run", 5, process)
    ranks_of(process)[0].kill()
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "rank 0 was ended by SIGKILL" in errors
    assert "give the same command to go on" in errors
    assert "Traceback" not in errors + output
    # On another number of ranks the steps hold the same events, and other random numbers: dropout.
    done = twotower("train", *arguments(demo_log, "run"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert_same_weights(unbroken, cwd / "run" / "train")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_training_saves_and_goes_on_where_it_was(
    number, code, unbroken, demo_log, twotower, cwd
) -> None:
    process = start(demo_log, cwd)
    wait_for_step(cwd / "run", 5, process)
    workers = list(ranks_of(process).values())
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not any(worker.is_running() for worker in workers)
    stopped = re.search(r"stopped at step (\d+): give the same command to go on from step (\d+)",
                        errors)  # fmt: skip
    assert stopped, errors
    if number == signal.SIGTERM:
        assert stopped[1] == stopped[2], "all steps done are saved"
    done = twotower("train", *arguments(demo_log, "run"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert_same_weights(unbroken, cwd / "run" / "train")


def test_a_launcher_that_is_killed_takes_its_ranks_along(demo_log, cwd) -> None:
    process = start(demo_log, cwd)
    wait_for_step(cwd / "run", 5, process)
    workers = list(ranks_of(process).values())
    assert len(workers) == 2
    process.kill()
    process.communicate()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_mistake_is_one_line_and_no_restart(demo_log, twotower, cwd) -> None:
    more = ("--train.elastic=3", "--train.tables={user_id: {sharding: row_wise}, item: {}}")
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
    assert (cwd / "run" / "train.partial" / "checkpoints").glob("step=*")
