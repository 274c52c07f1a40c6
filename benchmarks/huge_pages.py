"""The exact index on a CPU with memory in pages of 2 MB, as the server has it, and of 4 KB.

    python benchmarks/huge_pages.py      # about a minute on 2 cores

100,000 random vectors, 64 wide, are searched for the 100 best of one query and of batches, on one
thread, by two processes that differ in glibc's tunable alone and take turns. Ratios are taken
within a turn; their medians are the result, written to benchmarks/results/huge_pages.json. Where
the kernel gives no such pages (/sys/kernel/mm/transparent_hugepage/enabled is `never`) both are
alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
from measure import write_result

from twotower.export.config import IndexConfig
from twotower.export.index import VECTORS, build_index, index_spec
from twotower.export.search import open_search
from twotower.serve.runtime import HUGE_PAGES
from twotower.show import table

ITEMS, WIDTH, K = 100_000, 64, 100
BATCHES = (1, 2, 4, 8, 16, 32)
RUNS = 5
TUNABLES = {"4 KB": "", "2 MB": HUGE_PAGES}


def take_turns(folder: Path) -> None:
    """Search at every line of the input, and write the median seconds of each batch size."""
    rng = np.random.default_rng(1)
    index = open_search(folder, asdict(index_spec(IndexConfig(), WIDTH, False)), 1)
    vectors = [rng.standard_normal((size, WIDTH)).astype(np.float32) for size in BATCHES]
    for _ in sys.stdin:
        seconds = []
        for vector_BD in vectors:
            runs = []
            for _ in range(RUNS):
                started = time.perf_counter()
                index.search(vector_BD, K)
                runs.append(time.perf_counter() - started)
            seconds.append(median(runs))
        print(json.dumps(seconds), flush=True)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--index", type=Path, help=argparse.SUPPRESS)  # one of the two processes
    options = parser.parse_args()
    if options.index:
        take_turns(options.index)
        return
    found: dict[str, list[list[float]]] = {name: [] for name in TUNABLES}
    with TemporaryDirectory(prefix="twotower-") as work, ExitStack() as stack:
        folder = Path(work)
        rng = np.random.default_rng(0)
        np.save(folder / VECTORS, rng.standard_normal((ITEMS, WIDTH)).astype(np.float32))
        build_index(folder, index_spec(IndexConfig(), WIDTH, False), IndexConfig())
        processes = {}
        for name, tunables in TUNABLES.items():
            processes[name] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, f"--index={folder}"],
                    env=os.environ | {"GLIBC_TUNABLES": tunables},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for number in range(options.turns + 1):
            for name in sorted(processes, reverse=number % 2 == 1):
                process = processes[name]
                assert process.stdin
                assert process.stdout
                process.stdin.write("\n")
                process.stdin.flush()
                found[name].append(json.loads(process.stdout.readline()))
    rows = []
    for place, batch in enumerate(BATCHES):
        # The first turn is for caches.
        small, large = ([turn[place] for turn in found[name][1:]] for name in TUNABLES)
        ratio = median(b / a for a, b in zip(small, large, strict=True))
        ms = {"4 KB": 1000 * median(small), "2 MB": 1000 * median(large)}
        rows.append({"batch": batch, "ms": ms, "ratio": ratio})
    table(
        f"{ITEMS:,} x {WIDTH}, top {K}, one thread, pages of",
        [">batch", *(f">{name}, ms" for name in TUNABLES), ">ratio"],
        [[str(row["batch"]), *(f"{row['ms'][name]:.2f}" for name in TUNABLES),
          f"{row['ratio']:.2f}"] for row in rows],
    )  # fmt: skip
    write_result(
        "huge_pages", {"items": ITEMS, "width": WIDTH, "k": K, "turns": options.turns,
                       "rows": rows}, ("numpy", "onnxruntime"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
