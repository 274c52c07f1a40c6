"""Hard negatives mined from the model's own answers (Xiong et al. 2021, "ANCE").

Before every run of steps, each of its queries gets a list: a band of what the towers, as they are
then, answer to it from the whole catalogue. The first ranks are skipped, where most of what the log
does not call positive is so none the less (Zhang et al. 2013; Wu et al. 2017), and so are all
items that the query's user takes in training.

Shape legend: `Q` queries of the steps, `N` items, `D` width, `K` ranks of the band.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset, gather
from twotower.errors import UserError
from twotower.kernels.top_k_inner_product import top_k_inner_product
from twotower.towers.catalogue import catalogue_vectors, gather_parts, part_of_rank
from twotower.train.negatives_config import MiningConfig

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
# Seconds after which a mining says how far it is.
SAY_EVERY_S = 10.0


class HardNegatives:
    """Finds the lists of coming steps, on all ranks together, and keeps them for a resumed run.

    Args:
        data: the prepared dataset.
        config: of mining.
        module: whose `model` is sharded by the time that lists are asked for.
        queries: of the steps between two minings, at most.
        batch_size: queries or items a forward pass.

    Raises:
        UserError: when the band is deeper than the catalogue.
    """

    def __init__(
        self, data: PreparedDataset, config: MiningConfig, module: Any, queries: int,
        batch_size: int,
    ) -> None:  # fmt: skip
        self.builder, self.module, self.batch_size = BatchBuilder(data), module, batch_size
        self.every, self.skip, self.last = config.every, config.skip, config.skip + config.depth
        if self.last > len(data.items):
            raise UserError(
                f"train.negatives.mining: skip {config.skip} and depth {config.depth} need "
                f"{self.last} items, the catalogue of {data.path} has {len(data.items)}: lower them"
            )
        self.item_QK = torch.full((queries, config.depth), -1, dtype=torch.int32)
        # Epoch and step that the lists begin at, and their number.
        self.mark = torch.full((3,), -1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the lists and what they are of: the live tensors."""
        return {"item": self.item_QK, "mark": self.mark}

    def __call__(self, epoch: int, step: int, rows: I64) -> I32:
        """Return the lists of events' queries (R, K), ascending, -1 behind short ones.

        A resumed run goes on with the lists that it was stopped in.
        """
        mark = torch.tensor([epoch, step, len(rows)])
        found = self.item_QK[: len(rows)]
        if not torch.equal(self.mark, mark):
            found.copy_(torch.from_numpy(self._mine(rows)))
            self.mark.copy_(mark)
        return found.numpy()

    @torch.no_grad()
    def _mine(self, rows: I64) -> I32:
        module = self.module
        if module.pipeline is not None:
            module.pipeline.detach()
        module.model.eval()
        towers, device = module.model.module, module.device
        item_ND = catalogue_vectors(towers.item_vectors, self.builder, device, self.batch_size)
        started = said = time.monotonic()
        lists = []
        for start in range(0, len(rows), self.batch_size):
            lists.append(self._band(towers, item_ND, rows[start : start + self.batch_size]))
            now, done = time.monotonic(), min(start + self.batch_size, len(rows))
            if now - said > SAY_EVERY_S and dist.get_rank() == 0:
                said = now
                print(
                    f"twotower train: mining negatives: {done:,} of {len(rows):,} queries in "
                    f"{now - started:.0f} s",
                    file=sys.stderr,
                )
        module.model.train()
        return np.concatenate(lists)

    def _band(self, towers: Any, item_ND: Tensor, rows: I64) -> I32:
        part = part_of_rank(len(rows))
        mine, device = rows[part], item_ND.device
        query = self.builder.events(mine, extra=np.empty(0, np.int64), own=False)
        data = self.builder.data
        user = data.event_columns["user"][mine].astype(np.int64)
        # Those that the user takes later in training too: they are false negatives.
        taken, lengths = gather(data.timeline, data.history_from[user], data.train_end[user])
        _, best = top_k_inner_product(
            towers.query_vectors(query.to(device)), item_ND, self.last,
            exclude_row_X=torch.from_numpy(taken.astype(np.int64)).to(device),
            exclude_offset_B1=torch.from_numpy(np.append(0, np.cumsum(lengths))).to(device),
        )  # fmt: skip
        band = gather_parts(best[:, self.skip :], len(rows)).cpu().numpy()
        # In an order that no last bit of a score decides.
        band = np.sort(np.where(band < 0, len(data.items), band), 1)
        return np.where(band < len(data.items), band, -1).astype(np.int32)
