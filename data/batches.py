"""Batches: rows of a prepared dataset as one KeyedJaggedTensor and dense columns.

Features of both towers share one KeyedJaggedTensor, with keys `query.<name>` and `item.<name>`, so
that tables shared by the towers are looked up once. Queries are its first rows, and so are items:
where there are more of the one than of the other, the other's bags are empty.

Shape legend: `B` queries, `N` items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from twotower.data.encode import Normaliser
from twotower.data.listed import Listed
from twotower.data.prepared import (
    Column,
    PreparedDataset,
    array,
    dense,
    gather,
    id_column,
    one_chunk,
)
from twotower.data.schema import ID_KINDS, DataConfig, Feature

I64 = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
Bag = tuple[Array, I64]
NO_BAG: Bag = (np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass
class Entries:
    """Queries that are entries of histories, not rows.

    Attributes:
        place_B: of each query among all entries, where each history has `longest` of them.
        histories: rows of the queries.
        longest: entries of the longest history.
    """

    place_B: Tensor
    histories: int
    longest: int


@dataclass
class Seen:
    """What users had taken before their queries, in pairs (S,).

    Attributes:
        query_S: place of the query.
        item_S: catalogue row of an item that its user had taken.
    """

    query_S: Tensor
    item_S: Tensor


@dataclass
class EntryItems:
    """Items whose features the entries of histories bring, each once.

    Attributes:
        first: row of the first among the rows of items, behind those of `item_N`.
        count: their number.
        place_T: `query.<history>` -> which of them each entry is, history after history.
    """

    first: int
    count: int
    place_T: dict[str, Tensor]


@dataclass
class Batch(Pipelineable):
    """What a step reads.

    Attributes:
        ids: every id feature of both towers; stride max(B, N).
        dense: `<tower>.<name>` -> (B or N, width) float32, for numbers, vectors and,
            where a history has times, what is read of them (`twotower.data.encode`).
            Rows of items are followed by those of `entry_items`.
        item_N: catalogue row of each item, -1 for a filler, which has no ids.
        positive_B: which of the items is a query's positive.
        weight_B: sample weight, 0 of a filler.
        entries: which of the entries of histories the queries are, where they are not rows.
        entry_items: the items of histories that have `item_features`.
        outcome_BH: what followed each event (B, H) float32, NaN where it is not known, in the order
            that the builder was given; None without any.
        listed: how often the lists of the step's queries are expected to bring each item, the same
            on all ranks, where items are drawn from any.
        seen: what the queries' users had taken before, where the builder was asked for it.
        time_B: when each query's event happened, in microseconds since 1970, where the loader was
            asked for it; the end of time where that is not known.
    """

    ids: KeyedJaggedTensor
    dense: dict[str, Tensor]
    item_N: Tensor
    positive_B: Tensor
    weight_B: Tensor
    entries: Entries | None = None
    entry_items: EntryItems | None = None
    outcome_BH: Tensor | None = None
    listed: Listed | None = None
    seen: Seen | None = None
    time_B: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, for asynchronous copies to a GPU."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Batch:
        items = self.entry_items
        if items is not None:
            places = {key: change(value) for key, value in items.place_T.items()}
            items = replace(items, place_T=places)
        return Batch(
            change(self.ids),
            {key: change(value) for key, value in self.dense.items()},
            change(self.item_N),
            change(self.positive_B),
            change(self.weight_B),
            replace(self.entries, place_B=change(self.entries.place_B)) if self.entries else None,
            items,
            change(self.outcome_BH) if self.outcome_BH is not None else None,
            self.listed.each(change) if self.listed else None,
            Seen(change(self.seen.query_S), change(self.seen.item_S)) if self.seen else None,
            change(self.time_B) if self.time_B is not None else None,
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until `stream` is done with it."""
        self.ids.record_stream(stream)
        more = [] if self.entries is None else [self.entries.place_B]
        if self.entry_items is not None:
            more += self.entry_items.place_T.values()
        if self.outcome_BH is not None:
            more.append(self.outcome_BH)
        if self.listed is not None:
            more += [self.listed.id_K, self.listed.expected_K]
        if self.seen is not None:
            more += [self.seen.query_S, self.seen.item_S]
        if self.time_B is not None:
            more.append(self.time_B)
        for value in (*self.dense.values(), self.item_N, self.positive_B, self.weight_B, *more):
            value.record_stream(stream)


