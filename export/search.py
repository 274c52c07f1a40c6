"""How a bundle's index is searched, on whatever host: NumPy, ONNX Runtime and, for some, faiss.

A lossy index finds `rescore` candidates a result, and the whole fp32 item vectors, mapped from
their file, order them: what it answers are true inner products, and what it may lack are items.

Imports nothing of twotower's: the file is copied beside `twotower.serve.model`, into Triton.

Shape legend: `B` batch, `D` width, `N` items, `K` results, `C` candidates.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

FAISS_FILE = "index.faiss"
SCAN_FILE = "scan.onnx"
FAISS_KINDS = ("pq", "ivf", "hnsw")
# Of the catalogue as candidates: beyond, reading all of it is as fast, and misses nothing.
EXACT_SHARE = 0.25
ROWS_A_BLOCK = 1 << 16
# ONNX Runtime's product of two matrices copies all item vectors into an order of its own first:
# once, where there is room for the copy, else at every product but that of one vector. Of 100,000 x
# 64 on one thread, 1, 2, 3 and 4 vectors then took 1.0, 3.8, 4.2 and 4.3 ms together.
COPIED_BYTES = 256 << 20
FEW_VECTORS = 3
# A scan of 100,000 x 64 takes 0.5, 0.7, 0.9 and 1.1 times as long as fp32 products, of 1, 2, 3 and
# 4 vectors (benchmarks/search.py).
SCANNED_VECTORS = 2
# A scan whose bounds leave more of the catalogue than this is given up.
SCANNED_SHARE = 1 / 16
# What a host is tried with, this many times.
TRIED_VECTORS, TRIED_K, TRIALS = 4, 100, 3
F32 = npt.NDArray[np.float32]
Found = tuple[F32, npt.NDArray[np.int64]]


def cut_vectors(vector_BD: F32, width: int, bias: bool) -> F32:
    """Return vectors of fewer coordinates (B, width), as `twotower.towers.tower.cut` does."""
    if width == vector_BD.shape[1]:
        return vector_BD
    direction = vector_BD[:, : width - bias]
    length = np.linalg.norm(direction, axis=1, keepdims=True)
    direction = direction / np.maximum(length, np.float32(1e-12))
    return np.hstack([direction, vector_BD[:, -1:]]) if bias else direction


def exact_top_k(item_ND: F32, vector_BD: F32, k: int) -> Found:
    """Return the best scores and their rows (B, K), best first; k is at most N."""
    none = np.empty(0, np.float32), np.empty(0, np.int64)
    best: list[Found] = [none] * len(vector_BD)
    for start in range(0, len(item_ND), ROWS_A_BLOCK):
        score_BR = vector_BD @ item_ND[start : start + ROWS_A_BLOCK].T
        for i, score_R in enumerate(score_BR):
            scores, rows = best[i]
            # Of a later block, few are better than the worst of k.
            near = (
                np.arange(len(score_R)) if len(rows) < k else np.flatnonzero(score_R > scores[-1])
            )
            scores = np.concatenate([scores, score_R[near]])
            rows = np.concatenate([rows, near + start])
            kept_scores, kept = _best(scores, k)
            best[i] = kept_scores, rows[kept]
    return np.stack([scores for scores, _ in best]), np.stack([rows for _, rows in best])


def _best(score_N: F32, k: int) -> Found:
    rows = np.arange(len(score_N))
    if k < len(score_N):
        least = np.partition(score_N, len(score_N) - k)[len(score_N) - k]
        rows = np.flatnonzero(~(score_N < least))  # all of equal scores, and any NaN
    rows = rows[np.lexsort((rows, -score_N[rows]))][:k]
    return score_N[rows], rows


def best_among(item_ND: F32, vector_D: F32, row_R: npt.NDArray[np.int64], k: int) -> Found:
    """Return the best scores and rows (K,) of some ascending rows, best first; k is at most R."""
    score_R = np.empty(len(row_R), np.float32)
    for start in range(0, len(row_R), ROWS_A_BLOCK):
        block = slice(start, start + ROWS_A_BLOCK)
        score_R[block] = item_ND[row_R[block]] @ vector_D
    scores, place = _best(score_R, k)
    return scores, row_R[place]


def _open_graph(path: Path, threads: int, *, copied: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait by spinning take the time of all others: on 2 cores, 200 requests a second
    # through the gateway had a p99 of 84 ms by 2 threads that did, and 24 by 2 that slept.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_prepacking", str(int(not copied)))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Scan:
    """Searches for a few vectors by all products in 8 bits, and misses none of the best.

    One vector's search takes as long as reading all items does, and 8 bits are a quarter of fp32.
    Their products are off by a number of which the greatest is known (Cauchy and Schwarz): with it
    above and below, whatever cannot be one of the best is left out, and of the rest the fp32
    vectors decide.

    Args:
        folder: with the bundle's files.
        item_ND: all item vectors.
        threads: of a search.
    """

    def __init__(self, folder: Path, item_ND: F32, threads: int) -> None:
        self.item_ND = item_ND
        self.session = _open_graph(folder / SCAN_FILE, threads, copied=True)
        known = self.session.get_modelmeta().custom_metadata_map
        self.longest, self.error = float(known["longest"]), float(known["error"])
        _, self.groups = self.session.get_outputs()[1].shape  # of `group_best`

    def bound(self, vector_D: F32) -> float:
        """Return what a vector's products in 8 bits are off by at most."""
        length = float(np.linalg.norm(vector_D))
        # ONNX Runtime rounds it to 8 bits too, a block of coordinates after the other: by half of a
        # step each, and a step is at most a 127th of the largest.
        rounded = float(np.abs(vector_D).max()) / 254 * len(vector_D) ** 0.5
        off = rounded * self.longest + (length + rounded) * self.error
        return float(1.01 * off + 1e-5 * length * self.longest)  # and fp32's own

    def products(self, vector_BD: F32) -> tuple[F32, F32]:
        """Return all products (B, N), and the greatest of each group of items, in 8 bits."""
        rough_BN, best_BG = self.session.run(["rough", "group_best"], {"vector": vector_BD})
        return rough_BN, best_BG

    def search(self, vector_BD: F32, k: int) -> Found | None:
        """Return the best scores and their rows (B, K), best first; None where it does not pay."""
        if k > self.groups:
            return None
        rough_BN, best_BG = self.products(vector_BD)
        scores = np.empty((len(vector_BD), k), np.float32)
        rows = np.empty((len(vector_BD), k), np.int64)
        for i, vector_D in enumerate(vector_BD):
            # The best k groups have an item each that is at least this good but for the bound.
            least = np.partition(best_BG[i], self.groups - k)[self.groups - k]
            left = np.flatnonzero(rough_BN[i] >= least - 2 * self.bound(vector_D))
            if not k <= len(left) <= SCANNED_SHARE * len(self.item_ND):
                return None
            # Row by row, so that equal items have equal scores.
            true = np.einsum("rd,d->r", self.item_ND[left], vector_D)
            scores[i], place = _best(true, k)
            rows[i] = left[place]
        return scores, rows

    def pays(self, otherwise: ort.InferenceSession) -> bool:
        """Return whether this host's products keep their bound, and are faster than all of fp32's.

        Args:
            otherwise: of `index.onnx`.
        """
        tried = np.linspace(0, len(self.item_ND) - 1, TRIED_VECTORS).astype(np.int64)
        k = min(TRIED_K, self.groups)
        for vector_D in self.item_ND[tried]:
            off = self.products(vector_D[None])[0][0] - self.item_ND @ vector_D
            if not np.abs(off).max() <= self.bound(vector_D):
                return False
        scanned, all_products = [], []
        for row in np.tile(tried, TRIALS):
            vector_BD = self.item_ND[row][None]
            started = time.perf_counter()
            if self.search(vector_BD, k) is None:
                return False
            between = time.perf_counter()
            otherwise.run(None, {"vector": vector_BD, "k": np.array([k], np.int64)})
            scanned.append(between - started)
            all_products.append(time.perf_counter() - between)
        return median(scanned) < median(all_products)


