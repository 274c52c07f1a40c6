"""What is rendered for Triton: valid for its own schema, the same tensors on both targets."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
import tritonclient.grpc as grpc
from google.protobuf import text_format
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from tests.export.bundles import dynamic_bundle, featured_bundle, timed_bundle
from tests.export.test_weights import put_outside
from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.export.config import TensorRTConfig
from twotower.export.search import exact_top_k, open_search
from twotower.serve.client import RecommendClient
from twotower.serve.config import MODELS, ServeConfig
from twotower.serve.repository import render_repository
from twotower.serve.supervisor import running_server
from twotower.serve.triton.fused import FusedSearch

from ..conftest import maker
from .conftest import FREE, GOOD, raw_inputs, stubs_of

FULL = ServeConfig(
    models=list(MODELS), instances=2, max_batch_size=32, preferred_batch_sizes=[8, 16],
    max_queue_delay_us=500, max_queue_size=100, queue_timeout_ms=50, priority_levels=3,
    response_cache_mb=4, concurrent_batches=2,
)  # fmt: skip
KINDS = {"dynamic": dynamic_bundle, "timed": timed_bundle, "featured": featured_bundle}


@pytest.fixture(scope="module", params=KINDS)
def bundle(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tensorrt = TensorRTConfig(precisions=["fp16", "fp32"])
    return KINDS[request.param](maker(folder), folder, tensorrt=tensorrt)[2]


def configurations(repository, target) -> dict:
    """Parse every rendered file by Triton's own schema, which refuses unknown fields."""
    found = {}
    for model in sorted(repository.iterdir()):
        path = model / ("config.pbtxt" if target == "gpu" else f"configs/{target}.pbtxt")
        found[model.name] = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    return found


@pytest.mark.parametrize("config", [ServeConfig(), FULL], ids=["default", "full"])
def test_both_targets_fit_tritons_schema_and_have_the_same_tensors(
    bundle, config, tmp_path
) -> None:
    found = {}
    for target in ("cpu", "gpu"):
        environment = tmp_path if target == "cpu" else None
        render_repository(bundle, tmp_path / target, config, environment, target)
        found[target] = configurations(tmp_path / target, target)
    towers = {"query_tower", "item_tower"} if len(config.models) > 1 else {"query_tower"}
    assert set(found["gpu"]) - set(found["cpu"]) == towers
    for name in config.models:
        cpu, gpu = found["cpu"][name], found["gpu"][name]
        for field in ("input", "output", "max_batch_size", "dynamic_batching"):
            assert getattr(cpu, field) == getattr(gpu, field), field
        assert cpu.instance_group[0].kind == cpu.instance_group[0].KIND_CPU
        assert gpu.instance_group[0].kind == gpu.instance_group[0].KIND_GPU
        files = {p.name for p in (tmp_path / "gpu" / name / "1").iterdir()}
        assert not {"query.onnx", "index.onnx", "golden.json"} & files
    batching = found["cpu"]["recommend"].dynamic_batching
    assert batching.HasField("default_queue_policy") == (config is FULL)
    if config is FULL:
        assert list(batching.preferred_batch_size) == [8, 16]
        assert batching.default_queue_policy.default_timeout_microseconds == 50_000
        assert batching.priority_levels == batching.default_priority_level == 3


def test_a_towers_inputs_are_what_the_encoding_gives(bundle, tmp_path) -> None:
    render_repository(bundle, tmp_path / "r", FULL, None, "gpu")
    for side in ("query", "item"):
        config = configurations(tmp_path / "r", "gpu")[f"{side}_tower"]
        folder = tmp_path / "r" / f"{side}_tower" / "1"
        graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
        for weight in graph.initializer:
            for entry in weight.external_data:
                assert entry.key != "location" or (folder / entry.value).is_file()
        kinds = {1: model_config_pb2.TYPE_FP32, 7: model_config_pb2.TYPE_INT64}
        rows = {i.name: (i.data_type, list(i.dims), i.HasField("reshape")) for i in config.input}
        for value in graph.input:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim[1:]]
            wanted = (kinds[value.type.tensor_type.elem_type], shape or [1], not shape)
            assert rows[value.name] == wanted
        assert config.max_batch_size == 1024
        assert [w.batch_size for w in config.model_warmup] == [1, 64]
        for warm in config.model_warmup:
            assert set(warm.inputs) == set(rows)
        assert list(config.output[0].dims) == [bundle.manifest.dim]


def test_an_engine_takes_the_place_of_the_graph(bundle, tmp_path) -> None:
    (tmp_path / "model.plan").write_bytes(b"engine")
    plans = {"query": tmp_path / "model.plan"}
    render_repository(bundle, tmp_path / "r", ServeConfig(), None, "gpu", plans)
    config = configurations(tmp_path / "r", "gpu")["query_tower"]
    assert config.platform == "tensorrt_plan"
    assert config.optimization.cuda.graphs
    assert [p.name for p in (tmp_path / "r/query_tower/1").iterdir()] == ["model.plan"]


