"""What a training job makes of its events: weights by age, times, ids that are hidden.

Shape legend: `E` training events, `N` items, `B` queries.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from twotower.data.batches import Batch, id_keys
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import is_own_id
from twotower.errors import UserError

I64 = npt.NDArray[np.int64]
# The end of time.
LAST = np.iinfo(np.int64).max


class Recency:
    """Weighs training events by their age, so that what is taken now counts more.

    Args:
        data: the prepared dataset.
        half_life_days: age at which an event counts half of the newest.

    Raises:
        UserError: when the log has no times.
    """

    def __init__(self, data: PreparedDataset, half_life_days: float) -> None:
        _need_times(data, "train.half_life_days weighs events by their times")
        training = data.event_columns["time"][: data.section(0).stop]
        age_us = training.max(initial=0) - training
        # The oldest may count very little, but not nothing: a batch of them alone has a mean.
        power = np.maximum(-age_us / (half_life_days * 86_400e6), -60)
        self.weight_E = np.exp2(power).astype(np.float32)

    def __call__(self, event: I64) -> npt.NDArray[np.float32]:
        """Return the weights of training events, of -1 (older than the log) that of the oldest."""
        weight: npt.NDArray[np.float32] = self.weight_E[event]
        weight[event < 0] = self.weight_E.min()
        return weight


class Times:
    """When training events happened, and from when on there was each item to be taken.

    Attributes:
        first_N: when each item's first training event happened, in microseconds since 1970; the
            end of time for an item without one.

    Raises:
        UserError: when the log has no times.
    """

    def __init__(self, data: PreparedDataset) -> None:
        _need_times(data, "train.negatives.exclude_unreleased compares the times of events")
        c, training = data.event_columns, data.section(0).stop
        self.time_E = c["time"][:training]
        first_N = np.full(len(data.items), LAST)
        np.minimum.at(first_N, c["item"][:training], self.time_E)
        self.first_N = torch.from_numpy(first_N)

    def __call__(self, event: I64, size: int) -> Tensor:
        """Return the times of `size` queries (B,): the events', and of -1 or none the end of time.

        Args:
            event: rows of training events, -1 of those older than the log.
            size: queries of the batch; those behind the events are fillers.
        """
        time_B = np.full(size, LAST)
        time_B[: len(event)] = np.where(event < 0, LAST, self.time_E[event])
        return torch.from_numpy(time_B)


class IdDropout:
    """Shows items by out-of-vocabulary rows of their own id's table, which new items have.

    So the rows learn to stand for no knowledge, and the other features what they can tell
    (Volkovs et al. 2017, "DropoutNet").

    Args:
        data: the prepared dataset.
        share: of the items.

    Raises:
        UserError: when items have no id among their features, or one without a vocabulary.
    """

    def __init__(self, data: PreparedDataset, share: float) -> None:
        self.share = share
        self.places: dict[int, int] = {}  # of the key -> out-of-vocabulary rows
        keys = id_keys(data.config)
        for f in data.config.item:
            if not is_own_id(data.config, "item", f):
                continue
            if data.config.table(f.table_name).slots is not None:
                raise UserError(
                    f"train.id_dropout: table '{f.table_name}' has dynamic ids, whose shared rows "
                    "learn from ids without a slot: set it to 0"
                )
            rows = data.config.table(f.table_name).oov_rows
            self.places[keys.index(f"item.{f.name}")] = rows
        if not self.places:
            raise UserError(
                "train.id_dropout: no feature of data.item is the item's own id: set it to 0"
            )

    def __call__(self, batch: Batch, random: np.random.Generator) -> None:
        """Hide ids in a batch that nothing else reads yet."""
        values, offset = batch.ids.values().numpy(), batch.ids.offset_per_key()
        for place, rows in self.places.items():
            own = values[offset[place] : offset[place + 1]]
            hidden = random.random(len(own)) < self.share
            own[hidden] = random.integers(0, rows, int(hidden.sum()))


def _need_times(data: PreparedDataset, what: str) -> None:
    """Refuse a log without times, saying what needs them."""
    if data.config.format != "table":
        raise UserError(f"{what}, and data.format: {data.config.format} has none: remove it")
