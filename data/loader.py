"""Training batches in a global shuffle, for any number of ranks and of worker processes.

An epoch is one random order of all training events (`twotower.data.shuffle`). Its steps take equal
parts of what is left of it, and ranks equal parts of a step, so that every event comes once, all
ranks take the same number of steps, and no batch is a small rest with few in-batch negatives.

Sharded look-ups need batches of one size on all ranks. Where a step does not divide, the batches of
some ranks end with a filler, which looks up no ids and which no loss may count.

Where an epoch stands is one number, the events taken so far. A run goes on at the exact next batch,
with another number of workers too; with another number of ranks its steps hold the same events.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from twotower.data.batches import Batch, BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.data.shuffle import Shuffle
from twotower.errors import UserError

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A rank's part of a step.

    Attributes:
        epoch: of the step.
        step: first place of the step in the epoch's order.
        low, high: first place of the part and the one after its last.
        size: queries of the part's batch.
    """

    epoch: int
    step: int
    low: int
    high: int
    size: int


@dataclass(frozen=True)
class ExtraItems:
    """Items of a step beside the events' own, of which ranks hold equal parts.

    Attributes:
        uniform: number of items drawn evenly from the catalogue.
        catalogue: whether all items of the catalogue stand for the events' own.
    """

    uniform: int = 0
    catalogue: bool = False


class TrainLoader:
    """Shuffled training batches of one rank.

    Args:
        data: the prepared dataset.
        batch_size: most events of a step, of all ranks together; all steps of an epoch have this
            size or, where it does not divide the epoch, nearly one size below it.
        seed: of the shuffle.
        rank: of this process.
        ranks: number of processes that share an epoch.
        workers: processes that build batches ahead; 0 builds them here when they are asked for.
        pin_memory: whether to hand out pinned memory, for asynchronous copies to a GPU.
        extra: items beside the events' own.

    Raises:
        UserError: when there are fewer training events than ranks.
    """

    def __init__(
        self, data: PreparedDataset, batch_size: int, seed: int, *, rank: int = 0, ranks: int = 1,
        workers: int = 0, pin_memory: bool = False, extra: ExtraItems = ExtraItems(),
    ) -> None:  # fmt: skip
        self.length = data.section(0).stop
        if self.length < ranks:
            raise UserError(
                f"{data.path}: {self.length} training events do not suffice for {ranks} processes: "
                "train on fewer"
            )
        builder = BatchBuilder(data)
        self.batches = _Batches(builder, self.length, seed, extra, rank, ranks)
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        self.workers, self.pin_memory = workers, pin_memory
        self.epoch = 0
        self.place = 0

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return -(-self.length // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch; its place is kept if it is this one."""
        if epoch != self.epoch:
            self.epoch, self.place = epoch, 0

    def __iter__(self) -> Iterator[Batch]:
        ends = [low + size for low, size in self._steps()]
        unchanged: Any = _unchanged
        loader: DataLoader[Batch] = DataLoader(
            self.batches,
            batch_size=None,
            sampler=self._parts(),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            collate_fn=unchanged,
            # Of its own: the job's stream of random numbers stays as it is.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals,
        )
        for end, batch in zip(ends, loader, strict=True):
            # Batches that workers have built ahead do not count as taken.
            self.place = end
            yield batch

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Yield first place and size of every step that is left, for all ranks together.

        Each takes an equal part, rounded up, of what is left, so the rule needs no memory of where
        the epoch was broken off.
        """
        place = self.place
        while place < self.length:
            left = self.length - place
            steps = -(-left // self.batch_size)
            size = -(-left // steps)
            yield place, size
            place += size

    def _parts(self) -> list[Part]:
        """Return this rank's part of every step that is left."""
        rank, ranks = self.rank, self.ranks
        return [
            Part(
                epoch=self.epoch, step=low, low=low + size * rank // ranks,
                high=low + size * (rank + 1) // ranks, size=-(-size // ranks),
            )
            for low, size in self._steps()
        ]  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """Return how much of which epoch was taken."""
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place."""
        self.epoch, self.place = state["epoch"], state["place"]


class _Batches(Dataset[Batch]):
    """Any part of any epoch as a batch; what a worker process holds."""

    def __init__(
        self, builder: BatchBuilder, length: int, seed: int, extra: ExtraItems, rank: int,
        ranks: int,
    ) -> None:  # fmt: skip
        self.builder, self.length, self.seed = builder, length, seed
        self.extra, self.rank, self.ranks = extra, rank, ranks

    def __getitem__(self, part: Part) -> Batch:
        order = Shuffle(self.length, self.seed, part.epoch)
        rows = order(np.arange(part.low, part.high))
        own = not self.extra.catalogue
        return self.builder.events(rows, part.size, extra=self._items(part), own=own)

    def _items(self, part: Part) -> I64 | None:
        """Return this rank's part of the step's further items, with fillers where it is short."""
        items, number = len(self.builder.data.items), self.extra.uniform
        if self.extra.catalogue:
            rows = np.arange(items)
        elif number:
            # Of the step: any number of ranks draws the same.
            random = np.random.default_rng([self.seed % 2**64, part.epoch, part.step])
            rows = random.integers(0, items, number)
        else:
            return None
        length = -(-len(rows) // self.ranks)
        mine = rows[self.rank * length : (self.rank + 1) * length]
        return np.concatenate([mine, np.full(length - len(mine), -1)])


def _leave_signals(_: int) -> None:
    """Leave the end of a run to its process, which saves first and then ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Batch) -> Batch:
    return batch
