"""Whether to look up a batch's repeated ids once: measured where ids are looked up, on one process.

    python benchmarks/duplicates.py                  # about a minute

A batch of 8,192 with a history of 50 repeats its items a lot (1/rank popularity, 500,000 items).
Two places could use each once: the embedding lookup (forward and fused backward; the unique rows
are looked up and spread by an index), and the gather of item features in the loader. Both pay for
finding the unique ids. The result is written to benchmarks/results/duplicates.json.

On CUDA with several ranks, where every id looked up is also sent, TorchRec's own
`use_index_dedup` does this inside the sharded lookup; it has no CPU kernels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measure import write_result
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from twotower.train.strategy import TorchRecStrategy

ROWS, BATCH, LENGTH, DIM = 500_000, 8192, 50, 64
REPEAT = 9
Array = npt.NDArray[Any]


def draw(size: int, rng: np.random.Generator) -> Array:
    """Return ids, that of rank r with probability of about 1 / r."""
    return np.minimum(np.exp(rng.random(size) * np.log(ROWS)).astype(np.int64), ROWS - 1)


def timed(work: Callable[[Any], Any], inputs: list[Any]) -> float:
    """Return the median milliseconds."""
    times = []
    for value in inputs:
        started = time.perf_counter()
        work(value)
        times.append(1e3 * (time.perf_counter() - started))
    return median(times[1:])


def lookups(rng: np.random.Generator) -> dict[str, float]:
    """Time a lookup of a batch's ids, forward and backward with the fused optimizer."""
    from torch.distributed.optim import _apply_optimizer_in_backward as in_backward
    from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = EmbeddingConfig(name="t", embedding_dim=DIM, num_embeddings=ROWS,
                                     feature_names=["item"])  # fmt: skip
            self.lists = EmbeddingCollection(tables=[config])
            in_backward(RowWiseAdagrad, self.lists.parameters(), {"lr": 0.01})

        def table_names(self) -> list[str]:
            return ["t"]

        def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
            return self.lists(ids)["item"].values()

    strategy = TorchRecStrategy(parallel_devices=[torch.device("cpu")])
    model = strategy._shard(Model())

    def look_up(values: torch.Tensor) -> torch.Tensor:
        lengths = torch.ones(len(values), dtype=torch.int64)
        return model(KeyedJaggedTensor(keys=["item"], values=values, lengths=lengths))

    def plain(values: torch.Tensor) -> None:
        (look_up(values) ** 2).sum().backward()

    def once(values: torch.Tensor) -> None:
        unique, place = torch.unique(values, return_inverse=True)
        (look_up(unique).index_select(0, place) ** 2).sum().backward()

    batches = [torch.from_numpy(draw(BATCH * (LENGTH + 1), rng)) for _ in range(REPEAT)]
    share = median(len(torch.unique(b)) / len(b) for b in batches)
    return {
        "unique_share": share,
        "plain_ms": timed(plain, batches),
        "once_ms": timed(once, batches),
    }


def gathers(width: int, rng: np.random.Generator) -> dict[str, float]:
    """Time the gather of an item feature of `width` floats."""
    values = rng.random((ROWS, width), np.float32)

    def once(rows: Array) -> Array:
        unique, place = np.unique(rows, return_inverse=True)
        return values[unique][place]

    batches = [draw(BATCH, rng) for _ in range(5 * REPEAT)]
    share = median(len(np.unique(b)) / len(b) for b in batches)
    return {"unique_share": share, "plain_ms": timed(values.__getitem__, batches),
            "once_ms": timed(once, batches)}  # fmt: skip


def main() -> None:
    """Measure both places and print the ratios."""
    import torch.distributed as dist

    rng = np.random.default_rng(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    results = {f"gather of {w} floats": gathers(w, rng) for w in (1, 16, 128, 768)}
    results["embedding lookup"] = lookups(rng)
    for name, r in results.items():
        r["ratio"] = r["once_ms"] / r["plain_ms"]
        print(f"{name:22} {r['unique_share']:.0%} unique: as they come {r['plain_ms']:7.2f} ms, "
              f"each once {r['once_ms']:7.2f} ms, ratio {r['ratio']:.2f}")  # fmt: skip
    rounded = {n: {k: round(v, 3) for k, v in r.items()} for n, r in results.items()}
    write_result("duplicates", {"results": rounded}, ("twotower", "torch", "torchrec", "numpy"))
    os._exit(0)  # gloo's threads may abort an orderly exit


if __name__ == "__main__":
    main()
