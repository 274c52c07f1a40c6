"""Training on one GPU beside the bytes that its look-ups must move: a part of `gpu.py`.

    python benchmarks/gpu.py --training

A table of 100M users and one of 20M items x 128 in fp16, rounded stochastically, with the fused
rowwise Adagrad; a user id, a history of 50 items and an item id; layers 256-128 in bf16; the
softmax over a batch of 65,536 in bf16. Ids follow a power law and are spread over the tables. The
towers, their sharding, optimizers and pipeline are those of `twotower train`; the loop around them
is plain. Batches come from pinned memory, copied and distributed ahead.

The bound: each table row that a batch names is read once in the forward pass, read and written once
in the backward pass, and so is its optimizer's state; all at the bandwidth of a copy, measured in
the same process. Pooled vectors, their gradients and ids are left out, and rows that come again in
a batch cost nothing, so that no implementation can beat it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from step_profile import STAGES, device_ms, stage, stage_of_module, stages_ms
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.profiler import ProfilerActivity, profile

from twotower.data.batches import Batch, make_batch
from twotower.data.schema import DataConfig, Feature
from twotower.kernels.sampled_softmax import sampled_softmax
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.config import TrainConfig
from twotower.train.optimizers import Optimizers, fuse_table_optimizer
from twotower.train.pipeline import LookUps, SparsePipeline
from twotower.train.sharding import TABLE_TYPES, find_hardware, plan_tables, shard

GOAL = 0.6  # of the bound
DIM = 128
ROW_BYTES = DIM * 2  # fp16
STATE_BYTES = 4  # of rowwise Adagrad
BATCHES = 8  # different ones, in turn
# Coprime with the tables' sizes: neighbours in popularity are no neighbours in memory.
SPREAD = 1_000_003


@dataclass(frozen=True)
class Size:
    """Of a run."""

    users: int
    items: int
    history: int
    batch: int
    rounds: int
    steps: int


FULL = Size(users=100_000_000, items=20_000_000, history=50, batch=65_536, rounds=7, steps=20)
SMALL = Size(users=20_000, items=5_000, history=5, batch=512, rounds=2, steps=3)
WARM_UP = 10


def schema(size: Size) -> DataConfig:
    """Return the features."""
    return DataConfig(
        root="", interactions="",
        query=[Feature(name="user_id", kind="id"),
               Feature(name="history", kind="history", table="item_id", length=size.history)],
        item=[Feature(name="item_id", kind="id")],
    )  # fmt: skip


def draw(rng: np.random.Generator, rows: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Draw rows of a table; the r-th popular with a probability of about 1 / (r log rows)."""
    rank = np.minimum(np.exp(rng.random(count) * np.log(rows)).astype(np.int64), rows) - 1
    return rank * SPREAD % rows


def batches(size: Size, pin: bool) -> list[Batch]:
    """Return different batches; every history is full."""
    rng, b = np.random.default_rng(0), size.batch
    made = []
    for _ in range(BATCHES):
        item = draw(rng, size.items, b)
        one = np.ones(b, np.int64)
        bags = {
            "query.user_id": (draw(rng, size.users, b), one),
            "query.history": (draw(rng, size.items, b * size.history), one * size.history),
            "item.item_id": (item, one),
        }
        batch = make_batch(
            schema(size), bags, {}, b, item, np.arange(b), np.ones(b, np.float32)
        )  # fmt: skip
        made.append(batch.pin_memory() if pin else batch)
    return made


def log_q(size: Size, device: torch.device) -> Tensor:
    """Return the log of every item's probability (N,)."""
    rank_N = torch.arange(size.items, device=device)
    log_q_N = torch.empty(size.items, device=device)
    log_q_N[rank_N * SPREAD % size.items] = -((rank_N + 1).float() * math.log(size.items)).log()
    return log_q_N


def unique_rows(made: list[Batch]) -> float:
    """Return the table rows that a batch names, each counted once: the mean over batches."""
    total = 0
    for batch in made:
        items = [batch.ids[key].values() for key in ("query.history", "item.item_id")]
        total += len(batch.ids["query.user_id"].values().unique()) + len(torch.cat(items).unique())
    return total / len(made)


