"""What a bundle holds for a GPU: the query graph in its two halves, the tower once a precision.

    query_encoding.onnx         raw query features -> `<feature>.encoded`; ONNX Runtime alone
    query_tower.<precision>.onnx  these, lists padded to their length -> `vector`; TensorRT too
    query_tower.weights         the embedding tables, which all precisions read; absent where
                                query.onnx has them in a file, which they read then
    tensorrt.json               the graphs, their files of weights, inputs and batch sizes
    build_engine.py             builds an engine where it will run

`query.onnx`, both halves in one, stays what a CPU runs. There are no such halves of the item tower:
its vectors are computed once, by the export.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data

from twotower.data.encode import Encoder
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import ID_KINDS, TensorSpec
from twotower.export import build_engine
from twotower.export.bundle import Golden
from twotower.export.config import ExportConfig, TensorRTConfig
from twotower.export.golden import Search, index_recall, raw_tensors, session, vector_answers
from twotower.export.graphs import EntryTables, encoding_graph, save_graph, tower_graph
from twotower.export.id_nodes import constant
from twotower.export.parity import ParityError, check_answers, event_rows
from twotower.export.precision import lowered, rounded
from twotower.export.prune import EVERY_ROW, Kept
from twotower.export.quantisation import QUANTISED, layer_inputs, quantised
from twotower.export.weights import ALIGNMENT, StoredWeights
from twotower.files import write_json
from twotower.towers.two_tower import TwoTower

ENCODING = "query_encoding.onnx"
WEIGHTS = "query_tower.weights"
# Smaller tables stay in each graph.
SHARED_BYTES = 1024


def tower_file(precision: str) -> str:
    """Return the name of the tower's file of a precision."""
    return f"query_tower.{precision}.onnx"


def write_halves(
    bundle: Path, data: PreparedDataset, model: TwoTower, specs: list[TensorSpec],
    tables: EntryTables | None, stored: StoredWeights, config: TensorRTConfig, seed: int,
) -> None:  # fmt: skip
    """Write what `export.tensorrt` asks for into a bundle that has its `query.onnx`.

    Args:
        bundle: the directory.
        data: that the towers were trained on, whose training split calibrates int8 and fp8.
        model: the towers.
        specs: the raw features of a query.
        tables: see `entry_tables`; needed where histories have item features.
        stored: where the weights of `query.onnx` are.
        config: of the export.
        seed: chooses the queries that calibrate.

    Raises:
        UserError: naming the layer that has no ONNX operator.
    """
    encoding = padded_encoding(data.encoder, model, "query", specs, tables, stored.kept)
    save_graph(encoding, bundle / ENCODING)
    tower = dotted_tower(model, "query", specs, tables, stored)
    weights = _share_tables(tower, bundle)
    largest: dict[str, float] = {}
    if set(config.precisions) & set(QUANTISED):
        rows = event_rows(data, 0, config.calibration_queries, seed)
        largest = calibrated(bundle, tower, raw_tensors(specs, rows))
    for precision in config.precisions:
        save_graph(in_precision(tower, precision, bundle, largest), bundle / tower_file(precision))
    write_json(bundle / "tensorrt.json", {
        "graphs": {p: tower_file(p) for p in config.precisions},
        "weights": weights,
        "inputs": input_shapes(tower),
        "batch": config.batch,
    })  # fmt: skip
    shutil.copyfile(build_engine.__file__, bundle / "build_engine.py")


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
        # Of rows and ages -1 says that there is nothing; of rows of the catalogue, their number.
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


