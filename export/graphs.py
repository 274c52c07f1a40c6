"""ONNX graphs of a tower: raw features in, vector out, in two halves joined into one file.

The first half maps raw ids to table rows (`twotower.export.id_nodes`) and normalises numbers; only
ONNX Runtime can run it. The second half is the tower over padded rows: Gather, mask,
ReduceSum, Gemm, which TensorRT takes too (bags by offsets would export through Loop and Sequence).

Shape legend: `B` batch, `L` entries of a list, `D` width, `N` items, `K` results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from torch import Tensor, nn

from twotower.data.batches import BatchBuilder
from twotower.data.encode import Encoder
from twotower.data.prepared import PreparedDataset, one_chunk
from twotower.data.schema import ID_KINDS, Feature, TensorSpec
from twotower.data.vocabulary import DynamicIds
from twotower.errors import UserError
from twotower.export.conversion import to_onnx
from twotower.export.id_nodes import (
    IR_VERSION,
    OPSETS,
    age_nodes,
    catalogue_node,
    constant,
    row_nodes,
    slot_nodes,
    span_nodes,
)
from twotower.export.prune import EVERY_ROW, Kept
from twotower.export.weights import StoredWeights
from twotower.towers.catalogue import catalogue_vectors
from twotower.towers.tower import Tower
from twotower.towers.two_tower import TwoTower

ELEMENT = {
    "string": TensorProto.STRING, "int64": TensorProto.INT64, "float32": TensorProto.FLOAT,
}  # fmt: skip
# Protobuf refuses messages of 2 GB.
MOST_BYTES = 2**31 - 1


@dataclass(frozen=True)
class EntryTables:
    """What the catalogue's items add to the entries of histories with item features.

    Attributes:
        ids: raw ids of the catalogue (N,).
        vector_ND: by history.
    """

    ids: pa.Array
    vector_ND: dict[str, Tensor]


class PaddedTower(nn.Module):
    """The inference twin of one side of a `TwoTower`: padded rows in, vectors out.

    Args:
        model: the towers.
        side: query or item.
        tables: of the histories that have item features.
    """

    def __init__(self, model: TwoTower, side: str, tables: EntryTables | None = None) -> None:
        super().__init__()
        self.tower: Tower = getattr(model, side)
        self.features: list[Feature] = self.tower.features
        names = sorted({f.table_name for f in self.features if f.kind in ID_KINDS})
        self.place = {name: i for i, name in enumerate(names)}
        self.tables = nn.ParameterList([model.table_weight(name) for name in names])
        self.entry_place = {f.name: i for i, f in enumerate(f for f in self.features
                                                            if f.item_features)}  # fmt: skip
        # Behind the catalogue, what an item that is not in it adds: nothing.
        self.entry_tables = nn.ParameterList(
            nn.Parameter(F.pad(tables.vector_ND[name], (0, 0, 0, 1)), requires_grad=False)
            for name in self.entry_place if tables is not None
        )  # fmt: skip

    def forward(self, *columns: Tensor) -> Tensor:
        """Return (B, D).

        Args:
            columns: one a feature: rows (B, L) int64 with -1 for padding, or (B, W) float32; after
                the rows of a history with times, their ages or spans (B, L) float32; behind all,
                for each history with item features its entries' catalogue rows (B, L) int64, the
                number of items for one that is not known.
        """
        inputs: dict[str, Tensor] = {}
        rest = iter(columns)
        items_BL = columns[len(columns) - len(self.entry_place) :]
        for f in self.features:
            column = next(rest)
            if f.kind not in ID_KINDS:
                inputs[f.name] = column
                continue
            mask_BL = column >= 0
            weight = self.tables[self.place[f.table_name]]
            entry_BLD = F.embedding(column.clamp_min(0), weight)
            if f.item_features:
                place = self.entry_place[f.name]
                known_BLD = F.embedding(items_BL[place], self.entry_tables[place])
                entry_BLD = entry_BLD + known_BLD
            time_BL = next(rest) if f.has_times else None
            inputs[f.name] = self.tower.pool(f, entry_BLD, mask_BL, time_BL)
        vector: Tensor = self.tower(inputs)
        return vector


def tower_graph(
    model: TwoTower, side: str, specs: list[TensorSpec], tables: EntryTables | None = None,
    stored: StoredWeights | None = None, *, whole_lists: bool = False,
) -> Any:  # fmt: skip
    """Return the second half as an ONNX model with inputs `<feature>_encoded`.

    Behind them come `<history>:items_encoded`, of histories with item features.

    Args:
        model: the towers.
        side: query or item.
        specs: the raw features.
        tables: see `entry_tables`; needed where histories have item features.
        stored: how weights are stored; all in the graph by default.
        whole_lists: every list has all its places, padded, so that the batch alone varies.

    Raises:
        UserError: naming the layer that has no ONNX operator.
    """
    twin = PaddedTower(model, side, tables).eval()
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    example: list[Tensor] = []
    dynamic: list[dict[int, Any]] = []
    for spec in specs:
        shape: dict[int, Any] = {0: batch}
        if spec.kind == "times":
            history = next(i for i, s in enumerate(specs) if s.name == spec.of)
            example.append(torch.zeros(example[history].shape))
            shape = dynamic[history]
        elif spec.kind in ID_KINDS:
            varies = spec.is_list and not whole_lists
            length = min(spec.length, 3) if varies else spec.length
            example.append(torch.zeros(2, length, dtype=torch.int64))
            # A window of one entry has nothing to vary.
            if varies and spec.length > 1:
                shape[1] = torch.export.Dim(f"{spec.name}_length", min=1, max=spec.length)
        else:
            example.append(torch.zeros(2, spec.length))
        dynamic.append(shape)
    names = [s.name for s in specs]
    for history in twin.entry_place:
        place = next(i for i, s in enumerate(specs) if s.name == history)
        example.append(torch.zeros_like(example[place]))
        dynamic.append(dynamic[place])
        names.append(items_name(history))
    inputs = [f"{name}_encoded" for name in names]
    program = to_onnx(twin, example, dynamic, inputs, f"{side} tower")
    if stored is not None:
        stored.store(program.model, side)
    graph = program.model_proto
    graph.ir_version = IR_VERSION
    return graph


def items_name(history: str) -> str:
    """Return the name, within the graph, of the catalogue rows of a history's entries."""
    return f"{history}:items"


