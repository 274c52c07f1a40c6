"""A bundle made by hand in a moment, with integer ids and a vector: no training, no export."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from twotower.data.schema import TensorSpec
from twotower.export.bundle import seal
from twotower.export.config import IndexConfig
from twotower.export.index import index_spec
from twotower.export.manifest import Manifest
from twotower.files import write_json

USERS, ITEMS, WIDTH = 4, 40, 3
ITEM_IDS = np.arange(100, 100 + ITEMS, dtype=np.int64)


def spec(name: str, kind: str, dtype: str, length: int = 1) -> TensorSpec:
    return TensorSpec(name=name, kind=kind, dtype=dtype, length=length)


QUERY = [spec("user_id", "id", "int64"), spec("text", "vector", "float32", WIDTH)]


def write_graph(path: Path, nodes, inputs, outputs, constants) -> None:
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value(*i) for i in inputs], [value(*o) for o in outputs], tensors
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def tiny_bundle(
    folder: Path, version: int = 1, sign_with: str | None = None, **serve: object
) -> Path:
    """Query vector = table[user] + text, made unit; the unseen share the last row.

    Every version has weights of its own, so that its answers are told from another's.
    """
    path = folder / str(version)
    path.mkdir(parents=True)
    random = np.random.default_rng(version + 2)
    table = random.normal(size=(USERS + 1, WIDTH)).astype(np.float32)
    vectors = unit(random.normal(size=(ITEMS, WIDTH)))
    node = helper.make_node
    write_graph(
        path / "query.onnx",
        [
            node("Cast", ["user_id"], ["name"], to=TensorProto.STRING),
            node("LabelEncoder", ["name"], ["row"], domain="ai.onnx.ml",
                 keys_strings=[str(u) for u in range(USERS)], values_int64s=list(range(USERS)),
                 default_int64=USERS),
            node("Gather", ["table", "row"], ["gathered"]),
            node("Squeeze", ["gathered", "one"], ["user"]),
            node("Add", ["user", "text"], ["sum"]),
            node("LpNormalization", ["sum"], ["vector"], axis=-1, p=2),
        ],
        [("user_id", TensorProto.INT64, ["B", 1]), ("text", TensorProto.FLOAT, ["B", WIDTH])],
        [("vector", TensorProto.FLOAT, ["B", WIDTH])],
        {"table": table, "one": np.array([1])},
    )  # fmt: skip
    write_graph(
        path / "index.onnx",
        [node("MatMul", ["vector", "items"], ["all"]),
         node("TopK", ["all", "k"], ["scores", "rows"], axis=-1)],
        [("vector", TensorProto.FLOAT, ["B", WIDTH]), ("k", TensorProto.INT64, [1])],
        [("scores", TensorProto.FLOAT, ["B", "K"]), ("rows", TensorProto.INT64, ["B", "K"])],
        {"items": np.ascontiguousarray(vectors.T)},
    )  # fmt: skip
    (path / "item.onnx").write_bytes(b"not served")
    np.save(path / "item_vectors.npy", vectors)
    np.save(path / "item_ids.npy", ITEM_IDS)
    golden = []
    for user in range(USERS + 1):
        text = random.normal(size=WIDTH).astype(np.float32)
        scores = vectors @ unit(table[user] + text)
        order = [int(i) for i in np.argsort(-scores) if i != user][:6]
        golden.append({
            "features": {"user_id": user, "text": text.tolist()}, "exclude": [100 + user],
            "item_ids": ITEM_IDS[order].tolist(), "scores": scores[order].tolist(),
        })  # fmt: skip
    write_json(path / "golden.json", golden)
    write_json(path / "job.json", {"name": "tiny", "serve": serve})
    seal(path, Manifest(
        version=version, name="tiny", fingerprint="f", query=QUERY,
        item=[spec("item_id", "id", "int64")], item_id_dtype="int64", num_items=ITEMS, dim=WIDTH,
        versions={}, metrics={}, parity={}, index=index_spec(IndexConfig(), WIDTH, False),
    ), sign_with)  # fmt: skip
    return path
