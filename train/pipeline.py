"""Batches whose copy to the GPU and exchange between ranks overlap the steps before theirs.

TorchRec's sparse pipeline, taken apart so that forward, backward and the optimizers' step stay
Lightning's: while batch i is trained on, the ids of batch i+1 go to the ranks that hold their rows
and batch i+2 is copied to the device. It works on a CPU too, where it gains nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from twotower.data.batches import Batch
from twotower.data.loader import TrainLoader


class LookUps(nn.Module):
    """The sharded tables alone: what of the towers the pipeline must know, and trace."""

    def __init__(self, collections: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in collections.items():
            self.add_module(name, module)

    def forward(self, batch: Batch) -> list[Any]:
        """Look up the ids of both towers in every collection."""
        return [module(batch.ids) for module in self.children()]


class SparsePipeline(TrainPipelineSparseDist[Batch, Any]):
    """Hands out batches that are on the device and distributed already.

    Args:
        tables: the sharded tables.
        model: whose forward pass reads a batch; the exchange of the next one's ids is finished
            behind it.
        device: of this rank.
    """

    def __init__(self, tables: LookUps, model: nn.Module, device: torch.device) -> None:
        unused: Any = None  # Lightning steps the optimizers
        super().__init__(tables, unused, device)
        model.register_forward_hook(lambda *_: self._finish_next())

    def run(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; the model reads each before the next is asked for.

        Before the model reads any other batch, `detach` must be called.
        """
        self.reset()
        if not self._model_attached:
            self.attach(self._model)
        self.fill_pipeline(batches)
        while self.batches:
            self._set_module_context(self.contexts[0])
            self._wait_for_batch()
            if len(self.batches) > 1:
                self.start_sparse_data_dist(self.batches[1], self.contexts[1])
            self.enqueue_batch(batches)
            yield self.batches[0]
            self.dequeue_batch()

    def _finish_next(self) -> None:
        if len(self.batches) > 1 and self._model_attached:
            self.wait_sparse_data_dist(self.contexts[1])


class PipelinedLoader:
    """A loader seen through a pipeline; its place is that of the batches handed out.

    Args:
        loader: of this rank's batches.
        module: whose `model` is sharded by the time that batches are asked for; its `pipeline` is
            set to what validation detaches.
    """

    def __init__(self, loader: TrainLoader, module: Any) -> None:
        self.loader, self.module = loader, module
        self.state: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Turn to an epoch; its place is kept if it is this one."""
        self.loader.set_epoch(epoch)
        self.state = None

    def __iter__(self) -> Iterator[Batch]:
        if self.module.pipeline is None:
            look_ups = LookUps(self.module.model.module.collections())
            self.module.pipeline = SparsePipeline(look_ups, self.module.model, self.module.device)
        places: deque[dict[str, int]] = deque()

        def ahead(segment: Iterator[Batch]) -> Iterator[Batch]:
            for batch in segment:
                places.append(self.loader.state_dict())
                yield batch

        for segment in self.loader.segments():
            for batch in self.module.pipeline.run(ahead(segment)):
                self.state = places.popleft()
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how much of which epoch was handed out."""
        return self.state or self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a saved place."""
        self.loader.load_state_dict(state)
        self.state = None
