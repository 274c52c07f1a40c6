"""Two towers over TorchRec tables that they may share.

Tables whose features are all pooled by a sum or mean live in an EmbeddingBagCollection; a table
that a feature needs entry by entry (attention, an encoder) lives in an EmbeddingCollection. Tables
with dynamic ids have a collection of either kind to themselves (`twotower.towers.dynamic_tables`).
Collections span both towers, so a table shared by `history` and the item's id exists once.

Shape legend: `B` queries, `N` items, `L` entries of a list, `D` embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor

from twotower.data.batches import Batch, Entries
from twotower.data.schema import ID_KINDS, DataConfig, Feature, is_own_id
from twotower.towers.config import ModelConfig
from twotower.towers.dynamic import DynamicSlots
from twotower.towers.dynamic_tables import DynamicBags, DynamicLists, plain_tables
from twotower.towers.tower import EntryFeatures, Tower

# torch refuses modules named like its own attributes, `type` for instance.
PREFIX = "table_"
COLLECTIONS = ("bags", "lists", "dynamic_bags", "dynamic_lists")


class Vectors(NamedTuple):
    """What the towers make of a batch.

    Attributes:
        query_BD: the query vectors.
        item_ND: the item vectors.
        temperature: what their inner products are divided by.
        own_ND: the embedding of each item's own id; None where the item tower has none.
    """

    query_BD: Tensor
    item_ND: Tensor
    temperature: Tensor
    own_ND: Tensor | None


class TwoTower(nn.Module):
    """The query tower, the item tower and their tables.

    Args:
        data: the schema.
        table_rows: rows of each embedding table.
        config: shape of the towers.
        table_device: of the tables' weights; "meta" where they are made shard by shard.
        table_type: of the tables' weights.
    """

    def __init__(
        self,
        data: DataConfig,
        table_rows: Mapping[str, int],
        config: ModelConfig,
        *,
        table_device: str = "cpu",
        table_type: DataType = DataType.FP32,
    ) -> None:
        super().__init__()
        # TorchRec asks at every look-up whether it is being traced, and torch warns of the asking.
        logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
        self.data = data
        id_features = [(t, f) for t, f in data.features() if f.kind in ID_KINDS]
        listed = {
            f.table_name for _, f in id_features
            if f.pooling not in ("mean", "sum") or f.item_features
        }  # fmt: skip
        tables: dict[str, list[Any]] = {kind: [] for kind in COLLECTIONS}
        for name, rows in table_rows.items():
            keys = [f"{t}.{f.name}" for t, f in id_features if f.table_name == name]
            # A vector of unit length, whatever the table's size, keeps small tables comparable.
            bound = (3 / config.dim) ** 0.5
            common: dict[str, Any] = {
                "name": PREFIX + name, "embedding_dim": config.dim, "num_embeddings": rows,
                "feature_names": keys, "weight_init_min": -bound, "weight_init_max": bound,
                "data_type": table_type,
            }  # fmt: skip
            dynamic = "dynamic_" if data.table(name).slots is not None else ""
            if name in listed:
                tables[f"{dynamic}lists"].append(EmbeddingConfig(**common))
            else:
                bag = EmbeddingBagConfig(**common, pooling=PoolingType.SUM)
                tables[f"{dynamic}bags"].append(bag)
        device = torch.device(table_device)
        bags, lists = tables["bags"], tables["lists"]
        self.bags = EmbeddingBagCollection(tables=bags, device=device) if bags else None
        self.lists = EmbeddingCollection(tables=lists, device=device) if lists else None
        settings = {PREFIX + name: data.table(name) for name in table_rows}
        bags, lists = tables["dynamic_bags"], tables["dynamic_lists"]
        self.dynamic_bags = DynamicBags(bags, settings, device) if bags else None
        self.dynamic_lists = DynamicLists(lists, settings, device) if lists else None
        self.collection_of = {
            k: kind for kind in tables for t in tables[kind] for k in t.feature_names
        }
        self.dim, self.widths, self.item_bias = config.dim, config.widths, config.item_bias
        own = [f.name for f in data.item if is_own_id(data, "item", f)]
        self.own_id = own[0] if own else None
        self.query = Tower(data.query, config)
        self.item = Tower(data.item, config, is_item=True)
        self.entry_features = nn.ModuleDict({
            f"of_{f.name}": EntryFeatures(data.entry_features(f), config.dim)
            for f in data.histories() if f.item_features
        })  # fmt: skip
        log_temperature = torch.tensor(config.temperature).log()
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=config.learn_temperature)

    def forward(self, batch: Batch) -> Vectors:
        """Return the vectors of a training batch."""
        found = self._look_up(batch)
        if batch.entries is None:
            query_BD = self._run(self.query, "query", batch, found, len(batch.weight_B))
        else:
            query_BD = self._run_at_entries(batch, found, batch.entries)
        inputs = self._inputs(self.item, "item", batch, found, len(batch.item_N))
        own_ND = inputs[self.own_id] if self.own_id is not None else None
        return Vectors(query_BD, self.item(inputs), self.log_temperature.exp(), own_ND)

    def collections(self) -> dict[str, Any]:
        """Return the collections of tables that there are, of `COLLECTIONS`."""
        found = {kind: getattr(self, kind) for kind in COLLECTIONS}
        return {kind: module for kind, module in found.items() if module is not None}

    def table_configs(self) -> dict[str, Any]:
        """Return TorchRec's name of each table -> its configuration, when they are not sharded."""
        found: list[Any] = []
        for kind, module in self.collections().items():
            tables = plain_tables(module)
            bags = kind.endswith("bags")
            found += tables.embedding_bag_configs() if bags else tables.embedding_configs()
        return {table.name: table for table in found}

    def table_names(self) -> list[str]:
        """Return the names of the embedding tables as TorchRec knows them."""
        return list(self.table_configs())

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the embedding tables' weights."""
        return [p for module in self.collections().values() for p in module.parameters()]

    def table_weight(self, name: str) -> nn.Parameter:
        """Return the weights (rows, D) of the schema's table `name`, when it is not sharded."""
        for kind, module in self.collections().items():
            tables = plain_tables(module)
            modules = tables.embedding_bags if kind.endswith("bags") else tables.embeddings
            if PREFIX + name in modules:
                weight: nn.Parameter = modules[PREFIX + name].weight
                return weight
        raise KeyError(name)

    def dynamic_slots(self, name: str) -> DynamicSlots:
        """Return which keys the rows of the schema's table `name` have, when it is not sharded."""
        for module in (self.dynamic_bags, self.dynamic_lists):
            if module is not None and PREFIX + name in (found := module.slots()):
                slots: DynamicSlots = found[PREFIX + name]
                return slots
        raise KeyError(name)

    def query_vectors(self, batch: Batch) -> Tensor:
        """Return the query vectors (B, D)."""
        return self._run(self.query, "query", batch, self._look_up(batch), len(batch.weight_B))

    def item_vectors(self, batch: Batch) -> Tensor:
        """Return the item vectors (B, D)."""
        return self._run(self.item, "item", batch, self._look_up(batch))

    def entry_vectors(self, history: str, batch: Batch) -> Tensor:
        """Return what each item (N, D) adds to an entry of a history with item features."""
        return self._entry_vectors(history, batch, self._look_up(batch), 0, len(batch.item_N))

    def _entry_vectors(
        self, history: str, batch: Batch, found: dict[str, Any], first: int, count: int
    ) -> Tensor:
        """Return what items add to entries, of `count` rows of items from `first`."""
        features: Any = self.entry_features[f"of_{history}"]
        vector_ND: Tensor = features({
            f.name: self._input(self.item, f, f"item.{f.name}", batch, found, first + count)[first:]
            for f in features.features
        })  # fmt: skip
        return vector_ND

    def _entries(
        self, f: Feature, key: str, batch: Batch, found: dict[str, Any], rows: int | None,
        length: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the embeddings of a feature's entries (B, L, D) and which of them there are."""
        entries = found[self.collection_of[key]][key]
        value_TD = entries.values()
        if (items := batch.entry_items) is not None and key in items.place_T:
            known_ND = self._entry_vectors(f.name, batch, found, items.first, items.count)
            # A history's rows come first, and all others are empty.
            value_TD = value_TD + F.embedding(items.place_T[key], known_ND)
        return _padded(value_TD, entries.lengths()[:rows], length)

    def _look_up(self, batch: Batch) -> dict[str, Any]:
        """Return what each collection holds for the batch."""
        found = {kind: module(batch.ids) for kind, module in self.collections().items()}
        # Those of dynamic ids return a pair, whose second is nothing.
        return {k: v[0] if k.startswith("dynamic_") else v for k, v in found.items()}

    def _run(
        self, tower: Tower, side: str, batch: Batch, found: dict[str, Any], rows: int | None = None
    ) -> Tensor:
        """Return the vectors of a tower's first rows, of all by default."""
        vector_BD: Tensor = tower(self._inputs(tower, side, batch, found, rows))
        return vector_BD

    def _inputs(
        self, tower: Tower, side: str, batch: Batch, found: dict[str, Any], rows: int | None
    ) -> dict[str, Tensor]:
        """Return what enters a tower, of its first rows."""
        return {
            f.name: self._input(tower, f, f"{side}.{f.name}", batch, found, rows)
            for f in tower.features
        }

    def _run_at_entries(self, batch: Batch, found: dict[str, Any], entries: Entries) -> Tensor:
        """Return the vectors (B, D) of queries that are entries of histories."""
        rows, longest = entries.histories, entries.longest
        inputs: dict[str, Tensor] = {}
        for f in self.query.features:
            key = f"query.{f.name}"
            if f.is_causal:
                entry_HLD, mask_HL = self._entries(f, key, batch, found, rows, longest)
                time_HL = batch.dense.get(f"query.{f.times_name}")
                state_HLD = self.query.states(
                    f, entry_HLD, mask_HL,
                    time_HL[:rows, :longest] if time_HL is not None else None,
                )  # fmt: skip
                inputs[f.name] = state_HLD.flatten(0, 1)[entries.place_B]
            else:
                of_user = self._input(self.query, f, key, batch, found, rows)
                inputs[f.name] = of_user[entries.place_B // longest]
        vector_BD: Tensor = self.query(inputs)
        return vector_BD

    def _input(
        self, tower: Tower, f: Feature, key: str, batch: Batch, found: dict[str, Any],
        rows: int | None,
    ) -> Tensor:  # fmt: skip
        """Return a feature's values, or its pooled embedding, of the first rows."""
        if key in batch.dense:
            return batch.dense[key][:rows]
        kind = self.collection_of[key]
        if kind.endswith("bags"):
            length_B = batch.ids[key].lengths()[:rows]
            return tower.pool_sum(f, found[kind][key][:rows], length_B)
        length = f.length if f.kind in ("ids", "history") else 1
        entry_BLD, mask_BL = self._entries(f, key, batch, found, rows, length)
        time_BL = batch.dense.get(key.removesuffix(f.name) + f.times_name)
        time_BL = time_BL[:rows] if time_BL is not None else None
        return tower.pool(f, entry_BLD, mask_BL, time_BL)


def _padded(value_TD: Tensor, length_B: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Return the entries of the first lists in rows (B, L, D) and which of them exist (B, L)."""
    entry_BLD = JaggedTensor(values=value_TD, lengths=length_B).to_padded_dense(longest)
    place_L = torch.arange(longest, device=entry_BLD.device)
    return entry_BLD, place_L[None, :] < length_B[:, None]
