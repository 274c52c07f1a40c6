"""The processes below Triton: what Linux says of them, and their end; and our own memory."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

M_ARENA_MAX = -8  # of malloc.h


def descendants(pid: int) -> list[int]:
    """Return the pids of the processes below `pid`, those of its threads included."""
    found: list[int] = []
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:  # ended meanwhile
        return found
    for thread in threads:
        try:
            direct = [int(child) for child in (thread / "children").read_text().split()]
        except OSError:  # ended meanwhile
            continue
        for child in direct:
            found += [child, *descendants(child)]
    return found


def command_of(pid: int) -> list[str]:
    """Return the command line of a process, nothing of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def memory_bytes(pids: Iterable[int]) -> int:
    """Return the memory that processes hold together.

    It is the sum of their proportional set sizes: pages that several share, or that map a file, are
    divided among them.
    """
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:  # ended meanwhile
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def kill(pids: Iterable[int]) -> None:
    """Kill processes, of which some may have ended meanwhile."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def share_free_memory() -> None:
    """Have threads to come allocate from what others have freed.

    glibc gives each thread a pool of its own otherwise, 8 a core, and what a thread that has ended
    has freed stays in its pool: a process whose threads come and go grows.
    """
    with suppress(AttributeError):  # of another C library
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)
