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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from twotower.data.batches import Batch, BatchBuilder
from twotower.data.listed import Lists, Mined, Miner, Skipped, listed
from twotower.data.prepared import PreparedDataset
from twotower.data.sequences import Windows
from twotower.data.shuffle import Shuffle
from twotower.data.training_events import IdDropout, Recency, Times
from twotower.errors import UserError

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Part:
    """A rank's part of a step.

    Attributes:
        epoch: of the step.
        step, end: first place of the step in the epoch's order, and the one after its last.
        low, high: first place of the part and the one after its last.
        size: queries of the part's batch.
    """

    epoch: int
    step: int
    end: int
    low: int
    high: int
    size: int


@dataclass(frozen=True)
class ExtraItems:
    """Items of a step beside the events' own, of which ranks hold equal parts.

    Attributes:
        uniform: number of items drawn evenly from the catalogue.
        mined: number drawn from what a miner finds for the queries.
        skipped: number drawn from what the queries' users have skipped.
        catalogue: whether all items of the catalogue stand for the events' own; `positive_B` are
            then places among the items of all ranks.
    """

    uniform: int = 0
    mined: int = 0
    skipped: int = 0
    catalogue: bool = False


class TrainLoader:
    """Shuffled training batches of one rank.

    Args:
        data: the prepared dataset.
        batch_size: most events, or windows, of a step, of all ranks together; all steps of an
            epoch have this size or, where it does not divide the epoch, nearly one size below it.
        seed: of the shuffle.
        rank: of this process.
        ranks: number of processes that share an epoch.
        workers: processes that build batches ahead; 0 builds them here when they are asked for.
        pin_memory: whether to hand out pinned memory, for asynchronous copies to a GPU.
        extra: given the queries of a step, the items beside the events' own.
        id_dropout: share of items that a step shows by an out-of-vocabulary row of their own id's
            table, as a new item is shown.
        half_life_days: age at which an event counts half of the newest; by default all count alike.
        every_position: whether examples are windows of histories, of which every entry is a query
            (`twotower.data.sequences`), and whose items are shared by the ranks.
        outcomes: columns of the log that batches of events hold, see `BatchBuilder`.
        seen: whether batches hold what users had taken before.
        times: whether batches hold when their queries' events happened.

    Raises:
        UserError: when there are fewer examples than ranks, or no windows can be had.
    """

    def __init__(
        self, data: PreparedDataset, batch_size: int, seed: int, *, rank: int = 0, ranks: int = 1,
        workers: int = 0, pin_memory: bool = False, id_dropout: float = 0.0,
        half_life_days: float | None = None, every_position: bool = False,
        extra: Callable[[float], ExtraItems] | None = None, outcomes: Sequence[str] = (),
        seen: bool = False, times: bool = False,
    ) -> None:  # fmt: skip
        kind = _Windows if every_position else _Events
        self.batches = kind(BatchBuilder(data, outcomes, seen), seed, rank, ranks)
        self.length = self.batches.length
        if self.length < ranks:
            what = "histories" if every_position else "events"
            raise UserError(
                f"{data.path}: {self.length} training {what} do not suffice for {ranks} "
                "processes: train on fewer"
            )
        if not data.config.ordered and len(data.late_training):
            raise UserError(
                f"{data.path}: data.ordered is false, but {len(data.late_training)} users have "
                "training events timed after held-out ones, which their histories would hold: "
                "give held-out events later times, or set it to true"
            )
        if id_dropout:
            self.batches.hidden = IdDropout(data, id_dropout)
        if half_life_days is not None:
            self.batches.recency = Recency(data, half_life_days)
        if times:
            self.batches.times = Times(data)
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        if extra is not None:
            self.batches.take(extra(self.queries_a_step))
        self.miner: Miner | None = None
        self.workers, self.pin_memory = workers, pin_memory
        self.epoch = 0
        self.place = 0

    def __len__(self) -> int:
        """Return the batches of a whole epoch."""
        return -(-self.length // self.batch_size)

    def positive_counts(self) -> I64:
        """Return how often each item is a positive of an epoch (N,)."""
        return self.batches.positive_counts()

    @property
    def first_times(self) -> Tensor | None:
        """`Times.first_N`, where batches hold times."""
        return None if self.batches.times is None else self.batches.times.first_N

    @property
    def queries_a_step(self) -> float:
        """Queries of a step, of all ranks together, in the mean."""
        return self.batches.queries / len(self)

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch; its place is kept if it is this one."""
        if epoch != self.epoch:
            self.epoch, self.place = epoch, 0

    def __iter__(self) -> Iterator[Batch]:
        for segment in self.segments():
            yield from segment

    def segments(self) -> Iterator[Iterator[Batch]]:
        """Yield what is left of the epoch, in runs of batches that a miner finds lists for.

        Each is to be used up, and trained on, before the next is asked for.
        """
        steps = list(self._steps())
        every = len(steps) if self.miner is None else self.miner.every
        for start in range(0, len(steps), every):
            segment = steps[start : start + every]
            end = sum(segment[-1])
            if end <= self.place:
                continue
            if self.miner is not None:
                low = segment[0][0]
                rows = self.batches.rows(self.epoch, low, end)
                self.batches.mined = Mined(low, self.miner(self.epoch, low, rows))
            yield self._batches([step for step in segment if step[0] >= self.place])

    def _batches(self, steps: list[tuple[int, int]]) -> Iterator[Batch]:
        unchanged: Any = _unchanged
        loader: DataLoader[Batch] = DataLoader(
            self.batches,
            batch_size=None,
            sampler=[self._part(*step) for step in steps],
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            collate_fn=unchanged,
            # Of its own: the job's stream of random numbers stays as it is.
            generator=torch.Generator(),
            worker_init_fn=_leave_signals,
        )
        for (low, size), batch in zip(steps, loader, strict=True):
            # Batches that workers have built ahead do not count as taken.
            self.place = low + size
            yield batch

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Yield first place and size of every step of an epoch, for all ranks together.

        Each takes an equal part, rounded up, of what is left.
        """
        place = 0
        while place < self.length:
            left = self.length - place
            steps = -(-left // self.batch_size)
            size = -(-left // steps)
            yield place, size
            place += size

    def _part(self, low: int, size: int) -> Part:
        """Return this rank's part of a step."""
        rank, ranks = self.rank, self.ranks
        return Part(
            epoch=self.epoch, step=low, end=low + size, low=low + size * rank // ranks,
            high=low + size * (rank + 1) // ranks, size=-(-size // ranks),
        )  # fmt: skip

    def state_dict(self) -> dict[str, int]:
        """Return how much of which epoch was taken."""
        return {"epoch": self.epoch, "place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place."""
        self.epoch, self.place = state["epoch"], state["place"]


class _Events(Dataset[Batch]):
    """Any part of any epoch as a batch of events; what a worker process holds."""

    def __init__(self, builder: BatchBuilder, seed: int, rank: int, ranks: int) -> None:
        self.builder, self.seed, self.rank, self.ranks = builder, seed, rank, ranks
        self.extra = ExtraItems()
        self.hidden: IdDropout | None = None
        self.recency: Recency | None = None
        self.times: Times | None = None
        self.mined: Mined | None = None
        self.skipped: Skipped | None = None
        self.items = len(builder.data.items)
        self.length = self.queries = builder.data.section(0).stop

    def take(self, extra: ExtraItems) -> None:
        """Add items to each step from now on."""
        self.extra = extra
        self.skipped = Skipped(self.builder.data) if extra.skipped else None

    def __getitem__(self, part: Part) -> Batch:
        batch = self._batch(part)
        if self.hidden is not None:
            self.hidden(batch, self._random(part, self.rank))
        if self.recency is None and self.times is None:
            return batch
        event = self._events(self.rows(part.epoch, part.low, part.high))
        if self.recency is not None:
            batch.weight_B[: len(event)] *= torch.from_numpy(self.recency(event))
        if self.times is not None:
            batch.time_B = self.times(event, len(batch.weight_B))
        return batch

    def _events(self, rows: I64) -> I64:
        """Return the training events that are the positives of examples."""
        return rows

    def _batch(self, part: Part) -> Batch:
        rows = self.rows(part.epoch, part.low, part.high)
        if self.extra.catalogue:
            everything = self._mine(np.arange(self.items))
            return self.builder.events(rows, part.size, extra=everything, own=False)
        random, lists = self._random(part), self._lists(part)
        drawn = [self._drawn(random), *(some.draw(number, random) for some, number in lists)]
        items = np.concatenate(drawn)
        batch = self.builder.events(
            rows, part.size, extra=self._mine(items) if len(items) else None
        )
        return replace(batch, listed=listed(lists)) if lists else batch

    def _lists(self, part: Part) -> list[tuple[Lists, int]]:
        """Return the lists of all ranks' queries of a step, and how many items each brings."""
        lists = []
        if self.extra.mined:
            assert self.mined is not None, "a loader with mined items was given no miner"
            lists.append((self.mined.lists(part.step, part.end), self.extra.mined))
        if self.skipped is not None:
            rows = self.rows(part.epoch, part.step, part.end)
            lists.append((self.skipped.lists(rows), self.extra.skipped))
        return lists

    def positive_counts(self) -> I64:
        """Return how often each item is a positive of an epoch (N,)."""
        return self.builder.data.train_count.astype(np.int64)

    def rows(self, epoch: int, low: int, high: int) -> I64:
        """Return what stands at places from `low` to before `high` of an epoch's order."""
        return Shuffle(self.length, self.seed, epoch)(np.arange(low, high))

    def _drawn(self, random: np.random.Generator) -> I64:
        """Return items drawn evenly for the step, the same on any number of ranks."""
        return random.integers(0, self.items, self.extra.uniform)

    def _random(self, part: Part, *more: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, part.epoch, part.step, *more])

    def _mine(self, items: I64) -> I64:
        """Return this rank's part of a step's items, with fillers where it is short."""
        length = -(-len(items) // self.ranks)
        mine = items[self.rank * length : (self.rank + 1) * length]
        return np.concatenate([mine, np.full(length - len(mine), -1)])


class _Windows(_Events):
    """Any part of any epoch as a batch of windows, whose entries are queries."""

    def __init__(self, builder: BatchBuilder, seed: int, rank: int, ranks: int) -> None:
        super().__init__(builder, seed, rank, ranks)
        self.windows = Windows(builder)
        self.length, self.queries = len(self.windows), self.windows.queries

    def positive_counts(self) -> I64:
        """Return how often each item is a positive of an epoch (N,)."""
        return self.windows.target_counts()

    def _events(self, rows: I64) -> I64:
        """Return the training events that are the positives of windows, -1 of older ones."""
        return self.windows.events(rows)

    def _batch(self, part: Part) -> Batch:
        rows = self.rows(part.epoch, part.low, part.high)
        positive = self.windows.targets(rows)
        if self.extra.catalogue:
            items = np.arange(self.items)
        else:
            # Each once, over all ranks, so that a long history is not compared with itself again.
            items = np.unique(self.windows.targets(self.rows(part.epoch, part.step, part.end)))
            positive = np.searchsorted(items, positive)
            items = np.concatenate([items, self._drawn(self._random(part))])
        return self.windows.batch(rows, part.size, self._mine(items), positive)


def _leave_signals(_: int) -> None:
    """Leave the end of a run to its process, which saves first and then ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _unchanged(batch: Batch) -> Batch:
    return batch
