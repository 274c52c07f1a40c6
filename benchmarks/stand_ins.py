"""Stand-ins for public logs that are not at hand, of what KuaiRand's users watched before 25 April.

- `user-lines`, for Gowalla and Yelp2018: all of it, a random fifth held out; most of it popular;
- `user-lines-sparse`: without the 1,200 most watched videos, then without users and videos of fewer
  than 8 events, so that it is as sparse as the public logs, and smaller;
- `next-item`, for ML-1M: 6,000 users of at least 20 events, in their order;
- `next-item-sparse`, for Amazon Beauty: without the 1,200 most watched videos, of each user a
  stretch of 9 events on average, as short as histories are there.

`quality.py --recipe NAME` writes and uses them; what `configs/benchmarks/` say was chosen by them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

POPULAR = 1200
HELD_OUT = 0.2
USERS = 6000
Sequences = list[list[int]]


def write_user_lines(sequences: Path, folder: Path, *, sparse: bool) -> None:
    """Write train.txt and test.txt: a user, then items, on a line.

    Args:
        sequences: Parquet with a list `watch_seq` of items a user.
        folder: to write to.
        sparse: leave out what is popular.
    """
    taken = [items for items in _watched(sequences) if len(items) >= 5]
    if sparse:
        taken = _at_least(_without_popular(taken), 8)
    number = _numbers(taken)
    rng = np.random.default_rng(0)
    with (folder / "train.txt").open("w") as train, (folder / "test.txt").open("w") as test:
        for user, items in enumerate(taken):
            held = rng.random(len(items)) < HELD_OUT
            if held.all():
                held[0] = False
            for file, chosen in ((train, ~held), (test, held)):
                if chosen.any():
                    names = [number[i] for i, c in zip(items, chosen, strict=True) if c]
                    print(user, *names, file=file)


def write_next_items(sequences: Path, folder: Path, *, sparse: bool) -> None:
    """Write log.txt: a user and an item on a line, each user's oldest first.

    Args:
        sequences: Parquet with a list `watch_seq` of items a user.
        folder: to write to.
        sparse: leave out what is popular, and keep a short stretch of each user.
    """
    rng, taken = np.random.default_rng(0), _watched(sequences)
    if sparse:
        taken = [_stretch(items, rng) for items in _without_popular(taken) if len(items) >= 5]
    else:
        taken = [items for items in taken if len(items) >= 20]
        taken = [taken[i] for i in rng.permutation(len(taken))[:USERS]]
    taken = _at_least(taken, 5)
    number = _numbers(taken)
    with (folder / "log.txt").open("w") as file:
        for user, items in enumerate(taken, 1):
            for item in items:
                print(user, number[item] + 1, file=file)


def _watched(sequences: Path) -> Sequences:
    return [list(dict.fromkeys(s)) for s in pq.read_table(sequences)["watch_seq"].to_pylist()]


def _without_popular(taken: Sequences) -> Sequences:
    popular = {item for item, _ in _counts(taken).most_common(POPULAR)}
    return [[i for i in items if i not in popular] for items in taken]


def _stretch(items: list[int], rng: np.random.Generator) -> list[int]:
    size = min(len(items), 4 + int(rng.geometric(1 / 5)))
    start = int(rng.integers(0, len(items) - size + 1))
    return items[start : start + size]


def _at_least(taken: Sequences, fewest: int) -> Sequences:
    """Leave out users and items of fewer events, until none is left."""
    before = 0
    while before != (before := sum(map(len, taken))):
        taken = [items for items in taken if len(items) >= fewest]
        counts = _counts(taken)
        taken = [[i for i in items if counts[i] >= fewest] for items in taken]
    return [items for items in taken if items]


def _numbers(taken: Sequences) -> dict[int, int]:
    return {item: n for n, item in enumerate(sorted(_counts(taken)))}


def _counts(taken: Sequences) -> Counter[int]:
    return Counter(item for items in taken for item in items)
