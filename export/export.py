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
from twotower.export.golden import TOGETHER, answered, index_recall, onnx_answers
from twotower.export.graphs import entry_tables, raw_graph, save_graph
from twotower.export.halves import check_towers, write_halves
from twotower.export.index import VECTORS, build_index, index_spec
from twotower.export.manifest import Manifest
from twotower.export.new_items import check_vectors, id_array
from twotower.export.parity import (
    check_answers,
    check_item_graph,
    eager_answers,
    golden_rows,
)
from twotower.export.search import FAISS_KINDS, exact_top_k, open_search
from twotower.export.signature import read_private_key
from twotower.files import write_json
from twotower.towers.catalogue import catalogue_vectors
from twotower.train.checkpoint.towers import load_towers

LIBRARIES = ("twotower", "torch", "torchrec", "onnx", "onnxruntime", "numpy")
Progress = Callable[[str], None]


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
        progress: is told each stage.

    Raises:
        ParityError: when ONNX Runtime disagrees with eager PyTorch; no bundle is left.
        UserError: when the checkpoint does not fit.
    """
    if config.sign_with is not None:
        read_private_key(config.sign_with)  # a wrong one is said before the work
    progress("loading the checkpoint")
    model, encoder = load_towers(train_directory), data.encoder
    query, item = (encoder.specs(data.config, side) for side in ("query", "item"))
    with next_bundle(bundles) as (number, partial):
        progress("item vectors")
        vectors = catalogue_vectors(
            model.item_vectors, BatchBuilder(data), torch.device("cpu"), batch_size=8192
        ).numpy()
        check_vectors(vectors, data.items["id"])
        np.save(partial / VECTORS, np.ascontiguousarray(vectors, np.float32))
        ids = data.items["id"]
        id_dtype = "int64" if pa.types.is_int64(ids.type) else "string"
        catalogue = ids.to_pylist()
        np.save(partial / "item_ids.npy", id_array(catalogue, id_dtype), allow_pickle=False)
        _write_items(data, partial / "items.parquet")
        tables = entry_tables(model, data)
        for side, specs in (("query", query), ("item", item)):
            progress(f"{side} graph")
            save_graph(raw_graph(encoder, model, side, specs, tables), partial / f"{side}.onnx")
        if config.tensorrt.precisions:
            progress("query tower for TensorRT")
            write_halves(partial, encoder, model, query, tables, config)
        progress(f"{config.index.kind} index")
        spec = index_spec(config.index, vectors.shape[1], model.item_bias)
        build_index(partial, spec, config.index)
        search = open_search(partial, asdict(spec)).search
        progress("parity")
        rows = golden_rows(data, query, config.golden_queries, seed)
        k = min(config.golden_k, len(vectors))
        golden = eager_answers(model, vectors, data, rows, k)
        lossy = not spec.is_exact(vectors.shape[1])
        exact = functools.partial(exact_top_k, vectors) if lossy else search
        answers = onnx_answers(partial, query, golden, catalogue, k, exact, TOGETHER)
        parity = {
            "scores": check_answers(golden, answers, config.tolerance, "ONNX Runtime"),
            "item_vectors": check_item_graph(partial, item, data, vectors, config.tolerance),
            **check_towers(partial, query, golden, catalogue, k, exact, config, TOGETHER),
        }
        if lossy:
            # What a server must answer is what the index finds, though it lack items.
            answers = onnx_answers(partial, query, golden, catalogue, k, search)
            spec = replace(spec, recall=index_recall(golden, answers))
            golden = answered(golden, answers)
        write_json(partial / "golden.json", [vars(g) for g in golden])
        write_json(partial / "job.json", job)
        progress("manifest")
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
        ), config.sign_with)  # fmt: skip
    return read_bundle(bundles / str(number), verify=False)


def _versions(index: str) -> dict[str, str]:
    names = (*LIBRARIES, "faiss-cpu") if index in FAISS_KINDS else LIBRARIES
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def _write_items(data: PreparedDataset, path: Path) -> None:
    columns = {"id": data.items["id"], "train_count": data.items["train_count"]}
    columns |= {name: data.items[f"display.{name}"] for name in data.config.display}
    pq.write_table(pa.table(columns), path)
