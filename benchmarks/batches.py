"""Feeding batches: this loader beside torch's DataLoader over the same Parquet, and training.

    python benchmarks/batches.py                     # about 6 minutes

Every example has three ids and a history of up to 50. `twotower` reads the prepared dataset,
memory-mapped. Its peers read one Parquet file with the same columns, a row an example, whose
histories are lists, and pad them: a plain DataLoader takes row by row, as a team writes it first;
the other takes the rows of a whole batch from the Arrow table, as a team writes it second. All
shuffle. Training is that of the same log on the CPU, without validation. Each figure is the median
of several runs. The result is written to benchmarks/results/batches.json.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from large_log import log_config, write_log
from measure import write_result
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from twotower.data.loader import TrainLoader
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.towers.config import ModelConfig
from twotower.train.config import TrainConfig

BATCH = 8192
HISTORY = 50


class ParquetExamples(Dataset[dict[str, Any]]):
    """A row of a Parquet file an example, as a first attempt reads it."""

    def __init__(self, file: Path) -> None:
        self.table = pq.read_table(file).combine_chunks()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: self.table[name][row].as_py() for name in self.table.column_names}


class ParquetBatches(ParquetExamples):
    """All rows of a batch at once."""

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        taken = self.table.take(pa.array(rows)).combine_chunks()
        out = {n: torch.from_numpy(taken[n].to_numpy()) for n in ("user", "item", "device")}
        history = taken["history"].combine_chunks()
        lengths = history.value_lengths().to_numpy()
        padded = np.full((len(rows), HISTORY), -1)
        padded[np.arange(HISTORY) < lengths[:, None]] = history.flatten().to_numpy()
        return out | {"history": torch.from_numpy(padded)}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad histories and stack ids."""
    out = {n: torch.tensor([r[n] for r in rows]) for n in ("user", "item", "device")}
    history = [torch.tensor(r["history"], dtype=torch.int64) for r in rows]
    out["history"] = torch.nn.utils.rnn.pad_sequence(history, batch_first=True, padding_value=-1)
    return out


def write_examples(data: PreparedDataset, file: Path, rows: int) -> None:
    """Write the first training events as examples."""
    c = data.event_columns
    user = c["user"][:rows]
    end = c["history_to"][:rows].astype(np.int64)
    start = np.maximum(data.history_from[user], end - HISTORY)
    lists = [data.timeline[a:b] for a, b in zip(start, end, strict=True)]
    device = np.asarray(data.events["context.device"].slice(0, rows))
    table = pa.table({"user": user, "item": c["item"][:rows], "history": lists, "device": device})
    pq.write_table(table, file)


def rate(loader: Any, batches: int) -> float:
    """Return examples a second of the batches after the first."""
    iterator = iter(loader)
    next(iterator)
    started = time.perf_counter()
    taken = sum(len(b.item_N if hasattr(b, "item_N") else b["item"])
                for b in itertools.islice(iterator, batches))  # fmt: skip
    seconds = time.perf_counter() - started
    del iterator
    return taken / seconds


def training_rate(data: PreparedDataset, folder: Path, steps: int) -> float:
    """Return events a second of training steps, its loader included."""
    import lightning as L

    from twotower.towers.two_tower import TwoTower
    from twotower.train.module import RetrievalModule
    from twotower.train.negatives import PositiveRates
    from twotower.train.strategy import TorchRecStrategy

    times: list[float] = []

    class Clock(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            times.append(time.perf_counter())

    rows = {table: info["rows"] for table, info in data.summary["tables"].items()}
    towers = TwoTower(data.config, rows, ModelConfig(), table_device="meta")
    counts = torch.from_numpy(data.train_count.copy())
    config = TrainConfig()
    rates = PositiveRates(counts, steps, learned=False)
    module = RetrievalModule(towers, config, rates, config.batch_size, steps, seed=0)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=[Clock()], logger=False,
        strategy=TorchRecStrategy(TrainConfig(), 0, lambda plan: None),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, TrainLoader(data, BATCH, 0))
    return BATCH / median(np.diff(times))


def main() -> None:
    """Measure and print all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Some 160 events a user, so that most histories are full.
        write_log(folder / "log", arguments.events, users=arguments.events // 160)
        (folder / "prepared").mkdir()
        prepare(log_config(folder / "log", length=HISTORY), folder / "prepared")
        data = PreparedDataset(folder / "prepared")
        write_examples(data, folder / "examples.parquet", min(200_000, data.section(0).stop))
        examples = ParquetExamples(folder / "examples.parquet")
        probe = next(iter(TrainLoader(data, BATCH, 0)))
        mean_history = float(probe.ids["query.history"].lengths().float().mean())
        rates: dict[str, list[float]] = {}
        for _ in range(arguments.repeat):
            for workers in (0, 1, 2):
                ours = TrainLoader(data, BATCH, 0, workers=workers)
                rates.setdefault(f"twotower, {workers} workers", []).append(rate(ours, 100))
            for workers in (0, 2):
                plain = DataLoader(examples, BATCH, shuffle=True, collate_fn=collate,
                                   num_workers=workers)  # fmt: skip
                rates.setdefault(f"DataLoader, {workers} workers", []).append(rate(plain, 4))
                sampler = BatchSampler(RandomSampler(range(len(examples))), BATCH, drop_last=True)
                taking = DataLoader(ParquetBatches(folder / "examples.parquet"), None,
                                    sampler=sampler, num_workers=workers)  # fmt: skip
                rates.setdefault(f"Arrow take, {workers} workers", []).append(rate(taking, 15))
        rates["training on the CPU"] = [training_rate(data, folder, 8)]
    shown = {n: median(v) for n, v in rates.items()}
    best = max(v for n, v in shown.items() if n.startswith("twotower"))
    peer = max(v for n, v in shown.items() if n.startswith("DataLoader"))
    second = max(v for n, v in shown.items() if n.startswith("Arrow"))
    train = shown["training on the CPU"]
    for label, value in shown.items():
        print(f"{label:24} {value:>12,.0f} examples/s")
    print(f"mean history {mean_history:.1f}: {best / peer:.0f}x the plain DataLoader, "
          f"{best / second:.1f}x Arrow take, {best / train:.0f}x what training takes")  # fmt: skip
    write_result(
        "batches",
        {"events": arguments.events, "batch_size": BATCH, "mean_history": round(mean_history, 1),
         "examples_per_second": {n: round(v) for n, v in shown.items()},
         "against_dataloader": round(best / peer, 1),
         "against_arrow_take": round(best / second, 2),
         "against_training": round(best / train, 1)},
        ("twotower", "torch", "numpy", "pyarrow"),
    )  # fmt: skip
    os._exit(0)  # gloo's threads may abort an orderly exit


if __name__ == "__main__":
    main()
