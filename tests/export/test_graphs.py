"""The contract of every tower: TorchRec in training = the padded twin = ONNX on raw features."""

import numpy as np
import onnx
import pytest
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.schema import ID_KINDS, OF_HISTORIES, POOLINGS, Feature
from twotower.data.table import Table
from twotower.errors import UserError
from twotower.export.golden import raw_tensors, session
from twotower.export.graphs import entry_tables, raw_graph, save_graph
from twotower.towers.config import INTERACTIONS, ModelConfig
from twotower.towers.two_tower import TwoTower

from ..conftest import EVENTS

USERS = {"user_id": [1, 2, 3], "age": [20, 30, None], "city": ["x", None, "é"]}
ITEMS = {
    "item_id": list("abcd"),
    "tags": [["p", "q"], ["q"], None, ["r", "p", "q"]],
    "price": [1.5, 2.0, None, 9.0],
    "text": [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]],
}
KINDS = {
    "history": Feature(name="history", kind="history", table="item_id", length=3),
    "one": Feature(name="history", kind="history", table="item_id", length=1),
    "integer id": Feature(name="user_id", kind="id"),
    "string id with nulls": Feature(name="city", kind="id"),
    "number": Feature(name="age", kind="number"),
}
ITEM_KINDS = {
    "id": Feature(name="item_id", kind="id"),
    "ids": Feature(name="tags", kind="ids", length=2),
    "number": Feature(name="price", kind="number"),
    "vector": Feature(name="text", kind="vector", width=2),
}


def pooled(features, pooling):
    from dataclasses import replace

    lists = ("history",) if pooling in OF_HISTORIES else ("history", "ids")
    return [replace(f, pooling=pooling) if f.kind in lists else f for f in features]


def domains(path) -> set[str]:
    """Return where a graph's operators come from."""
    graph = onnx.load(path)
    assert max(o.version for o in graph.opset_import if not o.domain) <= 20
    return {node.domain for node in graph.graph.node}


CASES = {
    **{f"query {n}, {p}": ([f], list(ITEM_KINDS.values())[:1], p)
       for n, f in KINDS.items() for p in ("mean", "sum", "attention")
       if f.kind == "history" or p == "mean"},
    **{f"item {n}, {p}": ([KINDS["history"]], [f], p)
       for n, f in ITEM_KINDS.items() for p in ("mean", "sum", "attention")
       if f.kind == "ids" or p == "mean"},
    "all, mean": (list(KINDS.values())[:1] + list(KINDS.values())[2:],
                  list(ITEM_KINDS.values()), "mean"),
    "all, attention": (list(KINDS.values())[:1] + list(KINDS.values())[2:],
                       list(ITEM_KINDS.values()), "attention"),
}  # fmt: skip


# Every feature alone and all at once, with each interaction; without the residual, concatenated.
VARIANTS = [(interaction, True, False) for interaction in INTERACTIONS]
VARIANTS += [("concat", False, False), ("concat", True, True)]
CONTRACT = [(name, *variant) for name in CASES for variant in VARIANTS]
# An encoder is what it is whatever comes after it.
CASES |= {f"query {n}, {p}": ([KINDS[n]], list(ITEM_KINDS.values())[:1], p)
          for n in ("history", "one") for p in OF_HISTORIES}  # fmt: skip
CONTRACT += [
    (f"query history, {p}", "concat", True, d) for p in OF_HISTORIES for d in (False, True)
]
CONTRACT += [(f"query one, {p}", "concat", True, False) for p in OF_HISTORIES]
# What a history brings of the catalogue, however it is read.
BRINGS = Feature(
    name="history",
    kind="history",
    table="item_id",
    length=3,
    item_features=["tags", "price", "text"],
)
CASES |= {f"entries' features, {p}": ([BRINGS], list(ITEM_KINDS.values()), p)
          for p in POOLINGS}  # fmt: skip
CONTRACT += [(f"entries' features, {p}", "concat", True, d)
             for p in POOLINGS for d in (False, True)]  # fmt: skip


def tables_of(features, dynamic) -> dict[str, Table]:
    names = {f.table_name for f in features if f.kind in ID_KINDS}
    if dynamic:
        return {name: Table(slots=4) for name in names}
    return {name: Table(min_count=2, oov_rows=3) for name in names & {"item_id"}}


def admit(model, builder, steps=3) -> None:
    """Look up the first events in training mode, so that their ids get slots, as far as they go."""
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(builder.events(np.arange(7)))
    model.eval()


