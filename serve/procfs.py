"""What Linux says of the processes below Triton: which there are, and what memory they hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Return the pids of the processes below `pid`, those of its threads included."""
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            direct = [int(child) for child in children.read_text().split()]
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
