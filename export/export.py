"""Export: a checkpoint and the dataset it was trained on become a bundle.

twotower export --config JOB.yaml
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.export.bundle import Bundle, next_bundle, read_bundle, seal
from twotower.export.config import ExportConfig
from twotower.export.filters import write_filters
from twotower.export.golden import TOGETHER, answered, index_recall, onnx_answers
from twotower.export.graphs import entry_tables, raw_graph, save_graph
from twotower.export.halves import check_towers, write_halves
from twotower.export.index import VECTORS, build_index, created, index_spec
from twotower.export.manifest import Manifest
from twotower.export.new_items import check_vectors, id_array
from twotower.export.parity import (
    check_answers,
    check_item_graph,
    eager_answers,
    golden_rows,
)
from twotower.export.prune import EVERY_ROW, kept_rows
from twotower.export.search import FAISS_KINDS, exact_top_k, open_search
from twotower.export.signature import read_private_key
from twotower.export.weights import INSIDE_BYTES, StoredWeights, check_weights, weight_bytes
from twotower.files import write_json
from twotower.towers.catalogue import catalogue_batches
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint.table_file import TableFile
from twotower.train.checkpoint.towers import load_towers

LIBRARIES = ("twotower", "torch", "torchrec", "onnx", "onnxruntime", "numpy")
ITEMS_A_BATCH = 8192
Progress = Callable[[str, float], None]


def export(
    data: PreparedDataset,
    train_directory: Path,
    bundles: Path,
    *,
    config: ExportConfig,
    job: dict[str, Any],
    name: str,
    fingerprint: str,
    metrics: dict[str, float],
    seed: int,
    progress: Progress,
) -> Bundle:
    """Write the next bundle version under `bundles` and return it.

    Args:
        data: the dataset that the checkpoint was trained on.
        train_directory: see `twotower.train.checkpoint`.
        bundles: holds one directory a version.
        config: of the export.
        job: the whole configuration, kept in the bundle.
        name: the job's name.
        fingerprint: of the inputs.
        metrics: of the test split.
        seed: chooses the golden queries.
        progress: is told the stage and the share done.

    Raises:
        ParityError: when ONNX Runtime disagrees with eager PyTorch; no bundle is left.
        UserError: when the checkpoint does not fit, or holds NaN.
    """
    if config.sign_with is not None:
        read_private_key(config.sign_with)  # a wrong one is said before the work
    with next_bundle(bundles) as (number, partial):
        progress("loading the checkpoint", 0.0)
        table_file = TableFile(partial)
        model, encoder = load_towers(train_directory, file=table_file), data.encoder
        progress("checking the weights", 0.1)
        check_weights(model)
        table_file.release()
        query, item = (encoder.specs(data.config, side) for side in ("query", "item"))
        progress("item vectors", 0.2)
        vectors = _write_vectors(partial / VECTORS, model, data, progress)
        check_vectors(vectors, data.items["id"])
        ids = data.items["id"]
        id_dtype = "int64" if pa.types.is_int64(ids.type) else "string"
        catalogue = ids.to_pylist()
        np.save(partial / "item_ids.npy", id_array(catalogue, id_dtype), allow_pickle=False)
        _write_items(data, partial / "items.parquet")
        filters = write_filters(partial, config.filters)
        tables = entry_tables(model, data)
        kept = kept_rows(model, data) if config.prune_vocab else EVERY_ROW
        large = weight_bytes(model, *tables.vector_ND.values()) > INSIDE_BYTES
        stored = StoredWeights(model, kept, partial if large else None, table_file.release)
        for side, specs, share in (("query", query, 0.5), ("item", item, 0.6)):
            progress(f"{side} graph", share)
            graph = raw_graph(encoder, model, side, specs, tables, stored)
            save_graph(graph, partial / f"{side}.onnx")
        if config.tensorrt.precisions:
            progress("towers for TensorRT", 0.65)
            write_halves(partial, data, model, tables, stored, config, seed)
        progress(f"{config.index.kind} index", 0.7)
        spec = index_spec(config.index, vectors.shape[1], model.item_bias)
        build_index(partial, spec, config.index)
        search = open_search(partial, asdict(spec)).search
        progress("parity", 0.8)
        rows = golden_rows(data, query, config.golden_queries, seed)
        k = min(config.golden_k, len(vectors))
        golden = eager_answers(model, vectors, data, rows, k)
        lossy = not spec.is_exact(vectors.shape[1])
        exact = functools.partial(exact_top_k, vectors) if lossy else search
        answers = onnx_answers(partial, query, golden, catalogue, k, exact, TOGETHER)
        parity = {
            "scores": check_answers(golden, answers, config.tolerance, "ONNX Runtime"),
            "item_vectors": check_item_graph(partial, item, data, vectors, config.tolerance),
        }
        if config.tensorrt.precisions:
            parity |= check_towers(partial, data, golden, vectors, k, exact, config, TOGETHER)
        if lossy:
            # What a server must answer is what the index finds, though it lack items.
            answers = onnx_answers(partial, query, golden, catalogue, k, search)
            spec = replace(spec, recall=index_recall(golden, answers))
            golden = answered(golden, answers)
        write_json(partial / "golden.json", [vars(g) for g in golden])
        write_json(partial / "job.json", job)
        progress("manifest", 0.95)
        seal(partial, Manifest(
            version=number,
            name=name,
            fingerprint=fingerprint,
            query=query,
            item=item,
            item_id_dtype=id_dtype,
            num_items=len(vectors),
            dim=vectors.shape[1],
            versions=_versions(spec.kind),
            metrics=metrics,
            parity=parity,
            index=spec,
            filters=filters,
            pruned=kept.pruned,
            pruned_bytes=kept.pruned_bytes,
        ), config.sign_with)  # fmt: skip
    return read_bundle(bundles / str(number), verify=False)


def _write_vectors(path: Path, model: TwoTower, data: PreparedDataset, progress: Progress) -> Any:
    """Write the vectors (N, D) of the catalogue, batch after batch, and return them mapped."""
    n, done = len(data.items), 0
    vector_ND: Any = None
    for part in catalogue_batches(
        model.item_vectors, BatchBuilder(data), torch.device("cpu"), ITEMS_A_BATCH
    ):
        if vector_ND is None:
            vector_ND = created(path, np.float32, (n, part.shape[1]))
        vector_ND[done : done + len(part)] = part.numpy()
        done += len(part)
        progress("item vectors", 0.2 + 0.3 * done / n)
    vector_ND.flush()
    return vector_ND


def _versions(index: str) -> dict[str, str]:
    names = (*LIBRARIES, "faiss-cpu") if index in FAISS_KINDS else LIBRARIES
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _write_items(data: PreparedDataset, path: Path) -> None:
    columns = {"id": data.items["id"], "train_count": data.items["train_count"]}
    columns |= {name: data.items[f"display.{name}"] for name in data.config.display}
    pq.write_table(pa.table(columns), path)
