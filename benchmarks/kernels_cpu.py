"""The kernels' CPU implementations: time and memory beside what they replace, in the same run.

    python benchmarks/kernels_cpu.py                 # about 3 minutes; faiss-cpu if importable

Times are medians of interleaved runs on the same threads; memory is what a process of its own
gains at its peak while it does the work once. The result is written to
benchmarks/results/kernels_cpu.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from measure import write_result

from twotower.kernels.dot_interaction import dot_interaction, dot_interaction_reference
from twotower.kernels.low_rank_cross import low_rank_cross, low_rank_cross_reference
from twotower.kernels.sampled_softmax import sampled_softmax, sampled_softmax_reference
from twotower.kernels.top_k_inner_product import top_k_inner_product

Work = Callable[[], Any]


def unit(*shape: int) -> torch.Tensor:
    """Return random vectors of length 1."""
    return F.normalize(torch.randn(*shape), dim=-1)


def softmax_works(batch: int = 8192, width: int = 64) -> dict[str, Work]:
    """Return a training step's loss and gradients, by each implementation."""
    query, candidate = unit(batch, width), unit(batch, width)
    # In-batch items of a skewed log: some come often.
    ids = (torch.rand(batch) ** 3 * batch).long()
    log_q = torch.randn(batch)

    def step(loss: Callable[..., torch.Tensor]) -> Work:
        def work() -> Any:
            leaves = [query.clone().requires_grad_(), candidate.clone().requires_grad_(),
                      torch.tensor(0.1, requires_grad=True)]  # fmt: skip
            value = loss(*leaves, log_q_N=log_q, candidate_id_N=ids)
            return torch.autograd.grad(value, leaves)

        return work

    return {"naive": step(sampled_softmax_reference), "twotower": step(sampled_softmax)}


def top_k_works(items: int = 1_000_000, width: int = 64, batch: int = 64, k: int = 100) -> Any:
    """Return a search by each implementation."""
    query, item = unit(batch, width), unit(items, width)
    works: dict[str, Work] = {
        "matmul + torch.topk": lambda: (query @ item.T).topk(k),
        "twotower": lambda: top_k_inner_product(query, item, k),
    }
    if find_spec("faiss"):
        import faiss

        index = faiss.IndexFlatIP(width)
        index.add(item.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())
        works["faiss.IndexFlatIP"] = lambda: index.search(query.numpy(), k)
    return works


def _steps(
    own: Callable[..., torch.Tensor], reference: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> dict[str, Work]:
    leaves = [t.requires_grad_() for t in inputs]

    def step(function: Callable[..., torch.Tensor]) -> Work:
        def work() -> Any:
            out = function(*leaves)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        return work

    return {"eager": step(reference), "twotower": step(own)}


def dot_works(batch: int = 8192, features: int = 27, width: int = 64) -> dict[str, Work]:
    """Return pairwise dots and their gradients, by each implementation."""
    return _steps(dot_interaction, dot_interaction_reference, torch.randn(batch, features, width))


def cross_works(
    batch: int = 8192, width: int = 256, rank: int = 32, layers: int = 2
) -> dict[str, Work]:
    """Return cross layers and their gradients, by each implementation."""
    shapes = (batch, width), (layers, width, rank), (layers, rank, width), (layers, width)
    return _steps(
        low_rank_cross, low_rank_cross_reference, *(0.1 * torch.randn(*s) for s in shapes)
    )


SUITES = {
    "sampled_softmax 8192 x 8192 x 64, forward + backward": softmax_works,
    "top_k_inner_product 64 x 1M x 64, k = 100": top_k_works,
    "dot_interaction 8192 x 27 x 64, forward + backward": dot_works,
    "low_rank_cross 8192 x 256, rank 32, 2 layers, forward + backward": cross_works,
}


def times(works: dict[str, Work], repeat: int) -> dict[str, float]:
    """Return the median seconds of each, run in turn."""
    measured: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeat + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            if number:  # the first warms up
                measured[name].append(time.perf_counter() - started)
    return {name: median(values) for name, values in measured.items()}


def peak_mb(suite: str, name: str) -> float:
    """Return what a process of its own gains in memory, in MB."""
    command = [sys.executable, __file__, "--memory", suite, name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def print_memory(suite: str, name: str) -> None:
    """Do the work once and print the gain of the peak."""
    torch.manual_seed(0)
    works = SUITES[suite]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_kb()
    works[name]()
    print((_peak_kb() - before) / 1e3)


def _peak_kb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def main() -> None:
    """Measure every suite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--memory", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        return print_memory(*arguments.memory)
    torch.manual_seed(0)
    results = {}
    for suite, make in SUITES.items():
        seconds = times(make(), arguments.repeat)
        memory = {name: peak_mb(suite, name) for name in seconds}
        print(suite)
        for name, value in seconds.items():
            print(f"  {name:20} {1e3 * value:8.1f} ms {memory[name]:8.1f} MB, twotower: "
                  f"{value / seconds['twotower']:5.2f}x as fast, "
                  f"{memory[name] / max(memory['twotower'], 0.1):6.1f}x less memory")  # fmt: skip
        results[suite] = {
            name: {"ms": round(1e3 * value, 1), "peak_mb": round(memory[name], 1)}
            for name, value in seconds.items()
        }
    packages = ("torch", "numpy", *(("faiss-cpu",) if find_spec("faiss") else ()))
    write_result("kernels_cpu", {"threads": torch.get_num_threads(), "results": results}, packages)


if __name__ == "__main__":
    main()
