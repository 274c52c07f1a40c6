"""What goes wrong around the server, on a bundle made by hand with integer ids and a vector."""

import asyncio
import json
import os
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from twotower.errors import UserError
from twotower.export.bundle import read_bundle, seal
from twotower.files import write_json
from twotower.serve.client import AsyncRecommendClient, RecommendClient, ServerUnavailable
from twotower.serve.config import ServeConfig
from twotower.serve.server import TritonServer
from twotower.serve.supervisor import running_server

from .conftest import FREE, stubs_of
from .tiny import ITEM_IDS, ITEMS, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with running_server(bundle, FREE, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def unwatched(bundle: Path, tmp_path: Path) -> Iterator[TritonServer]:
    """A server that nobody brings back."""
    with running_server(bundle, replace(FREE, probe_interval_s=1000.0), tmp_path) as running:
        yield running
        # With its stub dead or hung, Triton would use up its time to stop.
        running.process.kill()


def test_a_bundle_whose_queries_prove_nothing_is_refused(bundle, tmp_path) -> None:
    copy = tmp_path / "1"
    shutil.copytree(bundle, copy)
    golden = json.loads((copy / "golden.json").read_text())
    # As eager PyTorch answers numbers that overflow a tower.
    zeros = golden[0] | {"scores": [0.0] * len(golden[0]["scores"])}
    nothing_left = golden[0] | {"item_ids": [], "scores": []}
    manifest = read_bundle(bundle).manifest

    def server_of(queries) -> TritonServer:
        write_json(copy / "golden.json", queries)
        seal(copy, manifest)
        return TritonServer(read_bundle(copy), FREE, tmp_path / "server")

    for queries in ([], [zeros]):
        with pytest.raises(UserError, match=r"golden\.json: holds no golden query"):
            server_of(queries)
    assert len(server_of([zeros, nothing_left, golden[1]]).golden) == 2
    assert not (tmp_path / "server").exists()


def url_of(server: TritonServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


def test_integer_ids_and_vectors(server) -> None:
    assert server.prove() < 1e-4
    golden = server.golden[1]
    with RecommendClient(server.grpc_url) as client:
        best = client.recommend(golden.features, k=ITEMS).item_ids
        assert sorted(best) == ITEM_IDS.tolist()
        left = client.recommend(golden.features, k=5, exclude=[*best[:2], best[4], -7, 10**15])
        assert left.item_ids == [best[2], best[3], *best[5:8]]
        assert client.recommend(golden.features, k=5, exclude=ITEM_IDS.tolist()).item_ids == []
        unseen = [client.recommend(golden.features | {"user_id": u}, k=5) for u in (77, None)]
        assert unseen[0].item_ids == unseen[1].item_ids
        for text in ([0.1] * 2, [0.1] * 4, []):
            with pytest.raises(UserError, match=f"width 3, got {len(text)}"):
                client.recommend({"user_id": 1, "text": text})
        with pytest.raises(UserError, match="'exclude' must hold integer ids"):
            client.recommend(golden.features, exclude=["100"])


def test_a_refused_request_is_the_clients_fault_over_http(server) -> None:
    """A 5xx would page someone for a mistake of the caller."""
    body = {"inputs": [
        {"name": "user_id", "datatype": "INT64", "shape": [1, 1], "data": [1]},
        {"name": "text", "datatype": "FP32", "shape": [1, 3], "data": [0, 0, float("nan")]},
    ]}  # fmt: skip
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/recommend/infer", json.dumps(body).encode()
    )
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request)
    assert "text holds NaN" in caught.value.read().decode()


@pytest.mark.parametrize(
    "path", ["repository/index", "logging", "trace/setting", "systemsharedmemory/region/x/register"]
)
def test_what_changes_the_server_needs_the_key(server, path) -> None:
    request = urllib.request.Request(f"http://{server.http_url}/v2/{path}", b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_the_other_protocols_port_is_explained(server, protocol) -> None:
    url = url_of(server, "http" if protocol == "grpc" else "grpc")
    features = server.golden[0].features

    async def ask() -> None:
        async with AsyncRecommendClient(url, protocol) as client:
            await client.recommend(features)

    with (
        RecommendClient(url, protocol) as client,
        pytest.raises(ServerUnavailable, match="its port for the protocol"),
    ):
        client.recommend(features)
    with pytest.raises(ServerUnavailable, match="its port for the protocol"):
        asyncio.run(ask())


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_asyncio_clients_keep_their_deadline_when_the_model_hangs(unwatched, protocol) -> None:
    features = unwatched.golden[0].features

    async def ask() -> float:
        async with AsyncRecommendClient(url_of(unwatched, protocol), protocol, 0.4) as client:
            await client.recommend(features)
            for stub in stubs_of(unwatched.process.pid):
                stub.suspend()
            started = time.monotonic()
            with pytest.raises(ServerUnavailable):
                await client.recommend(features)
            return time.monotonic() - started

    try:
        # The deadline, and as much again for a busy machine; Triton itself notices after 1 s.
        assert asyncio.run(ask()) < 0.8
    finally:
        for stub in stubs_of(unwatched.process.pid):
            stub.resume()


def test_many_first_requests_ask_for_the_schema_once(server) -> None:
    async def ask() -> int:
        calls = 0
        async with AsyncRecommendClient(server.grpc_url) as client:
            asked = client._model_config

            async def counted(model, deadline):
                nonlocal calls
                calls += 1
                return await asked(model, deadline)

            client._model_config = counted
            features = server.golden[0].features
            await asyncio.gather(*(client.recommend(features) for _ in range(50)))
        return calls

    assert asyncio.run(ask()) == 1


def test_a_dead_stub_is_no_mistake_of_the_caller(unwatched) -> None:
    for stub in stubs_of(unwatched.process.pid):
        stub.kill()
    deadline = time.monotonic() + 10
    while stubs_of(unwatched.process.pid):  # one that is dying may answer once more
        assert time.monotonic() < deadline
    with RecommendClient(unwatched.grpc_url, timeout_s=5, retries=0) as client:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with pytest.raises(ServerUnavailable) as caught:
                client.recommend(unwatched.golden[0].features)
            if "not healthy" in str(caught.value):
                return
    pytest.fail(f"Triton never said so: {caught.value}")


def test_a_hung_stub_does_not_outlive_its_killed_server(server) -> None:
    (stub,) = stubs_of(server.process.pid)
    before = server.process.pid
    stub.suspend()
    os.kill(before, 9)
    deadline = time.monotonic() + 30
    while server.process is None or server.process.pid == before:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    gone, _ = psutil.wait_procs([stub], timeout=5)
    if not gone:
        stub.kill()
    assert gone or stub.status() == psutil.STATUS_ZOMBIE


def test_supervision_outlives_an_error_of_ours(server, monkeypatch) -> None:
    failed = threading.Event()

    def broken() -> None:
        failed.set()
        monkeypatch.undo()
        raise RuntimeError("a bug")

    monkeypatch.setattr(server, "probe", broken)
    assert failed.wait(10)
    time.sleep(3 * FREE.probe_interval_s)
    assert any(t.name == "supervisor" and t.is_alive() for t in threading.enumerate())


def test_a_collector_that_is_no_url_is_refused() -> None:
    with pytest.raises(UserError, match=r"serve\.trace_url must be http://HOST:PORT/v1/traces"):
        ServeConfig(trace_url="localhost:4318").validate()


def test_a_default_k_that_no_request_could_use_is_refused() -> None:
    with pytest.raises(UserError, match=r"serve\.default_k must be <= serve\.max_k"):
        ServeConfig(default_k=20, max_k=10).validate()
