"""Embedding tables in a file rather than in memory, so that they may be larger than it.

The system keeps of them in memory what is used, and writes the rest to the disk.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from twotower.train.checkpoint.manifest import naming


class TableFile:
    """A file without a name, gone when nothing refers to it any more, even after a kill.

    Args:
        folder: on whose disk it lies.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._map: mmap.mmap | None = None

    def move(self, weights: Iterable[nn.Parameter]) -> None:
        """Give weights memory in the file; what they held is not copied.

        Raises:
            OSError: naming the folder, when its disk has no room for them.
        """
        weights, places, end = list(weights), [], 0
        for weight in weights:
            places.append(end)
            end += -(-weight.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if not end:
            return
        with naming(self.folder), tempfile.TemporaryFile(dir=self.folder) as file:
            # A full disk shows itself here; later, writing to the memory would kill the process.
            os.posix_fallocate(file.fileno(), 0, end)
            self._map = mmap.mmap(file.fileno(), end)
        for weight, place in zip(weights, places, strict=True):
            flat: Tensor = torch.frombuffer(
                self._map, dtype=weight.dtype, count=weight.numel(), offset=place
            )
            weight.data = flat.view(weight.shape)

    def release(self) -> None:
        """Let go of the memory that holds the tables; they are read again as they are used."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