class GraphSearch:
    """Searches with `index.onnx`, and with `scan.onnx` for few vectors where there is one.

    Args:
        folder: with the bundle's files.
        spec: the manifest's `index`.
        threads: of a search.
    """

    def __init__(self, folder: Path, spec: dict[str, Any], threads: int) -> None:
        # Still of the file; a plain array's rows are read faster than a map's.
        self.item_ND = np.asarray(
            np.load(folder / "item_vectors.npy", mmap_mode="r", allow_pickle=False)
        )
        in_int8 = spec["kind"] == "int8"
        item_bytes = spec["width"] * (1 if in_int8 else 4)
        copied = item_bytes * len(self.item_ND) <= COPIED_BYTES
        self.few = 1 if in_int8 or copied else FEW_VECTORS
        self.session = _open_graph(folder / "index.onnx", threads, copied=copied)
        self.scan: Scan | None = None
        if (folder / SCAN_FILE).exists() and self.item_ND.nbytes <= 4 * COPIED_BYTES:
            scan = Scan(folder, self.item_ND, threads)
            self.scan = scan if scan.pays(self.session) else None

    def search(self, vector_BD: F32, k: int) -> Found:
        """Return the best scores and their rows (B, K), best first; k is at most N."""
        if self.scan and 0 < len(vector_BD) <= SCANNED_VECTORS:
            scanned = self.scan.search(vector_BD, k)
            if scanned is not None:
                return scanned
        if 1 < len(vector_BD) <= self.few:
            found = [self.search(vector_D[None], k) for vector_D in vector_BD]
            scores, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
            return scores, rows
        feed = {"vector": vector_BD, "k": np.array([k], np.int64)}
        scores, rows = self.session.run(None, feed)
        return scores, rows

    def among(self, vector_D: F32, row_R: npt.NDArray[np.int64], k: int) -> Found:
        """Return the best scores and rows (K,) of some rows; see `best_among`."""
        return best_among(self.item_ND, vector_D, row_R, k)


