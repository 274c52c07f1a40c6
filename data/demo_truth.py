"""What the synthetic log is drawn from, so that the best possible answers are known.

`twotower.data.demo_log` draws from these probabilities, and `benchmarks/planted.py` compares the
towers with the answers that follow from them.

Shape legend: `Q` queries, `N` items, `U` users, `S` sub-genres, `E` events.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Of a user's first, second and third sub-genre.
TASTE_SHARES = (0.6, 0.3, 0.1)
# Of events that follow no taste at all.
STRAY_SHARE = 0.1
# When half of the users change their most liked sub-genre, as a share of the log's days.
TASTES_CHANGE = 0.5


@dataclass(frozen=True, kw_only=True)
class DemoTruth:
    """The tastes of users and the weights of items; times are shares of the log's days.

    Attributes:
        favourite_U3: sub-genres of each user, the most liked first.
        later_U3: the same from `TASTES_CHANGE` on.
        sub_N: sub-genre of each item.
        release_N: time from which an item is taken.
        popularity_N: weight of each item within its sub-genre at its release.
    """

    favourite_U3: Array
    later_U3: Array
    sub_N: Array
    release_N: Array
    popularity_N: Array

    def tastes(self, user_E: Array, time_E: Array) -> Array:
        """Return the sub-genres (E, 3) that users like at a time, the most liked first."""
        return np.where(
            time_E[:, None] > TASTES_CHANGE, self.later_U3[user_E], self.favourite_U3[user_E]
        )

    def weights(self, items: Array, time: float) -> Array:
        """Return what the items of one sub-genre are drawn by at a time: 0 before their release."""
        age = time - self.release_N[items]
        weight = np.where(age >= 0, self.popularity_N[items] * np.exp(-2 * age), 0)
        return np.asarray(weight + 1e-9 * (self.release_N[items] == 0))

    def stray_weights(self) -> Array:
        """Return what events without a taste are drawn by (N,): only items that are always out."""
        return np.where(self.release_N == 0, self.popularity_N, 0)

    def probabilities(self, user_Q: Array, time_Q: Array, known_N: Array | None = None) -> Array:
        """Return how likely an event of each user takes each item.

        What a row lacks of 1 is the probability that nothing happens, since nothing of a liked
        sub-genre is out. Given that nobody takes an item twice, the next new item of a user is
        likely in proportion to what is left.

        Args:
            user_Q: places of the users.
            time_Q: moments, as shares of the log's days.
            known_N: whether an item's weight may be told; the others' is the mean of theirs at
                that moment. By default all may.

        Returns:
            (Q, N).
        """
        everything = np.arange(len(self.sub_N))
        member_SN = np.arange(self.sub_N.max() + 1)[:, None] == self.sub_N
        stray_N = told(self.stray_weights(), known_N)
        out_QN = np.tile(STRAY_SHARE * stray_N / stray_N.sum(), (len(user_Q), 1))
        for row, (taste_3, time) in enumerate(
            zip(self.tastes(user_Q, time_Q), time_Q, strict=True)
        ):
            weight_N = told(self.weights(everything, float(time)), known_N)
            for share, sub in zip(TASTE_SHARES, taste_3, strict=True):
                of_sub_N = weight_N * member_SN[sub]
                if of_sub_N.any():
                    out_QN[row] += (1 - STRAY_SHARE) * share * of_sub_N / of_sub_N.sum()
        return out_QN


def told(weight_N: Array, known_N: Array | None) -> Array:
    """Return weights (N,) of which some are not told: theirs is the mean of all such."""
    if known_N is None or known_N.all():
        return weight_N
    return np.where(known_N, weight_N, weight_N[~known_N].mean())