def id_keys(config: DataConfig) -> list[str]:
    """Return the keys of the KeyedJaggedTensor, in order."""
    return [f"{t}.{f.name}" for t, f in config.features() if f.kind in ID_KINDS]


class BatchBuilder:
    """Gathers the columns of a prepared dataset into batches, with no per-row Python.

    Args:
        data: the prepared dataset.
        outcomes: columns of `data.columns.outcomes` that batches of events hold.
        seen: whether batches of events and of histories hold what users had taken before.
    """

    def __init__(
        self, data: PreparedDataset, outcomes: Sequence[str] = (), seen: bool = False
    ) -> None:
        self.data, self.seen = data, seen
        self.outcomes = [data.outcome(name) for name in outcomes]
        self.config = data.config
        self._ids: dict[str, Column] = {}
        self._dense: dict[str, Array] = {}
        self._code_rows: dict[str, npt.NDArray[np.int64]] = {}
        self._normalisers: dict[str, Normaliser] = {}
        for tower, f in self.config.features():
            key = f"{tower}.{f.name}"
            if f.kind == "history":
                continue
            if f.source == "interactions":
                self._add_context(key, f)
                continue
            table = data.items if tower == "item" else data.users
            column = one_chunk(table[f"feature.{f.name}"])
            if f.kind in ID_KINDS:
                self._ids[key] = id_column(column)
            else:
                self._dense[key] = dense(column)

    def _add_context(self, key: str, f: Feature) -> None:
        column = one_chunk(self.data.events[f"context.{f.name}"])
        if f.kind in ID_KINDS:
            self._ids[key] = id_column(column)
            self._code_rows[key] = array(self.data.context(f.name), "feature")
        else:
            self._dense[key] = dense(column)
            if f.kind == "number":
                self._normalisers[key] = self.data.encoder.normalisers[key]

    def events(
        self, rows: I64, size: int | None = None, *, extra: I64 | None = None, own: bool = True
    ) -> Batch:
        """Return both towers' features of events.

        Args:
            rows: of the events.
            size: queries of the batch; those behind the events are fillers.
            extra: further catalogue rows, -1 for fillers, behind the events' own.
            own: whether the events' items are items of the batch. Where they are not, `positive_B`
                holds their catalogue rows.
        """
        c, fillers = self.data.event_columns, (size or len(rows)) - len(rows)
        user, item = c["user"][rows].astype(np.int64), c["item"][rows].astype(np.int64)
        weight = c["weight"][rows] if "weight" in c else np.ones(len(rows), np.float32)
        end = c["history_to"][rows] if self.config.ordered else self.data.train_end[user]
        bags, columns, entries = self._query(user, rows, end)
        if not self.config.ordered:
            self._leave_out_own(bags, entries, user, item, end)
        columns = {key: _behind(value, fillers) for key, value in columns.items()}
        items = [_behind(item, fillers, -1)] if own else []
        items += [extra] if extra is not None else []
        positive = np.arange(len(rows) + fillers) if own else _behind(item, fillers)
        batch = self._batch(
            bags, columns, np.concatenate(items), positive, _behind(weight, fillers),
            entries=entries,
        )  # fmt: skip
        if self.outcomes:
            known = torch.from_numpy(np.stack([of[rows] for of in self.outcomes], axis=1))
            batch.outcome_BH = F.pad(known, (0, 0, 0, fillers), value=torch.nan)
        if self.seen:
            batch.seen = self._seen(user, end)
        return batch

    def histories(
        self, user: I64, part: tuple[I64, I64], entries: Entries, items: I64, positive: I64
    ) -> Batch:
        """Return users' histories, of which every entry is a query.

        Args:
            user: of each history (H,), at most as many as `entries.histories`; others are empty.
            part: where each begins and ends in the timeline.
            entries: which the queries are.
            items: catalogue rows (N,), -1 for fillers.
            positive: places of the queries' positives (B,).
        """
        bags, columns, taken = self._query(user, user, part[1], part[0])
        more = entries.histories - len(user)
        columns = {key: _behind(value, more) for key, value in columns.items()}
        weight = np.ones(len(positive), np.float32)
        batch = self._batch(bags, columns, items, positive, weight, entries.histories, taken)
        if self.seen:
            # An entry is taken before what it predicts, and so are those before it.
            lengths = part[1] - part[0]
            before = np.cumsum(lengths) - lengths
            entry = np.arange(lengths.sum()) + np.repeat(part[0] - before, lengths)
            batch.seen = self._seen(np.repeat(user, lengths), entry + 1)
        return replace(batch, entries=entries)

    def _seen(self, user: I64, end: I64) -> Seen:
        """Return what users had taken before places of the timeline."""
        items, lengths = gather(self.data.timeline, self.data.history_from[user], end)
        query = np.repeat(np.arange(len(user)), lengths)
        return Seen(torch.from_numpy(query), torch.from_numpy(items.astype(np.int64)))

    def queries(self, rows: I64) -> Batch:
        """Return the query tower's features of the events at `rows` (B,)."""
        c = self.data.event_columns
        user = c["user"][rows].astype(np.int64)
        bags, columns, entries = self._query(user, rows, c["history_to"][rows])
        none, ones = np.empty(0, np.int64), np.ones(len(rows), np.float32)
        return self._batch(bags, columns, none, weight=ones, entries=entries)

    def requests(self, tower: str, rows: list[dict[str, Any]]) -> Batch:
        """Return raw features of one tower, one dictionary a row, as its request carries them."""
        raw = self.data.encoder.encode_rows(self.config, tower, rows)
        bags: dict[str, Bag] = {}
        columns: dict[str, Array] = {}
        entries: dict[str, I64] = {}
        for f in (f for t, f in self.config.features() if t == tower):
            key = f"{tower}.{f.name}"
            if f.kind not in ID_KINDS:
                columns[key] = dense(raw[f.name])
                continue
            bags[key] = id_column(raw[f.name]).take(np.arange(len(rows)))
            if f.has_times:
                columns[f"{tower}.{f.times_name}"] = dense(raw[f.times_name])
            if f.item_features:
                ids = self.data.items["id"]
                taken = pa.array([i for row in rows for i in row[f.name]], ids.type)
                found = pc.fill_null(pc.index_in(taken, value_set=ids), -1)
                entries[key] = found.to_numpy(zero_copy_only=False).astype(np.int64)
        none, ones = np.empty(0, np.int64), np.ones(len(rows), np.float32)
        return self._batch(bags, columns, none, weight=ones, entries=entries)

    def items(self, rows: I64) -> Batch:
        """Return the item tower's features of the catalogue's `rows` (N,)."""
        return self._batch({}, {}, rows)

    def _query(
        self, user: I64, event: I64, history_to: I64, history_from: I64 | None = None
    ) -> tuple[dict[str, Bag], dict[str, Array], dict[str, I64]]:
        """Return ids, numbers and, of histories with item features, their entries' items."""
        bags: dict[str, Bag] = {}
        columns: dict[str, Array] = {}
        entries: dict[str, I64] = {}
        for f in self.config.query:
            key = f"query.{f.name}"
            if f.kind == "history":
                start = history_from
                if start is None:
                    start = np.maximum(self.data.history_from[user], history_to - f.length)
                bags[key] = gather(self.data.history_rows(f.table_name), start, history_to)
                if f.has_times:
                    seconds, lengths = gather(self.data.timeline_seconds, start, history_to)
                    times = self.data.encoder.entry_times(f, seconds, lengths)
                    columns[f"query.{f.times_name}"] = times
                if f.item_features:
                    entries[key], _ = gather(self.data.timeline, start, history_to)
                continue
            rows = event if f.source == "interactions" else user
            if key in self._ids:
                values, lengths = self._ids[key].take(rows)
                if key in self._code_rows:
                    values = self._code_rows[key][values]
                bags[key] = (values, lengths)
            else:
                values = self._dense[key][rows]
                norm = self._normalisers.get(key)
                columns[key] = values if norm is None else norm.apply(values)
        return bags, columns, entries

    def _leave_out_own(
        self, bags: dict[str, Bag], taken: dict[str, I64], user: I64, item: I64, end: I64
    ) -> None:
        """Remove each event's own item from the histories that end at `end` of the timeline."""
        for f in self.config.histories():
            start = np.maximum(self.data.history_from[user], end - f.length)
            entries, lengths = gather(self.data.timeline, start, end)
            owner = np.repeat(np.arange(len(user)), lengths)
            other = entries != item[owner]
            key = f"query.{f.name}"
            counts = np.bincount(owner[other], minlength=len(user))
            bags[key] = (bags[key][0][other], counts)
            if key in taken:
                taken[key] = taken[key][other]

    def _batch(
        self, bags: dict[str, Bag], columns: dict[str, Array], item: I64,
        positive: I64 | None = None, weight: Array | None = None, queries: int | None = None,
        entries: dict[str, I64] | None = None,
    ) -> Batch:  # fmt: skip
        """Return a batch of what queries look up, in as many rows as weights, and of items.

        Args:
            bags: of the queries.
            columns: of the queries.
            item: catalogue rows, -1 for none.
            positive: places among them.
            weight: of the queries.
            queries: their number, where there are no weights or more rows.
            entries: `query.<history>` -> catalogue rows of its entries, -1 for none, of those
                that bring item features.
        """
        if queries is None:
            queries = 0 if weight is None else len(weight)
        rows, items = len(item), None
        behind = np.empty(0, np.int64)
        if entries:
            # None, -1, is among them, so that empty histories have something to look up too.
            behind = np.unique(np.concatenate([[-1], *entries.values()]))
            places = {k: torch.from_numpy(np.searchsorted(behind, v)) for k, v in entries.items()}
            items = EntryItems(rows, len(behind), places)
            # As many rows on every rank, however many items its histories have.
            most = sum(queries * f.length for f in self.config.histories() if f.item_features)
            rows += min(most, len(self.data.items)) + 1
        brought = {name for f in self.config.histories() for name in f.item_features}
        for f in self.config.item if len(item) or len(behind) else ():
            key = f"item.{f.name}"
            wanted = item
            if len(behind):
                seen = behind if f.name in brought else np.full(len(behind), -1)
                wanted = np.concatenate([item, seen])
            place = np.flatnonzero(wanted >= 0)
            if key in self._ids:
                values, lengths = self._ids[key].take(wanted[place])
                bags[key] = (values, _spread(lengths, place, len(wanted)))
            else:
                columns[key] = _spread(self._dense[key][wanted[place]], place, len(wanted))
        batch = make_batch(
            self.config, bags, columns, max(rows, queries), item, positive, weight
        )  # fmt: skip
        batch.entry_items = items
        return batch


