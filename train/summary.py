"""train.json: what training did, and the SHA-256 of the files that later steps read.

Needs no torch, so that a step with nothing to do ends at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twotower.errors import UserError
from twotower.files import sha256_file, write_json

SUMMARY = "train.json"
TRACKED = "tracked.json"


def write_summary(directory: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Write train.json into a training directory that is complete but for it, and return it."""
    files = [directory / "model.json", *sorted((directory / "checkpoint").rglob("*"))]
    digests = {
        str(file.relative_to(directory)): sha256_file(file) for file in files if file.is_file()
    }
    whole = summary | {"files": digests}
    write_json(directory / SUMMARY, whole)
    return whole


def read_summary(directory: Path) -> dict[str, Any]:
    """Return what training did.

    Raises:
        UserError: when nothing was trained there, or train.json is damaged.
    """
    try:
        summary: dict[str, Any] = json.loads((directory / SUMMARY).read_text())
        if not isinstance(summary["fingerprint"], str) or not isinstance(summary["files"], dict):
            raise TypeError
    except FileNotFoundError:
        raise UserError(f"{directory}: no trained model: run `twotower train` first") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory / SUMMARY}: damaged, or of another version of twotower: run "
            "`twotower train` again"
        ) from None
    return summary


def check_training(directory: Path) -> None:
    """Refuse a training directory that is not as training left it.

    Raises:
        UserError: naming the file; also as `read_summary`.
    """
    for name, digest in read_summary(directory)["files"].items():
        file = directory / name
        if not file.is_file() or sha256_file(file) != digest:
            raise UserError(
                f"{file}: the checkpoint is damaged, it is not as training left it: run "
                "`twotower train` again"
            )


def is_tracked(directory: Path, version: int) -> bool:
    """Whether a bundle of this training has been handed to the tracker."""
    return version in _tracked(directory)


def note_tracked(directory: Path, version: int) -> None:
    """Remember that a bundle has been handed to the tracker."""
    write_json(directory / TRACKED, sorted({*_tracked(directory), version}))


def _tracked(directory: Path) -> list[int]:
    try:
        return list(json.loads((directory / TRACKED).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return []
