"""What a training shows of itself: speed, where a step's time goes, memory, gradients, accuracy.

All of it is logged with the loss, every `log_every_n_steps` steps. It draws no random numbers and
keeps no state, so that a resumed run trains as an unbroken one.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

# Steps between two whose time is split; a profiled step takes longer (measured with
# benchmarks/train_cpu.py: 0.3% of the training at this distance).
SPLIT_EVERY_STEPS = 500
# Queries whose accuracy is computed: enough for 3 points of error, little beside a step.
ACCURACY_QUERIES = 256

# What an operation of a step belongs to, by its name: the first that fits.
KINDS = {
    "communication": re.compile(
        r"nccl|gloo|c10d|all2all|all_?to_?all|all_?gather|all_?reduce|reduce_?scatter|_Gather|"
        r"param_comms|broadcast|_Wait|_Req",
        re.IGNORECASE,
    ),
    "lookup": re.compile(
        r"fbgemm|embedding|lookup|jagged|kjt|keyed|input_dist|sparse|bucketize|radix|segment",
        re.IGNORECASE,
    ),
    "copy": re.compile(r"memcpy|memset", re.IGNORECASE),
}


@dataclass(frozen=True)
class Latest:
    """What a logged step scored; see `twotower.kernels.sampled_softmax` for the shapes."""

    query_BD: Tensor
    candidate_ND: Tensor
    id_N: Tensor
    log_q_N: Tensor
    temperature: Tensor
    positive_offset: int


@torch.no_grad()
def in_batch_accuracy(latest: Latest) -> Tensor:
    """Return (queries whose positive outscores every candidate that is no hit, queries)."""
    query_BD = latest.query_BD[:ACCURACY_QUERIES].float()
    row_B = torch.arange(len(query_BD), device=query_BD.device)
    positive_B = row_B + latest.positive_offset
    logits_BN = query_BD @ latest.candidate_ND.float().T / latest.temperature - latest.log_q_N
    hit_BN = latest.id_N[positive_B, None] == latest.id_N[None, :]
    hit_BN[row_B, positive_B] = False
    best_B = logits_BN.masked_fill(hit_BN, -torch.inf).argmax(1)
    real_B = latest.id_N[positive_B] >= 0
    return torch.stack([((best_B == positive_B) & real_B).sum(), real_B.sum()]).double()


def split_step(profiled: profile, cuda: bool) -> dict[str, float]:
    """Return the milliseconds that a profiled step spent on lookup, communication, copy and dense.

    On a CPU it is the time of the operations themselves, without those that they call; on CUDA
    that of the kernels, which may overlap.
    """
    spent = dict.fromkeys([*KINDS, "dense"], 0.0)
    for event in profiled.key_averages():
        kind = next((k for k, pattern in KINDS.items() if pattern.search(event.key)), "dense")
        own_us = event.self_device_time_total if cuda else event.self_cpu_time_total
        if event.key.startswith(("ProfilerStep", RANGE)):
            continue  # a frame around others
        spent[kind] += own_us / 1000
    return spent


RANGE = "twotower: "


class Meters(L.Callback):
    """Logs `speed/`, `step/`, `memory/`, `lr/`, `train/accuracy` and `train/grad_norm`.

    Args:
        events_a_step: of all ranks together.
        trace: first and last step of a trace for Perfetto, or None.
        folder: that traces are written to, `rank<n>.json.gz` each.
    """

    def __init__(self, events_a_step: float, trace: list[int] | None, folder: Path) -> None:
        self.events_a_step, self.trace, self.folder = events_a_step, trace, folder
        self.logged_at = (0, 0.0)  # step, and when
        self.began = self.ended = 0.0
        self.data_s = 0.0
        self.batches = 0
        self.profiler: profile | None = None
        self.tracing: profile | None = None
        self.range: AbstractContextManager[Any] | None = None
        self.split: dict[str, float] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.ended = time.perf_counter()
        self.logged_at = (trainer.global_step, self.ended)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out what happened between two epochs."""
        now = time.perf_counter()
        step, at = self.logged_at
        self.logged_at, self.ended = (step, at + now - self.ended), now

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time that the batch was waited for, and begin to profile where it is due."""
        self.began = time.perf_counter()
        self.data_s += self.began - self.ended
        self.batches += 1
        step = trainer.global_step
        cuda = pl_module.device.type == "cuda"
        if self.trace and self.trace[0] <= step <= self.trace[1]:
            if self.tracing is None:
                self.tracing = _profiler(cuda)
                self.tracing.start()
        # Not the first step of all, which warms up.
        elif step % SPLIT_EVERY_STEPS == 5:
            self.profiler = _profiler(cuda)
            self.profiler.start()
            self.began = time.perf_counter()
        self._enter("step")

    def on_before_backward(self, *_: Any) -> None:
        """Mark the backward pass in traces."""
        self._enter("backward")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Take the norm of the dense parameters' gradients, before they are clipped."""
        self._enter("optimizer")
        module: Any = pl_module
        if module.step_is_logged:
            dense = module.optimizers(use_pl_optimizer=False).dense
            norms = [p.grad.norm() for p in dense if p.grad is not None]
            pl_module.log("train/grad_norm", torch.stack(norms).norm())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Log where it is due."""
        cuda = pl_module.device.type == "cuda"
        if self.profiler is not None:
            wall_ms = 1000 * (time.perf_counter() - self.began)
            self.profiler.stop()
            parts = split_step(self.profiler, cuda)
            other = wall_ms - sum(parts.values())
            self.split = {**parts, "other": max(0.0, other), "profiled": wall_ms}
            self.profiler = None
        if self.tracing is not None and self.trace and trainer.global_step > self.trace[1]:
            self._write_trace(trainer.global_rank)
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step > self.logged_at[0]:
            self._log(trainer, pl_module)
        self.ended = time.perf_counter()
        self._enter("data")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a trace that the training ended in."""
        if self.tracing is not None:
            self._write_trace(trainer.global_rank)

    def _enter(self, name: str) -> None:
        """Begin a range of the trace where the one before ends."""
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        if self.tracing is not None:
            self.range = record_function(RANGE + name)
            self.range.__enter__()

    def _write_trace(self, rank: int) -> None:
        assert self.tracing is not None
        if self.range is not None:
            self.range.__exit__(None, None, None)
            self.range = None
        self.tracing.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tracing.export_chrome_trace(str(self.folder / f"rank{rank}.json.gz"))
        self.tracing, self.trace = None, None

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        now, (step, at) = time.perf_counter(), self.logged_at
        steps = trainer.global_step - step
        step_ms = 1000 * (now - at) / steps
        data_ms = 1000 * self.data_s / steps
        values: dict[str, Any] = {
            "speed/examples_per_s": self.events_a_step * self.batches / (now - at),
            "step/total_ms": step_ms,
            "step/data_ms": data_ms,
        }
        optimizers = module.optimizers(use_pl_optimizer=False)
        values["lr/tables"] = optimizers.tables[0].param_groups[0]["lr"]
        values["lr/dense"] = optimizers.towers.param_groups[0]["lr"]
        if self.split:
            values |= {f"step/{kind}_ms": ms for kind, ms in self.split.items() if ms}
            self.split = {}
        values |= self._memory(pl_module.device)
        if module.latest is not None:
            counts = in_batch_accuracy(module.latest)
            if dist.get_world_size() > 1:
                dist.all_reduce(counts)
            values["train/accuracy"] = float(counts[0] / counts[1].clamp_min(1))
            module.latest = None
        pl_module.log_dict(values)
        self.logged_at, self.data_s, self.batches = (trainer.global_step, now), 0.0, 0

    def _memory(self, device: torch.device) -> dict[str, float]:
        """Return the gigabytes of each rank: on CUDA the most that was reserved."""
        cuda = device.type == "cuda"
        own = torch.cuda.max_memory_reserved(device) if cuda else resident_bytes()
        sizes = torch.tensor([own / 1e9], dtype=torch.float64, device=device)
        every = sizes.new_empty(dist.get_world_size())
        dist.all_gather_into_tensor(every, sizes)
        of_ranks = {f"memory/rank{rank}_gb": size for rank, size in enumerate(every.tolist())}
        return of_ranks | {"memory/most_gb": max(of_ranks.values())}


def _profiler(cuda: bool) -> profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    return profile(activities=activities)


def resident_bytes() -> int:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
