"""A Lightning strategy over TorchRec's DistributedModelParallel.

The module's `model` is replaced by a DMP of it: tables go to fused lookups whose optimizer runs in
the backward pass, spread by `twotower.train.sharding`; dense parameters are replicated. One process
is the smallest case of the same code. Checkpoints (`twotower.train.checkpoint.storage`) load at any
number of ranks.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torchrec.distributed.model_parallel import DistributedModelParallel

from twotower.train.checkpoint import storage
from twotower.train.checkpoint.state import tensors_of
from twotower.train.config import TrainConfig
from twotower.train.optimizers import Optimizers
from twotower.train.sharding import Plan, find_hardware, plan_tables, shard


class TorchRecStrategy(DDPStrategy):
    """Trains `lightning_module.model`, a `TwoTower`, under DistributedModelParallel.

    Args:
        config: of training.
        seed: of the tables' first weights.
        show: is given the plan on rank 0, before the tables are made.
    """

    def __init__(
        self, config: TrainConfig, seed: int, show: Callable[[Plan], None], **arguments: Any
    ) -> None:
        super().__init__(process_group_backend=None, **arguments)
        self.config, self.seed, self.show = config, seed, show
        # What the hosts exchange neither waits for a GPU nor disturbs it; what is saved in the
        # background must not meet it.
        self._side_group: Any = None
        self._saving_group: Any = None
        self._saving: Future[None] | None = None

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
        self._side_group = dist.new_group(backend="gloo")
        self._saving_group = dist.new_group(backend="gloo")
        module = self.lightning_module
        if not isinstance(module.model, DistributedModelParallel):
            hardware = find_hardware(self.root_device, self.world_size, self.num_processes)
            plan = plan_tables(module.model, self.config, hardware)
            if self.is_global_zero:
                self.show(plan)
            module.model = shard(module.model, plan, self.root_device, self.seed)
            if self.config.compile:
                module.model.module.query.compile()
                module.model.module.item.compile()
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(self.root_device))
        for part in (module.memory, module.rates, module.heads):
            if part is not None:
                part.to(self.root_device)
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def configure_ddp(self) -> None:
        """Do nothing: DMP has wrapped the dense parameters already."""

    def teardown(self) -> None:
        """Destroy the process groups: with gloo, leaving it to the interpreter's exit aborts."""
        module = self.lightning_module
        if module is not None and not isinstance(module.model, DistributedModelParallel):
            # Lightning moves what it leaves, and tables that were not made yet cannot be moved.
            module.model = torch.nn.Module()
        super().teardown()
        if dist.is_initialized():
            dist.destroy_process_group()

    def any_rank(self, said: bool) -> bool:
        """Whether any rank says so; every rank must ask."""
        if self.world_size == 1:
            return said
        word = torch.tensor([int(said)])
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self._side_group)
        return bool(word.item())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}  # `save_checkpoint` takes it from DMP itself

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
        """Write a checkpoint directory, atomically; in the background where it is configured so.

        A checkpoint that cannot be written, for instance to a full disk, does not end the
        training: it is said, loudly, and the ones before it stay.
        """
        self.finish_saving()
        path = Path(filepath)
        del checkpoint["state_dict"]
        nested = self._module_state()
        for i, optimizer in enumerate(checkpoint.pop("optimizer_states", [])):
            nested[f"optimizer_{i}"] = optimizer
        tensors, state = tensors_of(nested), {"loop": checkpoint}
        if self.config.checkpoint_async:
            self._saving = storage.save_async(path, tensors, state, group=self._saving_group)
            return
        try:
            storage.save(path, tensors, state, group=self._side_group)
        except OSError as error:
            self._say_unsaved(error)

    def _module_state(self) -> dict[str, Any]:
        """Return the state of what is no optimizer; but for the model's, the live tensors."""
        module = self.lightning_module
        nested = {"model": module.model.state_dict()}
        for name, part in (
            ("memory", module.memory), ("rates", module.rates), ("heads", module.heads),
            ("mined", module.mining),
        ):  # fmt: skip
            if part is not None:
                nested[name] = part.state_dict()
        return nested

    def finish_saving(self) -> None:
        """Wait for the checkpoint that is written in the background, if there is one."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        try:
            saving.result()
        except OSError as error:
            self._say_unsaved(error)

    def _say_unsaved(self, error: Exception) -> None:
        if self.is_global_zero:
            print(
                f"twotower train: WARNING: a checkpoint was not written: {error}\n"
                "twotower train: WARNING: training goes on; a run that is stopped now goes on from "
                "the last checkpoint that was",
                file=sys.stderr,
            )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: Any = None) -> dict[str, Any]:
        """Load weights and optimizers into the live shards and return Lightning's own part."""
        module = self.lightning_module
        optimizers: list[Optimizers] = [_plain(optimizer) for optimizer in self.optimizers]
        for optimizer in optimizers:
            # The first step makes them, and only tensors that exist are loaded; without them a
            # resumed run would silently begin with fresh moments. What this changes is loaded too.
            optimizer.make_states()
        nested = self._module_state()
        for i, optimizer in enumerate(optimizers):
            nested[f"optimizer_{i}"] = optimizer.state_dict()
        state = storage.load(Path(checkpoint_path), tensors_of(nested))
        # DMP's parameters are not named as its state is, so only its own loader fits.
        module.model.load_state_dict(nested["model"])
        for i, optimizer in enumerate(optimizers):
            optimizer.load_state_dict(nested[f"optimizer_{i}"])
        loop: dict[str, Any] = state["loop"]
        return loop

    def remove_checkpoint(self, filepath: Any) -> None:
        """Delete a checkpoint directory."""
        if self.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)


def _plain(optimizer: Any) -> Any:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
