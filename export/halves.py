"""What a bundle holds for a GPU: each tower's graph in its two halves, one tower a precision.

    <side>_encoding.onnx        raw features -> `<feature>.encoded`; ONNX Runtime alone
    <side>_tower.<precision>.onnx   these, lists padded to their length -> `vector`; TensorRT too
    towers.weights              the embedding tables, which all of them read; absent where
                                query.onnx and item.onnx have them in files, which they read then
    tensorrt.json               the graphs, their files of weights, inputs, batches, tolerances
    tensorrt_check.npz          inputs of each tower, and the vectors that an engine must give
    build_engine.py             builds an engine where it will run, and checks it there

The sides are query and item. `query.onnx` and `item.onnx`, both halves in one, stay what a CPU
runs.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from twotower.data.encode import Encoder
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import ID_KINDS, TensorSpec
from twotower.export import build_engine
from twotower.export.bundle import Golden
from twotower.export.config import ExportConfig
from twotower.export.golden import Search, index_recall, raw_tensors, session, vector_answers
from twotower.export.graphs import EntryTables, encoding_graph, save_graph, tower_graph
from twotower.export.id_nodes import constant
from twotower.export.manifest import SIDES
from twotower.export.parity import (
    ITEM_SAMPLE,
    ParityError,
    check_answers,
    check_vectors_of,
    event_rows,
    item_rows,
)
from twotower.export.precision import lowered, rounded
from twotower.export.prune import EVERY_ROW, Kept
from twotower.export.quantisation import QUANTISED, layer_inputs, quantised
from twotower.export.weights import ALIGNMENT, StoredWeights
from twotower.files import write_json
from twotower.towers.two_tower import TwoTower

WEIGHTS = "towers.weights"
# Smaller tables stay in each graph.
SHARED_BYTES = 512
CHECKED_ROWS = 64


def encoding_file(side: str) -> str:
    """Return the name of a side's first half."""
    return f"{side}_encoding.onnx"


def tower_file(side: str, precision: str) -> str:
    """Return the name of the file of a side's second half in a precision."""
    return f"{side}_tower.{precision}.onnx"


def write_halves(
    bundle: Path, data: PreparedDataset, model: TwoTower, tables: EntryTables | None,
    stored: StoredWeights, config: ExportConfig, seed: int,
) -> None:  # fmt: skip
    """Write what `export.tensorrt` asks for into a bundle that has its whole graphs.

    Args:
        bundle: the directory.
        data: that the towers were trained on, of which training queries and the catalogue
            calibrate int8 and fp8.
        model: the towers.
        tables: see `entry_tables`; needed where histories have item features.
        stored: where the weights of the whole graphs are.
        config: of the export.
        seed: chooses the queries that calibrate.

    Raises:
        UserError: naming the layer that has no ONNX operator.
    """
    count, precisions = config.tensorrt.calibration_queries, config.tensorrt.precisions
    towers: dict[str, Any] = {}
    check: dict[str, npt.NDArray[Any]] = {}
    places: dict[bytes, tuple[int, int]] = {}
    for side in SIDES:
        specs = data.encoder.specs(data.config, side)
        rows = event_rows(data, 0, count, seed) if side == "query" else item_rows(data, count)[1]
        encoding = padded_encoding(data.encoder, model, side, specs, tables, stored.kept)
        save_graph(encoding, bundle / encoding_file(side))
        tower = dotted_tower(model, side, specs, tables, stored)
        weights = _share_tables(tower, bundle, places)
        encoded = encoded_inputs(bundle, side, raw_tensors(specs, rows))
        largest: dict[str, float] = {}
        if set(precisions) & set(QUANTISED):
            largest = calibrated(bundle, tower, encoded)
        for precision in precisions:
            graph = in_precision(tower, precision, bundle, largest)
            save_graph(graph, bundle / tower_file(side, precision))
        inputs = input_shapes(tower)
        towers[side] = {
            "graphs": {p: tower_file(side, p) for p in precisions},
            "weights": weights,
            "inputs": inputs,
        }
        some = {name: encoded[name][:CHECKED_ROWS] for name in inputs}
        check |= {f"{side}/{name}": value for name, value in some.items()}
        (check[f"{side}/vector"],) = _run(bundle, tower, ["vector"], some)
    write_json(bundle / "tensorrt.json", {
        "towers": towers,
        "batch": config.tensorrt.batch,
        "refit": config.tensorrt.refit,
        "tolerance": {p: _tolerance(config, p)[1] for p in precisions},
    })  # fmt: skip
    np.savez(bundle / build_engine.CHECK, **check)  # type: ignore[arg-type]
    shutil.copyfile(build_engine.__file__, bundle / "build_engine.py")