def test_a_bundle_without_halves_is_refused_for_a_gpu(finished_run, twotower, tmp_path) -> None:
    done = twotower("render", finished_run.bundle, "--output=r", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds nothing for a GPU: export it with --export.tensorrt.precisions" in done.stderr
    assert not (tmp_path / "r").exists()
    done = twotower("render", finished_run.bundle, "--output=r", "--target=cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "twotower serve r" in done.stdout
    assert set(configurations(tmp_path / "r", "cpu")) == {"recommend"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"models": ["embed_query"]}, "serve.models must name recommend"),
        ({"models": ["recommend", "rank"]}, "serve.models must be one of recommend, embed_query"),
        ({"preferred_batch_sizes": [128]}, r"serve.preferred_batch_sizes must be in 1..64"),
        ({"max_queue_size": -1}, "serve.max_queue_size must be >= 0"),
        ({"queue_timeout_ms": float("nan")}, "serve.queue_timeout_ms must be >= 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says) -> None:
    with pytest.raises(UserError, match=says):
        ServeConfig(**settings).validate()


@pytest.mark.parametrize("device", [
    "cpu", pytest.param("cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")]),
])  # fmt: skip
def test_the_gpus_search_finds_what_the_index_finds(bundle, device) -> None:
    fused = FusedSearch(bundle.path, device)
    index = open_search(bundle.path, vars(bundle.manifest.index))
    rng = np.random.default_rng(0)
    query_BD = rng.standard_normal((5, bundle.manifest.dim)).astype(np.float32)
    scores, rows = fused.search(query_BD, 7)
    for other in (index.search(query_BD, 7), exact_top_k(index.item_ND, query_BD, 7)):
        np.testing.assert_array_equal(rows, other[1])
        np.testing.assert_allclose(scores, other[0], rtol=1e-5)
    some = np.array([1, 4, 5, 9, 20])
    for k in (1, 3, 5):
        for search in (fused, index):
            score_K, row_K = search.among(query_BD[0], some, k)
            np.testing.assert_array_equal(
                row_K, some[np.argsort(-(index.item_ND[some] @ query_BD[0]))[:k]]
            )
            np.testing.assert_allclose(score_K, index.item_ND[row_K] @ query_BD[0], rtol=1e-5)


@pytest.fixture(scope="module")
def full(finished_run, tmp_path_factory):
    """A server with every model and every limit that leaves a lone request alone."""
    config = replace(FREE, models=list(MODELS), response_cache_mb=4, concurrent_batches=1,
                     priority_levels=2)  # fmt: skip
    with running_server(finished_run.bundle, config, tmp_path_factory.mktemp("full")) as server:
        yield server


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_vectors_of_queries_and_items_are_those_that_are_searched(full, protocol) -> None:
    bundle = full.bundle
    vectors = np.load(bundle.path / "item_vectors.npy")
    ids = [i.decode() for i in np.load(bundle.path / "item_ids.npy")]
    url = full.grpc_url if protocol == "grpc" else full.http_url
    with RecommendClient(url, protocol) as client:
        best = client.recommend(GOOD, k=len(ids))
        query = client.embed("embed_query", GOOD)
        assert query.version == best.version == 1
        scores = vectors @ np.array(query.vector, np.float32)
        np.testing.assert_allclose(
            best.scores, [scores[ids.index(i)] for i in best.item_ids], atol=1e-5
        )
        with pytest.raises(UserError, match="feature 'genre'"):
            client.embed("embed_items", {"item_id": ids[0]})


def test_an_items_vector_is_that_of_the_catalogue(full, finished_run) -> None:
    data = PreparedDataset(finished_run.run_dir / "prepared")
    names = [s.name for s in full.bundle.manifest.item]
    rows = data.items.select([f"raw.{n}" for n in names]).rename_columns(names)
    vectors = np.load(full.bundle.path / "item_vectors.npy")
    with RecommendClient(full.grpc_url) as client:
        for row in (0, 17, 299):
            item = rows.slice(row, 1).to_pylist()[0]
            found = client.embed("embed_items", item)
            np.testing.assert_allclose(found.vector, vectors[row], atol=1e-5)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_similar_items_are_the_nearest_by_cosine(full, protocol) -> None:
    bundle = full.bundle
    vectors = np.load(bundle.path / "item_vectors.npy")
    ids = [i.decode() for i in np.load(bundle.path / "item_ids.npy")]
    bias = bundle.manifest.index.bias
    direction = vectors[:, :-1] if bias else vectors
    url = full.grpc_url if protocol == "grpc" else full.http_url
    with RecommendClient(url, protocol, model="similar") as client:
        for row in (0, 123):
            cosine = direction @ direction[row]
            wanted = [ids[i] for i in np.argsort(-cosine, kind="stable") if i != row][:9]
            found = client.recommend({"item": ids[row]}, k=9)
            assert found.item_ids == wanted
            less = client.recommend({"item": ids[row]}, k=8, exclude=wanted[:1])
            assert less.item_ids == wanted[1:]
            assert (
                client.recommend({"item": ids[row]}, k=3, allow=wanted[4:6]).item_ids
                == (wanted[4:6])
            )
        with pytest.raises(UserError, match=f"item 'no {protocol}' is not in the catalogue"):
            client.recommend({"item": f"no {protocol}"})
        with pytest.raises(UserError, match="refused this request before"):
            client.recommend({"item": f"no {protocol}"})


