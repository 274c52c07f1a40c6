"""Negatives from lists: every query brings items of its own, and a step draws from all of them.

The lists are what the model itself ranks high (mined), or what the query's user was shown and did
not take (skipped). A step of `Q` queries draws `n` items in all, equally many from each list, and
every query is compared with all of them. Given its queries, item j is then expected

    L_j = sum_i n / Q * [j in list i] / |list i|

times among the step's candidates. With it a candidate is corrected for what was really sampled,
though the lists depend on the queries.

Shape legend: `Q` queries of a step, `K` different items of their lists, `N` items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.data.prepared import PreparedDataset, gather
from twotower.errors import UserError

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
# Most skipped events that a query draws from.
NEAREST_SKIPPED = 50
# Behind all ids, so that a search ends before it.
LAST = np.iinfo(np.int64).max


@dataclass
class Listed:
    """How often a step's lists are expected to bring each item.

    Attributes:
        id_K: catalogue rows, ascending, and one behind all.
        expected_K: draws of each, fp64.
    """

    id_K: Tensor
    expected_K: Tensor

    def of(self, id_N: Tensor) -> Tensor:
        """Return the expected draws of any items (N,), 0 of those in no list."""
        place_N = torch.searchsorted(self.id_K, id_N)
        return self.expected_K[place_N] * (self.id_K[place_N] == id_N)

    def each(self, change: Callable[[Tensor], Tensor]) -> Listed:
        """Return both tensors changed."""
        return Listed(change(self.id_K), change(self.expected_K))


@dataclass(frozen=True)
class Lists:
    """Items of each query (Q), one list after another.

    Attributes:
        items: of the lists.
        lengths: of each (Q,).
    """

    items: I64
    lengths: I64

    def draw(self, number: int, random: np.random.Generator) -> I64:
        """Return items drawn from the lists, each from as many; -1 where a list is empty."""
        query = random.permutation(len(self.lengths))[np.arange(number) % len(self.lengths)]
        place = (random.random(number) * self.lengths[query]).astype(np.int64)
        first = np.cumsum(self.lengths) - self.lengths
        drawn = np.full(number, -1)
        there = self.lengths[query] > 0
        drawn[there] = self.items[(first[query] + place)[there]]
        return drawn

    def expected(self, number: int) -> npt.NDArray[np.float64]:
        """Return how often an entry of each list is drawn, for every entry."""
        a_query = number / len(self.lengths)
        return np.repeat(a_query / np.maximum(self.lengths, 1), self.lengths)


def listed(parts: list[tuple[Lists, int]]) -> Listed:
    """Return what lists bring together, each drawn from a number of times."""
    items, inverse = np.unique(
        np.concatenate([lists.items for lists, _ in parts]), return_inverse=True
    )
    draws = np.concatenate([lists.expected(number) for lists, number in parts])
    expected = np.bincount(inverse, draws, len(items))
    return Listed(
        torch.from_numpy(np.append(items, LAST)), torch.from_numpy(np.append(expected, 0.0))
    )


class Miner(Protocol):
    """What finds lists for the queries of coming steps.

    Attributes:
        every: steps that one finding is for.
    """

    every: int

    def __call__(self, epoch: int, step: int, rows: I64) -> I32:
        """Return lists of the queries of events (R, depth), -1 for none.

        Args:
            epoch: of the steps.
            step: the first one's place in the epoch.
            rows: of the events, in the order of the steps.
        """
        ...


@dataclass(frozen=True)
class Mined:
    """Lists of the queries of some steps.

    Attributes:
        first: place of the first query in the epoch's order.
        items: (R, depth), -1 for none.
    """

    first: int
    items: I32

    def lists(self, start: int, end: int) -> Lists:
        """Return those of the queries at places from `start` to before `end`."""
        items = self.items[start - self.first : end - self.first]
        there = items >= 0
        return Lists(items[there].astype(np.int64), there.sum(1))


class Skipped:
    """Lists of what users were shown and did not take, the newest before an event or at it.

    Args:
        data: the prepared dataset.

    Raises:
        UserError: when it has none.
    """

    def __init__(self, data: PreparedDataset) -> None:
        self.data = data
        if not data.keeps_skipped:
            raise UserError(
                f"train.negatives.skipped: {data.path} has no skipped events: name "
                "data.columns.label and positive_from, with train_on: positives, or set it to 0"
            )
        if not len(self._item):
            raise UserError(
                f"train.negatives.skipped: no event of {data.path} has a label below "
                f"data.columns.positive_from ({data.config.columns.positive_from:g}) and an item "
                "and a user of the dataset: raise it, or set the share to 0"
            )

    @cached_property
    def _item(self) -> I32:
        return np.asarray(self.data.skipped_columns["item"])

    @cached_property
    def _time(self) -> I64:
        return np.asarray(self.data.skipped_columns["time"])

    @cached_property
    def _first(self) -> I64:
        """Where each user's begin (U + 1,)."""
        users = np.arange(len(self.data.users) + 1)
        return np.searchsorted(self.data.skipped_columns["user"], users)

    def lists(self, rows: I64) -> Lists:
        """Return those of events, without each one's own item."""
        c = self.data.event_columns
        user, item, time = c["user"][rows], c["item"][rows], c["time"][rows]
        end = self._end(user, time)
        start = np.maximum(self._first[user], end - NEAREST_SKIPPED)
        items, lengths = gather(self._item, start, end)
        owner = np.repeat(np.arange(len(rows)), lengths)
        other = items != item[owner]
        return Lists(
            items[other].astype(np.int64), np.bincount(owner[other], minlength=len(rows))
        )  # fmt: skip

    def _end(self, user: I64, time: I64) -> I64:
        """Return the end of what users had skipped at given times, by bisection of all at once."""
        low, high = self._first[user], self._first[user.astype(np.int64) + 1]
        while (open_ := low < high).any():
            middle = (low + high) // 2
            before = open_ & (self._time[np.where(open_, middle, 0)] <= time)
            low = np.where(before, middle + 1, low)
            high = np.where(open_ & ~before, middle, high)
        return low
