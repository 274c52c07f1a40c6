"""Runs a scenario in several processes that train together; each scenario is a function below.

As a script, it is one of those processes.
"""

import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

TIMEOUT_S = 400


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_on_ranks(ranks: int, scenario: str, arguments: dict[str, Any], cwd: Path) -> list[str]:
    """Run a scenario and return what each rank printed; fail with what all did if one fails.

    The ranks meet at stores of this process, one a training, as they would at torchrun's: a port
    that was free a minute ago may be taken.
    """
    runs = len(arguments.get("settings", [0]))
    stores = [TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in range(runs)]
    environment = os.environ | {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "PORTS": json.dumps([store.port for store in stores]), "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    outputs = [cwd / f"rank-{rank}.txt" for rank in range(ranks)]
    processes = []
    for rank, path in enumerate(outputs):
        with path.open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, __file__, scenario, json.dumps(arguments)],
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=cwd, stdout=output, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    end = time.monotonic() + TIMEOUT_S
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < end:
            if any(p.poll() for p in processes):
                end = min(end, time.monotonic() + 10)  # the others say what they lost
            time.sleep(0.05)
        codes = [p.poll() for p in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks, "\n".join(
        f"rank {rank} ended with {code}:\n{path.read_text()}"
        for rank, (code, path) in enumerate(zip(codes, outputs, strict=True))
    )
    return [path.read_text() for path in outputs]


def train(prepared: str, settings: list[dict[str, Any]]) -> None:
    """Train once for every setting; the result of the i-th is the directory `<i>`."""
    from twotower.data.prepared import PreparedDataset
    from twotower.towers.config import model_config
    from twotower.train.config import EvaluateConfig, TableSharding, TrackingConfig, TrainConfig
    from twotower.train.heads_config import HeadConfig
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
        if "heads" in changes:
            changes["heads"] = {n: HeadConfig(**h) for n, h in changes["heads"].items()}
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
    # A crash in native code is silent otherwise.
    faulthandler.enable()
    {"train": train, "negatives": negatives, "predict": predict}[sys.argv[1]](
        **json.loads(sys.argv[2])
    )
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may abort the interpreter's orderly exit.
    os._exit(0)
