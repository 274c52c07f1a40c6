"""Population stability index: how far a distribution has moved, and whether chance explains it.

    PSI = sum over bins of (q - p) ln(q / p)

With N and M observations of one distribution in B bins, PSI / (1/N + 1/M) is about chi-square with
B - 1 degrees of freedom (Yurdakul 2018, Statistical Properties of Population Stability Index).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Share that an empty bin counts as, so that one new value among millions is no infinite shift.
EMPTY = 1e-4
# One in so many comparisons of equal distributions is beyond chance.
ONE_IN = 1000
Array = npt.NDArray[Any]


def stability_terms(was: Array, now: Array) -> Array:
    """Return each bin's part of the index, not negative.

    Args:
        was: counts (..., B), at least one in each row.
        now: counts (..., B), likewise.
    """
    p = np.maximum(was / was.sum(-1, keepdims=True), EMPTY)
    q = np.maximum(now / now.sum(-1, keepdims=True), EMPTY)
    return np.asarray((q - p) * np.log(q / p))


def explained_by_chance(bins: int, n: float, m: float, comparisons: int = 1) -> float:
    """Return the index that chance passes once in 1,000 times.

    Args:
        bins: in use.
        n: independent observations of the first distribution.
        m: of the second.
        comparisons: of which the largest index is looked at.
    """
    from scipy.stats import chi2

    if bins < 2 or n <= 0 or m <= 0:
        return 0.0
    return float(chi2.isf(1 / (ONE_IN * comparisons), bins - 1) * (1 / n + 1 / m))
