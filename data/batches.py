"""Batches: rows of a prepared dataset as one KeyedJaggedTensor and dense columns.

Features of both towers share one KeyedJaggedTensor, with keys `query.<name>` and `item.<name>`, so
that tables shared by the towers are looked up once. A batch that holds one side only has empty
bags for the other.

Shape legend: `B` batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from twotower.data.encode import Normaliser, entry_ages
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
Bag = tuple[npt.NDArray[Any], I64]


@dataclass
class Batch(Pipelineable):
    """What a step reads.

    Attributes:
        ids: every id feature of both towers; stride B.
        dense: `<tower>.<name>` -> (B, width) float32, for numbers, vectors and, where a history
            has time gaps, the ages of its entries (see `twotower.data.encode.entry_ages`).
        item_B: catalogue row of the positive item.
        weight_B: sample weight.
    """

    ids: KeyedJaggedTensor
    dense: dict[str, Tensor]
    item_B: Tensor
    weight_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Return the batch on another device."""
        return Batch(
            self.ids.to(device, non_blocking),
            {k: v.to(device, non_blocking=non_blocking) for k, v in self.dense.items()},
            self.item_B.to(device, non_blocking=non_blocking),
            self.weight_B.to(device, non_blocking=non_blocking),
        )

    def padded(self, size: int) -> Batch:
        """Return the batch with fillers up to `size` rows: no ids, item -1, weight 0."""
        more = size - len(self.item_B)
        lengths = self.ids.lengths().view(len(self.ids.keys()), len(self.item_B))
        ids = KeyedJaggedTensor(
            keys=self.ids.keys(),
            values=self.ids.values(),
            lengths=nn.functional.pad(lengths, (0, more)).reshape(-1),
            stride=size,
        )
        return Batch(
            ids,
            {k: nn.functional.pad(v, (0, 0, 0, more)) for k, v in self.dense.items()},
            nn.functional.pad(self.item_B, (0, more), value=-1),
            nn.functional.pad(self.weight_B, (0, more)),
        )

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, for asynchronous copies to a GPU."""
        return Batch(
            self.ids.pin_memory(),
            {k: v.pin_memory() for k, v in self.dense.items()},
            self.item_B.pin_memory(),
            self.weight_B.pin_memory(),
        )

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until `stream` is done with it."""
        self.ids.record_stream(stream)
        for value in (*self.dense.values(), self.item_B, self.weight_B):
            value.record_stream(stream)


def id_keys(config: DataConfig) -> list[str]:
    """Return the keys of the KeyedJaggedTensor, in order."""
    return [f"{t}.{f.name}" for t, f in config.features() if f.kind in ID_KINDS]


class BatchBuilder:
    """Gathers the columns of a prepared dataset into batches, with no per-row Python."""

    def __init__(self, data: PreparedDataset) -> None:
        self.data = data
        self.config = data.config
        self._ids: dict[str, Column] = {}
        self._dense: dict[str, npt.NDArray[Any]] = {}
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

    def events(self, rows: I64) -> Batch:
        """Return both towers' features of the events at `rows` (B,)."""
        c = self.data.event_columns
        user, item = c["user"][rows].astype(np.int64), c["item"][rows].astype(np.int64)
        bags, columns = self._query(user, rows, c["history_to"][rows])
        item_bags, item_columns = self._item(item)
        weight = c["weight"][rows] if "weight" in c else None
        return self._batch(bags | item_bags, columns | item_columns, item, weight)

    def queries(self, rows: I64) -> Batch:
        """Return the query tower's features of the events at `rows` (B,)."""
        c = self.data.event_columns
        user = c["user"][rows].astype(np.int64)
        bags, columns = self._query(user, rows, c["history_to"][rows])
        return self._batch(bags, columns, c["item"][rows].astype(np.int64))

    def items(self, rows: I64) -> Batch:
        """Return the item tower's features of the catalogue's `rows` (B,)."""
        bags, columns = self._item(rows)
        return self._batch(bags, columns, rows)

    def _query(
        self, user: I64, event: I64, history_to: I64
    ) -> tuple[dict[str, Bag], dict[str, npt.NDArray[Any]]]:
        bags: dict[str, Bag] = {}
        columns: dict[str, npt.NDArray[Any]] = {}
        for f in self.config.query:
            key = f"query.{f.name}"
            if f.kind == "history":
                start = np.maximum(self.data.history_from[user], history_to - f.length)
                bags[key] = gather(self.data.history_rows(f.table_name), start, history_to)
                if f.time_gaps:
                    seconds, lengths = gather(self.data.timeline_seconds, start, history_to)
                    columns[f"query.{f.times_name}"] = entry_ages(seconds, lengths, f.length)
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
        return bags, columns

    def _item(self, rows: I64) -> tuple[dict[str, Bag], dict[str, npt.NDArray[Any]]]:
        keys = [f"item.{f.name}" for f in self.config.item]
        bags = {k: self._ids[k].take(rows) for k in keys if k in self._ids}
        return bags, {k: self._dense[k][rows] for k in keys if k in self._dense}

    def _batch(
        self,
        bags: dict[str, Bag],
        columns: dict[str, npt.NDArray[Any]],
        item: I64,
        weight: npt.NDArray[np.float32] | None = None,
    ) -> Batch:
        return make_batch(self.config, bags, columns, item, weight)


def make_batch(
    config: DataConfig,
    bags: dict[str, Bag],
    columns: dict[str, npt.NDArray[Any]],
    item: I64,
    weight: npt.NDArray[np.float32] | None = None,
) -> Batch:
    """Assemble a batch; id features that `bags` lacks get empty bags.

    Args:
        config: names the keys and their order.
        bags: key -> (values, lengths (B,)).
        columns: key -> (B, width) float32.
        item: catalogue rows (B,).
        weight: sample weights (B,), 1 by default.
    """
    size = len(item)
    nothing: Bag = (np.empty(0, np.int64), np.zeros(size, np.int64))
    keys = id_keys(config)
    parts = [bags.get(key, nothing) for key in keys]
    ids = KeyedJaggedTensor(
        keys=keys,
        values=torch.from_numpy(np.concatenate([v for v, _ in parts], dtype=np.int64)),
        lengths=torch.from_numpy(np.concatenate([n for _, n in parts], dtype=np.int64)),
        stride=size,
    )
    tensors = {
        # A view of a mapped file is read-only, which torch does not know.
        k: torch.from_numpy(np.require(v, np.float32, ["C", "W"]))
        for k, v in columns.items()
    }
    ones = np.ones(size, np.float32) if weight is None else weight
    item_B = torch.from_numpy(np.ascontiguousarray(item))
    return Batch(ids, tensors, item_B, torch.from_numpy(ones))


def encoded_batch(config: DataConfig, tower: str, columns: dict[str, pa.Array]) -> Batch:
    """Return a batch of rows that `Encoder.encode_rows` encoded, for one tower."""
    bags: dict[str, Bag] = {}
    floats: dict[str, npt.NDArray[Any]] = {}
    size = 0
    for t, f in config.features():
        if t != tower:
            continue
        column, size = columns[f.name], len(columns[f.name])
        if f.kind in ID_KINDS:
            bags[f"{t}.{f.name}"] = id_column(column).take(np.arange(size))
            if f.time_gaps:
                floats[f"{t}.{f.times_name}"] = dense(columns[f.times_name])
        else:
            floats[f"{t}.{f.name}"] = dense(column)
    return make_batch(config, bags, floats, np.zeros(size, np.int64))
