"""Collections of embedding tables with dynamic ids, unsharded and sharded.

They are TorchRec's managed-collision collections, but for what becomes of a row that changes its
id: TorchRec leaves it as it is unsharded, and sharded calls an operator that FBGEMM has for CUDA
alone. Here it begins anew before it is looked up, weights and optimizer state, on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.mc_embedding import (
    ManagedCollisionEmbeddingCollectionSharder,
    ShardedManagedCollisionEmbeddingCollection,
)
from torchrec.distributed.mc_embeddingbag import (
    ManagedCollisionEmbeddingBagCollectionSharder,
    ShardedManagedCollisionEmbeddingBagCollection,
)
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.modules.mc_embedding_modules import (
    ManagedCollisionEmbeddingBagCollection,
    ManagedCollisionEmbeddingCollection,
)
from torchrec.modules.mc_modules import ManagedCollisionCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from twotower.data.table import Table
from twotower.towers.dynamic import DynamicSlots, reset_rows


class _ResetsRows:
    """Looks up slots, of which those with a new id begin anew; its optimizer keeps their state."""

    def slots(self: Any) -> dict[str, DynamicSlots]:
        """Return which keys the rows have, by table."""
        return dict(self._managed_collision_collection._managed_collision_modules.items())

    def forward(self: Any, features: KeyedJaggedTensor, mutate_miss_lengths: bool = True) -> Any:
        """Return what the tables hold for the keys, and None."""
        collisions = self._managed_collision_collection
        slots = collisions(features)
        for name, rows in collisions.evict().items():
            if rows is not None:
                reset_rows(self.weight(name), [], rows, self.slots()[name].admitted_keys)
        return self._embedding_module(slots), None


class DynamicBags(_ResetsRows, ManagedCollisionEmbeddingBagCollection):
    """Tables with dynamic ids whose features are pooled by a sum.

    Args:
        tables: of the collection.
        settings: of each, by its name; with slots.
        device: of weights and state.
    """

    def __init__(
        self, tables: list[EmbeddingBagConfig], settings: dict[str, Table], device: torch.device
    ) -> None:
        slots = {t.name: DynamicSlots(settings[t.name], device) for t in tables}
        super().__init__(
            EmbeddingBagCollection(tables=tables, device=device),
            ManagedCollisionCollection(slots, tables),
        )

    def weight(self, name: str) -> Tensor:
        """Return a table's weights."""
        weight: Tensor = self._embedding_module.embedding_bags[name].weight
        return weight


class DynamicLists(_ResetsRows, ManagedCollisionEmbeddingCollection):
    """Tables with dynamic ids that a feature needs entry by entry; see `DynamicBags`."""

    def __init__(
        self, tables: list[EmbeddingConfig], settings: dict[str, Table], device: torch.device
    ) -> None:
        slots = {t.name: DynamicSlots(settings[t.name], device) for t in tables}
        super().__init__(
            EmbeddingCollection(tables=tables, device=device),
            ManagedCollisionCollection(slots, tables),
        )

    def weight(self, name: str) -> Tensor:
        """Return a table's weights."""
        weight: Tensor = self._embedding_module.embeddings[name].weight
        return weight


class _ShardedResetsRows:
    """Resets weights and optimizer state of this rank's slots that have a new id."""

    def _evict(self: Any, evictions_per_table: dict[str, Tensor | None]) -> None:
        modules = self._managed_collision_collection._managed_collision_modules
        for name, rows in evictions_per_table.items():
            if rows is not None:
                tables, index = self._table_to_tbe_and_index[name]
                weight = tables.split_embedding_weights()[int(index)]
                states = tables.split_optimizer_states()
                own = states[int(index)] if states else ()
                reset_rows(weight, own, rows, modules[name].admitted_keys)


class _ShardedBags(_ShardedResetsRows, ShardedManagedCollisionEmbeddingBagCollection):
    pass


class _ShardedLists(_ShardedResetsRows, ShardedManagedCollisionEmbeddingCollection):
    pass


def plain_tables(collection: Any) -> Any:
    """Return a collection of tables without what maps ids to its rows."""
    if isinstance(collection, DynamicBags | DynamicLists):
        return collection._embedding_module
    return collection


# A cached row would be reset in the host's memory and go on as it was in the cache.
KERNELS = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.FUSED_UVM.value)


class _BagSharder(ManagedCollisionEmbeddingBagCollectionSharder):
    module_type = DynamicBags

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return list(KERNELS)

    def shard(
        self, module: DynamicBags, params: Any, env: Any, device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _ShardedBags:  # fmt: skip
        return _ShardedBags(
            module, params, ebc_sharder=self._e_sharder, mc_sharder=self._mc_sharder, env=env,
            device=device,
        )  # fmt: skip


class _ListSharder(ManagedCollisionEmbeddingCollectionSharder):
    module_type = DynamicLists

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        return list(KERNELS)

    def shard(
        self, module: DynamicLists, params: Any, env: Any, device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> _ShardedLists:  # fmt: skip
        return _ShardedLists(
            module, params, ec_sharder=self._e_sharder, mc_sharder=self._mc_sharder, env=env,
            device=device,
        )  # fmt: skip


def dynamic_sharders(
    bags: EmbeddingBagCollectionSharder, lists: EmbeddingCollectionSharder
) -> list[Any]:
    """Return what shards `DynamicBags` and `DynamicLists`: row-wise, by the kernels of `KERNELS`.

    The towers must be in training mode when they are sharded: otherwise TorchRec does not exchange
    the sizes of the ranks' shares.

    Args:
        bags: shards plain tables that are pooled, row-wise on a CPU too.
        lists: shards plain tables that are not.
    """
    return [_BagSharder(ebc_sharder=bags), _ListSharder(ec_sharder=lists)]
