"""How figures are written, on the page and in the terminal alike."""

from __future__ import annotations

import numpy as np


def count(value: float) -> str:
    """Return a count with its thousands set apart."""
    return f"{int(value):,}"


def share(value: float) -> str:
    """Return a share in percent: 0%, <0.1% and 3.4% are different things."""
    percent = 100 * value
    if value == 0 or abs(percent) >= 99.95:
        return f"{percent:.0f}%"
    return "<0.1%" if 0 < percent < 0.05 else f"{percent:.1f}%"


def moment(micros: int | None, *, days: bool = False) -> str:
    """Return µs since 1970 as a UTC date, with the minute unless `days`; - for none."""
    if micros is None:
        return "-"
    return str(np.datetime64(micros, "us").astype(f"M8[{'D' if days else 'm'}]")).replace("T", " ")
