"""Building a bundle's index: of the item vectors, by one of five kinds.

=======  ==========================================================================
`exact`  every item's inner product, in fp32
`int8`   every item's, of vectors in int8 with a scale a row, then rescored
`pq`     every item's, of product-quantised vectors (Jegou et al. 2011) of 4-bit
         codes, scanned in registers (Andre et al. 2015), then rescored
`ivf`    the items in the cells nearest the query, in 8 bits, then rescored
`hnsw`   a walk through a graph of near items (Malkov and Yashunin 2016), in 8 bits,
         then rescored
=======  ==========================================================================

`exact` and `int8` are graphs of ONNX Runtime, the others files of faiss; `twotower.export.search`
searches them all. With a width below the vectors' own, every kind searches the vectors' first
coordinates alone, and is rescored. An `exact` index of many items has a second graph, a scan in 8
bits that a few vectors are searched by: see `twotower.export.search.Scan`.

Shape legend: `B` batch, `D` width of a vector, `W` of it searched, `N` items, `K` results.
"""

from __future__ import annotations

import errno
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from twotower.export.config import IndexConfig
from twotower.export.id_nodes import IR_VERSION, OPSETS, constant
from twotower.export.manifest import IndexSpec
from twotower.export.search import FAISS_FILE, FAISS_KINDS, SCAN_FILE, cut_vectors

VECTORS, CUT, CODES, SCALES = "item_vectors.npy", "item_cut.npy", "item_int8.npy", "item_scales.npy"
SCAN_CODES, SCAN_SCALES = "item_scan.npy", "item_scan_scales.npy"
ONNX_TYPE = {
    "float32": TensorProto.FLOAT, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8,
}  # fmt: skip
# A query has 7 bits and its zero at 64: on a CPU without VNNI, ONNX Runtime adds two products of
# 8 bits in 16, which they would overflow. https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html
QUERY_MAX, QUERY_ZERO, ITEM_MAX = 63, 64, 127
ROWS_A_BLOCK = 1 << 16
# Of 100,000 scores, groups of 32 took the least time of 32, 64 and 128; few scores need no groups.
GROUP, FEWEST_GROUPS = 32, 64
# Of fewer items, whose fp32 a core's caches hold, a scan in 8 bits gains nothing.
SCANNED_FROM = 1 << 14
# Coordinates of a scan that have a scale together, in 8 bits whose zero is 128.
SCAN_BLOCK, SCAN_ZERO = 64, 128
# Of k-means, which needs no more to place its centroids.
TRAINED_ON = 1 << 18
F32 = npt.NDArray[np.float32]


def index_spec(config: IndexConfig, dim: int, item_bias: bool) -> IndexSpec:
    """Return what a search must know of an index made with these settings, which are validated."""
    width = config.width or dim
    return IndexSpec(
        kind=config.kind, width=width, rescore=config.rescore, nprobe=config.nprobe,
        ef_search=config.ef_search, bias=int(item_bias), recall=1.0,
    )  # fmt: skip


def build_index(
    folder: Path, spec: IndexSpec, config: IndexConfig, trained: Path | None = None
) -> int:
    """Write the index of `folder`'s item vectors beside them; returns the bytes that it searches.

    Args:
        folder: holds `item_vectors.npy` (N, D) float32.
        spec: of `index_spec`.
        config: the rest of the settings.
        trained: an index of the same settings whose centroids are taken over.
    """
    item_ND = np.load(folder / VECTORS, mmap_mode="r", allow_pickle=False)
    if spec.kind in FAISS_KINDS:
        return _write_faiss(folder / FAISS_FILE, item_ND, spec, config, trained)
    lossy = spec.kind != "exact" or spec.width < item_ND.shape[1]
    nodes: list[Any] = []
    initializers: list[Any] = []
    searched = VECTORS
    if spec.kind == "int8":
        searched = CODES
        write_int8(folder, item_ND, spec)
    elif lossy:
        searched = CUT
        cut_NW = created(folder / CUT, np.float32, (len(item_ND), spec.width))
        for rows in blocks(len(item_ND)):
            cut_NW[rows] = cut_vectors(item_ND[rows], spec.width, bool(spec.bias))
        cut_NW.flush()
    vector = "vector"
    if spec.width < item_ND.shape[1]:
        vector = _cut_nodes(spec, nodes, initializers)
    if spec.kind == "int8":
        initializers += [_external(folder / CODES, "codes"), _external(folder / SCALES, "scales")]
        nodes += _int8_nodes(vector, initializers)
    else:
        initializers.append(_external(folder / searched, "items"))
        nodes.append(helper.make_node("Gemm", [vector, "items"], ["all_scores"], transB=1))
    if lossy:
        if searched != VECTORS:
            initializers.append(_external(folder / VECTORS, "whole"))
        nodes += _rescored_nodes(len(item_ND), spec.rescore, initializers)
    else:
        nodes += _best_nodes("k", len(item_ND), ["scores", "rows"], initializers)
    k = helper.make_tensor_value_info("k", TensorProto.INT64, [1])
    _save_graph(
        folder / "index.onnx", nodes, initializers, [_tensor("vector", item_ND.shape[1]), k],
        [_tensor("scores", None), _tensor("rows", None, TensorProto.INT64)],
    )  # fmt: skip
    files = [searched, SCALES] if spec.kind == "int8" else [searched]
    if not lossy and len(item_ND) >= SCANNED_FROM:
        write_scan(folder, item_ND)
        files += [SCAN_CODES, SCAN_SCALES]
    return sum((folder / name).stat().st_size for name in files)


