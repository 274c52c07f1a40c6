"""What each kind of index costs and loses on a bundle's vectors: `twotower index --compare`.

Recall is of the exact answers to the bundle's golden queries, at k. Latency is a search alone, from
vectors to items: the median of interleaved runs on two threads, one query at a time, and 64.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from twotower.errors import UserError
from twotower.export.bundle import Bundle
from twotower.export.config import INDEX_KINDS, IndexConfig
from twotower.export.golden import raw_tensors, session
from twotower.export.index import VECTORS, build_index, index_spec
from twotower.export.search import exact_top_k, open_search

THREADS = 2
BATCHES = (1, 64)
ROUNDS = 11
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class IndexCost:
    """What one index costs and loses."""

    kind: str
    width: int
    recall: float
    """Share of the exact top k that it finds."""
    bytes_an_item: float
    """That a search reads or holds; where it is lossy, the whole vectors stay on disk beside it."""
    build_s: float
    latency_ms: dict[int, float]
    """Median of a search, by its number of queries."""


def compare_indexes(
    bundle: Bundle, config: IndexConfig, k: int, report: Callable[[str, float], None]
) -> list[IndexCost]:
    """Build every kind of index of a bundle's vectors, and measure it.

    Args:
        bundle: checked already.
        config: settings of all kinds; with a width, the kinds are also measured with it.
        k: results.
        report: is told the stage and the share done.

    Raises:
        UserError: for a k beyond the catalogue.
    """
    m = bundle.manifest
    if not 1 <= k <= m.num_items:
        raise UserError(
            f"--k must be in 1..{m.num_items} (the catalogue's items), got {k}: lower it"
        )
    report("queries", 0.0)
    tensors = raw_tensors(m.query, [g.features for g in bundle.golden()])
    (queries,) = session(bundle.path / "query.onnx").run(["vector"], tensors)
    vectors = np.load(bundle.path / VECTORS, mmap_mode="r", allow_pickle=False)
    widths = sorted({m.dim, config.width or m.dim}, reverse=True)
    settings = [replace(config, kind=kind, width=width) for width in widths for kind in INDEX_KINDS]
    with TemporaryDirectory(prefix="twotower-") as work:
        return measure_indexes(
            vectors, queries, settings, k, bool(m.index.bias), Path(work), report
        )


def measure_indexes(
    vectors: F32, queries: F32, settings: list[IndexConfig], k: int, item_bias: bool, work: Path,
    report: Callable[[str, float], None],
) -> list[IndexCost]:  # fmt: skip
    """Build an index for each of some settings below `work`, and measure them."""
    _, expected = exact_top_k(vectors, queries, k)
    searches, costs = [], []
    for i, config in enumerate(settings):
        report(f"{config.kind} index", i / (len(settings) + 1))
        spec = index_spec(config, vectors.shape[1], item_bias)
        folder = work / str(i)
        folder.mkdir()
        np.save(folder / VECTORS, vectors)
        started = time.perf_counter()
        size = build_index(folder, spec, config)
        seconds = time.perf_counter() - started
        search = functools.partial(open_search(folder, asdict(spec), THREADS).search, k=k)
        found = np.concatenate([search(part)[1] for part in _batches(queries, 64)])
        costs.append(IndexCost(
            kind=spec.kind, width=spec.width, recall=overlap(expected, found),
            bytes_an_item=size / len(vectors), build_s=seconds, latency_ms={},
        ))  # fmt: skip
        searches.append(search)
    report("latency", len(settings) / (len(settings) + 1))
    times: list[dict[int, list[float]]] = [{b: [] for b in BATCHES} for _ in searches]
    for number in range(ROUNDS):
        for taken, search in zip(times, searches, strict=True):
            for size in BATCHES:
                batch = np.take(queries, np.arange(number, number + size), axis=0, mode="wrap")
                started = time.perf_counter()
                search(batch)
                taken[size].append(1000 * (time.perf_counter() - started))
    return [
        replace(cost, latency_ms={size: median(each) for size, each in taken.items()})
        for cost, taken in zip(costs, times, strict=True)
    ]


def _batches(queries: F32, size: int) -> Iterator[F32]:
    for start in range(0, len(queries), size):
        yield queries[start : start + size]


def overlap(expected: npt.NDArray[np.int64], found: npt.NDArray[np.int64]) -> float:
    """Return the share of the rows expected (B, K) that were found (B, K)."""
    pairs = zip(expected, found, strict=True)
    return float(np.mean([len(np.intersect1d(e, f)) / len(e) for e, f in pairs]))