def entry_tables(model: TwoTower, data: PreparedDataset) -> EntryTables:
    """Return what the catalogue's items add to the entries of histories with item features."""
    builder, cpu = BatchBuilder(data), torch.device("cpu")
    vectors = {
        f.name: catalogue_vectors(partial(model.entry_vectors, f.name), builder, cpu, 8192)
        for f in data.config.histories() if f.item_features
    }  # fmt: skip
    return EntryTables(one_chunk(data.items["id"]), vectors)


def encoding_graph(
    encoder: Encoder, model: TwoTower, side: str, specs: list[TensorSpec],
    tables: EntryTables | None = None, kept: Kept = EVERY_ROW,
) -> Any:  # fmt: skip
    """Return the first half: raw features to `<feature>:encoded`.

    No feature's name holds a colon, so names made with one meet none.
    """
    features = {f.name: f for t, f in model.data.features() if t == side}
    encoder = kept.encoder(encoder)
    nodes: list[Any] = []
    initializers: list[Any] = []
    inputs, outputs = [], []
    for spec in specs:
        feature = features[spec.of or spec.name]
        entries: Any = f"{feature.name}_length" if spec.is_list else spec.length
        inputs.append(
            helper.make_tensor_value_info(spec.name, ELEMENT[spec.dtype], ["batch", entries])
        )
        kind = TensorProto.INT64 if spec.kind in ID_KINDS else TensorProto.FLOAT
        out = f"{spec.name}:encoded"
        outputs.append(helper.make_tensor_value_info(out, kind, ["batch", entries]))
        if spec.kind in ID_KINDS:
            vocabulary = encoder.vocabularies[feature.table_name]
            if isinstance(vocabulary, DynamicIds):
                slots = model.dynamic_slots(feature.table_name)
                rows = kept.rows.get(feature.table_name)
                nodes += slot_nodes(spec, slots, rows, out, initializers)
            else:
                nodes += row_nodes(spec, vocabulary, out, initializers)
            if feature.item_features and tables is not None:
                items = f"{items_name(spec.name)}:encoded"
                nodes.append(catalogue_node(spec, tables.ids.to_pylist(), items))
                outputs.append(helper.make_tensor_value_info(items, kind, ["batch", entries]))
        elif spec.kind == "times":
            if feature.pooling == "timed_sum":
                nodes += span_nodes(spec.name, encoder.span_starts, out, initializers)
            else:
                nodes += age_nodes(spec.name, out, initializers)
        elif spec.kind == "number":
            norm = encoder.normalisers[f"{side}.{spec.name}"]
            mean, std = (
                constant(f"{spec.name}:{n}", np.array([v], np.float32), initializers)
                for n, v in (("mean", norm.mean), ("std", norm.std))
            )
            nodes.append(helper.make_node("Sub", [spec.name, mean], [f"{spec.name}:centred"]))
            nodes.append(helper.make_node("Div", [f"{spec.name}:centred", std], [out]))
        else:
            nodes.append(helper.make_node("Identity", [spec.name], [out]))
    graph = helper.make_graph(nodes, f"{side}_encoding", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)


