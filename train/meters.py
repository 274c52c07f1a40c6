"""What a training shows of itself: speed, where a step's time goes, memory, gradients, accuracy.

All of it is logged with the loss, every `log_every_n_steps` steps:

    speed/examples_per_s         of all ranks, since the last logging, validation left out
    step/total_ms, data_ms       a step since then, and the wait for its batch in it, by the clock
    step/<part>_ms, profiled_ms  of the last step that was profiled, on rank 0: see `split_step`
    memory/rank<n>_gb, most_gb   of each rank: on CUDA the most it reserved, on a CPU what it holds
    train/accuracy               of queries, those whose own item outscores the other candidates
    train/grad_norm              of the dense parameters, before clipping
    lr/tables, lr/dense          learning rates

It draws no random numbers and keeps no state, so that a resumed run trains as an unbroken one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.profilers import Profiler
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from twotower.train.negatives import Candidates
from twotower.train.step_split import split_step

# Names of ranges in a trace begin so; those of whole steps go on with this and their number.
RANGE = "twotower: "
STEP = RANGE + "step"
# Steps of a process that nothing is concluded from: memory, kernels and caches warm up.
WARM_UP_STEPS = 10
# Share of the time that goes into starting and reading the profiler, 22 ms of a CPU for a step of
# `configs/quickstart.yaml`; how it slows that step itself was too little to measure.
PROFILING_SHARE = 0.005
# Queries whose accuracy is computed: enough for 3 points of error, little beside a step.
ACCURACY_QUERIES = 256


@dataclass(frozen=True)
class Latest:
    """What a logged step scored; see `twotower.kernels.sampled_softmax` for the shapes."""

    query_BD: Tensor
    candidates: Candidates
    positive_B: Tensor
    temperature: Tensor
    corrected: bool


@torch.no_grad()
def in_batch_accuracy(latest: Latest) -> Tensor:
    """Return (queries whose positive outscores all candidates but accidental hits, queries).

    Fillers, whose item is -1, are neither.
    """
    query_BD = latest.query_BD[:ACCURACY_QUERIES].float()
    found, positive_B = latest.candidates, latest.positive_B[:ACCURACY_QUERIES]
    logits_BN = query_BD @ found.vector_ND.float().T / latest.temperature
    own_B = logits_BN[torch.arange(len(query_BD)), positive_B]
    own_B -= found.log_q_N[positive_B] * latest.corrected
    same_BN = found.id_N[positive_B, None] == found.id_N[None, :]
    best_B = (logits_BN - found.log_q_N).masked_fill(same_BN, -torch.inf).amax(1)
    real_B = found.id_N[positive_B] >= 0
    right_B = real_B & (own_B > best_B)
    return torch.stack([right_B.sum(), real_B.sum()]).double()


class Meters(L.Callback):
    """Logs what the module's docstring lists, and writes a trace.

    Args:
        events_a_step: of all ranks together.
        trace: first and last step of a trace for Perfetto, or None.
        folder: that traces are written to, `rank<n>.json.gz` each.
    """

    def __init__(self, events_a_step: float, trace: list[int] | None, folder: Path) -> None:
        self.events_a_step, self.trace, self.folder = events_a_step, trace, folder
        self.logged_at = (0, 0.0)  # step, and when
        self.began = self.ended = 0.0  # a step, by the clock
        self.fetch_s = 0.0
        self.batches = self.warm = 0
        self.cuda, self.step_name = False, ""
        self.split: dict[str, float] = {}
        self.grad_norm = torch.zeros(())
        self.sample: profile | None = None
        self.sample_due = 0.0
        self.tracing: profile | None = None
        # The range of a step in the trace, and the one in it that is open.
        self.frame, self.inner = ExitStack(), ExitStack()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask Lightning when it waits for a batch: other callbacks' work is not that."""
        trainer.profiler = _Fetches(self, trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self.cuda = pl_module.device.type == "cuda"
        self.ended = time.perf_counter()
        self.logged_at = (trainer.global_step, self.ended)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out what happened between two epochs."""
        self._leave_out(time.perf_counter() - self.ended)

    def on_fetch_start(self, trainer: L.Trainer) -> None:
        """Begin the trace where it is due, with the wait for its first batch."""
        if self.trace and self.trace[0] <= trainer.global_step <= self.trace[1]:
            if self.tracing is None:
                self.tracing = self._start_profiler()
            self._enter("data")

    def on_fetch_end(self, seconds: float) -> None:
        """Take the time that a batch was waited for."""
        self.fetch_s += seconds
        self.inner.close()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to profile the step where that is due."""
        self.batches += 1
        self.warm += 1
        if (
            trainer.is_global_zero  # whose loggers write
            and self.tracing is None
            and self.warm > WARM_UP_STEPS
            and time.perf_counter() >= self.sample_due
        ):
            self.sample = self._start_profiler()
        if self.sample or self.tracing:
            self.step_name = f"{STEP} {trainer.global_step}"
            self.began = time.perf_counter()
            self.frame.enter_context(record_function(self.step_name))

    def on_before_backward(self, *_: Any) -> None:
        """Mark the backward pass in a trace."""
        self._enter("backward")

    def on_after_backward(self, *_: Any) -> None:
        """Mark its end."""
        self.inner.close()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any
    ) -> None:
        """Take the norm of the dense parameters' gradients, before they are clipped."""
        self._enter("optimizer")
        module: Any = pl_module
        if module.step_is_logged:
            dense = module.optimizers(use_pl_optimizer=False).dense
            gradients = [p.grad for p in dense if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(gradients)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:  # fmt: skip
        """Log where it is due."""
        if self.sample and self.cuda:
            torch.cuda.synchronize()
        self.inner.close()
        self.frame.close()
        if self.sample:
            self._end_sample(self.sample, time.perf_counter() - self.began)
        if self.tracing and self.trace and trainer.global_step > self.trace[1]:
            self._end_trace(trainer)
        step = trainer.global_step
        if step % trainer.log_every_n_steps == 0 and step > self.logged_at[0]:
            self._log(trainer, pl_module)
        self.ended = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a trace that the training ended in."""
        if self.tracing:
            self._end_trace(trainer)
        elif self.trace and trainer.global_step <= self.trace[0] and trainer.is_global_zero:
            _warn(
                f"train.profile begins at step {self.trace[0]}, but training ended after "
                f"{trainer.global_step} steps: no trace was written"
            )

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Write a trace that the training was stopped in."""
        self.inner.close()
        self.frame.close()
        if self.sample:
            self.sample.stop()
            self.sample = None
        if self.tracing:
            self._end_trace(trainer)

    def _start_profiler(self) -> profile:
        """Start to profile what the host and an idle device do from now on."""
        cuda = []
        if self.cuda:
            torch.cuda.synchronize()
            cuda = [ProfilerActivity.CUDA]
        profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
        profiler.start()
        return profiler

    def _enter(self, name: str) -> None:
        """Begin a range of the trace; the one before ends."""
        self.inner.close()
        if self.tracing:
            self.inner.enter_context(record_function(RANGE + name))

    def _leave_out(self, seconds: float) -> None:
        """Keep a time out of what is logged next."""
        step, at = self.logged_at
        self.logged_at = (step, at + seconds)

    def _end_sample(self, sample: profile, seconds: float) -> None:
        """Read where the time of the profiled step went, and when the next one may be."""
        began = time.perf_counter()
        sample.stop()
        self.sample = None
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "step.json"
                sample.export_chrome_trace(str(file))
                parts = split_step(json.loads(file.read_bytes()), self.step_name)
            self.split = {f"step/{part}_ms": ms for part, ms in parts.items()}
            self.split["step/profiled_ms"] = 1000 * seconds
            cost_s = time.perf_counter() - began
            self.sample_due = began + cost_s / PROFILING_SHARE
        except (OSError, ValueError) as error:  # a full disk, for instance
            self.sample_due = math.inf
            _warn(f"where a step's time goes is not logged from here on: {error}")
        self._leave_out(time.perf_counter() - began)

    def _end_trace(self, trainer: L.Trainer) -> None:
        """Write the trace, whole or not at all; where it cannot be, the training goes on."""
        assert self.tracing is not None
        began = time.perf_counter()
        self.tracing.stop()
        path = self.folder / f"rank{trainer.global_rank}.json.gz"
        partial = path.with_name(f"partial-{path.name}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.tracing.export_chrome_trace(str(partial))
            os.replace(partial, path)
        except OSError as error:
            _warn(f"the trace of train.profile was not written to {path}: {error}")
        self.tracing, self.trace = None, None
        self._leave_out(time.perf_counter() - began)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module: Any = pl_module
        now = time.perf_counter()
        seconds = now - self.logged_at[1]
        values: dict[str, Any] = {
            "speed/examples_per_s": self.events_a_step * self.batches / seconds,
            "step/total_ms": 1000 * seconds / self.batches,
            "step/data_ms": 1000 * self.fetch_s / self.batches,
            "train/grad_norm": float(self.grad_norm),
            **self.split,
            **_rates(module.optimizers(use_pl_optimizer=False)),
            **_memory(pl_module.device),
        }
        if module.latest is not None:
            counts = in_batch_accuracy(module.latest)
            if trainer.world_size > 1:
                dist.all_reduce(counts)
            values["train/accuracy"] = float(counts[0] / counts[1].clamp_min(1))
            module.latest = None
        self.split = {}
        # Not by the module's `log_dict`, which takes 4 ms for these and repeats what is rare.
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)
        self.logged_at, self.fetch_s, self.batches = (trainer.global_step, now), 0.0, 0


class _Fetches(Profiler):
    """Tells the meters when Lightning waits for a batch."""

    def __init__(self, meters: Meters, trainer: L.Trainer) -> None:
        super().__init__()
        self.meters, self.trainer = meters, trainer
        self.began = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.meters.on_fetch_start(self.trainer)
            self.began = time.perf_counter()

    def stop(self, action_name: str) -> None:
        if action_name.endswith("train_dataloader_next"):
            self.meters.on_fetch_end(time.perf_counter() - self.began)


def _rates(optimizers: Any) -> dict[str, float]:
    """Return the learning rates of the tables and of everything else, where there are such."""
    parts = {"lr/tables": optimizers.fused, "lr/dense": optimizers.towers}
    groups = {name: part.param_groups for name, part in parts.items()}
    return {name: group[0]["lr"] for name, group in groups.items() if group}


def _memory(device: torch.device) -> dict[str, float]:
    """Return the gigabytes of each rank, and of the one that needs most."""
    cuda = device.type == "cuda"
    own = torch.cuda.max_memory_reserved(device) if cuda else resident_bytes()
    sizes = torch.tensor([own / 1e9], dtype=torch.float64, device=device)
    every = sizes.new_empty(dist.get_world_size())
    dist.all_gather_into_tensor(every, sizes)
    of_ranks = {f"memory/rank{rank}_gb": size for rank, size in enumerate(every.tolist())}
    return of_ranks | {"memory/most_gb": max(of_ranks.values())}


def resident_bytes() -> int:
    """Return the memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _warn(message: str) -> None:
    print(f"twotower train: WARNING: {message}", file=sys.stderr)