def write_int8(folder: Path, item_ND: F32, spec: IndexSpec) -> None:
    """Write the vectors in int8 (W, N), and a scale (N,) each: a row's largest becomes 127."""
    code_WN = created(folder / CODES, np.int8, (spec.width, len(item_ND)))
    scale_N = created(folder / SCALES, np.float32, (len(item_ND),))
    for rows in blocks(len(item_ND)):
        cut_RW = cut_vectors(item_ND[rows], spec.width, bool(spec.bias))
        whole_RW, scale_N[rows] = _in_8_bits(cut_RW)
        code_WN[:, rows] = whole_RW.T
    code_WN.flush()
    scale_N.flush()


def _in_8_bits(vectors: F32) -> tuple[F32, F32]:
    """Return whole numbers up to 127 (..., W), and the scale (...) of each vector's."""
    scale: F32 = np.abs(vectors).max(axis=-1) / np.float32(ITEM_MAX)
    scale[scale == 0] = 1
    return np.rint(vectors / scale[..., None]), scale


def write_scan(folder: Path, item_ND: F32) -> None:
    """Write the graph from `vector` (B, D) to all products in 8 bits, and the best of each group.

    Its metadata say how long the longest item vector is, and the longest difference of one from
    what 8 bits hold of it, by which `Scan` bounds the products' errors.
    """
    n, width = item_ND.shape
    shape = n, -(-width // SCAN_BLOCK), SCAN_BLOCK
    code_NVB = created(folder / SCAN_CODES, np.uint8, shape)
    scale_NV = created(folder / SCAN_SCALES, np.float32, shape[:2])
    longest = error = 0.0
    for rows in blocks(n):
        item_RVB = np.zeros((len(item_ND[rows]), *shape[1:]), np.float32)
        item_RVB.reshape(len(item_RVB), -1)[:, :width] = item_ND[rows]
        whole_RVB, scale_RV = _in_8_bits(item_RVB)
        code_NVB[rows], scale_NV[rows] = whole_RVB + SCAN_ZERO, scale_RV
        off_RVB = item_RVB.astype(np.float64) - whole_RVB * scale_RV[..., None].astype(np.float64)
        longest = max(longest, np.linalg.norm(item_RVB, axis=(1, 2)).max())
        error = max(error, np.linalg.norm(off_RVB, axis=(1, 2)).max())
    code_NVB.flush()
    scale_NV.flush()
    initializers = [
        _external(folder / SCAN_CODES, "codes"),
        _external(folder / SCAN_SCALES, "scales"),
    ]
    numbers, groups = partial(_numbers, initializers), n // GROUP
    # What is left over of whole groups needs none: fewer groups bound the best from below, too.
    nodes = [
        helper.make_node(
            "MatMulNBits", ["vector", "codes", "scales"], ["rough"], domain="com.microsoft",
            K=width, N=n, bits=8, block_size=SCAN_BLOCK, accuracy_level=4,
        )
    ]  # fmt: skip
    scores = "rough"
    if n % GROUP:
        ends = [numbers("zero", 0), numbers("end", groups * GROUP), numbers("columns", 1)]
        nodes.append(helper.make_node("Slice", [scores, *ends], ["whole_groups"]))
        scores = "whole_groups"
    nodes += [
        helper.make_node("Reshape", [scores, numbers("in_groups", 0, groups, GROUP)],
                         ["grouped"]),
        helper.make_node("ReduceMax", ["grouped", numbers("last_axis", 2)], ["group_best"],
                         keepdims=0),
    ]  # fmt: skip
    _save_graph(
        folder / SCAN_FILE, nodes, initializers, [_tensor("vector", width)],
        [_tensor("rough", n), _tensor("group_best", groups)], longest=longest, error=error,
    )  # fmt: skip


def created(path: Path, dtype: Any, shape: tuple[int, ...]) -> Any:
    """Return an array in a new `.npy` file, whose bytes the disk has: writing cannot fail later.

    Raises:
        OSError: when the disk has not.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as handle:
        os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    return array


def blocks(n: int) -> list[slice]:
    """Return slices that go through N rows without holding many of them."""
    return [slice(at, min(n, at + ROWS_A_BLOCK)) for at in range(0, n, ROWS_A_BLOCK)]


def _external(path: Path, name: str) -> Any:
    """Return an initializer whose bytes a graph in the same folder reads in place from `.npy`."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    tensor = TensorProto(name=name, data_type=ONNX_TYPE[array.dtype.name], dims=array.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (
        ("location", path.name), ("offset", array.offset), ("length", array.nbytes)
    ):  # fmt: skip
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _numbers(initializers: list[Any], name: str, *values: int) -> str:
    """Add a constant of whole numbers (V,), and return its name."""
    return constant(name, np.array(values, np.int64), initializers)