def raw_graph(
    encoder: Encoder, model: TwoTower, side: str, specs: list[TensorSpec],
    tables: EntryTables | None = None, stored: StoredWeights | None = None,
) -> Any:  # fmt: skip
    """Return the whole graph: raw features to `vector` (B, D).

    Args:
        encoder: of the dataset that the towers were trained on.
        model: the towers.
        side: query or item.
        specs: the raw features.
        tables: see `entry_tables`; needed where histories have item features.
        stored: how weights are stored; all in the graph by default.
    """
    kept = EVERY_ROW if stored is None else stored.kept
    first = encoding_graph(encoder, model, side, specs, tables, kept)
    second = tower_graph(model, side, specs, tables, stored)
    # Names of the two halves may not meet, but for the ones that join them.
    second = onnx.compose.add_prefix(second, "tower/", rename_inputs=True, rename_outputs=True)
    # Not merge_models, whose checker wants the files of external data in the working directory.
    graph = onnx.compose.merge_graphs(
        first.graph, second.graph,
        io_map=[(o.name, f"tower/{o.name.removesuffix(':encoded')}_encoded")
                for o in first.graph.output],
    )  # fmt: skip
    for node in graph.node:
        for i, output in enumerate(node.output):
            if output == "tower/vector":
                node.output[i] = "vector"
    graph.output[0].name = "vector"
    return helper.make_model(
        graph, opset_imports=OPSETS, ir_version=IR_VERSION, functions=second.functions
    )


def save_graph(graph: Any, path: Path) -> None:
    """Write a graph without the exporter's traces.

    Raises:
        UserError: when it is too large for ONNX.
    """
    # Lines of source files, of one machine, and worth more bytes than a small tower.
    for part in (graph, graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.functions):
        del part.metadata_props[:]
        if hasattr(part, "doc_string"):
            part.doc_string = ""
    if (size := graph.ByteSize()) > MOST_BYTES:
        raise UserError(
            f"{path.name}: the ids that it maps make it {size:,} bytes large, an ONNX graph can "
            f"have {MOST_BYTES:,}: lower data.tables.*.max_size, or give the tables slots"
        )
    path.write_bytes(graph.SerializeToString())
