"""Two towers over TorchRec tables that they may share.

Tables whose features are all pooled by a sum or mean live in an EmbeddingBagCollection; a table
that a feature needs entry by entry (attention) lives in an EmbeddingCollection. The collections
span both towers, so a table shared by `history` and the item's id exists once.

Shape legend: `B` batch, `L` entries of a list, `D` embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import (
    DataType,
    EmbeddingBagConfig,
    EmbeddingConfig,
    PoolingType,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from twotower.data.batches import Batch
from twotower.data.schema import ID_KINDS, DataConfig, Feature
from twotower.towers.config import ModelConfig
from twotower.towers.tower import Tower

# torch refuses modules named like its own attributes, `type` for instance.
PREFIX = "table_"


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
        listed = {f.table_name for _, f in id_features if f.pooling == "attention"}
        bags, lists = [], []
        for name, rows in table_rows.items():
            keys = [f"{t}.{f.name}" for t, f in id_features if f.table_name == name]
            # A vector of unit length, whatever the table's size, keeps small tables comparable.
            bound = (3 / config.dim) ** 0.5
            common: dict[str, Any] = {
                "name": PREFIX + name, "embedding_dim": config.dim, "num_embeddings": rows,
                "feature_names": keys, "weight_init_min": -bound, "weight_init_max": bound,
                "data_type": table_type,
            }  # fmt: skip
            if name in listed:
                lists.append(EmbeddingConfig(**common))
            else:
                bags.append(EmbeddingBagConfig(**common, pooling=PoolingType.SUM))
        device = torch.device(table_device)
        self.bags = EmbeddingBagCollection(tables=bags, device=device) if bags else None
        self.lists = EmbeddingCollection(tables=lists, device=device) if lists else None
        self.bag_keys = [k for t in bags for k in t.feature_names]
        self.list_keys = [k for t in lists for k in t.feature_names]
        self.query = Tower(data.query, config)
        self.item = Tower(data.item, config)
        log_temperature = torch.tensor(config.temperature).log()
        self.log_temperature = nn.Parameter(log_temperature, requires_grad=config.learn_temperature)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the query vectors (B, D), the item vectors (B, D) and the temperature."""
        bags, lists = self._look_up(batch)
        query_BD = self._run(self.query, "query", batch, bags, lists)
        item_BD = self._run(self.item, "item", batch, bags, lists)
        return query_BD, item_BD, self.log_temperature.exp()

    def table_configs(self) -> dict[str, Any]:
        """Return TorchRec's name of each embedding table -> its configuration."""
        bags = self.bags.embedding_bag_configs() if self.bags is not None else []
        lists = self.lists.embedding_configs() if self.lists is not None else []
        return {table.name: table for table in (*bags, *lists)}

    def table_names(self) -> list[str]:
        """Return the names of the embedding tables as TorchRec knows them."""
        return list(self.table_configs())

    def table_parameters(self) -> list[nn.Parameter]:
        """Return the embedding tables' weights."""
        found = [m.parameters() for m in (self.bags, self.lists) if m is not None]
        return [parameter for parameters in found for parameter in parameters]

    def table_weight(self, name: str) -> nn.Parameter:
        """Return the weights (rows, D) of the schema's table `name`, when it is not sharded."""
        for tables in (
            self.bags.embedding_bags if self.bags is not None else {},
            self.lists.embeddings if self.lists is not None else {},
        ):
            if PREFIX + name in tables:
                weight: nn.Parameter = tables[PREFIX + name].weight
                return weight
        raise KeyError(name)

    def query_vectors(self, batch: Batch) -> Tensor:
        """Return the query vectors (B, D)."""
        return self._run(self.query, "query", batch, *self._look_up(batch))

    def item_vectors(self, batch: Batch) -> Tensor:
        """Return the item vectors (B, D)."""
        return self._run(self.item, "item", batch, *self._look_up(batch))

    def _look_up(self, batch: Batch) -> tuple[Any, Any]:
        bags = self.bags(batch.ids) if self.bags is not None else None
        lists = self.lists(batch.ids) if self.lists is not None else None
        return bags, lists

    def _run(self, tower: Tower, side: str, batch: Batch, bags: Any, lists: Any) -> Tensor:
        inputs: dict[str, Tensor] = {}
        for f in tower.features:
            key = f"{side}.{f.name}"
            if key in batch.dense:
                inputs[f.name] = batch.dense[key]
            elif key in self.bag_keys:
                length_B = batch.ids[key].lengths()
                inputs[f.name] = tower.pool_sum(f, bags[key], length_B)
            else:
                inputs[f.name] = tower.pool(f, *_padded(lists[key], f))
        vector_BD: Tensor = tower(inputs)
        return vector_BD


def _padded(entries: Any, feature: Feature) -> tuple[Tensor, Tensor]:
    """Return a JaggedTensor's entries (B, L, D) and which of them exist (B, L)."""
    length = feature.length if feature.kind in ("ids", "history") else 1
    entry_BLD = entries.to_padded_dense(length)
    place_L = torch.arange(length, device=entry_BLD.device)
    return entry_BLD, place_L[None, :] < entries.lengths()[:, None]