def _tolerance(config: ExportConfig, precision: str) -> tuple[str, float]:
    """Return the key of a precision's tolerance, and it."""
    if precision == "fp32":
        return "export.tolerance", config.tolerance
    name = f"{precision}_tolerance"
    return f"export.tensorrt.{name}", getattr(config.tensorrt, name)


def dotted_tower(
    model: TwoTower, side: str, specs: list[TensorSpec], tables: EntryTables | None = None,
    stored: StoredWeights | None = None,
) -> Any:  # fmt: skip
    """Return the second half over whole lists, its inputs named `<feature>.encoded`.

    Those of the entries' catalogue rows are `<history>.items.encoded`. No feature's name holds a
    dot, and none of `trtexec`'s options takes it for one of its own signs.
    """
    graph = tower_graph(model, side, specs, tables, stored, whole_lists=True)
    dotted = {i.name: _dotted(i.name.removesuffix("_encoded")) for i in graph.graph.input}
    for value in graph.graph.input:
        value.name = dotted[value.name]
    for node in graph.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = dotted.get(name, name)
    return graph


def input_shapes(tower: Any) -> dict[str, list[int]]:
    """Return the shape of each of a tower's inputs, without the batch."""
    return {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim[1:]] for i in tower.graph.input
    }


def padded_encoding(
    encoder: Encoder, model: TwoTower, side: str, specs: list[TensorSpec],
    tables: EntryTables | None = None, kept: Kept = EVERY_ROW,
) -> Any:  # fmt: skip
    """Return the first half, with lists padded to their length and outputs named as inputs of it.

    Lists may come as short as their longest of a batch, as into `query.onnx`.
    """
    half = encoding_graph(encoder, model, side, specs, tables, kept)
    graph = half.graph
    initializers: list[Any] = []
    lists = {spec.name: spec for spec in specs if spec.is_list}
    for output in graph.output:
        old, name = output.name, output.name.removesuffix(":encoded")
        output.name = _dotted(name)
        spec = lists.get(name.removesuffix(":items"))
        if spec is None:
            graph.node.append(helper.make_node("Identity", [old], [output.name]))
            continue
        # Of rows and times -1 says that there is nothing; of rows of the catalogue, their number.
        pad: Any = np.array(-1, np.int64 if spec.kind in ID_KINDS else np.float32)
        if name.endswith(":items") and tables is not None:
            pad = np.array(len(tables.ids), np.int64)
        graph.node.extend(_pad_nodes(old, spec.length, pad, output.name, initializers))
        output.type.tensor_type.shape.dim[1].dim_value = spec.length
    graph.initializer.extend(initializers)
    return half


def _dotted(name: str) -> str:
    return f"{name.replace(':', '.')}.encoded"


def _pad_nodes(name: str, length: int, pad: Any, out: str, initializers: list[Any]) -> list[Any]:
    """Return nodes that put `pad` behind lists (B, L) until they have `length` places."""
    whole = constant(f"{name}:whole", np.array([length], np.int64), initializers)
    before = constant(f"{name}:before", np.zeros(3, np.int64), initializers)
    value = constant(f"{name}:pad", pad, initializers)
    return [
        helper.make_node("Shape", [name], [f"{name}:length"], start=1, end=2),
        helper.make_node("Sub", [whole, f"{name}:length"], [f"{name}:missing"]),
        helper.make_node("Concat", [before, f"{name}:missing"], [f"{name}:pads"], axis=0),
        helper.make_node("Pad", [name, f"{name}:pads", value], [out]),
    ]


def _share_tables(tower: Any, bundle: Path, places: dict[bytes, tuple[int, int]]) -> list[str]:
    """Move a tower's tables out of its graph; returns the names of the files that hold them.

    They stay fp32 in every precision, so that a gather rounds nothing, and one copy serves all.

    Args:
        tower: of `dotted_tower`.
        bundle: the directory.
        places: digest of a table -> where it is in `WEIGHTS`, of those that are; added to.
    """
    gathered = {node.input[0] for node in tower.graph.node if node.op_type == "Gather"}
    files: set[str] = set()
    for weight in tower.graph.initializer:
        if weight.data_location == TensorProto.EXTERNAL:  # where the whole graph has it
            files.update(e.value for e in weight.external_data if e.key == "location")
        elif weight.name in gathered and len(weight.raw_data) >= SHARED_BYTES:
            digest = hashlib.sha256(weight.raw_data).digest()
            if digest not in places:
                with (bundle / WEIGHTS).open("ab") as file:
                    file.write(bytes(-file.tell() % ALIGNMENT))
                    places[digest] = (file.tell(), len(weight.raw_data))
                    file.write(weight.raw_data)
            set_external_data(weight, WEIGHTS, *places[digest])
            weight.ClearField("raw_data")
            files.add(WEIGHTS)
    return sorted(files)


