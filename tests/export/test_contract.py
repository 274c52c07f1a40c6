"""The contract of the graphs' halves, for every kind of feature, encoder and interaction.

Eager PyTorch = both halves in ONNX Runtime, in each precision, and TensorRT builds an engine of the
tower: tensorrt-rtx does so ahead of time, without a GPU. What it cannot show is that the engine's
answers are right, and that TensorRT proper builds too, which shares the parser but not the kernels.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.schema import ENCODERS, ID_KINDS, OF_HISTORIES, Feature
from twotower.export.build_engine import build
from twotower.export.bundle import answer_difference
from twotower.export.config import TensorRTConfig
from twotower.export.golden import raw_tensors
from twotower.export.graphs import entry_tables, save_graph
from twotower.export.halves import (
    calibrated,
    dotted_tower,
    encoded_inputs,
    encoding_file,
    in_precision,
    input_shapes,
    padded_encoding,
    tower_file,
    tower_vectors,
)
from twotower.export.manifest import PRECISIONS
from twotower.export.parity import event_rows, item_rows
from twotower.towers.config import INTERACTIONS, EncoderConfig, ModelConfig
from twotower.towers.sequence import BIAS_UNIT
from twotower.towers.two_tower import TwoTower

USERS, ITEMS, EVENTS, QUERIES, K = 60, 50, 600, 300, 10
POOLINGS = ("mean", "attention", *OF_HISTORIES)
# fp32: the rounding of a few layers, on vectors of length 1. The others are the defaults' gate.
TOLERANCE = {"fp32": 1e-5} | {
    p: getattr(TensorRTConfig(), f"{p}_tolerance") for p in PRECISIONS if p != "fp32"
}
OVERLAP = {"fp32": 0.999, "fp16": 0.9, "bf16": 0.9, "int8": 0.8, "fp8": 0.7}
# Compute capability of the oldest GPU that has the products.
CAPABILITY = dict.fromkeys(PRECISIONS, "SM80") | {"fp8": "SM89"}
KINDS = {
    "id": Feature(name="user_id", kind="id"),
    "string id": Feature(name="city", kind="id"),
    "ids": Feature(name="friends", kind="ids", table="user_id", pooling="sum", length=4),
    "number": Feature(name="age", kind="number"),
    "vector": Feature(name="text", kind="vector", width=3),
}


def history(pooling: str, **more: object) -> Feature:
    return Feature(
        name="history", kind="history", table="item_id", length=6, pooling=pooling, **more
    )


# All kinds at once, whatever reads the history and however they meet; then each kind alone, and
# what a history may bring besides its ids.
CASES = {
    f"{pooling}, {interaction}": ([*KINDS.values(), history(pooling)], interaction)
    for pooling in POOLINGS for interaction in INTERACTIONS
}  # fmt: skip
CASES |= {kind: ([feature], "concat") for kind, feature in KINDS.items()}
CASES["a window of one"] = (
    [Feature(name="history", kind="history", table="item_id", length=1)], "concat",
)  # fmt: skip
CASES |= {
    f"{p}, time gaps and item features": (
        [history(p, time_gaps=True, item_features=["price"])], "concat",
    )
    for p in ENCODERS
}  # fmt: skip


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def log(make, rng):
    """Prepare a log of random events with the query features."""
    events = {
        "user_id": rng.integers(0, USERS, EVENTS).tolist(),
        "item_id": [f"item {i}" for i in rng.integers(0, ITEMS, EVENTS)],
        "timestamp": np.cumsum(rng.integers(1, 10**5, EVENTS)).tolist(),
    }
    users = {
        "user_id": list(range(USERS)),
        "city": [["x", "é", None][i % 3] for i in range(USERS)],
        "friends": [rng.integers(0, USERS, i % 6).tolist() for i in range(USERS)],
        "age": [None if i % 7 == 0 else float(i) for i in range(USERS)],
        "text": rng.standard_normal((USERS, 3)).tolist(),
    }
    items = {
        "item_id": [f"item {i}" for i in range(ITEMS)], "price": rng.random(ITEMS).tolist(),
        "kind": [["x", "é", None][i % 3] for i in range(ITEMS)],
        "tags": [[f"tag {j}" for j in range(i % 4)] for i in range(ITEMS)],
        "image": rng.standard_normal((ITEMS, 3)).tolist(),
    }  # fmt: skip
    item = [
        Feature(name="item_id", kind="id"), Feature(name="price", kind="number"),
        Feature(name="kind", kind="id"), Feature(name="tags", kind="ids", length=3),
        Feature(name="image", kind="vector", width=3),
    ]  # fmt: skip
    return lambda query: make(events, users=users, items=items, query=query, item=item)


def towers(data, interaction: str) -> TwoTower:
    """Return towers of random weights, in which every parameter takes part."""
    torch.manual_seed(1)
    rows = {name: table["rows"] for name, table in data.summary["tables"].items()}
    model = TwoTower(data.config, rows, ModelConfig(
        dim=8, hidden=[16], interaction=interaction, layer_norm=True,
        encoder=EncoderConfig(layers=1, heads=2),
    )).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim():
                told = name.endswith(("distance_bias", "gap_bias", "of_span", "recency"))
                unit = BIAS_UNIT if told else 1
                parameter.add_(0.1 * torch.randn_like(parameter) / unit)
    return model


def requests(data, count: int) -> list:
    """Return raw queries at random events, of which some name what no log holds."""
    rows = event_rows(data, 0, count, 0)
    for i, row in enumerate(rows):
        if i % 10 == 0:
            for f in data.config.query:
                if f.kind == "history":
                    row[f.name] = ["no such item"] * (i % 3)
                    row |= {f.times_name: [None] * (i % 3)} if f.has_times else {}
                elif f.kind in ID_KINDS and f.name != "friends":
                    row[f.name] = "nowhere" if f.name == "city" else 2**40 + i
    return rows


def answers(query_BD, item_ND) -> tuple:
    score_BN = query_BD @ item_ND.T
    found_BK = np.argsort(-score_BN, axis=1, kind="stable")[:, :K]
    return found_BK, np.take_along_axis(score_BN, found_BK, 1)


@pytest.mark.parametrize("name", CASES)
def test_query_halves_agree_with_eager_and_tensorrt_builds_the_tower(
    name: str, log, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    features, interaction = CASES[name]
    data = log(features)
    model = towers(data, interaction)
    rows = requests(data, QUERIES)
    with torch.no_grad():
        eager_BD = model.query_vectors(BatchBuilder(data).requests("query", rows)).numpy()
        item_ND = model.item_vectors(BatchBuilder(data).items(np.arange(len(data.items)))).numpy()
    wanted = answers(eager_BD, item_ND)
    for precision, vector_BD in each_precision("query", data, model, rows, tmp_path, request):
        tolerance = TOLERANCE[precision]
        np.testing.assert_allclose(vector_BD, eager_BD, atol=tolerance)
        found = answers(vector_BD, item_ND)
        shared = np.mean(
            [len(set(a) & set(b)) / K for a, b in zip(wanted[0], found[0], strict=True)]
        )
        assert shared >= OVERLAP[precision]
        for query in zip(*wanted, *found, strict=True):
            assert answer_difference(*query, tolerance) <= tolerance


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_item_halves_agree_with_eager_and_tensorrt_builds_the_tower(
    interaction: str, log, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data = log([KINDS["id"]])
    model = towers(data, interaction)
    places, rows = item_rows(data, ITEMS)
    assert len(places) == ITEMS
    with torch.no_grad():
        eager_ND = model.item_vectors(BatchBuilder(data).items(places)).numpy()
    for precision, vector_ND in each_precision("item", data, model, rows, tmp_path, request):
        np.testing.assert_allclose(vector_ND, eager_ND, atol=TOLERANCE[precision])


def each_precision(side, data, model, rows, folder, request):
    """Yield each precision and the vectors of its halves, then build an engine of each."""
    specs = data.encoder.specs(data.config, side)
    tables = entry_tables(model, data)
    save_graph(
        padded_encoding(data.encoder, model, side, specs, tables), folder / encoding_file(side)
    )
    tower = dotted_tower(model, side, specs, tables)
    assert max(o.version for o in tower.opset_import) <= 20
    assert {node.domain for node in tower.graph.node} == {""}
    encoded = encoded_inputs(folder, side, raw_tensors(specs, rows))
    largest = calibrated(folder, tower, encoded)
    for precision in PRECISIONS:
        graph = in_precision(tower, precision, folder, largest)
        save_graph(graph, folder / tower_file(side, precision))
        yield precision, tower_vectors(folder, side, precision, encoded)
    trt = request.getfixturevalue("trt")  # what is left is skipped where there is none
    for precision in PRECISIONS:
        build(trt, {
            "graph": folder / tower_file(side, precision), "inputs": input_shapes(tower),
            "batch": [1, 8, 64], "refit": False,
        }, CAPABILITY[precision])  # fmt: skip
