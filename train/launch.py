"""The processes that train together: who this one is, and starting them on one host.

A process finds its place in what launched it: torchrun (also inside a Kubeflow PyTorchJob), SLURM's
srun, or an indexed Kubernetes Job. Where nothing did, `twotower train` starts one process a device
by itself and watches them. It starts on its own host alone; more hosts are a launcher's business.

The watching is ours, not torchrun's agent (`torch.distributed.launcher.api`): that one restarts
after a mistake of the user's as after a lost device, answers it with a traceback of its own, keeps
each rank's output from the terminal or shows all of it, and ends ranks that save at SIGTERM after
30 s. Ours needs no torch either, so it holds no memory of a device while it waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import IO, Any

from twotower.errors import UserError

MASTER_PORT = 29_500
# What ranks need to notice that another was lost, and to leave.
GRACE_S = 10.0
# A rank ends itself when it cannot save in time; this much later it is ended.
MARGIN_S = 2.0
POLL_S = 0.05
LAUNCHED = "TWOTOWER_LAUNCHED"
# The socket at which rank 0 of such ranks meets the others, listening since before they started:
# a port that was free a moment ago may be taken.
LISTENER = "TWOTOWER_LISTENER"
PR_SET_PDEATHSIG = 1
USER_ERROR = 2


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which of the processes that train together one is.

    Attributes:
        rank: among all.
        ranks: number of all.
        local_rank: on its host.
        local_ranks: number on its host, the same on each.
    """

    rank: int
    ranks: int
    local_rank: int
    local_ranks: int


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place that a launcher gave this process, None where none did.

    Raises:
        UserError: when the launcher's variables are incomplete or contradict each other.
    """
    e = environment
    job = "JOB_COMPLETION_INDEX" in e
    if "RANK" in e or ("WORLD_SIZE" in e and not job):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        start = "start it as `torchrun ... -m twotower train ...`, in a PyTorchJob too"
        return _place(
            e, names, f"{start}, or unset RANK and WORLD_SIZE to train without a launcher"
        )
    # Of the step: the allocation's own SLURM_NTASKS also stands in a batch script and in an
    # interactive shell, which are one process.
    if e.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = (
            "SLURM_PROCID",
            "SLURM_STEP_NUM_TASKS",
            "SLURM_LOCALID",
            "SLURM_STEP_TASKS_PER_NODE",
        )
        # 4(x2): four on each of two hosts.
        each = re.sub(r"\(x\d+\)$", "", e.get(names[3], ""))
        start = "srun must start the same number on each host, in order: --ntasks-per-node=N"
        return _place({**e, names[3]: each}, names, f"{start} --distribution=block")
    if job and ("WORLD_SIZE" in e or "MASTER_ADDR" in e):
        names = ("JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # one process a pod
        return _place({**e, **alone}, names, "set WORLD_SIZE to the Job's completions")
    return None


def _place(environment: Mapping[str, str], names: Sequence[str], remedy: str) -> Place:
    numbers = []
    for name in names:
        value = environment.get(name, "")
        if not value.isdecimal():
            raise UserError(
                f"this process was started as one of several, but the environment variable {name} "
                f"is {repr(value) if value else 'missing'}: expected a number; {remedy}"
            )
        numbers.append(int(value))
    rank, ranks, local_rank, local_ranks = numbers
    for index, size in ((0, 1), (2, 3)):
        if numbers[index] >= numbers[size]:
            raise UserError(
                f"the environment variable {names[index]} must be < {names[size]} "
                f"({numbers[size]}), got {numbers[index]}: {remedy}"
            )
    if ranks % local_ranks or rank % local_ranks != local_rank:
        raise UserError(
            f"the environment names rank {rank} of {ranks} as number {local_rank} of {local_ranks} "
            "on its host: ranks must follow each other on a host, the same number on each; "
            f"{remedy}"
        )
    return Place(rank=rank, ranks=ranks, local_rank=local_rank, local_ranks=local_ranks)


def meeting_point(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return host and port at which the ranks meet, which is on rank 0's host.

    Raises:
        UserError: when the launcher did not say where.
    """
    e = environment
    host, port = e.get("MASTER_ADDR"), e.get("MASTER_PORT", str(MASTER_PORT))
    hosts = e.get("SLURM_STEP_NODELIST")
    if host is None and hosts:
        host = first_host(hosts)
        # Another port for another job on the same host.
        port = e.get("MASTER_PORT", str(20_000 + int(e.get("SLURM_JOB_ID", 0)) % 10_000))
    if host is None:
        raise UserError(
            "the ranks do not know where to meet: set the environment variable MASTER_ADDR to the "
            f"host of rank 0 (and MASTER_PORT, {MASTER_PORT} without)"
        )
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(
            f"the environment variable MASTER_PORT must be from 1 to 65535, got '{port}'"
        )
    return host, int(port)


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list such as `gpu[07-09,12],cpu1`.

    Raises:
        UserError: when it is none.
    """
    first = re.match(r"(?:[^\[\],]|\[[^\[\]]*\])+", nodes)
    host = re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0]) if first else ""
    if not host or "[" in host:
        raise UserError(f"SLURM's list of hosts is '{nodes}': expected names such as gpu[1-4]")
    return host


def end_with_parent() -> None:
    """End this process when the one that launched it has ended, killed for instance."""
    if parent := os.environ.get(LAUNCHED):
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        except (OSError, AttributeError):
            return  # not Linux
        if os.getppid() != int(parent):
            os._exit(1)


def launch(
    command: Sequence[str], processes: int, *, restarts: int, stop_within_s: float,
    resume_point: Callable[[], str],
) -> int:  # fmt: skip
    """Run a command in several processes of this host that train together.

    A SIGTERM or Ctrl-C reaches all ranks as SIGTERM, at which they save and leave; a second one
    ends them at once.

    Args:
        command: that each process runs; it calls `find_place`.
        processes: to start.
        restarts: times that all are started again when one was lost.
        stop_within_s: in which a rank that is told to stop saves and leaves; then it is ended.
        resume_point: says from where a restart goes on, for instance "step 40".

    Returns:
        0; USER_ERROR, when a rank refused its input; 1, when one was lost once too often; or 128 +
        the signal that stopped it.
    """
    with _noted_signals() as signals:
        for left in range(restarts, -1, -1):
            with _Workers(command, processes) as workers:
                failed = workers.wait(signals)
                if not failed and workers.running():
                    workers.stop(signals, stop_within_s)
                    return 128 + signals[0]
                if not failed:
                    return 0
                # The others notice by themselves and leave, unless they wait for a device.
                workers.leave(GRACE_S, lambda: bool(signals))
                cause = workers.cause(failed)
                workers.tell(cause)
                if workers.code(cause) == USER_ERROR:
                    return USER_ERROR
                lost = f"rank {cause} {workers.fate(cause)}"
            if signals:
                _say(f"{lost}, then told to stop: the same command goes on from {resume_point()}")
                return 128 + signals[0]
            if left:
                _say(f"{lost}: all {processes} start again from {resume_point()}; "
                     f"restarts left: {left - 1}")  # fmt: skip
    spent = f"train.elastic's {restarts} restarts are spent" if restarts else "train.elastic is 0"
    _say(f"{lost} and {spent}: give the same command to go on from {resume_point()}")
    return 1


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Yield the signals that ask to stop, as they come."""
    signals: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)

    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in previous.items():
        # A shell lets its background jobs ignore Ctrl-C.
        if handler != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _say(message: str) -> None:
    print(f"twotower train: {message}", file=sys.stderr, flush=True)


