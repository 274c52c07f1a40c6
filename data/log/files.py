"""Where a log lies: files, folders, globs and fsspec URLs, and what tells whether they changed."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import fsspec

from twotower.errors import UserError

FORMATS = {
    "parquet": (".parquet", ".pq"),
    "csv": (".csv",),
    "json": (".jsonl", ".ndjson", ".json"),
}
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class LogFile:
    """One file of a log.

    Attributes:
        fs: fsspec filesystem.
        path: in that filesystem.
        format: parquet, csv or json.
        size: bytes, for progress.
        state: name, size and time or ETag; what tells whether the file changed.
        partition: values that a hive folder's name gives, `day=3` as `{"day": "3"}`.
    """

    fs: Any
    path: str
    format: str
    size: int
    state: tuple[str, int, str]
    partition: dict[str, str | None]


def locate(root: str, location: str) -> str:
    """Return `location` below `root`, unless it is absolute or a URL of its own."""
    if not root or "://" in location or posixpath.isabs(location):
        return location
    return posixpath.join(root, location)


def list_files(location: str, key: str) -> list[LogFile]:
    """Return the sorted files that `location` stands for.

    Args:
        location: file, folder (searched to any depth), glob or URL.
        key: the configuration key, for errors.

    Raises:
        UserError: when nothing is there, or not all of one readable format.
    """
    try:
        fs, path = fsspec.core.url_to_fs(location)
        found = _matching(fs, path)
        files = [_log_file(fs, file, _below(path), location, key) for file in found]
    except (ImportError, PermissionError) as error:
        raise UserError(f"{location}: cannot be opened ({key}): {error}") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{location}: cannot be opened ({key}): {reason}") from None
    if not files:
        raise UserError(
            f"{location}: no such file ({key}): correct {key}, or data.root if it is relative"
        )
    if len({f.format for f in files}) > 1:
        other = next(f for f in files if f.format != files[0].format)
        raise UserError(
            f"{location}: holds {files[0].format} ({files[0].path}) and {other.format} "
            f"({other.path}): keep one format"
        )
    return files


def _below(path: str) -> str:
    """Return the part of a location that is no pattern: partitions lie below it."""
    parts = path.split("/")
    plain = next((i for i, p in enumerate(parts) if any(c in p for c in "*?[")), len(parts))
    return "/".join(parts[:plain])


def _matching(fs: Any, path: str) -> list[str]:
    if any(c in path for c in "*?["):
        found = sorted(fs.glob(path))
        folders = [f for f in found if fs.isdir(f)]
        return sorted({f for f in found if f not in folders}.union(
            *(set(_matching(fs, f)) for f in folders)
        ))  # fmt: skip
    if fs.isdir(path):
        base = len(path.rstrip("/"))
        return sorted(
            f for f in fs.find(path)
            # Spark's _SUCCESS, _temporary/ and .crc files are no data.
            if _format(f) and not any(p[:1] in ("_", ".") for p in f[base:].split("/") if p)
        )  # fmt: skip
    return [path] if fs.exists(path) else []


def _format(file: str) -> str | None:
    for name, suffixes in FORMATS.items():
        for suffix in suffixes:
            if any(file.endswith(suffix + c) for c in COMPRESSIONS):
                return name
    return None


def _log_file(fs: Any, path: str, below: str, location: str, key: str) -> LogFile:
    kind = _format(path)
    if kind is None:
        raise UserError(
            f"{location}: expected .parquet, .csv or .jsonl files ({key}), got {path}: "
            "rename or convert it"
        )
    info = fs.info(path)
    stamp = info.get("mtime") or info.get("ETag") or info.get("LastModified")
    size = int(info.get("size") or 0)
    pairs = [p.split("=", 1) for p in path[len(below) :].split("/")[:-1] if "=" in p]
    partition = {k: None if v == HIVE_NULL else unquote(v) for k, v in pairs}
    return LogFile(fs, path, kind, size, (path, size, str(stamp)), partition)
