"""Stand-ins for public logs of one user a line: the histories of KuaiRand, a random fifth held out.

Gowalla and Yelp2018 are not at hand. `user-lines` holds what its 24,376 users watched from 8 to 24
April, most of it popular; `user-lines-sparse` leaves the 1,200 most watched videos out, then users
and videos with fewer than 8 of what remains, so that it is as sparse as the public logs, and
smaller. `quality.py --recipe user-lines` writes and uses them; which settings of
`configs/benchmarks/gowalla.yaml` are best was chosen by them.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

POPULAR = 1200
FEWEST = 8
HELD_OUT = 0.2


def write_user_lines(sequences: Path, folder: Path, *, sparse: bool) -> None:
    """Write train.txt and test.txt: a user, then items, on a line.

    Args:
        sequences: Parquet with a list `watch_seq` of items a user.
        folder: to write to.
        sparse: leave out what is popular.
    """
    taken = [list(dict.fromkeys(s)) for s in pq.read_table(sequences)["watch_seq"].to_pylist()]
    taken = [items for items in taken if len(items) >= 5]
    if sparse:
        popular = {item for item, _ in _counts(taken).most_common(POPULAR)}
        taken = [[i for i in items if i not in popular] for items in taken]
        before = 0
        while before != (before := sum(map(len, taken))):
            taken = [items for items in taken if len(items) >= FEWEST]
            counts = _counts(taken)
            taken = [[i for i in items if counts[i] >= FEWEST] for items in taken]
    number = {item: n for n, item in enumerate(sorted(_counts(taken)))}
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


def _counts(taken: list[list[int]]) -> Counter[int]:
    return Counter(item for items in taken for item in items)
