"""When requests come, in an open loop: whether or not the ones before are answered.

Shape legend: `R` requests.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def arrival_times(kind: str, rate: float, seconds: float, seed: int) -> F64:
    """Return when each request is to be sent (R,), in seconds from the start, ascending.

    Args:
        kind: `poisson`: independent of one another, with exponential gaps; `constant`: evenly.
        rate: requests a second.
        seconds: no request comes later.
        seed: of what is drawn.
    """
    if kind == "constant":
        due = np.arange(math.ceil(rate * seconds)) / rate
        return due[due < seconds]
    # Given their number, the arrivals of a Poisson process are independent and uniform.
    rng = np.random.default_rng(seed)
    return np.sort(rng.uniform(0.0, seconds, rng.poisson(rate * seconds)))
