"""Training on a CPU beside plain torch and beside TorchRec without our loss.

    python benchmarks/train_cpu.py                   # about 5 minutes
    python benchmarks/train_cpu.py --small           # tries the script itself

1M users x 200k items of width 64, a user id and an item id, layers 128-64, batches of 8,192, the
softmax over the batch's items with logQ correction and accidental hits masked, on all cores. All
three (`training_peers.py`) begin with the same weights, which the loss of one batch proves, and
take the same batches from our loader. `twotower` trains as `twotower train` does, by Lightning, our
strategy and a CSV log, but without the meters, which may take 1% of the time; its peers run plain
loops. In one process they take turns of a few steps, in every round; each figure is the median
over the rounds. A last round is profiled (`step_profile.py`). The log's items follow a power law
(`large_log.py`). The result is written to benchmarks/results/train_cpu.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from large_log import log_config, write_log
from lightning.pytorch.loggers import CSVLogger
from measure import write_result
from step_profile import STAGES, stage_of_module, stages_ms
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.profiler import ProfilerActivity, profile
from training_peers import Peer, plain_peer, torchrec_peer

from twotower.data.batches import Batch
from twotower.data.loader import TrainLoader
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Feature
from twotower.kernels.sampled_softmax import sampled_softmax
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import PREFIX, TwoTower
from twotower.train.config import TrainConfig
from twotower.train.module import RetrievalModule
from twotower.train.negatives import PositiveRates
from twotower.train.strategy import TorchRecStrategy

SEED = 0
GOAL = 3.0  # times as fast as plain torch
MODEL = ModelConfig(dim=64, hidden=[128])
OURS, PLAIN, TORCHREC = "twotower", "plain torch", "torchrec"
WARM_UP = 3  # steps before the first round


@dataclass(frozen=True)
class Size:
    """Of a run."""

    users: int
    items: int
    events: int
    batch: int
    rounds: int
    steps: int

    @property
    def all_steps(self) -> int:
        """Steps of each contestant: warm-up, rounds and a profiled round."""
        return WARM_UP + (self.rounds + 1) * self.steps


FULL = Size(users=1_000_000, items=200_000, events=4_000_000, batch=8192, rounds=7, steps=3)
SMALL = Size(users=2_000, items=1_000, events=40_000, batch=256, rounds=2, steps=2)


class Rounds(L.Callback):
    """Lets the peers take their turns between Lightning's steps, and times every turn.

    Args:
        size: of the run.
        data: the prepared dataset.
        rows: of each table.
        config: of training.
    """

    def __init__(
        self, size: Size, data: PreparedDataset, rows: dict[str, int], config: TrainConfig
    ) -> None:
        self.size, self.data, self.rows, self.config = size, data, rows, config
        self.peers: dict[str, Peer] = {}
        self.batches: dict[str, Iterator[Batch]] = {}
        self.turn_s: dict[str, list[float]] = {name: [] for name in (OURS, PLAIN, TORCHREC)}
        self.profiles: dict[str, dict[str, float]] = {}
        self.losses: dict[str, float] = {}
        self.turn_began = 0.0
        self.profiler: profile | None = None

    def loader(self) -> TrainLoader:
        """Return a loader; all give the same batches."""
        return TrainLoader(self.data, self.size.batch, SEED)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the peers of our weights, and see that all three compute the same loss."""
        module: Any = pl_module
        state, log_q_N = module.model.state_dict(), module.log_q_N
        weights = {n: _table(state, n) for n in self.rows}
        towers = [TwoTower(self.data.config, self.rows, MODEL, table_device="meta") for _ in "ab"]
        own = {k: v for k, v in state.items() if ".table_" not in k}
        for other in towers:
            other.load_state_dict(own, strict=False)
        self.peers = {
            PLAIN: plain_peer(towers[0], self.rows, self.config, log_q_N, weights),
            TORCHREC: torchrec_peer(towers[1], self.config, log_q_N, state),
        }
        batch = next(iter(self.loader()))
        losses = {name: float(peer.loss(batch)) for name, peer in self.peers.items()}
        losses[OURS] = float(_our_loss(module, batch))
        # fp32 sums of some 8,192 numbers near 10.
        if max(losses.values()) - min(losses.values()) > 1e-5 * losses[OURS]:
            raise SystemExit(f"the contestants are not the same model: first losses {losses}")
        print(f"first loss of each: {losses[OURS]:.6f}", flush=True)
        stage_of_module(module.model.module.bags, "lookup")
        for tower in (module.model.module.query, module.model.module.item):
            stage_of_module(tower, "towers")
        self.batches = {name: iter(self.loader()) for name in self.peers}
        self.turn_began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *_: Any
    ) -> None:
        """End our turn where it ends, and let the peers take theirs."""
        now = time.perf_counter()
        step, size = trainer.global_step, self.size
        if step < WARM_UP or (step - WARM_UP) % size.steps:
            return
        steps = WARM_UP if step == WARM_UP else size.steps
        self._take(OURS, now - self.turn_began, steps)
        self.losses[OURS] = float(outputs["loss"])
        for name in self.peers:
            self._peers_turn(name, steps, profiled=step == size.all_steps)
        self._say(step)
        if step == size.all_steps - size.steps:  # the last turn begins
            self.profiler = _profiler()
            self.profiler.start()
        self.turn_began = time.perf_counter()

    def _say(self, step: int) -> None:
        if self.profiles:
            return
        turns = ", ".join(f"{n} {1000 * t[-1]:.0f} ms" for n, t in self.turn_s.items())
        print(f"step {step} of {self.size.all_steps}: {turns}", flush=True)

    def _peers_turn(self, name: str, steps: int, profiled: bool) -> None:
        peer, batches = self.peers[name], self.batches[name]
        if profiled:
            self.profiler = _profiler()
            self.profiler.start()
        started = time.perf_counter()
        for _ in range(steps):
            self.losses[name] = peer.step(next(batches))
        self._take(name, time.perf_counter() - started, steps)

    def _take(self, name: str, seconds: float, steps: int) -> None:
        """Keep a turn's time, or what its profile says."""
        if self.profiler is None:
            self.turn_s[name].append(seconds / steps)
            return
        self.profiler.stop()
        self.profiles[name] = stages_ms(self.profiler.events() or [], 1000 * seconds, steps)
        self.profiler = None


