"""The processes that train together: who this one is, and starting them on one host.

A process finds its place in what launched it: torchrun (also inside a Kubeflow PyTorchJob), SLURM's
srun, or an indexed Kubernetes Job. Where nothing did, `twotower train` starts one process a device
by itself and watches them.

The watching is ours, not torchrun's agent: a mistake of the user's must be one line and no restart,
Ctrl-C and SIGTERM must reach ranks that save and leave, and what is shown is rank 0's.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from twotower.errors import UserError

MASTER_PORT = 29_500
# What a rank that another was lost to needs to notice and leave, and a stopped one beyond its time.
GRACE_S = 10.0
POLL_S = 0.05
LAUNCHED = "TWOTOWER_LAUNCHED"
PR_SET_PDEATHSIG = 1
USER_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes that train together one is.

    Attributes:
        rank: among all.
        ranks: number of all.
        local_rank: on its host.
        local_ranks: number on its host.
    """

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that a launcher gave this process, None where none did.

    Raises:
        UserError: when the launcher's variables are incomplete.
    """
    e = environment
    if "RANK" in e or ("WORLD_SIZE" in e and "JOB_COMPLETION_INDEX" not in e):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return _place("torchrun", e, *names)
    if int(e.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in e:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
        return _place("SLURM", e, *names)
    if "JOB_COMPLETION_INDEX" in e and "WORLD_SIZE" in e:
        # One process a pod.
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **e}
        names = ("JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return _place("the indexed Job", alone, *names)
    return None


def _place(launcher: str, environment: Mapping[str, str], *names: str) -> Place:
    numbers = []
    for name in names:
        value = environment.get(name, "")
        if not value.isdigit():
            raise UserError(
                f"the environment looks like that of {launcher}, but {name} is "
                f"{repr(value) if value else 'missing'}: expected a number; unset {names[0]} and "
                f"{names[1]} to train without a launcher"
            )
        numbers.append(int(value))
    place = Place(rank=numbers[0], ranks=numbers[1], local_rank=numbers[2], local_ranks=numbers[3])
    if place.rank >= place.ranks or place.local_rank >= place.local_ranks:
        raise UserError(
            f"the environment of {launcher} names rank {place.rank} of {place.ranks} and local "
            f"rank {place.local_rank} of {place.local_ranks}: they must be below"
        )
    return place


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return host and port at which the ranks meet, which is on rank 0's host.

    Raises:
        UserError: when the launcher did not say where.
    """
    e = environment
    port = e.get("MASTER_PORT")
    if "MASTER_ADDR" in e:
        return e["MASTER_ADDR"], int(port or MASTER_PORT)
    hosts = e.get("SLURM_STEP_NODELIST") or e.get("SLURM_JOB_NODELIST") or e.get("SLURM_NODELIST")
    if hosts:
        # Another port for another job on the same host.
        of_job = 20_000 + int(e.get("SLURM_JOB_ID", 0)) % 20_000
        return first_host(hosts), int(port or of_job)
    raise UserError(
        "the ranks do not know where to meet: set MASTER_ADDR to the host of rank 0 (and "
        f"MASTER_PORT, {MASTER_PORT} without)"
    )


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list such as `gpu[07-09,12],cpu1`."""
    if not (found := re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)):
        raise UserError(f"SLURM's list of hosts is '{nodes}': expected names such as gpu[1-4]")
    return found[1] + (found[2] or "") + found[3]


def end_with_parent() -> None:
    """End this process when the one that launched it has ended, killed for instance."""
    if parent := os.environ.get(LAUNCHED):
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        except (OSError, AttributeError):
            return  # not Linux
        if os.getppid() != int(parent):
            os._exit(1)


class _Stop(Exception):
    """A signal asks the training to stop."""

    def __init__(self, number: int) -> None:
        self.number = number


def launch(arguments: Sequence[str], processes: int, *, restarts: int, stop_within_s: float) -> int:
    """Run `twotower ARGUMENTS` in several processes of this host that train together.

    Args:
        arguments: of the command.
        processes: to start.
        restarts: times that all are started again when one was lost.
        stop_within_s: in which a rank that is told to stop saves and leaves; then it is ended.

    Returns:
        0; what a rank that refused its input returned; or 1, when one was lost too often.

    Raises:
        SystemExit: of 128 + the signal that stopped it.
    """
    previous = {n: signal.signal(n, _raise_stop) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        for attempt in range(restarts + 1):
            workers = _Workers(arguments, processes)
            try:
                cause = workers.wait()
            except _Stop as stop:
                workers.stop(stop.number, stop_within_s)
                raise SystemExit(128 + stop.number) from None
            finally:
                workers.end()
            if cause is None:
                return 0
            if workers.code(cause) == USER_ERROR:
                workers.tell(cause)
                return USER_ERROR
            workers.tell(cause)
            left = restarts - attempt
            again = f"all {processes} start again from the last checkpoint, {left - 1} times more"
            _say(
                f"rank {cause} {workers.fate(cause)}: "
                + (again if left else "give the same command to go on from the last checkpoint, or "
                   "set train.elastic to have that done")
            )  # fmt: skip
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_stop(number: int, _: FrameType | None) -> None:
    for both in (signal.SIGTERM, signal.SIGINT):
        signal.signal(both, signal.SIG_IGN)
    raise _Stop(number)


def _say(message: str) -> None:
    print(f"twotower train: {message}", file=sys.stderr, flush=True)


class _Workers:
    """The processes of one attempt."""

    def __init__(self, arguments: Sequence[str], processes: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        common = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), LAUNCHED: str(os.getpid()),
        }  # fmt: skip
        # Cores are shared, or each process would start a thread on every one.
        common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
        self.processes: list[subprocess.Popen[bytes]] = []
        self.errors: dict[int, IO[bytes]] = {}
        for rank in range(processes):
            # What rank 0 shows goes to the terminal, what others say only when they fail.
            streams: dict[str, Any] = {}
            if rank:
                self.errors[rank] = tempfile.TemporaryFile()  # noqa: SIM115, read in `tell`
                streams = {"stdout": subprocess.DEVNULL, "stderr": self.errors[rank]}
            self.processes.append(subprocess.Popen(
                [sys.executable, "-m", "twotower", *arguments],
                env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
                # Ctrl-C comes to the launcher alone, which passes it on.
                start_new_session=True,
                **streams,
            ))  # fmt: skip

    def code(self, rank: int) -> int:
        """Return a rank's exit code, negative for a signal."""
        code = self.processes[rank].poll()
        return 0 if code is None else code

    def wait(self) -> int | None:
        """Wait until all are done, or one has failed; returns the rank that is the cause."""
        while True:
            codes = [process.poll() for process in self.processes]
            if any(codes):
                break
            if None not in codes:
                return None
            time.sleep(POLL_S)
        # The others notice by themselves and leave, unless they wait for a device.
        self._wait_until(time.monotonic() + GRACE_S)
        failed = [rank for rank in range(len(codes)) if self.code(rank)]
        # Others fail because one was lost; a signal, or a mistake of the user's, comes first.
        return min(failed, key=lambda r: (self.code(r) > 0, self.code(r) != USER_ERROR, r))

    def _wait_until(self, deadline: float) -> bool:
        """Wait for all to end; returns whether they have."""
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def stop(self, number: int, stop_within_s: float) -> None:
        """Pass a signal on, and end those that do not leave in time."""
        for process in self.processes:
            process.send_signal(number)
        if not self._wait_until(time.monotonic() + stop_within_s + GRACE_S):
            late = [rank for rank, p in enumerate(self.processes) if p.poll() is None]
            _say(
                f"ranks {', '.join(map(str, late))} did not stop within {stop_within_s:g} s and "
                "are ended: the next run goes on from the checkpoint before"
            )

    def end(self) -> None:
        """End all that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def tell(self, rank: int) -> None:
        """Print what a rank said that nobody has seen."""
        if rank in self.errors:
            errors = self.errors[rank]
            errors.seek(0)
            sys.stderr.write(errors.read().decode(errors="replace"))
            sys.stderr.flush()

    def fate(self, rank: int) -> str:
        """Return how a rank ended."""
        code = self.code(rank)
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-code).name}{hint}"
        return f"failed with code {code}"
