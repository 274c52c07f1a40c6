"""What is worth a remark among the figures of a log, the gravest first."""

from __future__ import annotations

from typing import Any

from twotower.data.inspect.config import InspectConfig
from twotower.data.schema import DataConfig

LEAK, STOPS, NOTE = "suspected leak", "stops prepare", "note"


def find(report: dict[str, Any], config: DataConfig, limits: InspectConfig) -> list[dict[str, str]]:
    """Return the findings of a log.

    Args:
        report: the figures, see `twotower.data.inspect.inspection`.
        config: the schema as the job says it.
        limits: past which something is remarked on.

    Returns:
        Each with `kind` (suspected leak, stops prepare or note), `subject` and `text`.
    """
    found = [*_leaks(report, limits), *_bad_rows(report, config), *_log(report, limits)]
    if "drift" not in report:  # a new log may well be of one user, or of one value
        found += [*_stops(report), *_features(report, limits)]
    order = (LEAK, STOPS, NOTE)
    found.sort(key=lambda row: order.index(row[0]))
    return [{"kind": kind, "subject": subject, "text": text} for kind, subject, text in found]


Found = list[tuple[str, str, str]]


def _leaks(report: dict[str, Any], limits: InspectConfig) -> Found:
    out: Found = []
    gains = report.get("gains", {})
    features = {f["name"]: f for f in report["features"] if f["tower"] == "query"}
    for name, told in gains.get("features", {}).items():
        gain = told["gain"]
        # A feature of the user tells at most who the user is: what that tells is no leak.
        innocent = max(0.0, gains["of_user"]) if features[name]["source"] == "users" else 0.0
        if gain - innocent > limits.max_gain:
            out.append((LEAK, name, (
                f"it tells {gain:.0%} of the item's {gains['bits']:.1f} bits "
                f"(limit {limits.max_gain:.0%}): is it known before the item is chosen?"
            )))  # fmt: skip
    listed = report.get("listed", {})
    for name in ("test", "train"):
        part = listed.get(name, {"share": 0.0})
        if part["share"] > limits.max_in_list:
            out.append((LEAK, listed["name"], (
                f"the list of earlier items holds the item itself at {part['in_list']:,} "
                f"({part['share']:.0%}) of {part['first_time']:,} first-time {name} events "
                f"(limit {limits.max_in_list:.0%}): does it end before the log begins?"
            )))  # fmt: skip
    return out


def _bad_rows(report: dict[str, Any], config: DataConfig) -> Found:
    count = report["counts"]["bad_rows"]
    if not count or config.on_bad_rows != "error":
        return []
    text = f"{count:,} rows that cannot be used: mend them, or set data.on_bad_rows to skip"
    return [(STOPS, "bad rows", text)]


def _stops(report: dict[str, Any]) -> Found:
    out: Found = []
    counts = report["counts"]
    for side in ("users", "items"):
        if counts[side] < 2:
            out.append((STOPS, side, f"there is {counts[side]}: two towers need at least two"))
    parts = report.get("split", {}).get("parts", {})
    for name in ("train", "test"):
        if name in parts and not parts[name]["events"]:
            out.append((STOPS, "split", f"leaves no {name} events: change data.split"))
    for f in report["features"]:
        if f["kind"] == "number" and f["missing"] == f["rows"]:
            out.append((STOPS, f["name"], "no value at all: remove the feature"))
    return out


def _log(report: dict[str, Any], limits: InspectConfig) -> Found:
    out: Found = []
    counts = report["counts"]
    duplicates = counts["duplicates"] / counts["events"]
    if duplicates > limits.max_duplicates:
        out.append((NOTE, "duplicates", (
            f"{counts['duplicates']:,} events ({duplicates:.1%}) repeat user, item and time of "
            f"another (limit {limits.max_duplicates:.0%}): was something logged twice?"
        )))  # fmt: skip
    test = report.get("split", {}).get("parts", {}).get("test", {})
    for side, limit, remedy in (
        ("users", limits.max_unseen_users, "features of the user and the history must carry them"),
        ("items", limits.max_unseen_items, "features of the item must carry them"),
    ):
        share = test.get(f"unseen_{side}", 0.0)
        if share > limit:
            out.append((NOTE, f"unseen {side}", (
                f"{share:.0%} of test events have {side} that training never saw "
                f"(limit {limit:.0%}): {remedy}"
            )))  # fmt: skip
    for side in ("users", "items"):
        without = counts.get(f"{side}_without_a_row", 0)
        if without > limits.max_missing * counts[side]:
            out.append((NOTE, side, (
                f"{without:,} of {counts[side]:,} have no row in data.{side}: is it the right one?"
            )))  # fmt: skip
    return out


def _features(report: dict[str, Any], limits: InspectConfig) -> Found:
    out: Found = []
    for f in report["features"]:
        rows = f.get("rows", 0)
        if not rows:
            continue
        share, present = f["missing"] / rows, rows - f["missing"]
        if share > limits.max_missing and not (f["kind"] == "number" and not present):
            out.append((NOTE, f["name"], (
                f"{share:.0%} of the rows have no value (limit {limits.max_missing:.0%})"
            )))  # fmt: skip
        if present == rows and f["distinct"] == 1:
            out.append((NOTE, f["name"], "has one value only, which tells nothing"))
        if f["kind"] == "id" and "top" in f and present > 100 and f["distinct"] > present / 2:
            out.append((NOTE, f["name"], (
                f"{f['distinct']:,} ids in {present:,} rows: too many of them to learn from"
            )))  # fmt: skip
    return out
