"""Weights beside the graphs: the same answers, each table once, and none that is no number."""

import json

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from onnx import helper

from twotower.errors import UserError
from twotower.export import export as export_module
from twotower.export import graphs, weights
from twotower.export.bundle import read_bundle
from twotower.export.golden import onnx_answers, raw_tensors, session
from twotower.export.graphs import save_graph
from twotower.export.parity import check_answers
from twotower.export.search import open_search
from twotower.export.update import update_bundle
from twotower.export.weights import check_weights
from twotower.train.checkpoint import storage
from twotower.train.checkpoint.manifest import MODEL
from twotower.train.checkpoint.towers import load_towers
from twotower.train.summary import write_summary

from .bundles import dynamic_bundle, export_again, featured_bundle


def put_outside(monkeypatch) -> None:
    """Let a small model's tables go where a large one's do, in blocks of a few rows."""
    monkeypatch.setattr(export_module, "INSIDE_BYTES", 0)
    monkeypatch.setattr(weights, "LEAST_OUTSIDE", 1)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 100)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 100)


def places(bundle, side) -> set[tuple[str, int, tuple[int, ...]]]:
    """Return file, offset and shape of the weights outside a graph."""
    model = onnx.load(bundle.path / f"{side}.onnx", load_external_data=False)
    found = set()
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            found.add((where["location"], int(where["offset"]), tuple(tensor.dims)))
    return found


@pytest.mark.parametrize("kind", [dynamic_bundle, featured_bundle])
def test_weights_beside_the_graphs_give_the_same_answers(kind, make, tmp_path, monkeypatch) -> None:
    data, model, inside = kind(make, tmp_path)
    put_outside(monkeypatch)
    outside = export_again(data, tmp_path)
    read_bundle(outside.path)
    files = set(outside.manifest.files) - set(inside.manifest.files)
    assert files == {"query.weights", "item.weights"}
    assert outside.golden() == inside.golden()
    ids = data.items["id"].to_pylist()
    search = open_search(outside.path, vars(outside.manifest.index)).search
    for bundle in (inside, outside):
        answers = onnx_answers(bundle.path, bundle.manifest.query, bundle.golden(), ids, 10, search)
        assert check_answers(bundle.golden(), answers, 1e-6, "ONNX Runtime") < 1e-6
    # Item ids are read by both sides, and written once.
    query, item = places(outside, "query"), places(outside, "item")
    shared = {place for place in item if place[0] == "query.weights"}
    assert {shape for *_, shape in shared} == {tuple(model.table_weight("item_id").shape)}
    assert shared < query
    assert tuple(model.table_weight("tags").shape) in {shape for *_, shape in item - shared}
    assert {file for file, *_ in query} == {"query.weights"}
    again = export_again(data, tmp_path)
    for file in outside.manifest.files:
        assert (outside.path / file).read_bytes() == (again.path / file).read_bytes(), file


def test_items_are_added_to_a_bundle_with_weights_beside_its_graphs(
    make, tmp_path, monkeypatch
) -> None:
    put_outside(monkeypatch)
    data, _, bundle = featured_bundle(make, tmp_path)
    job = json.dumps({"data": data.summary["config"]})
    table = pa.table({"item_id": ["new"], "tags": [["tag 1"]], "price": [0.5]})
    pq.write_table(table, tmp_path / "new.parquet")
    (bundle.path / "job.json").write_text(job)
    made = update_bundle(bundle, tmp_path / "new.parquet", [], None, lambda *_: None)
    read_bundle(made.path)
    assert made.manifest.num_items == bundle.manifest.num_items + 1
    specs = made.manifest.query
    features = raw_tensors(specs, [bundle.golden()[0].features])
    session(made.path / "query.onnx").run(["vector"], features)


def test_weights_that_are_no_numbers_are_refused_by_table_and_row_or_layer(
    make, tmp_path, monkeypatch
) -> None:
    data, _, _ = featured_bundle(make, tmp_path)
    monkeypatch.setattr(weights, "BLOCK_BYTES", 100)
    model = load_towers(tmp_path / "train")
    check_weights(model)
    state = model.state_dict()
    table = next(w for path, w in state.items() if path.endswith("table_item_id.weight"))
    bias = next(w for path, w in state.items() if path == "item.layers.0.bias")
    words = r"table 'item_id': 4 of \d+ rows hold NaN or infinity, rows 3, 17, 18 first"
    for value in (np.inf, -np.inf, np.nan):
        table[[3, 17, 18, 30], 2] = value
        with pytest.raises(UserError, match=words):
            check_weights(model)
    storage.save(tmp_path / "train" / "checkpoint", {MODEL + k: v for k, v in state.items()}, {})
    write_summary(tmp_path / "train", {"fingerprint": "of a test"})
    with pytest.raises(UserError, match=words):
        export_again(data, tmp_path)
    assert [p.name for p in (tmp_path / "bundles").iterdir()] == ["1"], "the old one stays"
    table[:] = 0
    bias[0] = np.nan
    with pytest.raises(UserError, match=r"weights of layer item\.layers\.0\.bias hold NaN"):
        check_weights(model)


def test_a_graph_too_large_for_onnx_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(graphs, "MOST_BYTES", 10)
    node = helper.make_node("Identity", ["user_id"], ["vector"])
    graph = helper.make_model(helper.make_graph([node], "query", [], []))
    with pytest.raises(UserError, match=r"query\.onnx: the ids that it maps make it [\d,]+ bytes"):
        save_graph(graph, tmp_path / "query.onnx")
    assert not list(tmp_path.iterdir())