def _profiler() -> profile:
    return profile(activities=[ProfilerActivity.CPU])


def _table(state: dict[str, Any], name: str) -> Tensor:
    """Return a table's weights of the state of a model that is sharded over one process."""
    value = state[f"bags.embedding_bags.{PREFIX}{name}.weight"]
    (shard,) = value.local_shards()
    weight: Tensor = shard.tensor
    return weight


@torch.no_grad()
def _our_loss(module: Any, batch: Batch) -> Tensor:
    query_BD, item_BD, temperature, _ = module.model(batch)
    return sampled_softmax(
        query_BD, item_BD, temperature, log_q_N=module.log_q_N[batch.item_N],
        candidate_id_N=batch.item_N, weight_B=batch.weight_B,
    )  # fmt: skip


def prepared_log(folder: Path, size: Size) -> PreparedDataset:
    """Write a log of users and items alone, and prepare it."""
    write_log(folder / "log", size.events, users=size.users, items=size.items)
    config = replace(
        log_config(folder / "log"),
        query=[Feature(name="user_id", kind="id")],
        item=[Feature(name="item_id", kind="id")],
    )
    (folder / "prepared").mkdir()
    prepare(config, folder / "prepared")
    return PreparedDataset(folder / "prepared")


def run(folder: Path, size: Size) -> Rounds:
    """Train all three, in turns."""
    data = prepared_log(folder, size)
    # Tables of the full size, though not every user of the log comes in its training part.
    full = {"user_id": size.users, "item_id": size.items}
    rows = {n: max(full[n], table["rows"]) for n, table in data.summary["tables"].items()}
    config = TrainConfig(batch_size=size.batch, max_steps=size.all_steps, accelerator="cpu")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    loader = TrainLoader(data, size.batch, SEED)
    towers = TwoTower(data.config, rows, MODEL, table_device="meta")
    counts = torch.from_numpy(data.train_count.copy())
    rates = PositiveRates(counts, -(-int(counts.sum()) // size.batch), learned=False)
    module = RetrievalModule(towers, config, rates, size.batch, size.all_steps, SEED)
    rounds = Rounds(size, data, rows, config)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, strategy=TorchRecStrategy(config, SEED, lambda plan: None),
        max_steps=size.all_steps, callbacks=[rounds], logger=CSVLogger(folder),
        log_every_n_steps=10, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader)
    return rounds


def report(rounds: Rounds) -> dict[str, Any]:
    """Print and return what was measured."""
    size = rounds.size
    # The first turn is the warm-up.
    step_s = {name: median(turns[1:]) for name, turns in rounds.turn_s.items()}
    ratios = {name: median(t / own for t, own in zip(turns[1:], rounds.turn_s[OURS][1:],
                                                     strict=True))
              for name, turns in rounds.turn_s.items()}  # fmt: skip
    print(f"{'':12} {'examples/s':>11} {'ms a step':>10} {'slower':>7} {'last loss':>10}   "
          "profiled ms a step: " + ", ".join(STAGES))  # fmt: skip
    for name, seconds in step_s.items():
        split = " ".join(f"{rounds.profiles[name][s]:8.1f}" for s in STAGES)
        print(f"{name:12} {size.batch / seconds:11,.0f} {1000 * seconds:10.1f} "
              f"{ratios[name]:6.2f}x {rounds.losses[name]:10.4f}   {split}")  # fmt: skip
    reached = "reached" if ratios[PLAIN] >= GOAL else "MISSED"
    print(f"{ratios[PLAIN]:.2f}x plain torch; goal {GOAL:g}x: {reached}")
    return {
        "batch_size": size.batch, "users": size.users, "items": size.items, "dim": MODEL.dim,
        "threads": torch.get_num_threads(), "rounds": size.rounds,
        "examples_per_second": {n: round(size.batch / s) for n, s in step_s.items()},
        "ms_a_step": {n: round(1000 * s, 1) for n, s in step_s.items()},
        "times_ours": {n: round(r, 2) for n, r in ratios.items()},
        "goal": GOAL, "last_loss": {n: round(v, 4) for n, v in rounds.losses.items()},
        "profiled_ms_a_step": {
            n: {s: round(ms, 1) for s, ms in split.items()} for n, split in rounds.profiles.items()
        },
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="sizes that try the script only")
    arguments = parser.parse_args()
    # Lightning's and TorchRec's remarks at every start, and the profiler's.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        result = report(run(Path(folder), SMALL if arguments.small else FULL))
    if not arguments.small:
        write_result("train_cpu", result, ("twotower", "torch", "torchrec", "lightning"))
    # gloo's threads may abort an orderly exit.
    os._exit(0)


if __name__ == "__main__":
    main()
