"""Which rows of embedding tables a bundle keeps: those that a request can reach.

Without `export.prune_vocab` all. With it, a row stays if it is one for unseen ids, or if its id is
one that the prepared dataset has of an item, a user or a context. An id that it does not have stays
too where a query can name it and training saw it. So out of a bundle are left:

- of a table of item features alone, ids that no item of the catalogue has. Item vectors are
  computed before, so no answer changes;
- of other tables, ids that training never saw and the dataset does not have, for instance pinned
  ones: their rows are as training began. A request that names one gets what unseen ids get;
- of a table with dynamic ids, slots that no id has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from twotower.data.encode import Encoder
from twotower.data.prepared import PreparedDataset, array, one_chunk
from twotower.data.schema import ID_KINDS, Feature
from twotower.data.vocabulary import Vocabulary
from twotower.towers.dynamic import DynamicSlots
from twotower.towers.two_tower import TwoTower

I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Kept:
    """Rows of tables that stay.

    Attributes:
        rows: table -> rows, ascending; a table that loses none is not in it.
        pruned: table -> how many rows it loses, of those that lose some.
        pruned_bytes: of these rows.
    """

    rows: Mapping[str, I64]
    pruned: dict[str, int]
    pruned_bytes: int

    def encoder(self, encoder: Encoder) -> Encoder:
        """Return an encoder to the rows of the tables that stay, in their order."""
        vocabularies = dict(encoder.vocabularies)
        for name, rows in self.rows.items():
            vocabulary = vocabularies[name]
            if isinstance(vocabulary, Vocabulary):
                first = vocabulary.oov_rows
                keys = pa.array(rows[rows >= first] - first)
                vocabularies[name] = replace(
                    vocabulary, keys=vocabulary.keys.take(keys), counts=vocabulary.counts.take(keys)
                )
        return replace(encoder, vocabularies=vocabularies)


EVERY_ROW = Kept({}, {}, 0)


def kept_rows(model: TwoTower, data: PreparedDataset) -> Kept:
    """Return which rows of the tables a request can reach."""
    rows: dict[str, I64] = {}
    pruned: dict[str, int] = {}
    size = 0
    for name, vocabulary in data.encoder.vocabularies.items():
        weight = model.table_weight(name)
        if isinstance(vocabulary, Vocabulary):
            keep = _known(name, vocabulary, data)
        else:
            keep = _taken(model.dynamic_slots(name))
        if not keep.all():
            rows[name] = np.flatnonzero(keep)
            pruned[name] = len(keep) - len(rows[name])
            size += pruned[name] * weight[0].nbytes
    return Kept(rows, pruned, size)


def _known(name: str, vocabulary: Vocabulary, data: PreparedDataset) -> Mask:
    features = [
        (tower, f) for tower, f in data.config.features()
        if f.kind in ID_KINDS and f.table_name == name
    ]  # fmt: skip
    keep = np.zeros(vocabulary.rows, np.bool_)
    keep[: vocabulary.oov_rows] = True
    for tower, f in features:
        found = _rows_of(tower, f, data)
        keep[found[found >= 0]] = True
    if any(tower == "query" for tower, _ in features):
        keep[vocabulary.oov_rows :] |= vocabulary.counts.to_numpy() > 0
    return keep


def _rows_of(tower: str, f: Feature, data: PreparedDataset) -> npt.NDArray[Any]:
    """Return the rows of all ids that a dataset has of a feature, -1 for none."""
    if f.kind == "history":
        return data.history_rows(f.table_name)
    if f.source == "interactions":
        return array(data.context(f.name), "feature")
    column = one_chunk((data.items if tower == "item" else data.users)[f"feature.{f.name}"])
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = column.flatten()
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _taken(slots: DynamicSlots) -> Mask:
    """Return which slots an id has, or all that have none share."""
    keep = np.zeros(slots.parts * slots.part_slots, np.bool_)
    keep[slots.assigned()[1].numpy()] = True
    keep[slots.part_slots - 1 :: slots.part_slots] = True
    return keep
