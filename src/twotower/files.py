"""Whole directories or none: atomic writes and fingerprints shared by every step.

A step writes beside the final name and swaps into place, so a reader sees a complete directory, the
old or the new one, and a killed writer leaves nothing that looks whole.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from twotower.errors import UserError

PARTIAL_SUFFIX = ".partial"
OLD_SUFFIX = ".old"

# Of renameat2(2): where paths are relative to, and "swap the two".
AT_FDCWD = -100
RENAME_EXCHANGE = 2
NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


def partial_path(final: Path) -> Path:
    """Return where `final` is written before it is complete."""
    return final.with_name(final.name + PARTIAL_SUFFIX)


def publish(partial: Path, final: Path) -> None:
    """Give `partial` the name `final`, replacing a directory that is already there.

    Where the system can swap two directories (Linux, on most local filesystems), `final` is whole
    at every moment. Elsewhere two renames leave an instant without it, in which the old directory
    is `<final>.old`: after a kill right there, `recover` puts it back.

    Raises:
        OSError: naming the path, for instance when the disk is full; `final` is as it was.
    """
    recover(final)
    for folder, _, names in os.walk(partial):
        for name in names:
            _sync(Path(folder, name))
        _sync(Path(folder))
    if not final.exists():
        os.rename(partial, final)
    elif not _exchange(partial, final):
        old = final.with_name(final.name + OLD_SUFFIX)
        os.rename(final, old)
        os.rename(partial, final)
        os.rename(old, partial)
    _sync(final.parent)
    shutil.rmtree(partial, ignore_errors=True)


def recover(final: Path) -> None:
    """Settle what a writer left that was killed while it published `final`.

    An old directory whose name the new one had not yet taken gets it back: it may hold what can be
    made from nothing else. One that was replaced is removed.
    """
    old = final.with_name(final.name + OLD_SUFFIX)
    doomed = partial_path(old)
    if old.exists() and not final.exists():
        os.rename(old, final)
    shutil.rmtree(doomed, ignore_errors=True)
    if old.exists():
        # Under a name of its own, lest a kill leave a part of it where a whole one is looked for.
        os.rename(old, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directories in one step; returns whether the system can."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    if swap(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if not (path.is_file() or path.is_dir()):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network filesystems sync no folders.
        if path.is_file() or error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(handle)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a fresh directory that becomes `final` when the block ends without an error."""
    recover(final)
    partial = partial_path(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        recover(final)
        raise


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes that ask the same out of `folder`; a killed one is out at once.

    Raises:
        UserError: while another process is in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"{folder}: another process is writing here: wait until it is done, or stop it"
        ) from None
    except OSError:
        pass  # Some network filesystems have no locks.
    try:
        yield
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file that nobody will change a second name, or a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, atomically."""
    temporary = path.with_name(path.name + PARTIAL_SUFFIX)
    temporary.write_text(json.dumps(value, indent=2, sort_keys=False, allow_nan=False) + "\n")
    os.replace(temporary, path)


def fingerprint(value: Any) -> str:
    """Return a short stable hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex."""
    with path.open("rb") as handle:
        digest = hashlib.sha256()
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
