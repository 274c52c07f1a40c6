"""A bundle for TensorRT: its files, what gates them, and the script that builds their engines."""

import functools
import itertools
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from twotower.errors import UserError
from twotower.export.build_engine import BuildError, build, cached_engine, engine_name, trtexec_line
from twotower.export.build_engine import read_description as described
from twotower.export.bundle import bundle_versions, read_bundle
from twotower.export.config import ExportConfig, TensorRTConfig
from twotower.export.golden import TOGETHER
from twotower.export.graphs import tower_graph
from twotower.export.halves import check_towers
from twotower.export.manifest import HALVES, SIDES
from twotower.export.parity import ParityError
from twotower.export.precision import HALF, PRODUCTS, lowered, rounded
from twotower.export.search import exact_top_k
from twotower.export.update import update_bundle

from ..conftest import maker
from .bundles import dynamic_bundle, export_again
from .test_weights import put_outside

PRECISIONS = ["fp16", "fp32", "bf16", "int8", "fp8"]
CONFIG = ExportConfig(tensorrt=TensorRTConfig(precisions=PRECISIONS, batch=[1, 8, 32]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, towers and a bundle for TensorRT."""
    folder = tmp_path_factory.mktemp("halves")
    return dynamic_bundle(maker(folder), folder, tensorrt=CONFIG.tensorrt)


def run_script(bundle, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(bundle / "build_engine.py"), *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60, env=os.environ | environment,
    )  # fmt: skip


def test_a_bundle_holds_both_halves_its_parity_and_each_table_once(made) -> None:
    _, _, bundle = made
    m = bundle.manifest
    assert set(HALVES) <= set(m.files)
    assert m.parity["tensorrt_fp32"] <= CONFIG.tolerance
    assert m.parity["tensorrt_fp32_items"] <= CONFIG.tolerance
    for precision, most in (("fp16", 0.01), ("bf16", 0.01), ("int8", 0.1), ("fp8", 0.1)):
        assert 0 < m.parity[f"tensorrt_{precision}"] < most
        assert 0 < m.parity[f"tensorrt_{precision}_items"] < most
        assert m.parity[f"tensorrt_{precision}_overlap"] > 0.9
    places = set()
    for precision in PRECISIONS:
        graph = onnx.load(bundle.path / f"query_tower.{precision}.onnx", load_external_data=False)
        assert [d.dim_value for d in graph.graph.input[1].type.tensor_type.shape.dim] == [0, 4]
        outside = [i for i in graph.graph.initializer if i.data_location == TensorProto.EXTERNAL]
        assert {i.data_type for i in outside} == {TensorProto.FLOAT}
        places.add(tuple(e.value for i in outside for e in i.external_data))
    assert len(places) == 1, "all precisions read the same bytes"
    item = onnx.load(bundle.path / "item_tower.fp16.onnx", load_external_data=False)
    also = {
        (i.external_data[1].value, *i.dims) for i in item.graph.initializer
        if i.data_location == TensorProto.EXTERNAL
    }  # fmt: skip
    shared = also & {(i.external_data[1].value, *i.dims) for i in outside}
    assert len(shared) == 1, "the items' ids"
    shapes = [i.dims for i in outside] + [shape for _, *shape in also - shared]
    tables = sum(int(np.prod(shape)) * 4 for shape in shapes)
    assert tables <= (bundle.path / "towers.weights").stat().st_size < tables + 4096 * 8


def test_a_table_that_query_onnx_keeps_in_a_file_is_not_written_again(made, monkeypatch) -> None:
    put_outside(monkeypatch)  # as of tables beyond 1 GiB
    data, _, bundle = made
    again = export_again(data, bundle.path.parent.parent, tensorrt=CONFIG.tensorrt)
    assert "towers.weights" not in again.manifest.files
    towers = again.tensorrt()["towers"]
    assert towers["query"]["weights"] == ["query.weights"]
    assert towers["item"]["weights"] == ["item.weights", "query.weights"]
    for name, difference in bundle.manifest.parity.items():
        assert again.manifest.parity[name] == pytest.approx(difference, abs=1e-5)


def test_other_items_keep_the_halves(made) -> None:
    _, _, bundle = made
    first = bundle.golden()[0].item_ids[0]
    after = update_bundle(bundle, None, [first], None, lambda *_: None)
    for name in HALVES:
        assert after.manifest.files[name] == bundle.manifest.files[name]


def test_a_precision_past_its_tolerance_leaves_no_bundle(made) -> None:
    data, _, bundle = made
    strict = TensorRTConfig(precisions=["bf16"], bf16_tolerance=1e-7)
    before = bundle_versions(bundle.path.parent)
    says = r"the bf16 tower answers .*export.tensorrt.bf16_tolerance 1e-07"
    with pytest.raises(ParityError, match=says):
        export_again(data, bundle.path.parent.parent, tensorrt=strict)
    assert bundle_versions(bundle.path.parent) == before


def test_a_precision_that_finds_other_items_is_refused(made) -> None:
    data, _, bundle = made
    item_ND = np.load(bundle.path / "item_vectors.npy")
    # Other items with the scores of the golden ones: as of towers that lie far off.
    other = [replace(g, item_ids=[f"no {i}" for i in g.item_ids]) for g in bundle.golden()]
    loose = TensorRTConfig(precisions=["fp16"], fp16_tolerance=10.0)
    exact = functools.partial(exact_top_k, item_ND)
    with pytest.raises(ParityError, match=r"fp16 tower gives 0.0% .*export.tensorrt.overlap 0.9"):
        check_towers(
            bundle.path, data, other, item_ND, 10, exact, ExportConfig(tensorrt=loose), TOGETHER
        )


class Odd(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


def test_a_layer_that_onnx_has_no_operator_for_is_named(made) -> None:
    data, model, _ = made
    specs = data.encoder.specs(data.config, "query")
    usual, model.query.layers[1] = model.query.layers[1], Odd()
    try:
        with pytest.raises(UserError) as refused:
            tower_graph(model, "query", specs)
    finally:
        model.query.layers[1] = usual
    said = str(refused.value)
    assert said.startswith("query tower: layer 'tower.layers.1' (Odd) cannot be exported to ONNX: ")
    assert "bessel_j0" in said
    assert "\n" not in said


def chain(layers):
    """Return the softmax of products and additions in turn, from `x` (B, W), as a graph."""
    nodes, weights, at = [], [], "x"
    for i, arrays in enumerate(layers):
        weights += [
            numpy_helper.from_array(a, f"{n}{i}") for n, a in zip("wb", arrays, strict=True)
        ]
        if i % 2:
            nodes.append(helper.make_node("Gemm", [at, f"w{i}", f"b{i}"], [f"y{i}"]))
        else:
            nodes.append(helper.make_node("MatMul", [at, f"w{i}"], [f"p{i}"]))
            nodes.append(helper.make_node("Add", [f"p{i}", f"b{i}"], [f"y{i}"]))
        at = f"y{i}"
    nodes.append(helper.make_node("Softmax", [at], ["vector"]))
    shapes = {"x": ["b", len(layers[0][0])], "vector": ["b", len(layers[-1][1])]}
    x, vector = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
    graph = helper.make_graph(nodes, "chain", [x], [vector], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=5), st.sampled_from(["fp16", "bf16"]),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_only_products_are_halves_and_they_round_where_the_graph_says(
    widths, precision, seed
) -> None:
    rng = np.random.default_rng(seed)

    def drawn(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    layers = [(drawn(n, m), drawn(m)) for n, m in itertools.pairwise(widths)]
    graph = lowered(chain(layers), precision, Path())
    onnx.checker.check_model(graph, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    kinds |= {i.name: i.data_type for i in inferred.initializer}
    kind, dtype = HALF[precision]
    for node in graph.graph.node:
        if node.op_type != "Cast":
            expected = kind if node.op_type in PRODUCTS else TensorProto.FLOAT
            assert {kinds[name] for name in (*node.input, *node.output)} == {expected}

    def half(array):
        return torch.as_tensor(array).to(dtype).float()

    x = drawn(3, widths[0])
    at = torch.from_numpy(x)
    for i, (w, b) in enumerate(layers):
        product = half(at) @ half(w)
        at = half(product + half(b)) if i % 2 else half(product) + torch.from_numpy(b)
    (found,) = ort.InferenceSession(rounded(graph).SerializeToString()).run(None, {"x": x})
    # A sum in another order may round to the neighbour, which later products carry on.
    unit = {"fp16": 2**-10, "bf16": 2**-7}[precision]
    np.testing.assert_allclose(found, torch.softmax(at, -1).numpy(), atol=4 * unit)


def test_an_engine_is_built_of_each_precision_and_found_again(made, trt, tmp_path) -> None:
    _, _, bundle = made
    for tower, precision in itertools.product(SIDES, PRECISIONS):
        description = described(bundle.path, precision, tower)
        assert [p.name for p in description["weights"]] == ["towers.weights"]
        engine = bytes(build(trt, description, "SM89"))
        assert len(engine) > 1000
        path = tmp_path / engine_name(description, "10.15.1", "80")
        path.write_bytes(engine)
        # What is there is not built again: this machine has no GPU.
        assert cached_engine(None, None, description, path).read_bytes() == engine
    assert len(list(tmp_path.iterdir())) == 2 * len(PRECISIONS)


def test_an_engine_that_takes_other_weights_is_another(made, trt) -> None:
    description = described(made[2].path, "fp32")
    assert not description["refit"]
    other = description | {"refit": True}
    # tensorrt-rtx builds every other engine without a GPU.
    with pytest.raises(BuildError, match="TensorRT built no engine of query_tower"):
        build(trt, other, "SM80")
    assert engine_name(other, "10.15.1", "80") != engine_name(description, "10.15.1", "80")
    assert " --refit " in trtexec_line(other)
    assert " --refit " not in trtexec_line(description)


def test_what_an_engine_is_checked_by_is_what_the_export_computed(made) -> None:
    bundle = made[2]
    description = described(bundle.path, "fp16")
    assert description["tolerance"] == CONFIG.tensorrt.fp16_tolerance
    with np.load(description["check"], allow_pickle=False) as known:
        rows = len(known["query/vector"])
        assert {f"query/{name}" for name in description["inputs"]} < set(known)
        assert all(len(known[name]) == rows for name in known if name.startswith("query/"))
        items = known["item/vector"]
    assert rows == len(items) + 24 == 64
    vectors = np.load(bundle.path / "item_vectors.npy")
    np.testing.assert_allclose(items, vectors, atol=1e-5)


def test_the_line_for_trtexec_gives_every_inputs_shapes(made) -> None:
    line = trtexec_line(described(made[2].path, "bf16"))
    assert f"--onnx={made[2].path / 'query_tower.bf16.onnx'} --stronglyTyped --noTF32" in line
    shapes = "user_id.encoded:{0}x1,friends.encoded:{0}x4,city.encoded:{0}x1,history.encoded:{0}x5"
    for option, batch in zip(("min", "opt", "max"), CONFIG.tensorrt.batch, strict=True):
        assert f" --{option}Shapes={shapes.format(batch)},liked.encoded:{batch}x3 " in line


def test_an_engines_name_changes_with_all_that_it_depends_on(made, tmp_path) -> None:
    _, _, bundle = made
    description = described(bundle.path, None)
    assert description["precision"] == "fp16"
    other = tmp_path / "other.onnx"
    other.write_bytes(b"other")
    names = [
        engine_name(description, "10.15.1", "80"),
        engine_name(description, "11.0.0", "80"),
        engine_name(description, "10.15.1", "90"),
        engine_name(description | {"batch": [1, 8, 64]}, "10.15.1", "80"),
        engine_name(description | {"graph": other}, "10.15.1", "80"),
        engine_name(description | {"weights": [other]}, "10.15.1", "80"),
        engine_name(described(bundle.path, "bf16"), "10.15.1", "80"),
    ]
    assert len(set(names)) == len(names)
    assert engine_name(described(bundle.path, None), "10.15.1", "80") == names[0]


def test_tensorrt_refuses_an_operator_by_the_name_of_its_node(trt, tmp_path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b"]) for n in "xy")
    nodes = [helper.make_node("Unique", ["x"], ["y"], name="layers.1/unique")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )  # fmt: skip
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(BuildError, match=r"refuses node 'layers.1/unique' \(Unique\) of bad.onnx"):
        build(
            trt,
            {"graph": tmp_path / "bad.onnx", "inputs": {"x": []}, "batch": [1, 2, 3],
             "refit": False},
            "SM80",
        )  # fmt: skip


def test_the_script_says_in_one_line_why_it_built_nothing(made, tmp_path) -> None:
    bundle = made[2].path
    for arguments, says in (
        ([], "TensorRT"),  # missing here, or without a GPU
        (["--precision", "int4"], "--precision must be one of fp16, fp32, bf16, int8, fp8, got"),
    ):
        done = run_script(bundle, *arguments, "--cache", tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("build_engine: ")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: (b / "tensorrt.json").unlink(), "exported without export.tensorrt.precisions"),
        (lambda b: (b / "tensorrt.json").write_text("{"), "damaged"),
        (lambda b: (b / "tensorrt.json").write_text('{"graphs": {}}'), "damaged"),
        (lambda b: (b / "towers.weights").unlink(), "towers.weights: missing"),
        (lambda b: (b / "tensorrt_check.npz").unlink(), "tensorrt_check.npz: missing"),
        (lambda b: (b / "query_tower.fp16.onnx").unlink(), "query_tower.fp16.onnx: missing"),
    ],
)
def test_the_script_refuses_part_of_a_bundle(made, damage, says, tmp_path) -> None:
    for name in HALVES:
        (tmp_path / name).write_bytes((made[2].path / name).read_bytes())
    damage(tmp_path)
    done = run_script(tmp_path)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("settings_", "says"),
    [
        ({"precisions": ["fp4"]}, "export.tensorrt.precisions must be one of fp32, fp16, bf16"),
        ({"precisions": ["fp16", "fp16"]}, "must differ"),
        ({"batch": [1, 64]}, "export.tensorrt.batch must be three sizes"),
        ({"batch": [1, 64, 32]}, "export.tensorrt.batch must be three sizes"),
        ({"batch": [0, 1, 1]}, "export.tensorrt.batch must be three sizes"),
        ({"fp16_tolerance": 0.0}, "export.tensorrt.fp16_tolerance must be > 0"),
        ({"bf16_tolerance": float("nan")}, "export.tensorrt.bf16_tolerance must be > 0"),
        ({"calibration_queries": 0}, "export.tensorrt.calibration_queries must be >= 1"),
        ({"overlap": 1.5}, r"export.tensorrt.overlap must be in \[0, 1\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings_, says) -> None:
    with pytest.raises(UserError, match=says):
        ExportConfig(tensorrt=TensorRTConfig(**settings_)).validate([8])


def test_export_makes_a_whole_bundle_and_says_why_it_built_no_engine(
    finished_run, twotower, tmp_path
) -> None:
    arguments = [*finished_run.arguments, "--tensorrt"]
    done = twotower("export", *arguments, cwd=finished_run.cwd)
    assert done.returncode == 2
    assert "--tensorrt: export.tensorrt.precisions is empty" in done.stderr
    skip = shutil.ignore_patterns("server*", "wandb")
    shutil.copytree(finished_run.run_dir, tmp_path / "run", ignore=skip)
    done = twotower("export", *arguments, "--export.tensorrt.precisions=[fp16]", cwd=tmp_path)
    assert done.returncode == 2  # neither TensorRT nor, on most machines, a GPU
    assert (
        "the bundle is whole, but no fp16 engine of the query tower was built: TensorRT cannot"
        in done.stderr
    )
    made = tmp_path / "run" / "bundles" / "2"
    parity = read_bundle(made).manifest.parity
    assert parity["tensorrt_fp16_overlap"] > 0.95
    for tolerance, code in (("0.01", 0), ("1e-7", 1)):
        done = twotower("verify", made, "--no-server", f"--tolerance={tolerance}", cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        assert "worst query of fp16 tower" in done.stdout
