"""Runs a scenario in several processes that train together; each scenario is a function below.

As a script, it is one of those processes.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_on_ranks(ranks: int, scenario: str, arguments: dict[str, Any], cwd: Path) -> list[str]:
    """Run a scenario and return what each rank printed; fail with the output of a rank that did."""
    runs = len(arguments.get("settings", [0]))
    environment = os.environ | {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "PORTS": json.dumps(free_ports(runs)), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, scenario, json.dumps(arguments)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [p.communicate(timeout=TIMEOUT_S)[0] for p in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def train(prepared: str, settings: list[dict[str, Any]]) -> None:
    """Train once for every setting; the result of the i-th is the directory `<i>`."""
    from twotower.data.prepared import PreparedDataset
    from twotower.towers.config import model_config
    from twotower.train.config import EvaluateConfig, TableSharding, TrackingConfig, TrainConfig
    from twotower.train.launch import Place
    from twotower.train.negatives_config import MiningConfig, NegativesConfig
    from twotower.train.train import train

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = Place(rank=rank, ranks=ranks, local_rank=rank, local_ranks=ranks)
    for number, (port, changes) in enumerate(
        zip(json.loads(os.environ["PORTS"]), settings, strict=True)
    ):
        os.environ["MASTER_PORT"] = str(port)
        tables = {n: TableSharding(**t) for n, t in changes.pop("tables", {}).items()}
        if "negatives" in changes:
            mining = MiningConfig(**changes["negatives"].pop("mining", {}))
            changes["negatives"] = NegativesConfig(**changes["negatives"], mining=mining)
        model = model_config({"dim": 16, "hidden": [32], **changes.pop("model", {})})
        config = TrainConfig(**{"tables": tables, **changes})
        config.validate()
        train(
            PreparedDataset(Path(prepared)), Path(str(number)), job={}, fingerprint="test", seed=3,
            name="test", model=model, config=config,
            evaluate=EvaluateConfig(max_queries=100), tracking=TrackingConfig(wandb="off"),
            show=lambda plan: None, place=place,
        )  # fmt: skip


def meet() -> tuple[int, int]:
    """Make the ranks' group and return this one's rank and their number."""
    import torch.distributed as dist

    (port,) = json.loads(os.environ["PORTS"])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    return rank, ranks


def negatives(out: str) -> None:
    """Write this rank's loss and gradients of a batch that ranks share unequally."""
    import torch
    import torch.distributed as dist

    from twotower.kernels.sampled_softmax import sampled_softmax
    from twotower.train.negatives import FILLER_LOG_Q, Candidates, share_of_weight

    rank, ranks = meet()
    joined = torch.load(f"{out}/joined.pt")
    part = slice(rank * 4, min(rank * 4 + 4, 7))
    filler = 4 - (part.stop - part.start)
    grow = torch.nn.functional.pad
    query, item = (
        grow(joined[name][part], (0, 0, 0, filler)).requires_grad_() for name in ("query", "item")
    )
    weight = grow(joined["weight"][part], (0, filler))
    ids = grow(joined["id"][part], (0, filler), value=-1)
    temperature = torch.tensor(0.2, requires_grad=True)
    log_q = torch.cat([joined["log_q"], torch.tensor([FILLER_LOG_Q])])[ids]
    found = Candidates(item, ids, log_q).of_all_ranks()
    loss = sampled_softmax(
        query, found.vector_ND, temperature, log_q_N=found.log_q_N, candidate_id_N=found.id_N,
        weight_B=weight, positive_B=rank * len(item) + torch.arange(len(query)),
    ) * share_of_weight(weight)  # fmt: skip
    loss.backward()
    # What DDP and TorchRec do with gradients, and the logger with the loss.
    mean = [loss.detach().clone(), temperature.grad.clone()]
    for value in mean:
        dist.all_reduce(value)
    size = part.stop - part.start
    gradients = [tensor.grad[:size] / ranks for tensor in (query, item)]
    torch.save([*(value / ranks for value in mean), *gradients], f"{out}/{rank}.pt")
    dist.destroy_process_group()


def predict(prepared: str, source: str, target: str, out: str) -> None:
    """Load towers from a checkpoint, write the catalogue's vectors, and save them again."""
    import torch
    import torch.distributed as dist

    from twotower.data.batches import BatchBuilder
    from twotower.data.prepared import PreparedDataset
    from twotower.towers.catalogue import catalogue_vectors
    from twotower.towers.two_tower import TwoTower
    from twotower.train.checkpoint import storage
    from twotower.train.checkpoint.state import tensors_of
    from twotower.train.checkpoint.towers import read_model_spec
    from twotower.train.config import TrainConfig
    from twotower.train.optimizers import fuse_table_optimizer
    from twotower.train.sharding import find_hardware, plan_tables, shard

    rank, ranks = meet()
    cpu, config = torch.device("cpu"), TrainConfig()
    model = TwoTower(**read_model_spec(Path(source).parent), table_device="meta")
    fuse_table_optimizer(model, config)
    plan = plan_tables(model, config, find_hardware(cpu, ranks, ranks))
    sharded = shard(model, plan, cpu, seed=99)
    nested = {
        "model": sharded.state_dict(), "optimizer_0": sharded.fused_optimizer.state_dict()
    }  # fmt: skip
    state = storage.load(Path(source), tensors_of(nested))
    sharded.load_state_dict(nested["model"])
    sharded.fused_optimizer.load_state_dict(nested["optimizer_0"])
    builder = BatchBuilder(PreparedDataset(Path(prepared)))
    vectors = catalogue_vectors(sharded.module.eval().item_vectors, builder, cpu, 64)
    nested = {
        "model": sharded.state_dict(), "optimizer_0": sharded.fused_optimizer.state_dict()
    }  # fmt: skip
    storage.save(Path(target), tensors_of(nested), state)
    if rank == 0:
        torch.save(vectors, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    {"train": train, "negatives": negatives, "predict": predict}[sys.argv[1]](
        **json.loads(sys.argv[2])
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may abort the interpreter's orderly exit.
    os._exit(0)