def test_a_request_that_was_answered_comes_from_the_cache(full) -> None:
    with grpc.InferenceServerClient(full.grpc_url) as client:

        def hits() -> int:
            stats = client.get_inference_statistics("recommend", as_json=True)["model_stats"][0]
            return int(stats["inference_stats"].get("cache_hit", {}).get("count", 0))

        first, before = client.infer("recommend", raw_inputs()), hits()
        again = client.infer("recommend", raw_inputs())
        assert hits() == before + 1
        np.testing.assert_array_equal(first.as_numpy("item_ids"), again.as_numpy("item_ids"))


def test_a_priority_beyond_the_levels_is_no_failure(full) -> None:
    with RecommendClient(full.grpc_url) as client:
        answers = [client.recommend(GOOD, k=3, priority=p) for p in (0, 1, 2, 7)]
    assert len({tuple(a.item_ids) for a in answers}) == 1


def test_a_full_queue_rejects_at_once_and_answers_the_rest(finished_run, tmp_path) -> None:
    config = replace(FREE, max_queue_size=2, max_batch_size=1)
    with running_server(finished_run.bundle, config, tmp_path / "server") as server:

        def ask(_: int) -> str:
            with grpc.InferenceServerClient(server.grpc_url) as client:
                try:
                    client.infer("recommend", raw_inputs(), client_timeout=10)
                except InferenceServerException as error:
                    return str(error)
            return "answered"

        with ThreadPoolExecutor(48) as pool:
            outcomes = set(pool.map(ask, range(200)))
    assert "answered" in outcomes
    rejected = outcomes - {"answered"}
    assert rejected
    assert all("Exceeds maximum queue size" in text for text in rejected), rejected


def test_rendered_parameters_are_read_back(bundle, tmp_path) -> None:
    render_repository(bundle, tmp_path / "r", FULL, tmp_path, "cpu")
    for name, config in configurations(tmp_path / "r", "cpu").items():
        parameters = MessageToDict(config)["parameters"]
        schema = json.loads(parameters["schema"]["stringValue"])
        specs = bundle.manifest.item if name == "embed_items" else bundle.manifest.query
        wanted = ["item"] if name == "similar" else [s.name for s in specs]
        assert [f["name"] for f in schema["features"]] == wanted
        assert parameters["target"]["stringValue"] == "cpu"


def test_what_nobody_waits_for_is_not_computed(full) -> None:
    def counted(client) -> tuple[int, int]:
        stats = client.get_inference_statistics("recommend", as_json=True)["model_stats"][0]
        return tuple(int(stats["inference_stats"][n].get("count", 0)) for n in ("success", "fail"))

    stubs = [s for s in stubs_of(full.process.pid) if "recommend" in " ".join(s.cmdline())]
    assert stubs
    with grpc.InferenceServerClient(full.grpc_url) as client:
        success, fail = counted(client)
        for stub in stubs:
            stub.suspend()
        try:
            for user in range(20):
                with pytest.raises(InferenceServerException, match="Deadline Exceeded"):
                    client.infer(
                        "recommend", raw_inputs(age=("FP32", np.array([[user]], np.float32))),
                        client_timeout=0.03,
                    )  # fmt: skip
        finally:
            for stub in stubs:
                stub.resume()
        client.infer("recommend", raw_inputs(age=("FP32", np.array([[99]], np.float32))))
        after = counted(client)
    # The one that the stub had begun is computed, and perhaps the probe's.
    assert after[0] - success <= 6
    assert after[1] - fail >= 15


def test_weights_beside_the_graphs_are_served(make, tmp_path, monkeypatch) -> None:
    put_outside(monkeypatch)
    served = featured_bundle(make, tmp_path)[2]
    assert {"query.weights", "item.weights"} <= set(served.manifest.files)
    config = replace(FREE, models=["recommend", "embed_items"])
    with (
        running_server(served.path, config, tmp_path / "server") as server,
        RecommendClient(server.grpc_url) as client,
    ):
        assert server.prove() < 1e-4
        item = {"item_id": "item 3", "tags": ["tag 3"], "price": 0.5}
        assert len(client.embed("embed_items", item).vector) == served.manifest.dim
