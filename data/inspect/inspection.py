"""Inspecting a log: everything counted in the engine, within `data.memory_gb`.

twotower inspect --config JOB.yaml [--against PREPARED]

inspection.json
  log        the locations read, with their number of files and bytes
  counts     see `sizes` and `repeats` in `twotower.data.inspect.measure`; `bad_rows` skipped,
             `dropped_by_label`
  bad_rows   the first reasons
  time, popularity, histories, features, split
             see the functions of `twotower.data.inspect.measure`
  gains, listed
             see `twotower.data.inspect.leaks`
  drift      with --against, in place of split, gains and listed: `twotower.data.inspect.drift`
  limits     the `inspect:` section
  findings   see `twotower.data.inspect.findings`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twotower.data.engine import one_value, open_engine
from twotower.data.inspect.config import InspectConfig
from twotower.data.inspect.drift import compare, readable
from twotower.data.inspect.findings import find
from twotower.data.inspect.leaks import gains, listed, make_prior
from twotower.data.inspect.measure import (
    feature_figures,
    histories,
    popularity,
    repeats,
    sizes,
    split_figures,
    time_span,
)
from twotower.data.inspect.tables import contexts_of, make_log, temporal_cuts
from twotower.data.log.id_types import IdTypes
from twotower.data.log.scan import Report, Scan, scan
from twotower.data.log.sources import Source, find_sources, locations
from twotower.data.prepare.entities import make_entities
from twotower.data.prepare.split import Cuts
from twotower.data.schema import DataConfig
from twotower.errors import UserError

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset


def inspect_log(
    config: DataConfig, limits: InspectConfig, scratch: Path,
    against: PreparedDataset | None = None, report: Report = lambda stage, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of a log, as `inspection.json` holds them.

    Args:
        config: the schema.
        limits: past which something is remarked on.
        scratch: folder for the engine, removed afterwards.
        against: a dataset trained on; the log is then a new one, compared with it.
        report: told what is being done, and how much of it is.

    Raises:
        UserError: for what is wrong with a whole file or column; a bad row is counted instead.
    """
    asked, (config, types) = config, _reading(config, against)
    sources = find_sources(config)
    with open_engine(scratch, config.memory_gb) as connection:
        found = scan(connection, config, sources, types, report)
        _refuse_nothing(connection, config, found)
        # Nothing below asks for the order of rows, and keeping it costs memory.
        connection.execute("SET preserve_insertion_order = false")
        report("numbering ids", 0.0)
        make_entities(connection, found.config, types, None)
        cuts, contexts = Cuts(), []
        if against is None:
            cuts, contexts = temporal_cuts(connection, found.config), contexts_of(found.config)
        make_log(connection, found.config, cuts, contexts)
        out = _figures(connection, found, sources, report)

        if against is None:
            leaks = partial(report, "looking for leaks")
            out |= _split_and_leaks(connection, found.config, cuts, leaks)
        else:
            done = partial(report, "comparing features")
            out["drift"] = compare(connection, found.config, asked, against, limits, done)
    out["limits"] = asdict(limits)
    out["findings"] = find(out, asked, limits)
    return out


def _reading(config: DataConfig, against: PreparedDataset | None) -> tuple[DataConfig, IdTypes]:
    """Return what the log is read with: bad rows skipped, ids of the types trained on."""
    types = IdTypes.of(config)
    if against is not None:
        # What came before the log is no part of a new one.
        config = replace(readable(config, against), earlier=None)
        types = IdTypes.of(against.config, against.summary["types"])
    return replace(config, on_bad_rows="skip"), types


def _refuse_nothing(connection: Any, config: DataConfig, found: Scan) -> None:
    if one_value(connection, "SELECT count(*) FROM raw_events"):
        return
    where = locations(config)["data.interactions"]
    reason = next((f": {r}" for r in found.bad_rows.first), "")
    if found.dropped:
        reason = ": no label reaches data.columns.positive_from: lower it"
    raise UserError(f"{where}: the log has no event that can be used{reason}")


def _figures(connection: Any, found: Scan, sources: list[Source], report: Report) -> dict[str, Any]:
    """Return what is said of any log."""
    config = found.config
    places = locations(config)
    log = {
        s.key: {"location": places[s.key], "files": len(s.files),
                "bytes": sum(f.size for f in s.files)}
        for s in sources
    }  # fmt: skip
    steps: list[Callable[[], dict[str, Any]]] = [
        lambda: {"time": time_span(connection)},
        lambda: {"popularity": popularity(connection)},
        lambda: {"counts": sizes(connection) | repeats(connection)},
        lambda: {"histories": histories(connection)},
    ]
    features: list[dict[str, Any]] = []
    out: dict[str, Any] = {"log": log}
    every = config.features()
    for done, step in enumerate(steps):
        report("counting", done / (len(steps) + len(every)))
        out |= step()
    for done, (tower, f) in enumerate(every, len(steps)):
        report("counting", done / (len(steps) + len(every)))
        features.append(feature_figures(connection, config, tower, f))
    out["counts"] |= {"bad_rows": found.bad_rows.count, "dropped_by_label": found.dropped}
    return out | {"bad_rows": found.bad_rows.first, "features": features}


def _split_and_leaks(
    connection: Any, config: DataConfig, cuts: Cuts, report: Callable[[float], None]
) -> dict[str, Any]:
    report(0.0)
    split = split_figures(connection, config, cuts)
    make_prior(connection)
    told = gains(connection, config, report)
    return {"split": split, "gains": told, "listed": listed(connection, config)}
