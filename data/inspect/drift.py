"""Drift: how the events of a new log differ from those that a prepared dataset was trained on.

Compared are each feature's distribution over events, by its population stability index, the share
of events of unseen users and items, and the events a day. The events of one user are not
independent of one another, so chance is judged by the effective number of users,
(sum n)^2 / sum n^2 with n the events of each (Kish 1965), not by the number of events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from twotower.data.inspect.bins import compare_feature
from twotower.data.inspect.config import InspectConfig
from twotower.data.inspect.sides import Sides
from twotower.data.log.scan import SPLIT_NAMES
from twotower.data.schema import DataConfig, Feature, Split, is_own_id

if TYPE_CHECKING:
    from twotower.data.prepared import PreparedDataset

DAY_US = 86_400_000_000


def readable(config: DataConfig, data: PreparedDataset) -> DataConfig:
    """Return the schema without what the new log's tables cannot give.

    Without `data.users` or `data.items`, the features that training read from there are left out;
    the split and what is shown beside answers say nothing of a new log.
    """
    old = {(t, f.name): f for t, f in data.config.features()}
    gone = {side for side in ("users", "items") if getattr(config, side) is None}

    def kept(tower: str, features: list[Feature]) -> list[Feature]:
        out = []
        for f in features:
            source = f.source or getattr(old.get((tower, f.name)), "source", None)
            if f.kind == "history":
                # Lists of earlier items are not compared: they would be read for nothing.
                f = replace(f, column=None, source=None)
            elif source in gone and not is_own_id(config, tower, f):
                continue
            out.append(f)
        return out

    return replace(
        config, query=kept("query", config.query), item=kept("item", config.item),
        split=Split(), display=[],
    )  # fmt: skip


def compare(
    connection: Any, config: DataConfig, asked: DataConfig, data: PreparedDataset,
    limits: InspectConfig, report: Callable[[float], None] = lambda done: None,
) -> dict[str, Any]:  # fmt: skip
    """Compare a new log with what a dataset was trained on, after `make_log` of the new one.

    Args:
        connection: the engine.
        config: the schema that the new log was read with: `readable`, resolved.
        asked: the job's schema.
        data: the dataset trained on.
        limits: past which something is flagged.
        report: told the share that is done.

    Returns:
        `against` and its `fingerprint`; `events` and effective `users`, each `was` and `now`;
        `volume`: events a day `was` and `now`, and their `ratio`; `unseen`: share of events whose
        `users` and `items` training never saw; `features`: see `compare_feature`, or with the
        reason why it is `not_compared`; `flags`: [subject, what is said] of all past a limit.
    """
    sides = Sides(connection, config, data)
    features = []
    every = _every_feature(asked, data)
    for done, (tower, name) in enumerate(every, 1):
        entry: dict[str, Any] = {"name": name, "tower": tower}
        f = next((f for t, f in config.features() if (t, f.name) == (tower, name)), None)
        reason = _incomparable(asked, data, tower, name, f)
        if reason is not None or f is None:
            features.append(entry | {"not_compared": reason})
        else:
            features.append(entry | compare_feature(sides, tower, f))
        report(done / len(every))
    out = {
        "against": str(data.path), "fingerprint": data.fingerprint,
        "events": sides.events, "users": sides.users, "volume": _volume(connection, data),
        "unseen": {"users": sides.unseen("user"), "items": sides.unseen("item")},
        "features": features,
    }  # fmt: skip
    return out | {"flags": flags(out, limits)}


def _every_feature(asked: DataConfig, data: PreparedDataset) -> list[tuple[str, str]]:
    both = [*data.config.features(), *asked.features()]
    return list(dict.fromkeys((tower, f.name) for tower, f in both))


def _incomparable(
    asked: DataConfig, data: PreparedDataset, tower: str, name: str, new: Feature | None
) -> str | None:
    """Return why a feature cannot be compared, None when it can."""
    old = next((f for t, f in data.config.features() if (t, f.name) == (tower, name)), None)
    wanted = next((f for t, f in asked.features() if (t, f.name) == (tower, name)), None)
    if old is None:
        return "not in the prepared dataset"
    if wanted is None:
        return "not in the job"
    if (old.kind, old.width) != (wanted.kind, wanted.width):
        return f"of kind {old.kind} in the prepared dataset, {wanted.kind} in the job"
    if old.kind == "history":
        return "made of items, which are compared"
    if new is None:
        return f"data.{old.source} is not given"
    return None


def _volume(connection: Any, data: PreparedDataset) -> dict[str, float | None]:
    """Return events a day of all that was prepared and of the new log, and their ratio."""
    first, last, events = connection.execute(
        "SELECT min(time), max(time), count(*) FROM log"
    ).fetchall()[0]
    spans = data.summary["time"].values()
    prepared = sum(data.summary["counts"][f"{name}_events"] for name in SPLIT_NAMES)
    was = _rate(prepared, min(s[0] for s in spans), max(s[1] for s in spans))
    now = _rate(events, first, last)
    return {"was": was, "now": now, "ratio": now / was if was and now else None}


def _rate(events: int, first: int, last: int) -> float | None:
    """Return events a day, None when all are of one moment."""
    days = (last - first) / DAY_US
    # A day's file begins and ends with an event, at night perhaps hours from midnight.
    days = max(days, round(days))
    return (events - 1) / days if days else None


def flags(drift: dict[str, Any], limits: InspectConfig) -> list[list[str]]:
    """Return [subject, what is said] of all that is past a limit."""
    out = []
    for side, limit in (("users", limits.max_unseen_users), ("items", limits.max_unseen_items)):
        share = drift["unseen"][side]
        if share > limit:
            out.append([side, f"{share:.1%} of events have {side} that training never saw "
                              f"(limit {limit:.0%})"])  # fmt: skip
    ratio = drift["volume"]["ratio"]
    if ratio is not None and not limits.min_volume <= ratio <= limits.max_volume:
        out.append(["volume", (
            f"{drift['volume']['now']:,.0f} events a day against {drift['volume']['was']:,.0f}: "
            f"{ratio:.2f} times (limits {limits.min_volume:g} and {limits.max_volume:g})"
        )])  # fmt: skip
    for f in drift["features"]:
        if f.get("psi", 0.0) > max(limits.max_psi, f.get("chance", 0.0)):
            out.append([f["name"], f"{moved(f)}: index {f['psi']:.2f} (limit {limits.max_psi:g})"])
        if "psi" in f and "unseen" in f:
            more = f["unseen"]["now"] - f["unseen"]["was"]
            if more > limits.max_unseen_values:
                out.append([f["name"], (
                    f"{f['unseen']['now']:.1%} of its ids are not in the vocabulary, in training "
                    f"{f['unseen']['was']:.1%} (limit {limits.max_unseen_values:.0%} more)"
                )])  # fmt: skip
    return out


def moved(feature: dict[str, Any]) -> str:
    """Return in words what moved most of a compared feature."""
    most = feature["largest"]
    of = f"dimension {feature['dimension']}, " if "dimension" in feature else ""
    return f"{of}{most['bin']}: {most['was']:.1%} -> {most['now']:.1%}"
