"""What a preparation has to do: nothing, append new files, or prepare everything.

A file that was read once is never read again. New files are appended; a file that has gone keeps
its events, so that a folder may forget old days. What would lose events is refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.data.log.sources import Source, find_sources
from twotower.data.schema import ID_KINDS, DataConfig, parse_date
from twotower.errors import UserError
from twotower.files import fingerprint

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset

FORMAT = 4
LOG = "data.interactions"


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        kind: nothing, append or all.
        sources: what to read; of the interactions, only what is new.
        inputs: by key, the state of every file that the dataset then holds.
    """

    kind: str
    sources: list[Source]
    inputs: dict[str, list[list[Any]]]


def schema_mark(config: DataConfig) -> str:
    """Fingerprint what the dataset's content depends on, beside the files and the split's dates."""
    split = replace(config.split, validation_from=None, test_from=None)
    if config.split.kind == "temporal" and config.split.test_from is not None:
        split = replace(split, test_from="a date")
    return fingerprint(
        asdict(replace(config, split=split, memory_gb=0.0, on_bad_rows=""))
    )  # fmt: skip


def _refuse_names(config: DataConfig) -> None:
    """Refuse names that the engine or a filesystem cannot tell apart, or that are no file's name.

    DuckDB's names, and those of files on macOS and Windows, differ only beyond upper and lower
    case: of two such features one would silently hold the other's values.
    """
    names = {
        "data.query": [f.name for f in config.query],
        "data.item": [f.name for f in config.item],
        "embedding tables": list(
            dict.fromkeys(f.table_name for _, f in config.features() if f.kind in ID_KINDS)
        ),
        "data.display": list(dict.fromkeys(config.display)),
        "data.columns.outcomes": config.columns.outcomes,
    }
    for key, found in names.items():
        for name in found:
            like = next((n for n in found if n != name and n.lower() == name.lower()), None)
            if like is not None:
                raise UserError(
                    f"{key}: '{name}' and '{like}' differ only in upper and lower case: rename one"
                    + (" in the log" if key in ("data.display", "data.columns.outcomes") else "")
                )
    for name in names["embedding tables"] + names["data.query"]:
        if "/" in name or "\0" in name or name[:1] == "." or len(name.encode()) > 200:
            raise UserError(
                f"embedding table or feature '{name[:50]}': is no name for a file: choose a short "
                "one without '/' that does not begin with '.'"
            )


def make_plan(config: DataConfig, previous: PreparedDataset | None) -> Plan:
    """Return what has to be done.

    Args:
        config: a validated schema.
        previous: what was prepared before.

    Raises:
        UserError: when a file is not there, or preparing anew would lose events.
    """
    _refuse_names(config)
    sources = find_sources(config)
    now: dict[str, list[list[Any]]] = {s.key: [list(f.state) for f in s.files] for s in sources}
    everything = Plan("all", sources, now)
    if previous is None:
        return everything
    before: dict[str, list[list[Any]]] = previous.summary["inputs"]
    read = {state[0]: state for state in before[LOG]}
    there: dict[str, list[Any]] = {str(state[0]): state for state in now[LOG]}
    new = {path for path in there if path not in read}
    gone = [path for path in read if path not in there]
    others = {k: v for k, v in before.items() if k != LOG}
    same_others = others == {k: v for k, v in now.items() if k != LOG}
    reason = _anew(config, previous, any(read.get(p, s) != s for p, s in there.items()))
    if reason is None and not new and same_others:
        return Plan("nothing", [], before)
    if reason is None and not new:
        reason = "data.users or data.items changed without new events"
    if reason is None and others.get("data.earlier") != now.get("data.earlier"):
        reason = "data.earlier changed"
    if reason is None and config.columns.train_on == "all":
        reason = "data.columns.train_on is all: events may move from test to training"
    if reason is None and config.split.kind == "leave_last_out":
        reason = "leave_last_out moves events from test to training"
    if reason is None and set(others) & {
        "data.split.validation_files", "data.split.test_files"
    } and not (same_others and not new):  # fmt: skip
        reason = "the split's files are given"
    if reason is not None:
        same_place = (config.root, config.interactions) == (
            previous.config.root, previous.config.interactions,
        )  # fmt: skip
        if gone and same_place:
            raise UserError(
                f"{previous.path}: holds the events of {len(gone)} files that are no longer there "
                f"({gone[0]}), and preparing everything anew, because {reason}, would lose them: "
                f"restore the files, or remove {previous.path} to go on without them"
            )
        return everything
    appended = [
        replace(s, files=[f for f in s.files if f.path in new]) if s.key == LOG else s
        for s in sources
    ]
    return Plan("append", appended, now | {LOG: before[LOG] + [there[p] for p in sorted(new)]})


def refuse_loss(path: Path, plan: Plan) -> None:
    """Refuse to replace a dataset that cannot be appended to and may hold what the log has not.

    Args:
        path: where there is no dataset, or one that is damaged or of another version.
        plan: what would be prepared instead.

    Raises:
        UserError: unless every file that the dataset was made from is still there.
    """
    try:
        before = [str(state[0]) for state in json.loads((path / "prepared.json").read_text())
                  ["inputs"][LOG]]  # fmt: skip
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, IndexError):
        raise UserError(
            f"{path}: prepared.json is damaged, and which files the dataset was made from cannot "
            f"be read: remove {path} to prepare the files that are there now"
        ) from None
    there = {str(state[0]) for state in plan.inputs[LOG]}
    gone = [file for file in before if file not in there]
    if gone:
        raise UserError(
            f"{path}: is of another version of twotower and holds the events of {len(gone)} files "
            f"that are no longer there ({gone[0]}): restore the files, or remove {path} to go on "
            "without them"
        )


def _anew(config: DataConfig, previous: PreparedDataset, changed: bool) -> str | None:
    """Return why appending is out of the question, None when it is not."""
    if previous.summary["schema"] != schema_mark(config):
        return "the schema changed"
    if changed:
        return "a file changed"
    for name in ("validation_from", "test_from"):
        was, now = getattr(previous.config.split, name), getattr(config.split, name)
        if (was is None) != (now is None):
            return f"data.split.{name} changed"
        key = f"data.split.{name}"
        if was is not None and parse_date(key, now) < parse_date(key, was):
            return f"{key} moved back"
        if was is not None and now != was and config.split.kind != "temporal":
            return f"{key} changed"
    return None


def dataset_mark(config: DataConfig, inputs: dict[str, list[list[Any]]]) -> str:
    """Return the fingerprint of a dataset: of its schema and every file that it was made from."""
    dates = [config.split.validation_from, config.split.test_from]
    return fingerprint([FORMAT, schema_mark(config), dates, inputs])
