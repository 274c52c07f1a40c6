"""Plots of an inspection as inline SVG: text stays text, and nothing is fetched."""

from __future__ import annotations

import io
import re
from typing import Any

BLUE, ORANGE, GREEN, RED, GREY = "#2f6db5", "#e08214", "#3a9a5b", "#c0392b", "#8a94a0"
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "twotower", "font.size": 9, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY,
    "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "xtick.color": "#555",
    "ytick.color": "#555", "axes.labelcolor": "#555", "legend.frameon": False,
}  # fmt: skip
MOST_BARS = 400
MOST_FEATURES = 16


def draw(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (what it shows, SVG) of each plot of an inspection's figures."""
    plots = [
        (_title_of_days(report["time"]), _days),
        ("Popularity: events of each item, by rank", _popularity),
        ("History lengths: events of a user, and before a test event", _histories),
    ]
    if report.get("gains", {}).get("features"):
        plots.append(("What a query feature tells of the item (held out)", _gains))
    if any("psi" in f for f in report.get("drift", {}).get("features", [])):
        plots.append(("Population stability index of each feature", _stability))
    return [(title, _svg(function, report)) for title, function in plots]


def _svg(function: Any, report: dict[str, Any]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.1), layout="constrained")
        axis = figure.subplots()
        function(axis, report)
        out = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    # HTML knows SVG by itself: the addresses of its name spaces would only look like links.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*?sans-serif", "system-ui, sans-serif", svg)
    return re.sub(r'^<svg ([^>]*?)width="[^"]*"', r'<svg \1width="100%"', svg, count=1)


def _short(value: float, _: Any = None) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _width_of_bars(time: dict[str, Any]) -> int:
    return int(-(-time["days"] // MOST_BARS))


def _title_of_days(time: dict[str, Any]) -> str:
    width = _width_of_bars(time)
    return "Events a day" if width == 1 else f"Events in every {width} days"


def _days(axis: Any, report: dict[str, Any]) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    time = report["time"]
    width, first = _width_of_bars(time), time["daily"][0][0]
    bars = [0] * (-(-time["days"] // width))
    for day, events in time["daily"]:
        bars[(day - first) // width] += events
    edges = [first + i * width for i in range(len(bars) + 1)]
    axis.stairs(bars, edges, fill=True, color=BLUE)
    for cut, name, color in zip(
        report.get("split", {}).get("cuts") or (), ("validation", "test"), (ORANGE, RED),
        strict=False,
    ):  # fmt: skip
        at = cut / 86_400_000_000
        axis.axvline(at, color=color, linewidth=1.3, label=f"{name} begins")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="upper left", bbox_to_anchor=(0, 1.12), ncols=2)
    # Day numbers since 1970 are what matplotlib counts dates in.
    axis.xaxis_date()
    locator = AutoDateLocator(minticks=3, maxticks=8)
    axis.xaxis.set_major_locator(locator)
    axis.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    axis.yaxis.set_major_formatter(_short)
    axis.grid(axis="x", visible=False)


def _popularity(axis: Any, report: dict[str, Any]) -> None:
    ranks, events = zip(*report["popularity"]["curve"], strict=True)
    axis.loglog(ranks, events, color=BLUE, marker=".", markersize=3)
    axis.set(xlabel="rank of the item", ylabel="events")
    for part in (axis.xaxis, axis.yaxis):
        part.set_major_formatter(_short)
        part.set_minor_formatter("")


def _histories(axis: Any, report: dict[str, Any]) -> None:
    series = [
        ("per_user", "events of a user", BLUE),
        ("before_test", "before a test event", ORANGE),
    ]
    shown = [(report["histories"][key]["bins"], label, color) for key, label, color in series]
    longest = max((bins for bins, _, _ in shown), key=len)
    names = [str(low) if low < 10_000 else f"{low >> 10}Ki" for low, _, _ in longest]
    for place, (bins, label, color) in enumerate(s for s in shown if s[0]):
        total = sum(n for _, _, n in bins)
        x = [i + 0.4 * place for i in range(len(bins))]
        axis.bar(x, [100 * n / total for _, _, n in bins], 0.4, label=label, color=color)
    axis.set_xticks([i + 0.2 for i in range(len(names))], names)
    axis.set(xlabel="events, from; bins double", ylabel="%")
    axis.legend()
    axis.grid(axis="x", visible=False)


def _gains(axis: Any, report: dict[str, Any]) -> None:
    limit = 100 * report["limits"]["max_gain"]
    leaks = {f["subject"] for f in report["findings"] if f["kind"] == "suspected leak"}
    told = report["gains"]["features"].items()
    values = {name: 100 * gain["gain"] for name, gain in told}
    _lying(axis, values, leaks, limit, "{:.1f}%")
    axis.set(xlabel="% of the item's bits")


def _stability(axis: Any, report: dict[str, Any]) -> None:
    drift = report["drift"]
    flagged = {subject for subject, _ in drift["flags"]}
    found = {f["name"]: f for f in drift["features"] if "psi" in f}
    values = {name: f["psi"] for name, f in found.items()}
    chance = {name: f["chance"] for name, f in found.items()}
    shown = _lying(axis, values, flagged, report["limits"]["max_psi"], "{:.3f}", chance)
    axis.scatter(
        [chance[name] for name in shown], range(len(shown)), marker="|", s=60,
        color="black", zorder=3, label="chance",
    )  # fmt: skip
    axis.legend(loc="lower right")


def _lying(
    axis: Any, values: dict[str, float], red: set[str], limit: float, written: str,
    marks: dict[str, float] | None = None,
) -> list[str]:  # fmt: skip
    """Draw lying bars, the largest above, room for `marks` left; return their names from below."""
    shown = sorted(values, key=values.__getitem__)[-MOST_FEATURES:]
    lengths = [max(0.0, values[name]) for name in shown]
    axis.barh(range(len(shown)), lengths, color=[RED if n in red else BLUE for n in shown])
    ends = [max(n, (marks or {}).get(name, 0.0)) for name, n in zip(shown, lengths, strict=True)]
    reach = 1.25 * max(limit, *ends) or 1.0
    for place, (name, end) in enumerate(zip(shown, ends, strict=True)):
        text = written.format(values[name])
        axis.text(end + 0.015 * reach, place, text, va="center", fontsize=8, color="#555")
    axis.axvline(limit, color=GREY, linestyle="--", linewidth=1, label="limit")
    axis.set(xlim=(0, reach))
    axis.set_yticks(range(len(shown)), shown)
    axis.legend(loc="lower right")
    axis.grid(axis="y", visible=False)
    return shown