def _behind(values: Array, more: int, value: int = 0) -> Array:
    """Return the rows and `more` rows of a value behind them."""
    if not more:
        return values
    return np.concatenate([values, np.full((more, *values.shape[1:]), value, values.dtype)])


def _spread(values: Array, place: I64, rows: int) -> Array:
    """Return rows of zeros, of which those at `place` are the values."""
    if len(values) == rows:
        return values
    out = np.zeros((rows, *values.shape[1:]), values.dtype)
    out[place] = values
    return out


def make_batch(
    config: DataConfig,
    bags: dict[str, Bag],
    columns: dict[str, Array],
    rows: int,
    item: I64 | None = None,
    positive: I64 | None = None,
    weight: Array | None = None,
) -> Batch:
    """Assemble a batch.

    Args:
        config: names the keys and their order.
        bags: key -> (values, lengths) of the first rows; all that lack here are empty.
        columns: key -> (rows of its tower, width) float32.
        rows: of the batch.
        item: catalogue rows (N,), of no items by default.
        positive: places among them (B,), of no queries by default.
        weight: sample weights (B,).
    """
    parts = [bags.get(key, NO_BAG) for key in id_keys(config)]
    ids = KeyedJaggedTensor(
        keys=id_keys(config),
        values=torch.from_numpy(np.concatenate([v for v, _ in parts], dtype=np.int64)),
        lengths=torch.from_numpy(
            np.concatenate([_behind(n, rows - len(n)) for _, n in parts], dtype=np.int64)
        ),
        stride=rows,
    )
    tensors = {
        # A view of a mapped file is read-only, which torch does not know.
        k: torch.from_numpy(np.require(v, np.float32, ["C", "W"]))
        for k, v in columns.items()
    }
    numbers = (
        torch.from_numpy(np.ascontiguousarray(v if v is not None else NO_BAG[0]))
        for v in (item, positive)
    )
    weights = np.ones(0, np.float32) if weight is None else weight
    return Batch(ids, tensors, *numbers, torch.from_numpy(weights))
