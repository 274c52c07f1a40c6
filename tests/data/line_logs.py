"""A stand-in for the public user-lines benchmarks, which may not be downloaded."""

from pathlib import Path

import numpy as np


def write_stand_in(folder: Path, users: int = 3000, items: int = 1500, seed: int = 0) -> None:
    """Write train.txt and test.txt, a user a line: tastes, a skew of popularity, a random fifth.

    A user likes two of 30 groups of items; of what is liked, the popular is taken more often.
    """
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 30, items)
    popularity = rng.permutation(1 / (np.arange(items) + 10))
    with (folder / "train.txt").open("w") as train, (folder / "test.txt").open("w") as test:
        for user in range(users):
            liked = np.isin(groups, rng.choice(30, 2, replace=False))
            chance = popularity * np.where(liked, 1, 0.01)
            taken = rng.choice(items, rng.integers(10, 40), replace=False, p=chance / chance.sum())
            cut = len(taken) // 5
            for file, part in ((test, taken[:cut]), (train, taken[cut:])):
                file.write(f"{user} {' '.join(map(str, part))}\n")
