"""Holding a server's directory: two servers never work in one, however close together they start.

The hold is an OS lock (flock), which ends with the process that took it, even a killed one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from twotower.errors import UserError

LOCK = "lock"
REPOSITORY = "repository"
STATE = "server.json"


@contextmanager
def held(work_dir: Path) -> Iterator[None]:
    """Hold `work_dir`, made if need be, while the block runs.

    Raises:
        UserError: when another server works there, or the filesystem has no locks.
    """
    handle = _lock(work_dir)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        if (orphan := server_pid(work_dir)) is not None:
            raise _taken(work_dir, orphan)
        # A killed server left it.
        (work_dir / STATE).unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


@contextmanager
def passing_directory(path: Path) -> Iterator[None]:
    """Hold `path`, emptied, while the block runs, and remove it at the end.

    What a killed process left in it goes too. After a `UserError` it stays until the next time,
    since the message names the log in it.

    Raises:
        UserError: as `held`.
    """
    with held(path):
        _empty(path)
        keep = False
        try:
            yield
        except UserError:
            keep = True
            raise
        finally:
            if not keep:
                # The lock goes last: nobody may take a directory that is half gone.
                _empty(path)
                shutil.rmtree(path, ignore_errors=True)


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink(missing_ok=True)


def _lock(work_dir: Path) -> int:
    """Return the handle of the directory's lock file, locked."""
    while True:
        work_dir.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(work_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # who held the directory has just removed it
            continue
        try:
            _flock(handle, work_dir)
        except UserError:
            os.close(handle)
            raise
        # A lock on a file that has lost its name keeps nobody out.
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)


def _flock(handle: int, work_dir: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _taken(work_dir, os.pread(handle, 32, 0).decode() or "unknown") from None
    except OSError as error:
        raise UserError(
            f"{work_dir / LOCK}: cannot be locked ({error.strerror}): give a run_dir on a "
            "filesystem that has locks (flock)"
        ) from None


def server_pid(work_dir: Path) -> int | None:
    """Return the pid of the tritonserver that runs there, though its twotower may be killed."""
    try:
        pid = int(json.loads((work_dir / STATE).read_text())["pid"])
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError, TypeError):
        return None
    ours = f"--model-repository={(work_dir / REPOSITORY).resolve()}"
    return pid if os.fsencode(ours) in command.split(b"\0") else None


def _taken(work_dir: Path, pid: object) -> UserError:
    return UserError(
        f"{work_dir}: process {pid} serves this job already: stop it first, or give another "
        "run_dir, beside a PATH another --work-dir"
    )