class Training:
    """Sharded towers that learn from batches of a pipeline.

    Args:
        size: of the run.
        device: that holds the tables.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.device = device
        config = TrainConfig(batch_size=size.batch, table_precision="fp16", precision="bf16")
        rows = {"user_id": size.users, "item_id": size.items}
        towers = TwoTower(
            schema(size), rows, ModelConfig(dim=DIM, hidden=[2 * DIM]), table_device="meta",
            table_type=TABLE_TYPES[config.table_precision],
        )  # fmt: skip
        fuse_table_optimizer(towers, config)
        plan = plan_tables(towers, config, find_hardware(device, 1, 1))
        self.plan = [f"{t.name}: {t.sharding}, {t.kernel}" for t in plan.tables]
        self.model = shard(towers, plan, device, 0)
        self.optimizers = Optimizers(self.model, config, 1, {})
        inner = self.model.module
        self.tables = LookUps({"bags": inner.bags})
        self.log_q_N = log_q(size, device)
        stage_of_module(inner.bags, "lookup")
        for tower in (inner.query, inner.item):
            stage_of_module(tower, "towers")

    def steps(self, source: Iterator[Batch]) -> Iterator[Tensor]:
        """Yield the loss of each step after it; the source has no end."""
        pipeline = SparsePipeline(self.tables, self.model, self.device)
        coming = pipeline.run(source)
        while True:
            with stage("data"):
                batch = next(coming)
            self.optimizers.zero_grad()
            self.optimizers.set_rates(0)
            with torch.autocast(self.device.type, torch.bfloat16):
                query_BD, item_BD, temperature, _ = self.model(batch)
            with stage("loss"):
                loss = sampled_softmax(
                    query_BD.bfloat16(), item_BD.bfloat16(), temperature,
                    log_q_N=self.log_q_N[batch.item_N], candidate_id_N=batch.item_N.int(),
                    weight_B=batch.weight_B,
                )  # fmt: skip
            loss.backward()
            self.optimizers.step()
            yield loss.detach()


def bench_training(device: torch.device, limit: dict[str, float], small: bool) -> dict[str, Any]:
    """Train for some rounds, then profile one; print and return what was measured.

    Args:
        device: that trains.
        limit: measured `copy_gb_s` and `matmul_tflop_s`.
        small: try the script only.
    """
    size, cuda = SMALL if small else FULL, device.type == "cuda"
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    training = Training(size, device)
    made = batches(size, pin=cuda)
    rows = unique_rows(made)
    steps = training.steps(itertools.cycle(made))
    losses = [next(steps) for _ in range(WARM_UP)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [1000 * _seconds(steps, size.steps, device) / size.steps for _ in range(size.rounds)]
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        profiled_ms = 1000 * _seconds(steps, size.steps, device)
    events = profiler.events() or []
    read = device_ms if cuda else stages_ms
    split = read(events, profiled_ms, size.steps)
    losses.append(next(steps))
    del steps
    dist.destroy_process_group()
    spent = "self_device_time_total" if cuda else "self_cpu_time_total"
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    averages = [e for e in profiler.key_averages() if e.device_type == kind]
    top = sorted(averages, key=lambda e: -getattr(e, spent))
    result = {
        "size": vars(size), "plan": training.plan, "ms_a_step": median(times),
        "examples_per_s": 1000 * size.batch / median(times), "split_ms": split,
        "profiled_ms": profiled_ms / size.steps, "peak_gb": peak_gb, "rows_a_batch": rows,
        "loss": {"first": float(losses[0]), "last": float(losses[-1])},
        "top": {
            e.key[:80]: getattr(e, spent) / 1000 / size.steps for e in top[:20]
        },
    }  # fmt: skip
    result |= bounds(size, rows, limit, result)
    report(result)
    return result


def bounds(size: Size, rows: float, limit: dict[str, float], found: dict[str, Any]) -> Any:
    """Return the bounds in milliseconds, and how near to that of the look-ups it came."""
    lookup_bytes = rows * (3 * ROW_BYTES + 2 * STATE_BYTES)
    bound_ms = lookup_bytes / limit["copy_gb_s"] / 1e6
    # Forward 2, backward 8 x B B D operations, as the kernels' own benchmark counts them.
    loss_ms = 10 * size.batch**2 * DIM / limit["matmul_tflop_s"] / 1e9
    return {
        "lookup_bytes": lookup_bytes, "lookup_bound_ms": bound_ms, "loss_bound_ms": loss_ms,
        "lookup_of_bound": bound_ms / found["split_ms"]["lookup"],
        "step_of_bound": bound_ms / found["ms_a_step"], "goal": GOAL,
    }  # fmt: skip


def _seconds(steps: Iterator[Tensor], count: int, device: torch.device) -> float:
    """Return the time of some steps, of the device's work too."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def report(result: dict[str, Any]) -> None:
    """Print what was measured."""
    loss = result["loss"]
    print(
        f"training: {result['examples_per_s']:,.0f} examples/s, {result['ms_a_step']:.2f} ms a "
        f"step, peak {result['peak_gb']:.1f} GB, loss {loss['first']:.3f} to {loss['last']:.3f}"
    )
    print("  plan: " + "; ".join(result["plan"]))
    split = ", ".join(f"{name} {result['split_ms'][name]:.2f}" for name in STAGES)
    print(f"  of {result['profiled_ms']:.2f} ms profiled: {split}")
    for name, ms in result["top"].items():
        print(f"    {ms:8.3f} ms {name}")
    print(
        f"  look-ups: {result['rows_a_batch']:,.0f} rows, {result['lookup_bytes'] / 1e6:,.0f} MB: "
        f"at least {result['lookup_bound_ms']:.3f} ms; they reach {result['lookup_of_bound']:.0%} "
        f"of that bound, a whole step {result['step_of_bound']:.1%} (goal {GOAL:.0%}); the loss's "
        f"products alone need {result['loss_bound_ms']:.3f} ms"
    )
