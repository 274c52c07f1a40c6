"""One of the processes that train tables with dynamic ids together, from a step to another.

python dynamic_rank.py '{"port": 1, "rank": 0, "ranks": 2, "steps": [0, 8], "pooling": "mean",
                         "load": null, "save": "a directory", "vectors": "a file"}'
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.optim.apply_optimizer_in_backward import (
    _apply_optimizer_in_backward as apply_in_backward,
)
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from twotower.data.batches import Batch, make_batch
from twotower.data.schema import DataConfig, Feature
from twotower.data.table import Table
from twotower.towers.config import ModelConfig
from twotower.towers.dynamic_tables import dynamic_sharders
from twotower.towers.two_tower import PREFIX, TwoTower
from twotower.train.checkpoint import storage
from twotower.train.checkpoint.state import tensors_of

BATCH = 64
ROWS = {"user_id": 800, "item_id": 400, "tag": 20}


class BagSharder(EmbeddingBagCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return super().sharding_types("cuda")


def schema(pooling: str) -> DataConfig:
    """Two dynamic tables that get more ids than slots, and a plain one."""
    history = Feature(name="history", kind="history", table="item_id", length=3, pooling=pooling)
    return DataConfig(
        interactions="log", query=[Feature(name="user_id", kind="id"), history],
        item=[Feature(name="item_id", kind="id"), Feature(name="tag", kind="ids")],
        tables={"user_id": Table(slots=800, admit_every=3), "item_id": Table(slots=400)},
    )  # fmt: skip


def towers(pooling: str, device: str = "cpu") -> TwoTower:
    torch.manual_seed(0)
    model = ModelConfig(dim=8, hidden=[16])
    return TwoTower(schema(pooling), ROWS, model, table_device=device)


def batch(pooling: str, step: int, rank: int = 0, ranks: int = 1) -> Batch:
    """Return a rank's part of a step's batch."""
    known = np.random.default_rng(99)
    users, items = (2 * known.integers(0, 2**62, size) for size in (3000, 700))
    rng, size = np.random.default_rng(step), BATCH // ranks
    part = slice(rank * size, (rank + 1) * size)
    columns = {
        "query.user_id": users[rng.integers(0, len(users), (BATCH, 1))],
        "query.history": items[rng.integers(0, len(items), (BATCH, 3))],
        "item.item_id": items[rng.integers(0, len(items), (BATCH, 1))],
        "item.tag": rng.integers(0, ROWS["tag"], (BATCH, 2)),
    }
    bags = {
        key: (values[part].ravel(), np.full(size, values.shape[1]))
        for key, values in columns.items()
    }
    return make_batch(schema(pooling), bags, {}, np.arange(size))


def sharded(pooling: str, ranks: int) -> DistributedModelParallel:
    model = towers(pooling, "meta")
    apply_in_backward(RowWiseAdagrad, model.table_parameters(), {"lr": 0.05, "eps": 1e-8})
    bags, lists = BagSharder(), EmbeddingCollectionSharder()
    sharders = [bags, lists, *dynamic_sharders(bags, lists)]
    row_wise = ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=ranks, local_world_size=ranks, compute_device="cpu"),
        constraints={PREFIX + name: row_wise for name in ROWS},
    )
    plan = planner.plan(model, sharders)
    dmp = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    for name, value in dmp.state_dict().items():
        if PREFIX in name and name.endswith("weight"):
            for shard in value.local_shards():
                shard.tensor.fill_(0.1)
    return dmp


def run(
    rank: int, ranks: int, steps: list[int], pooling: str, load: str | None, save: str,
    vectors: str, **_: Any,
) -> None:  # fmt: skip
    model = sharded(pooling, ranks)
    nested = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    if load:
        storage.load(Path(load), tensors_of(nested))
        model.load_state_dict(nested["model"])
        model.fused_optimizer.load_state_dict(nested["optimizer"])
    dense = torch.optim.SGD(
        [p for n, p in model.named_parameters() if PREFIX not in n and p.requires_grad], lr=0.1
    )
    model.train()
    for step in range(*steps):
        query, item, _ = model(batch(pooling, step, rank, ranks))
        dense.zero_grad()
        (-(query * item).sum(1).mean()).backward()
        dense.step()
    nested = {"model": model.state_dict(), "optimizer": model.fused_optimizer.state_dict()}
    storage.save(Path(save), tensors_of(nested), {})
    model.eval()
    own = model(batch(pooling, 1000, rank, ranks))[0].detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(parts, own)
    if rank == 0:
        torch.save(torch.cat(parts), vectors)


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    number, of = str(arguments["rank"]), str(arguments["ranks"])
    os.environ.update(RANK=number, WORLD_SIZE=of, LOCAL_RANK=number, LOCAL_WORLD_SIZE=of)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{arguments['port']}", rank=arguments["rank"],
        world_size=arguments["ranks"],
    )  # fmt: skip
    run(**arguments)
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may abort the interpreter's orderly exit.
    os._exit(0)
