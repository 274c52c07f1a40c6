"""What the running server answers, over every protocol."""

import asyncio
import json
import queue
import re
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from twotower.export.bundle import answer_difference
from twotower.serve.client import AsyncRecommendClient, RecommendClient, ServerUnavailable
from twotower.serve.request import encode
from twotower.serve.server import TOLERANCE

from .conftest import GOOD, raw_inputs, stubs_of


@pytest.fixture(scope="module")
def golden(server):
    return server.golden


@pytest.fixture
def client(server):
    with RecommendClient(server.grpc_url) as client:
        yield client


def url_of(server, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


def test_all_golden_queries_are_answered_as_by_eager_pytorch(server) -> None:
    assert len(server.golden) == 200
    assert server.prove() < 1e-4


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_both_protocols_sync_and_asyncio_answer_alike(server, golden, protocol) -> None:
    url = url_of(server, protocol)

    async def ask() -> list[object]:
        async with AsyncRecommendClient(url, protocol) as client:
            return await asyncio.gather(
                *(client.recommend(g.features, k=10, exclude=g.exclude) for g in golden[:40])
            )

    with RecommendClient(url, protocol) as client:
        for g, other in zip(golden[:40], asyncio.run(ask()), strict=True):
            answer = client.recommend(g.features, k=10, exclude=g.exclude)
            assert answer.item_ids == other.item_ids == g.item_ids
            np.testing.assert_allclose(answer.scores, g.scores, atol=1e-4)
            assert answer.version == 1


def test_excluded_items_are_left_out_and_the_next_best_move_up(client, golden) -> None:
    features = golden[50].features
    best = client.recommend(features, k=20).item_ids
    answer = client.recommend(features, k=10, exclude=[*best[:5], best[9], "no such item"])
    assert answer.item_ids == [*best[5:9], *best[10:16]]


def test_everything_but_a_few_may_be_excluded(client, server, golden) -> None:
    ids = [i.decode() for i in np.load(server.bundle.path / "item_ids.npy")]
    answer = client.recommend(golden[0].features, k=10, exclude=ids[3:])
    assert sorted(answer.item_ids) == ids[:3]
    assert client.recommend(golden[0].features, k=10, exclude=ids).item_ids == []


def test_a_longer_id_than_any_is_not_mistaken_for_a_shorter_one(client, golden) -> None:
    best = client.recommend(golden[0].features, k=5).item_ids
    again = client.recommend(golden[0].features, k=5, exclude=[best[0] + "x"])
    assert again.item_ids == best


@pytest.mark.parametrize(("end", "left_out"), [(b"", True), (b"\0", False), (b"x", False)])
def test_only_the_id_itself_is_excluded(server, end, left_out) -> None:
    # Asked without our client, which sends no id with a zero.
    with grpc.InferenceServerClient(server.grpc_url) as raw:
        best = raw.infer("recommend", raw_inputs()).as_numpy("item_ids")[0, 0]
        exclude = ("BYTES", np.array([[best + end]], dtype=object))
        again = raw.infer("recommend", raw_inputs(exclude=exclude)).as_numpy("item_ids")[0, 0]
    assert (again != best) is left_out


def test_k_is_the_servers_default_or_as_asked(client, golden) -> None:
    assert len(client.recommend(golden[0].features).item_ids) == 10
    for k in (1, 7, 250):
        assert len(client.recommend(golden[0].features, k=k).item_ids) == k


def test_unseen_and_missing_ids_are_answered(client) -> None:
    features = {"history": [], "country": None, "age": 33, "device": "fridge"}
    answer = client.recommend(features, k=5)
    assert len(set(answer.item_ids)) == 5
    features["history"] = ["no such item", "item-000001"]
    assert client.recommend(features, k=5).item_ids != answer.item_ids


def test_a_large_number_is_answered_as_by_eager_pytorch(server, finished_run, client) -> None:
    """Up to where a tower's float32 overflows, and no further, eager, ONNX and the server agree."""
    from twotower.data.prepared import PreparedDataset
    from twotower.export.parity import eager_answers
    from twotower.train.checkpoint.towers import load_towers

    data = PreparedDataset(finished_run.run_dir / "prepared")
    model = load_towers(finished_run.run_dir / "train")
    vectors = np.load(server.bundle.path / "item_vectors.npy")
    good = GOOD | {"history_times": [None], "exclude": []}
    rows = [good | {"age": age} for age in (1e6, -1e12, 1e17)]
    for g in eager_answers(model, vectors, data, rows, 10):
        answer = client.recommend(g.features, k=10)
        assert answer_difference(
            g.item_ids, g.scores, answer.item_ids, answer.scores, TOLERANCE
        ) <= TOLERANCE  # fmt: skip
        assert max(answer.scores) > 0.1
    (g,) = eager_answers(model, vectors, data, [good | {"age": 1e22}], 10)
    bias = np.sort(vectors[:, -1])[::-1][:10]
    np.testing.assert_allclose(g.scores, bias, atol=TOLERANCE, err_msg="the query still matters")


def test_a_request_of_several_rows_is_answered_row_by_row(server, client) -> None:
    rows = {
        "history": ("BYTES", np.array([[b"item-000001", b""], [b"item-000002", b"item-000003"]],
                                      dtype=object)),
        "country": ("BYTES", np.array([[b"c1"], [b""]], dtype=object)),
        "age": ("FP32", np.array([[30], [40]], np.float32)),
        "device": ("BYTES", np.array([[b"web"], [b"web"]], dtype=object)),
    }  # fmt: skip
    with grpc.InferenceServerClient(server.grpc_url) as raw:
        together = raw.infer("recommend", raw_inputs(**rows)).as_numpy("item_ids")
    first = client.recommend(GOOD)
    second = client.recommend(
        {"history": ["item-000002", "item-000003"], "country": None, "age": 40, "device": "web"}
    )  # fmt: skip
    assert [i.decode() for i in together[0]] == first.item_ids
    assert [i.decode() for i in together[1]] == second.item_ids


@pytest.mark.parametrize(("age", "words"), [(np.nan, "age holds NaN"), (1e22, "which overflows")])
def test_a_bad_request_fails_alone_in_its_batch(server, golden, age, words) -> None:
    bad = raw_inputs(age=("FP32", np.array([[age]], np.float32)))

    def ask(number: int) -> bool:
        if number % 3 == 0:
            with grpc.InferenceServerClient(server.grpc_url) as raw:
                try:
                    raw.infer("recommend", bad)
                except InferenceServerException as error:
                    return words in str(error)
            return False
        g = golden[number % len(golden)]
        with RecommendClient(server.grpc_url) as client:
            return client.recommend(g.features, k=10, exclude=g.exclude).item_ids == g.item_ids

    with ThreadPoolExecutor(24) as pool:
        assert all(pool.map(ask, range(240)))


def test_requests_that_wait_are_answered_in_batches(server, golden) -> None:
    def count(name: str) -> int:
        text = urllib.request.urlopen(server.metrics_url).read().decode()
        return int(float(re.search(rf'^{name}{{model="recommend".*}} (\S+)$', text, re.M)[1]))

    async def ask() -> list[object]:
        async with AsyncRecommendClient(server.grpc_url, timeout_s=20) as client:
            await client.schema()
            # While the model stands still, all of them queue up.
            for stub in stubs_of(server.process.pid):
                stub.suspend()
            asked = [
                asyncio.create_task(client.recommend(g.features, k=10, exclude=g.exclude))
                for g in golden
            ]
            await asyncio.sleep(0.7)
            for stub in stubs_of(server.process.pid):
                stub.resume()
            return await asyncio.gather(*asked)

    before = [count("nv_inference_count"), count("nv_inference_exec_count")]
    answers = asyncio.run(ask())
    # Triton counts a batch after it has sent the answers.
    deadline = time.monotonic() + 10
    while (rows := count("nv_inference_count") - before[0]) < len(golden):
        assert time.monotonic() < deadline, f"{rows} rows for {len(golden)} requests"
        time.sleep(0.05)
    runs = count("nv_inference_exec_count") - before[1]
    assert runs <= rows / 10, f"{rows} rows took {runs} runs of the model"
    for g, answer in zip(golden, answers, strict=True):
        assert answer.item_ids == g.item_ids


def test_a_stream_may_have_hundreds_of_requests_under_way(server, golden) -> None:
    answers: queue.Queue[tuple[object, object]] = queue.Queue()
    with RecommendClient(server.grpc_url) as alone:
        schema = alone.schema()
        first = [alone.recommend(g.features, k=1).item_ids[0].encode() for g in golden[:50]]
    asked = [raw_inputs(**encode(schema, g.features, 10, [])) for g in golden[:50]]
    client = grpc.InferenceServerClient(server.grpc_url)
    client.start_stream(lambda result, error: answers.put((result, error)))
    wrong = []
    try:
        for number in range(16_000):
            if number >= 256:
                answer, error = answers.get(timeout=20)
                assert error is None, error
                which = int(answer.get_response().id)
                if answer.as_numpy("item_ids")[0, 0] != first[which]:
                    wrong.append(which)
            which = number % 50
            client.async_stream_infer("recommend", asked[which], request_id=str(which))
    finally:
        client.stop_stream(cancel_requests=True)
        client.close()
    assert wrong == []


def test_those_who_wait_are_answered_beside_those_who_gave_up(server, golden) -> None:
    async def ask() -> tuple[list[object], list[object]]:
        async with (
            AsyncRecommendClient(server.grpc_url, timeout_s=20) as patient,
            AsyncRecommendClient(server.grpc_url, timeout_s=20) as hasty,
        ):
            await asyncio.gather(patient.schema(), hasty.schema())
            hasty.timeout_s = 0.3
            # While the model stands still, all of them queue up, in turn.
            for stub in stubs_of(server.process.pid):
                stub.suspend()
            clients = [(hasty, patient)[i % 3 > 1] for i in range(60)]
            asked = [
                asyncio.create_task(client.recommend(g.features, k=10, exclude=g.exclude))
                for client, g in zip(clients, golden, strict=False)
            ]
            await asyncio.sleep(0.7)
            for stub in stubs_of(server.process.pid):
                stub.resume()
            return clients, await asyncio.gather(*asked, return_exceptions=True)

    clients, answers = asyncio.run(ask())
    for client, g, answer in zip(clients, golden, answers, strict=False):
        if client.timeout_s < 1:
            assert isinstance(answer, ServerUnavailable)
            assert answer.kind == "deadline"
        else:
            assert answer.item_ids == g.item_ids


def test_json_over_http_answers_without_any_client_library(server) -> None:
    body = {
        "inputs": [
            {"name": "history", "datatype": "BYTES", "shape": [1, 1], "data": ["item-000001"]},
            {"name": "country", "datatype": "BYTES", "shape": [1, 1], "data": ["c1"]},
            {"name": "age", "datatype": "FP32", "shape": [1, 1], "data": [30]},
            {"name": "device", "datatype": "BYTES", "shape": [1, 1], "data": ["web"]},
        ]
    }
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/recommend/infer", json.dumps(body).encode()
    )
    with urllib.request.urlopen(request) as response:
        outputs = {o["name"]: o["data"] for o in json.load(response)["outputs"]}
    with RecommendClient(server.grpc_url) as client:
        assert outputs["item_ids"] == client.recommend(GOOD).item_ids


def test_no_server_is_an_answer_too() -> None:
    for protocol in ("grpc", "http"):
        with (
            RecommendClient("127.0.0.1:9", protocol, timeout_s=1) as client,
            pytest.raises(ServerUnavailable, match="twotower serve"),
        ):
            client.recommend(GOOD)


def test_the_admin_endpoints_are_locked(server) -> None:
    with (
        grpc.InferenceServerClient(server.grpc_url) as raw,
        pytest.raises(InferenceServerException, match=r"restricted|forbidden|expecting"),
    ):
        raw.unload_model("recommend")
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/repository/models/recommend/unload", b"{}", method="POST"
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)
    server.probe()
