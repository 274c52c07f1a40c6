"""How far a metric would move with other users: intervals and p-values over users.

The queries of a user are alike, so users are drawn, with all of their queries, and not queries:
over queries the intervals would be too narrow. A metric is a ratio of two sums over users (of a
mean, the sum and the number of queries), so a resample is a number of times that each user was
drawn, and a thousand resamples of every metric are one matrix product.

- **Interval**: the 2.5th and 97.5th percentile of 1,000 resamples (Efron 1979, "Bootstrap methods:
  another look at the jackknife").
- **p-value** of a difference: a permutation test, in which every user's two models change places
  or not, at random. It assumes nothing of how a metric is distributed, and is what Smucker et al.
  2007 ("A comparison of statistical significance tests for information retrieval evaluation")
  advise for comparing two systems, where the bootstrap's p-values come out too small.

Shape legend: `Q` queries, `U` users, `M` metrics, `R` resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
K = TypeVar("K", bound=Hashable)
# What is summed over queries (Q,), and what its sum is divided by the sum of (Q,).
Ratio = tuple[F64, F64]
Ratios = Mapping[str, Ratio]

RESAMPLES = 1_000
PERMUTATIONS = 10_000
LEVEL = 0.95
# Draws held at once, of every user.
BLOCK = 1 << 21


def values(ratios: Ratios) -> dict[str, float]:
    """Return every metric, leaving out those that nothing was asked of."""
    sums = {name: (float(n.sum()), float(d.sum())) for name, (n, d) in ratios.items()}
    return {name: n / d for name, (n, d) in sums.items() if d}


def sums_by_user(ratios: Mapping[K, Ratio], user_Q: I64) -> tuple[F64, F64]:
    """Return both sums of every metric by user (U, M); users are numbered without a gap."""
    users = int(user_Q.max(initial=-1)) + 1
    sums = [
        [np.bincount(user_Q, part, users) for part in (numerator, denominator)]
        for numerator, denominator in ratios.values()
    ]
    return np.stack([n for n, _ in sums], 1), np.stack([d for _, d in sums], 1)


def intervals(
    ratios: Mapping[K, Ratio], user_Q: I64, seed: int, resamples: int = RESAMPLES
) -> dict[K, tuple[float, float]]:
    """Return the 95% interval of every metric that `values` returns.

    Resamples in which nothing was asked of a metric, such as one without a new user, are left out
    of it.

    Args:
        ratios: of queries (Q).
        user_Q: whose each query is, from 0 without a gap.
        seed: of the resamples.
        resamples: their number.
    """
    asked = {name: pair for name, pair in ratios.items() if pair[1].sum()}
    if not asked:
        return {}
    numerator_UM, denominator_UM = sums_by_user(asked, user_Q)
    drawn = _resampled(numerator_UM, denominator_UM, seed, resamples)
    return dict(zip(asked, _bounds(drawn), strict=True))


def differences(
    ratios: tuple[Ratios, Ratios], user_Q: I64, seed: int
) -> dict[str, tuple[float, float, float, float]]:
    """Return, of every metric, the second less the first, its 95% interval and its p-value.

    Both are judged on the same queries, and a resample draws the same users of both: what makes a
    user hard is no part of the difference.
    """
    shared = [
        name for name, pair in ratios[0].items()
        if name in ratios[1] and pair[1].sum() and ratios[1][name][1].sum()
    ]  # fmt: skip
    if not shared:
        return {}
    first, second = ({name: one[name] for name in shared} for one in ratios)
    a, b = sums_by_user(first, user_Q), sums_by_user(second, user_Q)
    drawn = _resampled(*b, seed, RESAMPLES) - _resampled(*a, seed, RESAMPLES)
    before, after = values(first), values(second)
    bounds, p = _bounds(drawn), _permuted(a, b, seed)
    return {
        name: (after[name] - before[name], *bounds[i], float(p[i])) for i, name in enumerate(shared)
    }


def _bounds(drawn_RM: F64) -> list[tuple[float, float]]:
    tail = 50 * (1 - LEVEL)
    low, high = np.nanpercentile(drawn_RM, [tail, 100 - tail], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _resampled(numerator_UM: F64, denominator_UM: F64, seed: int, resamples: int) -> F64:
    """Return every metric of every resample (R, M), NaN where nothing was asked of it."""
    users, rng, drawn = len(numerator_UM), np.random.default_rng(seed), []
    for size in _blocks(resamples, users):
        chosen = rng.integers(users, size=(size, users)) + np.arange(size)[:, None] * users
        times_RU = np.bincount(chosen.ravel(), minlength=size * users).reshape(size, users)
        times = times_RU.astype(np.float64)
        with np.errstate(invalid="ignore"):
            drawn.append((times @ numerator_UM) / (times @ denominator_UM))
    return np.concatenate(drawn)


def _permuted(a: tuple[F64, F64], b: tuple[F64, F64], seed: int) -> F64:
    """Return the two-sided p-value of every metric (M,), the data's own arrangement counted in."""
    rng, users = np.random.default_rng([seed, 1]), len(a[0])
    apart = [y - x for x, y in zip(a, b, strict=True)]
    both = [x.sum(0) + y.sum(0) for x, y in zip(a, b, strict=True)]

    def distance(numerator: F64, denominator: F64) -> F64:
        # Of one model and the other from what their sums are apart: each is half of both, and half
        # of that more or less.
        upper = (both[0] + numerator) / (both[1] + denominator)
        return np.asarray(np.abs(upper - (both[0] - numerator) / (both[1] - denominator)))

    found = distance(apart[0].sum(0), apart[1].sum(0))
    as_far = np.ones(len(found))
    for size in _blocks(PERMUTATIONS, users):
        sign_RU = 2.0 * rng.integers(0, 2, (size, users), np.int8) - 1
        # Sums in another order differ in their last digits.
        as_far += (distance(*(sign_RU @ x for x in apart)) >= found * (1 - 1e-9)).sum(0)
    return as_far / (PERMUTATIONS + 1)


def _blocks(draws: int, users: int) -> Iterator[int]:
    size = max(1, min(draws, BLOCK // max(users, 1)))
    for start in range(0, draws, size):
        yield min(size, draws - start)
