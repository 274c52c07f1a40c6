"""Whole directories or none: atomic writes and fingerprints shared by every step.

A step writes beside the final name and renames into place, so a reader sees a complete directory
or no directory, and a killed writer leaves nothing that looks whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTIAL_SUFFIX = ".partial"


def partial_path(final: Path) -> Path:
    """Return where `final` is written before it is complete."""
    return final.with_name(final.name + PARTIAL_SUFFIX)


def publish(partial: Path, final: Path) -> None:
    """Rename `partial` to `final`, replacing a directory that is already there.

    A crash between the two renames leaves the old directory under `<final>.old` and the new one
    complete under `partial`; the next writer removes both.
    """
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a fresh directory that becomes `final` when the block ends without an error."""
    partial = partial_path(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    publish(partial, final)


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