@pytest.mark.parametrize(("name", "interaction", "residual", "dynamic"), CONTRACT)
def test_training_twin_and_onnx_agree(name, interaction, residual, dynamic, make, tmp_path) -> None:
    query, item, pooling = CASES[name]
    data = make(
        EVENTS, users=USERS, items=ITEMS, query=pooled(query, pooling), item=pooled(item, pooling),
        tables=tables_of((*query, *item), dynamic),
    )  # fmt: skip
    torch.manual_seed(1)
    rows = {n: t["rows"] for n, t in data.summary["tables"].items()}
    config = ModelConfig(
        dim=8,
        hidden=[16],
        residual=residual,
        interaction=interaction,
        item_bias=not residual,
        layer_norm=not residual,
    )
    model = TwoTower(data.config, rows, config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim():
                parameter.add_(0.1 * torch.randn_like(parameter))
    builder, encoder = BatchBuilder(data), data.encoder
    if dynamic:
        admit(model, builder)
    events = np.arange(len(data.events))
    requests = []
    for row in events:
        user = int(data.event_columns["user"][row])
        line = slice(data.history_from[user], data.event_columns["history_to"][row])
        seconds = data.timeline_seconds[line] if data.config.timed_histories() else None
        requests.append(data.raw_query(user, int(row), data.timeline[line], seconds))
    catalogue = np.arange(len(data.items))
    raw_items = data.items.select([f"raw.{f.name}" for f in data.config.item])
    raw_items = raw_items.rename_columns([f.name for f in data.config.item]).to_pylist()
    # The rounding of a few fp32 layers of width 16, on vectors of length 1. Crosses of the item
    # (3, 4) nearly cancel, so that eager's own error against fp64 is 3.4e-6 there.
    atol = 1e-5 if interaction == "cross" else 2e-6
    for side, trained, raw in (
        ("query", model.query_vectors(builder.queries(events)), requests),
        ("item", model.item_vectors(builder.items(catalogue)), raw_items),
    ):
        specs = encoder.specs(data.config, side)
        tables = entry_tables(model, data)
        save_graph(raw_graph(encoder, model, side, specs, tables), tmp_path / "graph.onnx")
        assert domains(tmp_path / "graph.onnx") <= {"", "ai.onnx.ml", "com.microsoft"}
        graph = session(tmp_path / "graph.onnx")
        assert [i.name for i in graph.get_inputs()] == [s.name for s in specs]
        (served,) = graph.run(["vector"], raw_tensors(specs, raw))
        np.testing.assert_allclose(served, trained.detach().numpy(), atol=atol)
        encode = model.query_vectors if side == "query" else model.item_vectors
        encoded = encode(builder.requests(side, raw))
        np.testing.assert_allclose(served, encoded.detach().numpy(), atol=atol)
        for place, request in enumerate(raw):
            (alone,) = graph.run(["vector"], raw_tensors(specs, [request]))
            np.testing.assert_allclose(alone[0], served[place], atol=atol)


@pytest.mark.parametrize(("admitted", "answers"), [(None, 20), (0, 9), (3, 20)])
def test_unseen_and_missing_ids_are_answered_as_in_training(
    admitted, answers, make, tmp_path
) -> None:
    features = [KINDS["history"], KINDS["integer id"], KINDS["string id with nulls"]]
    dynamic = admitted is not None
    tables = {"item_id": Table(slots=400), "user_id": Table(slots=800), "city": Table(slots=201)}
    data = make(EVENTS, users=USERS, query=features, tables=tables if dynamic else {})
    rows = {n: t["rows"] for n, t in data.summary["tables"].items()}
    model = TwoTower(data.config, rows, ModelConfig(dim=8, hidden=[16])).eval()
    if dynamic:
        admit(model, BatchBuilder(data), admitted)
    specs = data.encoder.specs(data.config, "query")
    requests = [
        {"history": history, "user_id": user, "city": city}
        for history in ([], ["zebra"], ["a", "zebra", "ü"])
        for user in (1, -7, 2**62, None)
        for city in ("x", "nowhere", "", None)
    ]
    save_graph(raw_graph(data.encoder, model, "query", specs), tmp_path / "graph.onnx")
    (served,) = session(tmp_path / "graph.onnx").run(["vector"], raw_tensors(specs, requests))
    for request in requests:
        request["city"] = request["city"] or None
    eager = model.query_vectors(BatchBuilder(data).requests("query", requests))
    np.testing.assert_allclose(served, eager.detach().numpy(), atol=2e-6)
    assert len(np.unique(served.round(5), axis=0)) > answers, "ids make a difference"


def test_features_named_like_parts_of_the_graph_do_not_meet(make, tmp_path) -> None:
    names = ["a", "a_encoded", "a_known", "a_hash", "batch", "tower", "type", "items", "forward"]
    users = {"user_id": [1, 2, 3]} | {n: [f"{n} 1", f"{n} 2", f"{n} 3"] for n in names}
    data = make(EVENTS, users=users, query=[
        *(Feature(name=n, kind="id") for n in names),
        Feature(name="pop", kind="history", table="values", pooling="attention"),
    ])  # fmt: skip
    rows = {n: t["rows"] for n, t in data.summary["tables"].items()}
    model = TwoTower(data.config, rows, ModelConfig(dim=8, hidden=[16])).eval()
    specs = data.encoder.specs(data.config, "query")
    save_graph(raw_graph(data.encoder, model, "query", specs), tmp_path / "graph.onnx")
    requests = [data.raw_query(row, None, np.empty(0, np.int64)) for row in range(3)]
    (served,) = session(tmp_path / "graph.onnx").run(["vector"], raw_tensors(specs, requests))
    eager = model.query_vectors(BatchBuilder(data).requests("query", requests))
    np.testing.assert_allclose(served, eager.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize("name", ["k", "exclude", "vector", "scores"])
def test_a_feature_may_not_be_named_like_a_tensor_of_every_model(name, make) -> None:
    with pytest.raises(UserError, match="rename it"):
        make(EVENTS, users=USERS, query=[Feature(name=name, kind="id", column="city")])
