"""Hashing of ids: ONNX Runtime's operator and ours must agree for ever."""

import numpy as np
import onnxruntime as ort
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from twotower.data import vocabulary
from twotower.data.vocabulary import KEY_SEEDS, DynamicIds, hashed_keys, murmur3

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40)
INT64 = st.integers(-(2**63), 2**63 - 1)
SEEDS = (0, *KEY_SEEDS)


def onnx_hashes(values: np.ndarray, kind: int) -> list[list[int]]:
    """Return the hashes by every seed."""
    names = [f"y{seed}" for seed in SEEDS]
    nodes = [
        helper.make_node(
            "MurmurHash3", ["x"], [name], domain="com.microsoft", seed=seed, positive=1
        )
        for name, seed in zip(names, SEEDS, strict=True)
    ]
    graph = helper.make_graph(
        nodes, "hash", [helper.make_tensor_value_info("x", kind, [None])],
        [helper.make_tensor_value_info(name, TensorProto.UINT32, [None]) for name in names],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [hashes.tolist() for hashes in session.run(None, {"x": values})]


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(TEXT, min_size=1, max_size=30), skip=st.integers(0, 3))
def test_strings_hash_as_in_the_graph(ids, skip) -> None:
    expected = onnx_hashes(np.array(ids, dtype=object), TensorProto.STRING)
    found = pa.array(["x"] * skip + ids).slice(skip)
    assert [murmur3(found, seed).tolist() for seed in SEEDS] == expected


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(INT64, min_size=1, max_size=30))
def test_integers_hash_as_in_the_graph(ids) -> None:
    expected = onnx_hashes(np.array(ids, dtype=np.int64), TensorProto.INT64)
    assert [murmur3(pa.array(ids), seed).tolist() for seed in SEEDS] == expected


def test_long_ids_hash_as_in_the_graph_without_widening_all_others(monkeypatch) -> None:
    monkeypatch.setattr(vocabulary, "HASHED_BYTES", 3000)
    ids = ["short", "x" * 1500, "", "é" * 1000, "longer than short", "y" * 4000]
    expected = onnx_hashes(np.array(ids, dtype=object), TensorProto.STRING)
    assert [murmur3(pa.array(ids), seed).tolist() for seed in SEEDS] == expected


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.none() | TEXT, max_size=30) | st.lists(st.none() | INT64, max_size=30))
def test_a_key_is_even_and_the_ids_own(ids) -> None:
    dtype = "int64" if any(isinstance(i, int) for i in ids) else "string"
    raw = pa.array(ids, pa.int64() if dtype == "int64" else pa.string())
    keys = DynamicIds(dtype, 100).lookup(raw)
    for raw_id, key in zip(ids, keys.tolist(), strict=True):
        if raw_id is None:
            assert key == -1
        else:
            high, low = divmod(key, 2**32)
            assert (high, low // 2, low % 2) == (*(
                int(murmur3(pa.array([raw_id], raw.type), seed)[0]) % 2**31 for seed in KEY_SEEDS
            ), 0)  # fmt: skip


def test_many_ids_have_keys_of_their_own_all_over_the_range() -> None:
    keys = hashed_keys(pa.array(np.arange(200_000)))
    assert len(np.unique(keys)) == 200_000
    # Of 64 equal parts of the range each has 3,125 of them, give or take six deviations.
    parts = np.bincount(keys // 2**57, minlength=64)
    assert len(parts) == 64
    assert np.abs(parts - 3125).max() < 6 * 3125**0.5


def test_known_values() -> None:
    # Of the reference implementation (Appleby, MurmurHash3_x86_32, seed 0).
    assert murmur3(pa.array(["", "hello"])).tolist() == [0, 0x248BFA47]
