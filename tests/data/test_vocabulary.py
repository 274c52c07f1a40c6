"""Hashing of unseen ids: ONNX Runtime's operator and ours must agree for ever."""

import numpy as np
import onnxruntime as ort
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from twotower.data.vocabulary import murmur3

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)


def onnx_hash(values: np.ndarray, kind: int) -> list[int]:
    node = helper.make_node("MurmurHash3", ["x"], ["y"], domain="com.microsoft", seed=0, positive=1)
    graph = helper.make_graph(
        [node], "hash", [helper.make_tensor_value_info("x", kind, [None])],
        [helper.make_tensor_value_info("y", TensorProto.UINT32, [None])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": values})[0].tolist()


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(TEXT, min_size=1, max_size=30))
def test_strings_hash_as_in_the_graph(ids) -> None:
    assert murmur3(pa.array(ids)).tolist() == onnx_hash(
        np.array(ids, dtype=object), TensorProto.STRING
    )


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=30))
def test_integers_hash_as_in_the_graph(ids) -> None:
    assert murmur3(pa.array(ids)).tolist() == onnx_hash(
        np.array(ids, dtype=np.int64), TensorProto.INT64
    )


def test_known_values() -> None:
    # Of the reference implementation (Appleby, MurmurHash3_x86_32, seed 0).
    assert murmur3(pa.array(["", "hello"])).tolist() == [0, 0x248BFA47]
