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
TEXT = (".txt",)
COMPRESSIONS = ("", ".gz", ".bz2", ".xz", ".zst")
# What no backend means when it cannot read: its traceback is needed.
OUR_BUGS = (AssertionError, AttributeError, IndexError, KeyError, NameError, TypeError)
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class LogFile:
    """One file of a log.

    Attributes:
        fs: fsspec filesystem.
        path: in that filesystem.
        format: parquet, csv, json, user_lines or pair_lines.
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

    def refuse_if_changed(self) -> None:
        """Refuse a local file that is no longer as it was listed; objects in a store do not change.

        Raises:
            UserError: for a file that something still writes.
        """
        if "file" not in self.fs.protocol or not self.fs.exists(self.path):
            return
        if _state(self.path, self.fs.info(self.path)) != self.state:
            raise UserError(
                f"{self.path}: changed while it was read: run again once nothing writes it"
            )


def _state(path: str, info: dict[str, Any]) -> tuple[str, int, str]:
    stamp = info.get("mtime") or info.get("ETag") or info.get("LastModified")
    return path, int(info.get("size") or 0), str(stamp)


def locate(root: str, location: str) -> str:
    """Return `location` below `root`, unless it is absolute or a URL of its own."""
    if not root or "://" in location or posixpath.isabs(location):
        return location
    return posixpath.join(root, location)


def list_files(location: str, key: str, lines: str | None = None) -> list[LogFile]:
    """Return the sorted files that `location` stands for.

    Args:
        location: file, folder (searched to any depth), glob or URL.
        key: the configuration key, for errors.
        lines: the format of files of lines, which have any name, in a folder one ending in .txt;
            without it, a name says the format.

    Raises:
        UserError: when nothing is there, or not all of one readable format.
    """
    try:
        fs, path = fsspec.core.url_to_fs(location)
        # A listing kept from before would hide what is new.
        fs.invalidate_cache()
        found = _matching(fs, path, lines)
        files = [
            _log_file(fs, f, found[f], _below(path), lines or _named_format(f, location, key))
            for f in sorted(found)
        ]
    except ImportError as error:
        raise UserError(
            f"{location}: cannot be opened ({key}): {_extra(location, error)}"
        ) from None
    except UserError:
        raise
    except Exception as error:
        # Each of fsspec's backends has errors of its own.
        foreign = "://" in location and not isinstance(error, OUR_BUGS)
        if not foreign and not isinstance(error, (OSError, ValueError)):
            raise
        raise UserError(f"{location}: cannot be opened ({key}): {first_line(error)}") from None
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


def first_line(error: Exception) -> str:
    """Return an error's first line, or its name where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _extra(location: str, error: ImportError) -> str:
    if location.startswith(("s3://", "s3a://")):
        return "reading from S3 needs s3fs: pip install 'twotower[s3]'"
    return first_line(error)


def _below(path: str) -> str:
    """Return the part of a location that is no pattern: partitions lie below it."""
    parts = path.split("/")
    plain = next((i for i, p in enumerate(parts) if any(c in p for c in "*?[")), len(parts))
    return "/".join(parts[:plain])


def _matching(fs: Any, path: str, lines: str | None) -> dict[str, dict[str, Any]]:
    """Return the files that a path stands for, with what the filesystem says of each."""
    if any(c in path for c in "*?["):
        found: dict[str, dict[str, Any]] = {}
        for name, info in fs.glob(path, detail=True).items():
            inside = info["type"] == "directory"
            found |= _below_folder(fs, name, lines) if inside else {name: info}
        return found
    if fs.isdir(path):
        return _below_folder(fs, path, lines)
    return {path: fs.info(path)} if fs.exists(path) else {}


def _below_folder(fs: Any, path: str, lines: str | None) -> dict[str, dict[str, Any]]:
    base = len(path.rstrip("/"))
    return {
        f: info
        for f, info in fs.find(path, detail=True).items()
        # Spark's _SUCCESS, _temporary/ and .crc files are no data.
        if (_ends(f, TEXT) if lines else _format(f))
        and not any(p[:1] in ("_", ".") for p in f[base:].split("/") if p)
    }


def _ends(file: str, suffixes: tuple[str, ...]) -> bool:
    return file.endswith(tuple(suffix + c for suffix in suffixes for c in COMPRESSIONS))


def _format(file: str) -> str | None:
    return next((name for name, suffixes in FORMATS.items() if _ends(file, suffixes)), None)


def _named_format(path: str, location: str, key: str) -> str:
    kind = _format(path)
    if kind is None:
        lines = ""
        if _ends(path, TEXT):
            lines = ", or set data.format to user_lines or pair_lines if it holds such events"
        raise UserError(
            f"{location}: expected .parquet, .csv or .jsonl files ({key}), got {path}: "
            f"rename or convert it{lines}"
        )
    return kind


def _log_file(fs: Any, path: str, info: dict[str, Any], below: str, kind: str) -> LogFile:
    state = _state(path, info)
    pairs = [p.split("=", 1) for p in path[len(below) :].split("/")[:-1] if "=" in p]
    partition = {k: None if v == HIVE_NULL else unquote(v) for k, v in pairs}
    return LogFile(fs, path, kind, state[1], state, partition)
