"""The report of a load test: one HTML page, its styles and plots inside, nothing fetched.

A serving host has no plotting library, so the curves are written as SVG here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from twotower.serve.load.measurement import PERCENTILES, Measurement

COLORS = ("#3a9a5b", "#2f6db5", "#e08214", "#c0392b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 620, 320, 58, 80, 14, 28
CSS = """
:root { color-scheme: light; --line: #e3e7ec; --dim: #66707c; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2530; background: #f5f7f9; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0 0 2px; } h2 { font-size: 17px; margin: 34px 0 10px; }
.dim { color: var(--dim); }
.plots { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 20px; }
figure, .box { background: #fff; border: 1px solid var(--line); border-radius: 8px; }
figure { flex: 1 1 430px; max-width: 580px; margin: 0; padding: 12px 14px; }
figcaption { font-weight: 600; font-size: 14px; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: #555; } svg .grid { stroke: #e9edf1; }
.box { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: right; padding: 6px 12px; border-bottom: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { color: var(--dim); font-weight: 600; } tr:last-child td { border-bottom: 0; }
li { margin-bottom: 4px; }
"""

LEGEND = (
    "sent late: 99th percentile of how much later than due the client sent; batch, queue, model: "
    "the server's means; client: share of a core that the busiest client process used"
)

Points = list[tuple[float, float]]


def number(value: float | None, digits: int = 1) -> str:
    """Return a figure as people read it, `-` for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def render(
    title: str, facts: dict[str, str], found: Sequence[Measurement], notes: Sequence[str]
) -> str:
    """Return the page.

    Args:
        title: what was measured.
        facts: name -> what was asked, of whom, and where.
        found: one measurement a rate, ascending.
        notes: what a reader should know of the figures.
    """
    about = "; ".join(f"{escape(name)}: {escape(text)}" for name, text in facts.items())
    listed = "".join(f"<li>{escape(note)}</li>" for note in notes)
    plots = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in _plots(found)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><div class="dim">{about}</div>'
        f'<div class="plots">{plots}</div><h2>Every rate</h2>{_table(*_rows(found))}'
        f'<div class="dim">{LEGEND}</div>'
        f"<h2>Notes</h2><ul>{listed}</ul></main></body></html>\n"
    )


def _rows(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    columns = ["asked/s", "answered/s", *(f"{name}, ms" for name in PERCENTILES), "max, ms",
               "failed", "sent late, ms", "batch", "queue, ms", "model, ms", "client"]  # fmt: skip
    rows = [
        [number(m.asked_rate, 0), number(m.answered_rate, 0),
         *(number(m.latency_ms[name]) for name in PERCENTILES), number(m.max_ms), failures(m),
         number(m.late_ms), number(m.mean_batch), number(m.queue_ms, 2), number(m.compute_ms, 2),
         f"{m.client_busy:.0%}"]
        for m in found
    ]  # fmt: skip
    return columns, rows


def failures(m: Measurement) -> str:
    """Return how many requests failed, by kind."""
    return ", ".join(f"{n:,} {kind}" for kind, n in m.errors.items()) or "0"


def _table(columns: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="box"><table><tr>{head}</tr>{body}</table></div>'


def _plots(found: Sequence[Measurement]) -> list[tuple[str, str]]:
    asked = [m.asked_rate or 0.0 for m in found]
    latency: dict[str, Points] = {
        name: [
            (rate, value) for rate, m in zip(asked, found, strict=True)
            if (value := m.latency_ms[name]) is not None
        ]
        for name in PERCENTILES
    }  # fmt: skip
    answered = {
        "asked": [(rate, rate) for rate in asked],
        "answered": [(rate, m.answered_rate) for rate, m in zip(asked, found, strict=True)],
    }
    return [
        ("Latency from the intended arrival, ms, by requests a second asked",
         _svg({name: points for name, points in latency.items() if points}, logarithmic=True)),
        ("Answers a second, by requests a second asked", _svg(answered, logarithmic=False)),
    ]  # fmt: skip


def _svg(series: dict[str, Points], *, logarithmic: bool) -> str:
    """Return lines with their marks, each named at its end."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if not xs:
        return "<p>Nothing was answered.</p>"
    most_x = 1.05 * max(xs)
    marks = _decades(ys) if logarithmic else _round_marks(max(ys))
    low, high = (marks[0], marks[-1]) if logarithmic else (0.0, max(marks[-1], max(ys)))

    def place(x: float, y: float) -> tuple[float, float]:
        if logarithmic:
            share = math.log(y / low) / math.log(high / low)
        else:
            share = (y - low) / (high - low)
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / most_x
        return across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = []
    for mark in marks:
        _, y = place(0, mark)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" '
                     f'y2="{y:.1f}"/><text x="{LEFT - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{mark:,g}</text>')  # fmt: skip
    for mark in _round_marks(most_x):
        x, _ = place(mark, high)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
                     f"{mark:,g}</text>")  # fmt: skip
    ends = []
    for color, (name, points) in zip(COLORS, series.items(), strict=False):
        spots = [place(x, y) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in spots]
        ends.append((spots[-1][1], spots[-1][0], color, name))
    lowest = -float("inf")
    for y, x, color, name in sorted(ends):
        lowest = max(y, lowest + 13)  # names that would lie on one another
        parts.append(
            f'<text x="{x + 8:.1f}" y="{lowest + 4:.1f}" style="fill:{color}">{name}</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _decades(values: Sequence[float]) -> list[float]:
    """Return 1, 2, 5, 10 and so on around some values, at least two."""
    steps = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)]
    first = max((i for i, s in enumerate(steps) if s <= min(values)), default=0)
    last = min((i for i, s in enumerate(steps) if s >= max(values)), default=len(steps) - 1)
    return steps[first : max(last, first + 1) + 1]


def _round_marks(most: float) -> list[float]:
    """Return 0 and up to six round numbers up to `most`."""
    size = 10.0 ** math.floor(math.log10(most))
    step = next(size * m for m in (0.1, 0.2, 0.5, 1, 2, 5) if most / (size * m) <= 6)
    return [step * i for i in range(int(most / step) + 1)]