def _share_tables(tower: Any, bundle: Path) -> list[str]:
    """Move a tower's tables out of its graph; returns the names of the files that hold them.

    They stay fp32 in every precision, so that a gather rounds nothing, and one copy serves all.
    """
    gathered = {node.input[0] for node in tower.graph.node if node.op_type == "Gather"}
    files: set[str] = set()
    for weight in tower.graph.initializer:
        if weight.data_location == TensorProto.EXTERNAL:  # where query.onnx has it
            files.update(e.value for e in weight.external_data if e.key == "location")
        elif weight.name in gathered and len(weight.raw_data) >= SHARED_BYTES:
            with (bundle / WEIGHTS).open("ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                start = file.tell()
                file.write(weight.raw_data)
            set_external_data(weight, WEIGHTS, start, len(weight.raw_data))
            weight.ClearField("raw_data")
            files.add(WEIGHTS)
    return sorted(files)


def tower_vectors(
    bundle: Path, precision: str, tensors: dict[str, npt.NDArray[Any]]
) -> npt.NDArray[np.float32]:
    """Return the vectors (B, D) that both halves give in ONNX Runtime, rounded as TensorRT does.

    Args:
        bundle: the directory.
        precision: of the tower.
        tensors: raw features, as `raw_tensors` makes them.
    """
    graph = onnx.load(str(bundle / tower_file(precision)), load_external_data=False)
    (vector_BD,) = _run(bundle, rounded(graph), ["vector"], tensors)
    return vector_BD


def calibrated(bundle: Path, tower: Any, tensors: dict[str, npt.NDArray[Any]]) -> dict[str, float]:
    """Return the largest magnitude, over some queries, of what enters each layer of a tower.

    Args:
        bundle: the directory, with the encoding and the tower's external data.
        tower: of `dotted_tower`.
        tensors: raw features, as `raw_tensors` makes them.
    """
    names = layer_inputs(tower)
    watched = onnx.ModelProto()
    watched.CopyFrom(tower)
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    found = _run(bundle, watched, names, tensors)
    return {name: float(np.abs(x).max()) for name, x in zip(names, found, strict=True)}


def in_precision(tower: Any, precision: str, folder: Path, largest: Mapping[str, float]) -> Any:
    """Return a tower's graph in a precision; see `lowered`, `quantised` and `calibrated`."""
    if precision in QUANTISED:
        return quantised(tower, precision, largest, folder)
    return lowered(tower, precision, folder)


def _run(
    bundle: Path, tower: Any, outputs: list[str], tensors: dict[str, npt.NDArray[Any]]
) -> list[npt.NDArray[np.float32]]:
    """Run the encoding of a bundle and a tower behind it."""
    encoding = session(bundle / ENCODING)
    names = [output.name for output in encoding.get_outputs()]
    encoded = dict(zip(names, encoding.run(names, tensors), strict=True))
    twin = bundle / ".tower.onnx"
    try:
        # Beside the bundle's files, where external data are looked for.
        onnx.save_model(tower, str(twin))
        # Optimised, ONNX Runtime 1.32 changes what fp8 gives: by 0.12 of a unit vector, not 0.008.
        tower_session = session(twin, optimise=False)
        found: list[npt.NDArray[np.float32]] = tower_session.run(outputs, encoded)
    finally:
        twin.unlink(missing_ok=True)
    return found


def check_towers(
    bundle: Path, specs: Sequence[TensorSpec], golden: Sequence[Golden], ids: list[Any], k: int,
    search: Search, config: ExportConfig, together: int,
) -> dict[str, float]:  # fmt: skip
    """Return, of each precision, the largest score difference and the share of golden answers.

    See `onnx_answers` for the arguments.

    Raises:
        ParityError: naming the precision and the worst query.
    """
    parity: dict[str, float] = {}
    tensors = raw_tensors(specs, [g.features for g in golden])
    for precision in config.tensorrt.precisions:
        vector_BD = tower_vectors(bundle, precision, tensors)
        answers = vector_answers(vector_BD, golden, ids, k, search, together)
        key = (
            "export.tolerance" if precision == "fp32" else f"export.tensorrt.{precision}_tolerance"
        )
        tolerance = (
            config.tolerance if precision == "fp32"
            else getattr(config.tensorrt, f"{precision}_tolerance")
        )  # fmt: skip
        name = f"tensorrt_{precision}"
        parity[name] = check_answers(golden, answers, tolerance, f"the {precision} tower", key)
        parity[f"{name}_overlap"] = overlap = index_recall(golden, answers)
        if overlap < config.tensorrt.overlap:
            raise ParityError(
                f"the {precision} tower gives {overlap:.1%} of eager PyTorch's golden answers "
                f"(export.tensorrt.overlap {config.tensorrt.overlap:g}): no bundle was made; leave "
                f"{precision} out of export.tensorrt.precisions, or lower the least overlap"
            )
    return parity