class FaissSearch:
    """Searches with `index.faiss`, then orders the candidates by the whole vectors."""

    def __init__(self, folder: Path, spec: dict[str, Any], threads: int) -> None:
        import faiss

        file = folder / FAISS_FILE
        faiss.omp_set_num_threads(threads)
        self.index = faiss.read_index(str(file))
        self.item_ND = np.load(folder / "item_vectors.npy", mmap_mode="r", allow_pickle=False)
        if (self.index.ntotal, self.index.d) != (len(self.item_ND), spec["width"]):
            raise ValueError(f"{file}: is of other item vectors")
        self.spec, self.faiss = spec, faiss

    def _parameters(self, candidates: int) -> Any:
        if self.spec["kind"] == "ivf":
            return self.faiss.SearchParametersIVF(nprobe=self.spec["nprobe"])
        if self.spec["kind"] == "hnsw":
            return self.faiss.SearchParametersHNSW(efSearch=max(self.spec["ef_search"], candidates))
        return None

    def search(self, vector_BD: F32, k: int) -> Found:
        """Return the best scores and their rows (B, K), best first; k is at most N."""
        candidates = k * self.spec["rescore"]
        if candidates > EXACT_SHARE * len(self.item_ND):
            return exact_top_k(self.item_ND, vector_BD, k)
        cut = cut_vectors(vector_BD, self.spec["width"], bool(self.spec["bias"]))
        _, row_BC = self.index.search(
            np.ascontiguousarray(cut, np.float32), candidates,
            params=self._parameters(candidates),
        )  # fmt: skip
        return self._rescored(vector_BD, row_BC, k)

    def among(self, vector_D: F32, row_R: npt.NDArray[np.int64], k: int) -> Found:
        """Return the best scores and rows (K,) of some rows; see `best_among`."""
        return best_among(self.item_ND, vector_D, row_R, k)

    def _rescored(self, vector_BD: F32, row_BC: npt.NDArray[np.int64], k: int) -> Found:
        scores = np.empty((len(vector_BD), k), np.float32)
        rows = np.empty((len(vector_BD), k), np.int64)
        for i, vector_D in enumerate(vector_BD):
            found = np.sort(row_BC[i][row_BC[i] >= 0])
            if len(found) < k:  # the cells that were searched hold no more
                (scores[i],), (rows[i],) = exact_top_k(self.item_ND, vector_D[None], k)
                continue
            scores[i], rows[i] = best_among(self.item_ND, vector_D, found, k)
        return scores, rows


def open_search(folder: Path, spec: dict[str, Any], threads: int = 1) -> GraphSearch | FaissSearch:
    """Open the index of a directory whose files were compared with the manifest.

    Args:
        folder: with the bundle's files.
        spec: the manifest's `index`.
        threads: of a search.

    Raises:
        ValueError: for an index of other item vectors.
        ModuleNotFoundError: where it needs faiss, and that is missing.
    """
    if spec["kind"] in FAISS_KINDS:
        return FaissSearch(folder, spec, threads)
    return GraphSearch(folder, spec, threads)
