"""What a schema reads: tables with their files, and the one that each feature comes from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from twotower.data.log.files import LogFile, list_files, locate
from twotower.data.log.read import column_names
from twotower.data.schema import ENTITIES, LINE_FORMATS, DataConfig, Feature, is_own_id
from twotower.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Source:
    """One of the log's tables: its key in the configuration, its files, and what they stand for."""

    key: str
    table: str
    files: list[LogFile]
    split: int = 0


def locations(config: DataConfig) -> dict[str, str]:
    """Return every location that a schema reads, by its key."""
    places = {
        "data.interactions": config.interactions,
        "data.users": config.users,
        "data.items": config.items,
    }
    if config.earlier is not None:
        places["data.earlier"] = config.earlier.location
    if config.split.kind == "given":
        places["data.split.validation_files"] = config.split.validation_files
        places["data.split.test_files"] = config.split.test_files
    return {k: locate(config.root, v) for k, v in places.items() if v is not None}


TABLES = {
    "data.interactions": ("raw_events", 0),
    "data.split.validation_files": ("raw_events", 1),
    "data.split.test_files": ("raw_events", 2),
    "data.users": ("raw_users", 0),
    "data.items": ("raw_items", 0),
    "data.earlier": ("raw_earlier", 0),
}


def find_sources(config: DataConfig) -> list[Source]:
    """Return the tables that a schema reads, with their files."""
    lines = config.format if config.format in LINE_FORMATS else None
    return [
        Source(key, table, list_files(place, key, lines if table == "raw_events" else None), split)
        for key, place in locations(config).items()
        for table, split in [TABLES[key]]
    ]


def _first_names(source: Source) -> list[str]:
    """Return the columns of the first file that has any: one of JSON lines may be empty."""
    for file in source.files:
        if names := column_names(file, source.key):
            return names
    expected = " of JSON, one object a line" if source.files[0].format == "json" else ""
    raise UserError(
        f"{source.files[0].path}: the log is empty: {source.key} needs at least one row{expected}"
    )


def resolve_sources(config: DataConfig, sources: list[Source]) -> DataConfig:
    """Return the schema with every feature's source filled in.

    Raises:
        UserError: for a column that is not there, in two tables, or what is to be predicted.
    """
    own = [config.columns.user, config.columns.item]
    names = {
        s.key: own if s.table == "raw_events" and config.format in LINE_FORMATS
        else _first_names(s)
        for s in sources if s.files
    }  # fmt: skip
    have = {side: [*names.get(f"data.{side}", [])] for side in ENTITIES}
    have["interactions"] = names.get("data.interactions", [])
    have["users"].append(config.columns.user)
    have["items"].append(config.columns.item)
    resolved: dict[str, list[Feature]] = {"query": [], "item": []}
    for tower, f in config.features():
        possible = ["users", "interactions"] if tower == "query" else ["items"]
        found = [s for s in possible if f.source_column in have[s]]
        if f.kind == "history" and f.column is None:
            resolved[tower].append(f)
            continue
        spot = f"data.{tower}, feature '{f.name}'"
        if tower == "query":
            if f.source_column == config.columns.user:
                found = ["users"]
            if f.source_column in (config.columns.item, config.columns.label):
                raise UserError(
                    f"{spot}: column '{f.source_column}' is what is to be predicted and would "
                    "leak: earlier items come with kind: history"
                )
        if (f.source is not None and f.source not in found) or not found:
            searched = [f.source] if f.source else possible
            near = [n for s in searched for n in have[s]]
            raise UserError(
                f"{spot}: no column '{f.source_column}' in {' or '.join(searched)}"
                f"{did_you_mean(f.source_column, near)}"
            )
        if f.source is None and len(found) > 1:
            raise UserError(
                f"{spot}: column '{f.source_column}' is in users and in interactions: "
                "say which with `source: users` or `source: interactions`"
            )
        source = f.source or found[0]
        if source in ENTITIES and f"data.{source}" not in names and not is_own_id(config, tower, f):
            raise UserError(
                f"{spot}: kind {f.kind}{' with a pattern' if f.pattern else ''} of the id column "
                f"is read from data.{source}, which is not set"
            )
        resolved[tower].append(replace(f, source=source))
    return replace(config, query=resolved["query"], item=resolved["item"])
