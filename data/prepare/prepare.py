"""Preparing a log: raw columns to the prepared dataset that training reads memory-mapped.

    twotower prepare --config JOB.yaml

    prepared/
      prepared.json       counts, split, normalisers, spans, tables; the fingerprint of the inputs
      events.arrow        training, validation and test, each sorted by (user, time): user, item,
                          time, [weight], history end, context
      skipped.arrow       with a label and positive_from: user, item and time of the events below,
                          and by raw ids in skipped_waiting.arrow where one has no row yet
      timeline.arrow      each user's items in order; a history is a slice of it, not a copy; for
                          histories with times also their seconds since 1970
      users.arrow         raw id, start of the timeline, features raw and encoded
      items.arrow         the catalogue, ascending by raw id: training count, features, display
      contexts/<f>.arrow  the values of a context feature, which events name by number
      tables/<name>.arrow the vocabulary of an embedding table that has one
      histories/<t>.arrow the timeline in rows of embedding table t, which batches are cut from

Where a table's ids are dynamic, their keys (`twotower.data.vocabulary`) stand for rows throughout.

Vocabularies, item frequencies and normalisers come from the training period alone. The work is
done within `data.memory_gb` by an engine that spills to disk; what is appended later leaves the
files as if all had been prepared at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from twotower.data.encode import Normaliser, find_span_starts
from twotower.data.engine import arrow_batches, column, open_engine
from twotower.data.log.id_types import IdTypes
from twotower.data.log.scan import SPLIT_NAMES, Report, Scan, scan
from twotower.data.prepare.columns import (
    EntityWriter,
    fit_normaliser,
    write_contexts,
    write_histories,
)
from twotower.data.prepare.entities import count_rows, make_entities
from twotower.data.prepare.events import EventWriter, Written
from twotower.data.prepare.plan import FORMAT, Plan, dataset_mark, make_plan, schema_mark
from twotower.data.prepare.skipped import write_skipped
from twotower.data.prepare.split import I64, Cuts, find_cuts
from twotower.data.prepare.spool import Spool, read_arrow
from twotower.data.prepare.vocabularies import (
    PIECE,
    build_vocabularies,
    count_training,
    write_vocabularies,
)
from twotower.data.prepared import array
from twotower.data.schema import DataConfig
from twotower.errors import UserError
from twotower.files import write_json

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset

REMEDIES = {
    "temporal": "change data.split.test or data.split.test_from",
    "leave_last_out": "leave_last_out needs users with at least 3 events: use a temporal split",
    "given": "mark such events in data.split.column, or check data.split.test_files",
}


def prepare(
    config: DataConfig,
    directory: Path,
    previous: PreparedDataset | None = None,
    report: Report = lambda stage, share: None,
) -> dict[str, Any]:
    """Write the prepared dataset into `directory`, which is empty.

    Args:
        config: the schema.
        directory: where to write; the caller renames it into place.
        previous: a dataset to append to, where that is possible.
        report: told what is being done, and how much of it is.

    Returns:
        The content of `prepared.json`.

    Raises:
        UserError: for anything wrong with the log, naming file, column, row and remedy.
    """
    config.validate()
    plan = make_plan(config, previous)
    if plan.kind == "all":
        previous = None
    scratch = directory / "scratch"
    with open_engine(scratch, config.memory_gb) as connection:
        decided = None if previous is None else previous.summary["types"]
        types = IdTypes.of(config, decided)
        found = scan(connection, config, plan.sources, types, report)
        return _write(connection, found, config, plan, directory, previous, report)


def _write(
    connection: Any, found: Scan, asked: DataConfig, plan: Plan, directory: Path,
    previous: PreparedDataset | None, report: Report,
) -> dict[str, Any]:  # fmt: skip
    config, types, scratch = found.config, found.types, directory / "scratch"
    report("numbering ids", 0.0)
    where = plan.inputs["data.interactions"][0][0]
    _refuse_overlap(connection, plan, previous)
    make_entities(connection, config, types, previous)
    rows = {side: count_rows(connection, side) for side in ("users", "items")}
    if min(rows.values()) < 2:
        raise UserError(
            f"{where}: has {rows['users']} user(s) and {rows['items']} item(s): "
            "two towers need at least two of each"
        )
    cuts = Cuts()
    if config.split.kind == "temporal":
        cuts = find_cuts(config.split, lambda: _times(connection, previous))
    users, items = Spool(scratch / "users"), Spool(scratch / "items")
    writer = EventWriter(connection, config, cuts, scratch, users, previous)
    written = writer.write(report)
    _refuse_empty_splits(config, written, where)
    writer.finish(directory)
    skipped = {}
    if config.columns.keeps_skipped:
        skipped["skipped"] = write_skipped(connection, config, types, directory, scratch, previous)
    report("building vocabularies", 0.0)
    events = read_arrow(directory / "events.arrow")
    train = written.counts[0]
    seen = count_training(connection, config, events, train)
    build_vocabularies(connection, config, types, events, train, previous)
    tables = write_vocabularies(connection, config, types, directory / "tables", scratch)
    report("encoding features", 0.0)
    write_contexts(connection, config, types, seen, directory / "contexts", scratch)
    normalisers = _context_normalisers(config, events, train)
    without = 0
    for side, spool in (("users", users), ("items", items)):
        entity = EntityWriter(connection, config, side, seen[side], spool, scratch)
        fitted, without = entity.write()
        normalisers |= fitted
        spool.finish(directory / f"{side}.arrow")
    write_histories(config, directory, scratch)
    cold = int((seen["items"].count == 0).sum())
    before = previous.summary if previous is not None else {}
    summary = {
        "format": FORMAT,
        "fingerprint": dataset_mark(asked, plan.inputs),
        "schema": schema_mark(asked),
        "inputs": plan.inputs,
        "config": asdict(config),
        "counts": {
            "events": sum(written.counts),
            "dropped_by_label": found.dropped + written.dropped
            + before.get("counts", {}).get("dropped_by_label", 0),
            "bad_rows": found.bad_rows.count + before.get("counts", {}).get("bad_rows", 0),
            **{f"{n}_events": c for n, c in zip(SPLIT_NAMES, written.counts, strict=True)},
            **skipped, **rows, "items_without_a_row": without, "cold_items": cold,
        },
        "bad_rows": [*before.get("bad_rows", []), *found.bad_rows.first][:5],
        "time": {
            name: [written.first[i], written.last[i]]
            for i, name in enumerate(SPLIT_NAMES)
            if written.counts[i]
        },
        "types": dict(sorted(types.decided.items())),
        "normalisers": {k: asdict(n) for k, n in sorted(normalisers.items())},
        "span_starts": find_span_starts(array(events, "time")[:train])
        if config.timed_histories() else [],
        "tables": tables,
        "files": {
            str(file.relative_to(directory)): file.stat().st_size
            for file in sorted(directory.rglob("*.arrow"))
            if scratch not in file.parents
        },
    }  # fmt: skip
    report("closing", 1.0)
    write_json(directory / "prepared.json", summary)
    return summary


def _times(connection: Any, previous: PreparedDataset | None) -> Iterator[I64]:
    """Yield all times in pieces."""
    for batch in arrow_batches(connection.cursor(), "SELECT time FROM raw_events"):
        yield column(batch, "time")
    if previous is not None:
        time = previous.event_columns["time"]
        for start in range(0, len(time), PIECE):
            yield time[start : start + PIECE]


def _refuse_overlap(connection: Any, plan: Plan, previous: PreparedDataset | None) -> None:
    """Refuse new events that are not later than all that were prepared."""
    if previous is None or not plan.sources[0].files:
        return
    newest = max(span[1] for span in previous.summary["time"].values())
    count, first = connection.execute(
        f"SELECT count(*), min(time) FROM raw_events WHERE time <= {newest}"
    ).fetchall()[0]
    if count:
        names = ", ".join(f.path for f in plan.sources[0].files[:3])
        raise UserError(
            f"{names}: {count:,} new events are not after the newest prepared one "
            f"({_moment(newest)}; the earliest new one is of {_moment(first)}): a day can be "
            "appended once, in order. Mend the files, or, to prepare everything anew, "
            f"remove {previous.path}; nothing was changed"
        )


def _moment(micros: int) -> str:
    return str(np.datetime64(micros, "us")).removesuffix(".000000").replace("T", " ")


def _refuse_empty_splits(config: DataConfig, written: Written, where: str) -> None:
    for number in (0, 2):
        if not written.counts[number]:
            raise UserError(
                f"{where}: the {config.split.kind} split leaves no {SPLIT_NAMES[number]} events "
                f"of {sum(written.counts)}: {REMEDIES[config.split.kind]}"
            )


def _context_normalisers(config: DataConfig, events: pa.Table, train: int) -> dict[str, Normaliser]:
    out = {}
    for f in config.query:
        if f.source == "interactions" and f.kind == "number":
            values = events[f"context.{f.name}"].slice(0, train)
            key = f"query.{f.name}"
            out[key] = fit_normaliser(
                lambda start, values=values: np.asarray(
                    values.slice(start, PIECE), np.float64
                ),
                train, f"data.query, feature '{f.name}'",
            )  # fmt: skip
    return out
