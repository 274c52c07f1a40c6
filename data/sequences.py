"""Whole histories as training examples: every entry predicts the one behind it.

A user's training items, those from before the log included, are cut into windows of a history's
length, the newest whole. In a window, each entry but the last of all is a query whose positive is
the next one (Kang and McAuley 2018), so that a history of L items is looked up and read once, not L
times.

Shape legend: `W` windows, `S` windows of a batch, `B` queries, `N` items.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from twotower.data.batches import Batch, BatchBuilder, Entries
from twotower.data.prepared import PreparedDataset, gather
from twotower.data.schema import CAUSAL, Feature
from twotower.errors import UserError

I64 = npt.NDArray[np.int64]


class Windows:
    """The windows of a prepared dataset.

    Args:
        builder: of its batches.

    Raises:
        UserError: when its query features cannot be had at every entry, or its training events are
            not each user's first.
    """

    def __init__(self, builder: BatchBuilder) -> None:
        self.builder, self.data = builder, builder.data
        self.history = _history_of(builder.config.query, builder.config.ordered)
        _refuse_late_training(self.data)
        start_U = self.data.history_from.astype(np.int64)
        size_U = self.data.train_end - start_U
        length = self.history.length
        # The first item of all has nothing before it to predict it from.
        number_U = -(-np.maximum(size_U - 1, 0) // length)
        self.user_W = np.repeat(np.arange(len(number_U)), number_U)
        back_W = np.arange(len(self.user_W)) - np.repeat(np.cumsum(number_U) - number_U, number_U)
        # Of the targets: the entries that predict them lie one before.
        self.end_W = (start_U + size_U)[self.user_W] - back_W * length
        self.start_W = np.maximum(self.end_W - length, start_U[self.user_W] + 1)
        known_U = self.data.prior_lengths
        first_U = np.cumsum(size_U - known_U) - (size_U - known_U)
        # From a place in the timeline to the training event there; earlier ones are from before.
        self.first_W = first_U[self.user_W]
        self.shift_W = (first_U - start_U - known_U)[self.user_W]

    def __len__(self) -> int:
        return len(self.user_W)

    @property
    def queries(self) -> int:
        """Number of entries that predict another, of all windows."""
        return int((self.end_W - self.start_W).sum())

    def target_counts(self) -> I64:
        """Return how often each item is a positive (N,)."""
        items = self.targets(np.arange(len(self)))
        return np.bincount(items, minlength=len(self.data.items))

    def targets(self, rows: I64) -> I64:
        """Return the positives of windows, window after window: catalogue rows (B,)."""
        items, _ = gather(self.data.timeline, self.start_W[rows], self.end_W[rows])
        return items.astype(np.int64)

    def events(self, rows: I64) -> I64:
        """Return the training events that are the positives of windows (B,), -1 of older ones."""
        lengths = self.end_W[rows] - self.start_W[rows]
        before = np.cumsum(lengths) - lengths
        place = np.arange(lengths.sum()) + np.repeat(self.start_W[rows] - before, lengths)
        event = place + np.repeat(self.shift_W[rows], lengths)
        return np.where(event < np.repeat(self.first_W[rows], lengths), -1, event)

    def batch(self, rows: I64, size: int, items: I64, positive: I64) -> Batch:
        """Return windows of which every entry is a query.

        Args:
            rows: of the windows (S,).
            size: windows of the batch; those behind `rows` are empty, and no queries.
            items: catalogue rows (N,), -1 for fillers.
            positive: place among all ranks' items of each query's positive (B,).
        """
        lengths = self.end_W[rows] - self.start_W[rows]
        longest = int(lengths.max(initial=1))
        first = np.cumsum(lengths) - lengths
        entry = np.arange(len(positive)) - np.repeat(first, lengths)
        place = np.repeat(np.arange(len(rows)), lengths) * longest + entry
        entries = (self.start_W[rows] - 1, self.end_W[rows] - 1)
        return self.builder.histories(
            self.user_W[rows], entries, Entries(torch.from_numpy(place), size, longest), items,
            positive,
        )  # fmt: skip


def _history_of(features: list[Feature], ordered: bool) -> Feature:
    """Return the history that is read entry by entry, refusing features that entries have not."""
    key = "train.every_position"
    if not ordered:
        raise UserError(
            f"{key} predicts what comes next, and data.ordered is false: set it to true"
        )
    causal = [f for f in features if f.is_causal]
    if len(causal) != 1:
        raise UserError(
            f"{key} needs one history in data.query whose pooling is {' or '.join(CAUSAL)}, "
            f"got {len(causal)}"
        )
    for f in features:
        if f.kind == "history" and f is not causal[0]:
            raise UserError(
                f"{key}: history '{f.name}' is pooled by {f.pooling}, which would show an entry "
                f"what came after it: remove it, or set {key} to false"
            )
        if f.source == "interactions":
            raise UserError(
                f"{key}: feature '{f.name}' is of the event, and a history's entries do not keep "
                f"theirs: remove it, or set {key} to false"
            )
    return causal[0]


def _refuse_late_training(data: PreparedDataset) -> None:
    """Refuse a split that gives a user training events after held-out ones."""
    if len(data.late_training):
        user = data.users["id"][int(data.late_training[0])].as_py()
        raise UserError(
            "train.every_position needs each user's training events to be the first; user "
            f"{user!r} is one of {len(data.late_training)} with some after held-out ones: use a "
            "temporal or leave_last_out split, or set it to false"
        )
