"""The page of an inspection: one HTML file, its styles and plots inside, nothing fetched.

All that comes from the log is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from twotower.data.inspect.drift import moved
from twotower.data.inspect.plots import draw
from twotower.data.inspect.words import count, moment, share

CSS = """
:root { color-scheme: light; --line: #e3e7ec; --dim: #66707c; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2530; background: #f5f7f9; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 34px 0 10px; }
.dim { color: var(--dim); } code { font-size: 13px; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: 10px; margin-top: 18px; }
.card, figure, .box { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.card { flex: 1 1 170px; padding: 10px 14px; }
.card b { display: block; font-size: 20px; line-height: 1.3; }
.card span { font-size: 13px; color: var(--dim); }
.plots { display: flex; flex-wrap: wrap; gap: 12px; }
figure { flex: 1 1 430px; max-width: 580px; margin: 0; padding: 12px 14px; }
figcaption { font-weight: 600; font-size: 14px; }
figure svg { display: block; width: 100%; height: auto; }
.box { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 12px; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 160px; }
td.n:last-child { white-space: nowrap; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.found { list-style: none; padding: 0; margin: 0; }
ul.found li { background: #fff; border: 1px solid var(--line); border-left: 4px solid #8a94a0;
  border-radius: 6px; padding: 8px 14px; margin-bottom: 8px; }
ul.found li.leak, ul.found li.flag { border-left-color: #c0392b; }
ul.found li.stops { border-left-color: #e08214; } ul.found li.fine { border-left-color: #3a9a5b; }
"""


def render(name: str, report: dict[str, Any]) -> str:
    """Return the page.

    Args:
        name: of the job.
        report: the figures, see `twotower.data.inspect.inspection`.
    """
    title = f"{name}: {'drift' if 'drift' in report else 'inspection'} of a log"
    places = "; ".join(
        f"{key} <code>{escape(place['location'])}</code>, {_files(place['files'])}"
        for key, place in report["log"].items()
    )
    drift = _drift(report["drift"]) if "drift" in report else ""
    plots = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"
        for title, svg in draw(report)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><div class="dim">{places}</div>'
        f"{_cards(report)}{drift}{_found(report)}"
        f'<h2>Plots</h2><div class="plots">{plots}</div>{_split(report)}{_features(report)}'
        f"{_popular(report)}{_bad_rows(report)}</main></body></html>\n"
    )


def _files(number: int) -> str:
    return "1 file" if number == 1 else f"{count(number)} files"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; columns whose name begins with '>' are right-aligned; cells are escaped."""
    kinds = [' class="n"' if c.startswith(">") else "" for c in columns]
    head = "".join(
        f"<th{k}>{escape(c.lstrip('>'))}</th>" for k, c in zip(kinds, columns, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(
            f"<td{k}>{escape(str(v))}</td>" for k, v in zip(kinds, row, strict=True)
        ) + "</tr>"
        for row in rows
    )  # fmt: skip
    head = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return f'<div class="box"><table>{head}<tbody>{body}</tbody></table></div>'


def _cards(report: dict[str, Any]) -> str:
    counts, time, popular = report["counts"], report["time"], report["popularity"]
    history = report["histories"]["per_user"]
    events = counts["events"]
    cards = {
        "events": count(events),
        f"active of {count(counts['users'])} users": count(counts["active_users"]),
        f"active of {count(counts['items'])} items": count(counts["active_items"]),
        f"{moment(time['first'], days=True)} to {moment(time['last'], days=True)}": (
            "1 day" if time["days"] == 1 else f"{count(time['days'])} days"
        ),
        "events a day, median": count(time["events_a_day"]["median"]),
        "days without events": count(time["empty_days"]),
        f"events a user, median; mean {history['mean']:.1f}": count(history["median"]),
        "of events on the top 1% of items": share(popular["top_1_percent"]),
        "Gini of popularity": f"{popular['gini']:.2f}",
        "duplicate events": count(counts["duplicates"]),
        "of events repeat a user and item": share(counts["repeats"] / events),
        "bad rows, skipped": count(counts["bad_rows"]),
    }
    if counts["dropped_by_label"]:
        cards["events below positive_from"] = count(counts["dropped_by_label"])
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
        for label, value in cards.items()
    ) + "</div>"  # fmt: skip


def _found(report: dict[str, Any]) -> str:
    css = {"suspected leak": "leak", "stops prepare": "stops", "note": "note"}
    rows = "".join(
        f'<li class="{css[f["kind"]]}"><b>{escape(f["subject"])}</b> '
        f'<span class="dim">{f["kind"]}</span><br>{escape(f["text"])}</li>'
        for f in report["findings"]
    )
    rows = rows or '<li class="fine">Nothing is past a limit.</li>'
    title = "Findings about the new log itself" if "drift" in report else "Findings"
    return f'<h2>{title}</h2><ul class="found">{rows}</ul>'


def _drift(drift: dict[str, Any]) -> str:
    flags = "".join(
        f'<li class="flag"><b>{escape(subject)}</b><br>{escape(text)}</li>'
        for subject, text in drift["flags"]
    )
    flags = flags or '<li class="fine">Nothing has moved past a limit.</li>'
    rows = []
    for f in drift["features"]:
        psi = f"{f['psi']:.3f}" if "psi" in f else "-"
        chance = f"{f['chance']:.3f}" if "psi" in f else "-"
        unseen = share(f["unseen"]["now"]) if "unseen" in f else "-"
        what = f"not compared: {f['not_compared']}" if "not_compared" in f else ""
        rows.append([f["name"], f["tower"], f.get("kind", ""), psi, chance, unseen,
                     what or (moved(f) if "psi" in f else "")])  # fmt: skip
    volume, unseen = drift["volume"], drift["unseen"]
    rate = "not known, all at one moment"
    if volume["ratio"] is not None:
        rate = f"{volume['now']:,.0f}, {volume['ratio']:.2f} times the {volume['was']:,.0f} before"
    facts = [
        ["compared with", drift["against"]],
        ["events", f"{count(drift['events']['now'])}, trained on {count(drift['events']['was'])}"],
        ["effective users", f"{drift['users']['now']:,.0f}, then {drift['users']['was']:,.0f}"],
        ["events a day", rate],
        ["of events, users unseen", share(unseen["users"])],
        ["of events, items unseen", share(unseen["items"])],
    ]
    columns = ["feature", "tower", "kind", ">index", ">chance", ">unseen", "moved most"]
    return (
        f'<h2>Drift</h2><ul class="found">{flags}</ul>{_table(["", ""], facts)}<br>'
        f"{_table(columns, rows)}"
    )


def _split(report: dict[str, Any]) -> str:
    if "split" not in report:
        return ""
    split = report["split"]
    rows = [
        [name, count(p["events"]), share(p["events"] / report["counts"]["events"]),
         count(p["users"]), count(p["items"]), moment(p["first"]), moment(p["last"]),
         *([share(p["unseen_users"]), share(p["unseen_items"])] if name != "train" else "--")]
        for name, p in split["parts"].items()
    ]  # fmt: skip
    columns = ["", ">events", ">share", ">users", ">items", "from", "to", ">unseen users",
               ">unseen items"]  # fmt: skip
    return f"<h2>Split: {escape(split['kind'])}</h2>{_table(columns, rows)}"


def _features(report: dict[str, Any]) -> str:
    told = report.get("gains", {}).get("features", {})
    rows = []
    for f in report["features"]:
        column, missing, distinct, gain = f["source"], "-", "-", "-"
        if "rows" in f:
            column = f"{f['source']}.{f['column']}"
            missing, distinct = share(f["missing"] / max(1, f["rows"])), count(f["distinct"])
        if f["tower"] == "query" and f["name"] in told:
            gain = share(told[f["name"]]["gain"])
        row = [f["name"], f["tower"], f["kind"], column, missing, distinct, gain, _values(f)]
        rows.append(row)
    columns = ["feature", "tower", "kind", "column", ">missing", ">distinct", ">gain", "values"]
    return f"<h2>Features</h2>{_table(columns, rows)}"


def _values(f: dict[str, Any]) -> str:
    parts = []
    if f.get("least") is not None:
        parts.append(f"{f['least']:.4g} to {f['most']:.4g}, mean {f['mean']:.4g}, "
                     f"deviation {f['std']:.4g}")  # fmt: skip
    if "mean_length" in f:
        parts.append(f"{f['mean_length']:.1f} a row")
    if f.get("top"):
        parts.append(", ".join(f"{value} ({count(n)})" for value, n in f["top"]))
    return "; ".join(parts)


def _popular(report: dict[str, Any]) -> str:
    events = report["counts"]["events"]
    rows = [[item, count(n), share(n / events)] for item, n in report["popularity"]["top"]]
    return f"<h2>Most popular items</h2>{_table(['item', '>events', '>share'], rows)}"


def _bad_rows(report: dict[str, Any]) -> str:
    if not report["bad_rows"]:
        return ""
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report["bad_rows"])
    return f"<h2>First bad rows</h2><ul>{reasons}</ul>"
