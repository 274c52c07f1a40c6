"""Places that launchers give, and processes that are started and watched: small ones, in seconds.

What real trainings do when they are launched stands in `test_launched_training.py`.
"""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import UserError
from twotower.train.launch import Place, find_place, first_host, meeting_point

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_JOB_ID": "123",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip
# What a batch script sees of the same job, before srun.
BATCH = {
    "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "gpu[07-08]",
}  # fmt: skip
INDEXED = {"JOB_COMPLETION_INDEX": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train"}


def test_every_launcher_gives_a_place() -> None:
    fifth = Place(rank=5, ranks=8, local_rank=1, local_ranks=4)
    assert find_place(TORCHRUN) == fifth
    assert find_place(SLURM) == fifth
    assert find_place(INDEXED) == Place(rank=3, ranks=4, local_rank=0, local_ranks=1)
    assert find_place(SLURM | INDEXED | TORCHRUN) == fifth, "torchrun inside of another's pod"


@pytest.mark.parametrize(
    "environment",
    [{}, BATCH, BATCH | {"SLURM_STEP_NUM_TASKS": "1"}, {"JOB_COMPLETION_INDEX": "0"}],
    ids=["none", "a batch script", "an interactive shell", "a Job of other work"],
)
def test_one_process_has_no_place(environment) -> None:
    assert find_place(environment) is None


def test_every_launcher_says_where_to_meet() -> None:
    assert meeting_point({"MASTER_ADDR": "a", "MASTER_PORT": "7"}) == ("a", 7)
    assert meeting_point(INDEXED) == ("train-0.train", 29_500)
    assert meeting_point(SLURM) == ("gpu07", 20_123)
    with pytest.raises(UserError, match="set the environment variable MASTER_ADDR"):
        meeting_point(TORCHRUN)
    for port in ("http", "0", "65536"):
        with pytest.raises(UserError, match=f"MASTER_PORT must be from 1 to 65535, got '{port}'"):
            meeting_point(INDEXED | {"MASTER_PORT": port})


PLACES = [(TORCHRUN, name) for name in TORCHRUN]
PLACES += [(SLURM, name) for name in SLURM if name not in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST")]
PLACES += [(INDEXED, "WORLD_SIZE")]


@pytest.mark.parametrize(("environment", "name"), PLACES, ids=[name for _, name in PLACES])
def test_an_incomplete_environment_is_named(environment, name) -> None:
    left = {key: value for key, value in environment.items() if key != name}
    if name == "SLURM_STEP_NUM_TASKS":
        assert find_place(left) is None, "no step of SLURM's at all"
    else:
        with pytest.raises(UserError, match=f"variable {name} is missing: expected a number; "):
            find_place(left)
    with pytest.raises(UserError, match=f"variable {name} is 'many'"):
        find_place(environment | {name: "many"})


def test_impossible_numbers_are_named() -> None:
    with pytest.raises(UserError, match=r"RANK must be < WORLD_SIZE \(8\), got 9"):
        find_place(TORCHRUN | {"RANK": "9"})
    with pytest.raises(UserError, match=r"LOCAL_RANK must be < LOCAL_WORLD_SIZE \(4\), got 4"):
        find_place(TORCHRUN | {"LOCAL_RANK": "4"})
    with pytest.raises(UserError, match=r"SLURM_STEP_TASKS_PER_NODE is '4,3'.*--ntasks-per-node"):
        find_place(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,3"})
    with pytest.raises(UserError, match=r"rank 5 of 8 as number 2 of 4.*--distribution=block"):
        find_place(SLURM | {"SLURM_LOCALID": "2"})
    with pytest.raises(UserError, match="rank 5 of 9 as number 1 of 4"):
        find_place(TORCHRUN | {"WORLD_SIZE": "9"})


HOST = st.from_regex(r"[a-z]([a-z0-9-]*[a-z])?", fullmatch=True)


@given(HOST, st.integers(0, 99), st.integers(0, 50), st.sampled_from(["", "-ib", "n[3-4,7]"]))
def test_the_first_host_of_a_list(name, first, more, suffix) -> None:
    plain = suffix.replace("[3-4,7]", "3")
    assert first_host(f"{name}[{first:02d}-{first + more:02d},{first + more + 2}]{suffix}") == (
        f"{name}{first:02d}{plain}"
    )
    assert first_host(f"{name}{first}{suffix},other[1-2]") == f"{name}{first}{plain}"


@pytest.mark.parametrize("nodes", ["", ",a", "[", "gpu[x]"])
def test_what_is_no_list_of_hosts_is_refused(nodes) -> None:
    with pytest.raises(UserError, match="expected names such as"):
        first_host(nodes)


# A launcher of processes that do what each test says, and leave a line each.
LAUNCHER = """
import sys
from twotower.train import launch as module
from twotower.train.launch import launch
module.GRACE_S = 1.0  # instead of the 10 s that NCCL may need
restarts, stop_within_s = int(sys.argv[1]), float(sys.argv[2])
command = [sys.executable, "work.py"]
sys.exit(launch(command, 2, restarts=restarts, stop_within_s=stop_within_s,
                resume_point=lambda: "step 40"))
"""
WORK = """
import os, signal, subprocess, sys, time
from twotower.train.launch import end_with_parent, find_place
end_with_parent()
rank = find_place().rank
with open("log", "a") as log:
    log.write(f"{rank} {os.getpid()} {os.environ['MASTER_PORT']}\\n")
attempt = open("log").read().count(f"\\n{rank} ") + open("log").read().startswith(f"{rank} ")
def until(n):
    "Wait until n processes have begun."
    while len(open("log").read().splitlines()) < n:
        time.sleep(0.01)
def die(number):
    os.kill(os.getpid(), number)
    time.sleep(60)
def on_sigterm(work):
    signal.signal(signal.SIGTERM, work)
"""


@pytest.fixture
def launcher(tmp_path: Path):
    """Start a launcher of two processes, which run `work`; what is left of them is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(
        work: str, restarts: int = 0, stop_within_s: float = 30, **more: Any
    ) -> "subprocess.Popen[str]":
        (tmp_path / "work.py").write_text(WORK + work)
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        started.append(subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(restarts), str(stop_within_s)],
            cwd=tmp_path, text=True, **streams,
        ))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def begun(cwd: Path) -> list[tuple[int, int, int]]:
    """Rank, process and port of each process that has begun."""
    lines = (cwd / "log").read_text().splitlines() if (cwd / "log").exists() else []
    return [tuple(map(int, line.split())) for line in lines]  # type: ignore[misc]


def wait_until_begun(cwd: Path, number: int = 2) -> list[tuple[int, int, int]]:
    deadline = time.monotonic() + 30
    while len(begun(cwd)) < number:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return begun(cwd)


def alive(cwd: Path) -> list[int]:
    return [pid for _, pid, _ in begun(cwd) if psutil.pid_exists(pid)]


def test_two_processes_end_well_and_rank_0_alone_is_heard(launcher, tmp_path) -> None:
    process = launcher("until(2); print('out', rank); print('err', rank, file=sys.stderr)")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "out 0\n", "err 0\n")
    assert sorted(rank for rank, _, _ in begun(tmp_path)) == [0, 1]


def test_rank_0_writes_to_the_terminal(launcher) -> None:
    terminal, stdout = pty.openpty()
    process = launcher("print('terminal', sys.stdout.isatty())", stdout=stdout)
    process.communicate(timeout=30)
    os.close(stdout)
    with open(terminal, "rb", buffering=0) as stream:
        assert stream.read(100) == b"terminal True\r\n"


def test_nobody_takes_the_port_before_rank_0_listens(launcher) -> None:
    process = launcher("""
import socket
from twotower.train.launch import LISTENER
at = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
if rank == 0:
    until(2)
    with socket.socket(fileno=int(os.environ[LISTENER])) as listener, listener.accept()[0] as peer:
        print(peer.recv(100).decode())
else:
    try:
        socket.create_server(at)
        word = b"free"
    except OSError as error:
        word = os.strerror(error.errno).encode()
    with socket.create_connection(at) as peer:
        peer.send(word)
""")
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "Address already in use\n"), errors


def test_a_mistake_is_told_once_and_not_started_again(launcher, tmp_path) -> None:
    # Rank 0 notices that rank 1 is gone, and leaves first.
    process = launcher("""
until(2)
if rank == 0: sys.exit(1)
time.sleep(0.5); print('error: no such table', file=sys.stderr); sys.exit(2)
""", restarts=3)  # fmt: skip
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors == "error: no such table\n"
    assert len(begun(tmp_path)) == 2


def test_a_killed_rank_starts_all_again(launcher, tmp_path) -> None:
    # As with gloo: what is lost to a rank aborts it, at almost the same time.
    process = launcher("""
until(2 * attempt)
if attempt == 1: die(signal.SIGKILL if rank == 1 else time.sleep(0.5) or signal.SIGABRT)
print('done', attempt)
""", restarts=2)  # fmt: skip
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "done 2\n")
    assert errors == (
        "twotower train: rank 1 was ended by SIGKILL (out of memory?): all 2 start again from "
        "step 40; restarts left: 1\n"
    )
    ports = [port for _, _, port in begun(tmp_path)]
    assert len(ports) == 4
    assert ports[0] == ports[1] != ports[2] == ports[3]


def test_restarts_come_to_an_end(launcher, tmp_path) -> None:
    process = launcher("until(2 * attempt); sys.exit(7 * rank) if rank else time.sleep(60)",
                       restarts=1)  # fmt: skip
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[1] == (
        "twotower train: rank 1 failed with code 7 and train.elastic's 1 restarts are spent: give "
        "the same command to go on from step 40"
    )
    assert len(begun(tmp_path)) == 4
    assert not alive(tmp_path), "a rank that waits for a lost one is ended"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_stop_reaches_all_as_sigterm(number, code, launcher, tmp_path) -> None:
    process = launcher("""
def save(number, _):
    time.sleep(0.3)
    open(f'saved-{rank}', 'w').close()
    os._exit(143)
on_sigterm(save)
open(f'ready-{rank}', 'w').close()
time.sleep(60)
""", restarts=3, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
    wait_until_begun(tmp_path)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (code, "")
    assert len(list(tmp_path.glob("saved-*"))) == 2
    assert len(begun(tmp_path)) == 2


def test_nothing_starts_again_that_was_told_to_stop(launcher, tmp_path) -> None:
    process = launcher("until(2); die(signal.SIGKILL) if rank else time.sleep(60)", restarts=3)
    lost = next(pid for rank, pid, _ in wait_until_begun(tmp_path) if rank == 1)
    while psutil.pid_exists(lost):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "rank 1 was ended by SIGKILL (out of memory?), then told to stop" in errors
    assert "goes on from step 40" in errors
    assert len(begun(tmp_path)) == 2


STUBBORN = """
on_sigterm(signal.SIG_IGN)
helper = subprocess.Popen(['sleep', '60'])
open(f'helper-{rank}', 'w').write(str(helper.pid))
open(f'ready-{rank}', 'w').close()
time.sleep(60)
"""


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_stop_is_ended_with_its_helpers(signals, launcher, tmp_path) -> None:
    process = launcher(STUBBORN, stop_within_s=0.2 if signals == 1 else 60)
    while len(list(tmp_path.glob("ready-*"))) < 2:
        time.sleep(0.01)
    helpers = [psutil.Process(int(f.read_text())) for f in tmp_path.glob("helper-*")]
    for _ in range(signals):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    when = "within 0.2 s" if signals == 1 else "at once"
    assert errors == (
        f"twotower train: ranks that did not stop {when} are ended: 0, 1; the next run goes on "
        "from the checkpoint before\n"
    )
    assert not alive(tmp_path)
    _, left = psutil.wait_procs(helpers, timeout=10)
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []


def test_a_job_in_the_background_ignores_the_terminals_interrupt(launcher, tmp_path) -> None:
    process = launcher(
        "until(2); time.sleep(1)", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    wait_until_begun(tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_launcher_that_is_killed_takes_its_ranks_along(launcher, tmp_path) -> None:
    process = launcher("time.sleep(60)")
    workers = [psutil.Process(pid) for _, pid, _ in wait_until_begun(tmp_path)]
    process.kill()
    process.communicate()
    _, left = psutil.wait_procs(workers, timeout=10)
    assert [p for p in left if p.status() != psutil.STATUS_ZOMBIE] == []
