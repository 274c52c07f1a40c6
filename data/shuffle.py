"""A global shuffle that is computed, not stored: any place of any epoch, in any process.

A keyed permutation of 0 … n-1: a Feistel network (Luby and Rackoff 1988) over the smallest power of
two that holds n, walked along its cycles until it lands below n (Black and Rogaway 2002). It needs
no memory, so 50 million events are shuffled as cheaply as fifty, a run resumes in the middle of an
epoch at once, and workers and ranks agree without talking to each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

# Four rounds are indistinguishable from random by chosen pairs (Luby and Rackoff); the round
# function here is a hash, not a cipher, so there are some more.
ROUNDS = 6
ONE = np.uint64(1)


class Shuffle:
    """A random order of `length` rows.

    Args:
        length: number of rows, at least 1.
        seed: of the job.
        epoch: each has an order of its own.
    """

    def __init__(self, length: int, seed: int, epoch: int) -> None:
        self.length = length
        bits = max(2, (length - 1).bit_length())
        self.low_bits, self.high_bits = np.uint64(bits // 2), np.uint64(bits - bits // 2)
        source = np.random.SeedSequence([seed % 2**64, epoch])
        self.keys = source.generate_state(ROUNDS, np.uint64)

    def __call__(self, places: I64) -> I64:
        """Return the rows that stand at `places` of the order (R,)."""
        rows = self._once(places.astype(np.uint64))
        outside = np.flatnonzero(rows >= self.length)
        while len(outside):
            rows[outside] = self._once(rows[outside])
            outside = outside[rows[outside] >= self.length]
        return rows.astype(np.int64)

    def _once(self, value: U64) -> U64:
        """Permute the numbers below the power of two."""
        low_bits, high_bits = self.low_bits, self.high_bits
        for key in self.keys:
            high, low = value >> low_bits, value & ((ONE << low_bits) - ONE)
            high ^= _hash(low ^ key) >> (np.uint64(64) - high_bits)
            # The halves change places, so that each is mixed by the other in turn.
            value = (low << high_bits) | high
            low_bits, high_bits = high_bits, low_bits
        return value


def _hash(x: U64) -> U64:
    """Mix 64 bits, in place; the constants are those of SplitMix64 (Steele, Lea and Flood 2014)."""
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0x94D049BB133111EB)
    return x