def encoded_inputs(
    bundle: Path, side: str, tensors: dict[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """Return what a side's first half makes of raw features, as `raw_tensors` gives them."""
    encoding = session(bundle / encoding_file(side))
    names = [output.name for output in encoding.get_outputs()]
    return dict(zip(names, encoding.run(names, tensors), strict=True))


def tower_vectors(
    bundle: Path, side: str, precision: str, encoded: dict[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float32]:
    """Return the vectors (B, D) of a tower in ONNX Runtime, rounded as TensorRT does.

    Args:
        bundle: the directory.
        side: query or item.
        precision: of the tower.
        encoded: of `encoded_inputs`.
    """
    graph = onnx.load(str(bundle / tower_file(side, precision)), load_external_data=False)
    (vector_BD,) = _run(bundle, rounded(graph), ["vector"], encoded)
    return vector_BD


def calibrated(bundle: Path, tower: Any, encoded: dict[str, npt.NDArray[Any]]) -> dict[str, float]:
    """Return the largest magnitude, over some rows, of what enters each layer of a tower.

    Args:
        bundle: the directory of the tower's external data.
        tower: of `dotted_tower`.
        encoded: of `encoded_inputs`.
    """
    names = layer_inputs(tower)
    watched = onnx.ModelProto()
    watched.CopyFrom(tower)
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    found = _run(bundle, watched, names, encoded)
    return {name: float(np.abs(x).max()) for name, x in zip(names, found, strict=True)}


def in_precision(tower: Any, precision: str, folder: Path, largest: Mapping[str, float]) -> Any:
    """Return a tower's graph in a precision; see `lowered`, `quantised` and `calibrated`."""
    if precision in QUANTISED:
        return quantised(tower, precision, largest, folder)
    return lowered(tower, precision, folder)


def _run(
    bundle: Path, tower: Any, outputs: list[str], encoded: dict[str, npt.NDArray[Any]]
) -> list[npt.NDArray[np.float32]]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Optimised, ONNX Runtime 1.32 changes what fp8 gives: by 0.12 of a unit vector, not 0.008.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    outside = {
        i.name: ort.OrtValue.ortvalue_from_numpy(_mapped(bundle, i))
        for i in tower.graph.initializer if i.data_location == TensorProto.EXTERNAL
    }  # fmt: skip
    options.add_external_initializers(list(outside), list(outside.values()))
    run = ort.InferenceSession(
        tower.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = {i.name: encoded[i.name] for i in run.get_inputs()}
    found: list[npt.NDArray[np.float32]] = run.run(outputs, inputs)
    return found


def _mapped(bundle: Path, weight: Any) -> npt.NDArray[np.float32]:
    place = {e.key: e.value for e in weight.external_data}
    return np.memmap(
        bundle / place["location"], np.float32, "r", int(place["offset"]), tuple(weight.dims)
    )


def check_towers(
    bundle: Path, data: PreparedDataset, golden: Sequence[Golden],
    item_ND: npt.NDArray[np.float32], k: int, search: Search, config: ExportConfig, together: int,
) -> dict[str, float]:  # fmt: skip
    """Return, of each precision, the largest differences and the share of golden answers.

    See `onnx_answers` and `check_item_graph` for the arguments.

    Raises:
        ParityError: naming the precision and the worst query.
    """
    parity: dict[str, float] = {}
    specs = {side: data.encoder.specs(data.config, side) for side in SIDES}
    query = raw_tensors(specs["query"], [g.features for g in golden])
    rows, raw = item_rows(data, ITEM_SAMPLE)
    encoded = {
        "query": encoded_inputs(bundle, "query", query),
        "item": encoded_inputs(bundle, "item", raw_tensors(specs["item"], raw)),
    }
    ids = data.items["id"].to_pylist()
    for precision in config.tensorrt.precisions:
        vector_BD = tower_vectors(bundle, "query", precision, encoded["query"])
        answers = vector_answers(vector_BD, golden, ids, k, search, together)
        key, tolerance = _tolerance(config, precision)
        name = f"tensorrt_{precision}"
        parity[name] = check_answers(golden, answers, tolerance, f"the {precision} tower", key)
        parity[f"{name}_overlap"] = overlap = index_recall(golden, answers)
        if overlap < config.tensorrt.overlap:
            raise ParityError(
                f"the {precision} tower gives {overlap:.1%} of eager PyTorch's golden answers "
                f"(export.tensorrt.overlap {config.tensorrt.overlap:g}): no bundle was made; leave "
                f"{precision} out of export.tensorrt.precisions, or lower the least overlap"
            )
        found_ND = tower_vectors(bundle, "item", precision, encoded["item"])
        parity[f"{name}_items"] = check_vectors_of(
            found_ND, item_ND[rows], tolerance, f"the {precision} item tower", key
        )
    return parity