class _Workers:
    """The processes of one attempt; none outlives the block."""

    def __init__(self, command: Sequence[str], processes: int) -> None:
        self.command, self.size = list(command), processes
        self.processes: list[subprocess.Popen[bytes]] = []
        self.errors: dict[int, IO[bytes]] = {}

    def __enter__(self) -> _Workers:
        # Open here only while the ranks start, or the others would wait for a lost rank 0.
        with socket.create_server(("127.0.0.1", 0)) as server:
            common = os.environ | {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1]),
                "WORLD_SIZE": str(self.size), "LOCAL_WORLD_SIZE": str(self.size),
                LAUNCHED: str(os.getpid()), LISTENER: str(server.fileno()),
            }  # fmt: skip
            # Cores are shared, or each process would start a thread on every one.
            common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.size)))
            try:
                for rank in range(self.size):
                    own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    self._start(rank, common | own, () if rank else (server.fileno(),))
            except BaseException:
                self.__exit__()
                raise
        return self

    def _start(self, rank: int, environment: dict[str, str], inherited: tuple[int, ...]) -> None:
        # What rank 0 shows goes to the terminal, what others say only when they are the cause.
        streams: dict[str, Any] = {}
        if rank:
            self.errors[rank] = tempfile.TemporaryFile()  # noqa: SIM115, closed in `__exit__`
            streams = {"stdout": subprocess.DEVNULL, "stderr": self.errors[rank]}
        # A session of its own: Ctrl-C comes to the launcher alone, which passes it on.
        self.processes.append(subprocess.Popen(
            self.command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            pass_fds=inherited, **streams,
        ))  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None = None, error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:  # fmt: skip
        for rank in self.running():
            # With the processes that build its batches.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.processes[rank].pid, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for file in self.errors.values():
            file.close()

    def running(self) -> list[int]:
        """Return the ranks that have not ended."""
        return [rank for rank, process in enumerate(self.processes) if process.poll() is None]

    def code(self, rank: int) -> int:
        """Return a rank's exit code, negative for a signal, 0 while it runs."""
        return self.processes[rank].returncode or 0

    def failed(self) -> list[int]:
        """Return the ranks that have failed."""
        return [rank for rank, process in enumerate(self.processes) if process.poll()]

    def wait(self, signals: Sequence[int]) -> list[int]:
        """Wait until all have ended, some have failed, or a signal came; returns the failed."""
        while not signals and not self.failed() and self.running():
            time.sleep(POLL_S)
        return self.failed()

    def leave(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Give ranks time to leave by themselves."""
        deadline = time.monotonic() + seconds
        while self.running() and time.monotonic() < deadline and not enough():
            time.sleep(POLL_S)

    def cause(self, first: Sequence[int]) -> int:
        """Return the rank for which all failed, given those that were seen failing first.

        A signal to one of them comes first. Others fail because they lost one, perhaps before the
        one that refused its input has left.
        """
        refused = [rank for rank in self.failed() if self.code(rank) == USER_ERROR]
        return ([rank for rank in first if self.code(rank) < 0] or refused or list(first))[0]

    def stop(self, signals: Sequence[int], stop_within_s: float) -> None:
        """Tell all to save and leave, and say which do not."""
        for rank in self.running():
            self.processes[rank].send_signal(signal.SIGTERM)
        self.leave(stop_within_s + MARGIN_S, lambda: len(signals) > 1)
        if late := self.running():
            within = "at once" if len(signals) > 1 else f"within {stop_within_s:g} s"
            _say(
                f"ranks that did not stop {within} are ended: {', '.join(map(str, late))}; the "
                "next run goes on from the checkpoint before"
            )

    def tell(self, rank: int) -> None:
        """Print what a rank said that nobody has seen."""
        if rank in self.errors:
            self.errors[rank].seek(0)
            sys.stderr.write(self.errors[rank].read().decode(errors="replace"))
            sys.stderr.flush()

    def fate(self, rank: int) -> str:
        """Return how a rank ended."""
        code = self.code(rank)
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"was ended by {signal.Signals(-code).name}{hint}"
        if code == 128 + signal.SIGTERM:
            return "was told to stop by SIGTERM"
        return f"failed with code {code}"