def _cut_nodes(spec: IndexSpec, nodes: list[Any], initializers: list[Any]) -> str:
    """Add nodes for `cut_vectors`, and return the name of what they make."""
    numbers = partial(_numbers, initializers)
    first, axis = spec.width - spec.bias, numbers("axis", 1)
    nodes += [
        helper.make_node("Slice", ["vector", numbers("zero", 0), numbers("first", first), axis],
                         ["part"]),
        helper.make_node("ReduceL2", ["part", axis], ["length"], keepdims=1),
        helper.make_node("Div", ["part", "length"], ["direction"]),
    ]  # fmt: skip
    if not spec.bias:
        return "direction"
    last = [numbers("last", -1), numbers("end", np.iinfo(np.int64).max)]
    nodes += [
        helper.make_node("Slice", ["vector", *last, axis], ["query_bias"]),
        helper.make_node("Concat", ["direction", "query_bias"], ["cut"], axis=1),
    ]
    return "cut"


def _int8_nodes(vector: str, initializers: list[Any]) -> list[Any]:
    """Return nodes for: quantise each query by its largest number, then all products in int8.

    The query's own scale is left out, which leaves the order of its items as it is.
    """

    def number(name: str, value: float, dtype: Any = np.float32) -> str:
        return constant(name, np.array(value, dtype), initializers)

    constant("columns", np.array([1], np.int64), initializers)
    return [
        helper.make_node("Abs", [vector], ["sizes"]),
        helper.make_node("ReduceMax", ["sizes", "columns"], ["largest"], keepdims=1),
        helper.make_node("Div", ["largest", number("query_max", QUERY_MAX)], ["query_scale"]),
        helper.make_node("Div", [vector, "query_scale"], ["scaled"]),
        helper.make_node("Round", ["scaled"], ["whole_numbers"]),
        helper.make_node("Add", ["whole_numbers", number("shift", QUERY_ZERO)], ["shifted"]),
        helper.make_node("Cast", ["shifted"], ["query_codes"], to=TensorProto.UINT8),
        helper.make_node(
            "MatMulIntegerToFloat",
            ["query_codes", "codes", number("one", 1), "scales",
             number("query_zero", QUERY_ZERO, np.uint8)],
            ["all_scores"], domain="com.microsoft",
        ),
    ]  # fmt: skip


def _rescored_nodes(n: int, rescore: int, initializers: list[Any]) -> list[Any]:
    """Return nodes for: `rescore` candidates a result, then their order by the whole vectors."""
    numbers = partial(_numbers, initializers)
    return [
        helper.make_node("Mul", ["k", numbers("rescore", rescore)], ["wanted"]),
        helper.make_node("Min", ["wanted", numbers("all", n)], ["candidates"]),
        *_best_nodes("candidates", n, ["rough", "found"], initializers),
        helper.make_node("Gather", ["whole", "found"], ["entries"], axis=0),
        helper.make_node("Unsqueeze", ["vector", numbers("inner", 2)], ["column"]),
        helper.make_node("MatMul", ["entries", "column"], ["products"]),
        helper.make_node("Squeeze", ["products", "inner"], ["true_scores"]),
        helper.make_node("TopK", ["true_scores", "k"], ["scores", "places"], axis=1),
        helper.make_node("GatherElements", ["found", "places"], ["rows"], axis=1),
    ]


