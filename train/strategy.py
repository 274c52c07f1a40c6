"""A Lightning strategy over TorchRec's DistributedModelParallel.

The module's `model` is replaced by a DMP of it: tables go to fused lookups whose optimizer runs in
the backward pass, sharded by TorchRec's planner; dense parameters are replicated. One process is
the smallest case of the same code. Checkpoints are `torch.distributed.checkpoint` directories, so
they load at any world size.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ShardingType
from torchrec.optim.keyed import KeyedOptimizerWrapper

from twotower.files import atomic_directory

META = "lightning.pt"
# Data-parallel tables would fall to the dense optimizer, and column-wise ones keep a rowwise
# Adagrad state a shard, which does not reshard.
SHARDING = [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value]


class _BagSharder(EmbeddingBagCollectionSharder):
    """Offers row-wise sharding off CUDA too, where the stock sharder hides it."""

    def sharding_types(self, compute_device_type: str) -> list[str]:
        types: list[str] = super().sharding_types("cuda")
        return types


class TorchRecStrategy(DDPStrategy):
    """Trains `lightning_module.model` under DistributedModelParallel."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Shards exist only after `setup`."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` restores the optimizers itself."""
        return False

    def setup(self, trainer: Any) -> None:
        """Shard the model, then let the module configure its optimizers over the shards."""
        self.accelerator.setup(trainer)
        module = self.lightning_module
        if not isinstance(module.model, DistributedModelParallel):
            module.model = self._shard(module.model)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            _optimizers_to_device(self.optimizers, self.root_device)
        self.setup_precision_plugin()

    def _shard(self, model: Any) -> DistributedModelParallel:
        sharders: list[Any] = [_BagSharder(), EmbeddingCollectionSharder()]
        constraints = {
            name: ParameterConstraints(
                sharding_types=SHARDING, compute_kernels=[EmbeddingComputeKernel.FUSED.value]
            )
            for name in model.table_names()
        }
        topology = Topology(
            world_size=self.world_size,
            local_world_size=self.num_processes,
            compute_device=self.root_device.type,
        )
        planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
        # On every rank: `collective_plan` would hang the others when rank 0 raises.
        plan = planner.plan(model, sharders)
        return DistributedModelParallel(
            model, device=self.root_device, plan=plan, sharders=sharders
        )

    def configure_ddp(self) -> None:
        """Do nothing: DMP has wrapped the dense parameters already."""

    def teardown(self) -> None:
        """Destroy the process group: with gloo, leaving it to the interpreter's exit aborts."""
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return DMP's sharded state."""
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Do nothing: `load_checkpoint` did it."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Do nothing: `load_checkpoint` did it."""

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the state by parameter name, which is what resharding needs."""
        state: dict[str, Any] = _plain(optimizer).state_dict()
        return state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint directory, atomically."""
        path = Path(self.broadcast(str(filepath)))
        state = {"model": checkpoint.pop("state_dict")}
        for i, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            state[f"optimizer_{i}"] = optimizer
        with atomic_directory(path) as partial:
            save_state(state, checkpoint_id=partial)
            torch.save(checkpoint, partial / META)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """Load weights and optimizers into the live shards and return Lightning's own part."""
        path = Path(self.broadcast(str(checkpoint_path)))
        module = self.lightning_module
        for optimizer in self.optimizers:
            _make_states(optimizer)
        state: dict[str, Any] = {"model": module.state_dict()}
        for i, optimizer in enumerate(self.optimizers):
            state[f"optimizer_{i}"] = self.optimizer_state(optimizer)
        load_state(state, checkpoint_id=path)
        # DMP's parameters are not named as its state is, so only its own loader fits.
        prefix = "model."
        module.model.load_state_dict(
            {k[len(prefix) :]: v for k, v in state["model"].items() if k.startswith(prefix)}
        )
        for i, optimizer in enumerate(self.optimizers):
            _plain(optimizer).load_state_dict(state[f"optimizer_{i}"])
        meta: dict[str, Any] = torch.load(path / META, weights_only=True)
        return meta

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint directory."""
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)


def _make_states(optimizer: Any) -> None:
    """Give dense parameters the optimizer states that loading fills in.

    AdamW makes them at its first step, and only tensors that exist are loaded; without them a
    resumed run would silently begin with fresh moments. The weights that this step decays are
    loaded afterwards.
    """
    for _, part in _plain(optimizer).optimizers:
        if isinstance(part, KeyedOptimizerWrapper):
            part.init_state()


def _plain(optimizer: Any) -> Any:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