def _best_nodes(k: str, n: int, outputs: list[str], initializers: list[Any]) -> list[Any]:
    """Return nodes for the k best of `all_scores` (B, N) and their rows, as TopK orders them.

    The k best groups of neighbouring rows, by their best, hold the k best rows. Groups are taken in
    the order of rows, so that of equal scores the lower row comes first, as in TopK over all, which
    takes longer (benchmarks/search.py), unless k is above a hundredth of N or so.
    """
    groups = -(-n // GROUP)
    if groups < FEWEST_GROUPS:
        return [helper.make_node("TopK", ["all_scores", k], outputs, axis=1)]
    numbers = partial(_numbers, initializers)
    nodes, scores = [], "all_scores"
    if n % GROUP:
        lowest = constant("lowest", np.array(-np.inf, np.float32), initializers)
        missing = numbers("missing", 0, 0, 0, groups * GROUP - n)
        nodes.append(helper.make_node("Pad", [scores, missing, lowest], ["padded_scores"]))
        scores = "padded_scores"
    group, last = numbers("group", GROUP), numbers("last_axis", 2)
    nodes += [
        helper.make_node("Reshape", [scores, numbers("in_groups", 0, groups, GROUP)], ["grouped"]),
        helper.make_node("ReduceMax", ["grouped", last], ["group_best"], keepdims=0),
        helper.make_node("Min", [k, numbers("groups", groups)], ["chosen_groups"]),
        helper.make_node(
            "TopK", ["group_best", "chosen_groups"], ["chosen_best", "unordered"], sorted=0
        ),
        helper.make_node(
            "TopK", ["unordered", "chosen_groups"], ["chosen", "chosen_order"], largest=0
        ),
        helper.make_node("Unsqueeze", ["chosen", last], ["chosen_places"]),
        helper.make_node("GatherND", ["grouped", "chosen_places"], ["chosen_scores"], batch_dims=1),
        helper.make_node("Reshape", ["chosen_scores", numbers("flat", 0, -1)], ["contenders"]),
        helper.make_node("TopK", ["contenders", k], [outputs[0], "contender"], axis=1),
        helper.make_node("Div", ["contender", group], ["which"]),
        helper.make_node("Mod", ["contender", group], ["within"]),
        helper.make_node("GatherElements", ["chosen", "which"], ["of_group"], axis=1),
        helper.make_node("Mul", ["of_group", group], ["first_row"]),
        helper.make_node("Add", ["first_row", "within"], [outputs[1]]),
    ]
    return nodes


def _tensor(name: str, size: int | None, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, ["batch", size])


def _save_graph(
    path: Path, nodes: list[Any], initializers: list[Any], inputs: list[Any], outputs: list[Any],
    **known: float,
) -> None:  # fmt: skip
    """Write a graph, with what is known of it as its metadata."""
    graph = helper.make_graph(nodes, path.stem, inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)
    helper.set_model_props(model, {name: str(value) for name, value in known.items()})
    path.write_bytes(model.SerializeToString())


def _write_faiss(
    path: Path, item_ND: F32, spec: IndexSpec, config: IndexConfig, trained: Path | None
) -> int:
    import faiss

    n, width = len(item_ND), spec.width
    if trained is not None:
        index = faiss.read_index(str(trained))
        index.reset()
    else:
        # As many cells as keep the search of centroids and that of a cell about as long; k-means
        # wants 39 items a centroid.
        cells = config.nlist or max(1, min(round(2 * math.sqrt(n)), n // 39))
        recipe = {
            "pq": f"PQ{config.codes or width}x4fs",
            "ivf": f"IVF{min(cells, n)},SQ8",
            "hnsw": f"HNSW{config.m},SQ8",
        }
        index = faiss.index_factory(width, recipe[spec.kind], faiss.METRIC_INNER_PRODUCT)
        # faiss remarks on few items a centroid, on stderr.
        if spec.kind == "pq":
            index.pq.cp.min_points_per_centroid = 1
        elif spec.kind == "ivf":
            index.cp.min_points_per_centroid = 1
    threads = faiss.omp_get_max_threads()
    try:
        if spec.kind == "hnsw":
            index.hnsw.efConstruction = config.ef_construction
            # Threads would link items in an order of chance, and give other bytes every time.
            faiss.omp_set_num_threads(1)
        if not index.is_trained:
            # At least the 16 centroids of a code, of a catalogue of fewer some twice.
            size = max(16, min(n, TRAINED_ON))
            index.train(_cut(item_ND[np.linspace(0, n - 1, size).astype(np.int64)], spec))
        for rows in blocks(n):
            index.add(_cut(item_ND[rows], spec))
        try:
            faiss.write_index(index, str(path))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OSError(errno.EIO, reason, str(path)) from None
    finally:
        faiss.omp_set_num_threads(threads)
    return path.stat().st_size


def _cut(item_RD: F32, spec: IndexSpec) -> F32:
    return np.ascontiguousarray(cut_vectors(item_RD, spec.width, bool(spec.bias)), np.float32)
