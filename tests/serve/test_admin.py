"""What changes the server answers nobody but its supervisor, wherever the server listens."""

import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from twotower.export.bundle import read_bundle
from twotower.serve.server import TritonServer

from .conftest import FREE
from .tiny import tiny_bundle


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Open to every network, as in a container."""
    folder = tmp_path_factory.mktemp("open")
    server = TritonServer(
        read_bundle(tiny_bundle(folder / "bundles")), replace(FREE, host="0.0.0.0"), folder / "s"
    )
    server.start()
    yield server
    server.stop()


KEY = "triton-grpc-protocol-admin-key"
CALLS = {
    "index": lambda c, h: c.get_model_repository_index(headers=h),
    "load": lambda c, h: c.load_model("recommend", headers=h),
    "unload": lambda c, h: c.unload_model("recommend", headers=h),
    "shared memory": lambda c, h: c.register_system_shared_memory("x", "/x", 64, headers=h),
    "shared memory status": lambda c, h: c.get_system_shared_memory_status(headers=h),
    "cuda memory status": lambda c, h: c.get_cuda_shared_memory_status(headers=h),
    "trace": lambda c, h: c.update_trace_settings(settings={"trace_file": "/x"}, headers=h),
    "trace of a model": lambda c, h: c.get_trace_settings("recommend", headers=h),
    "logging": lambda c, h: c.update_log_settings({"log_file": "/x"}, headers=h),
}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("headers", [{}, {KEY: ""}, {KEY: "0" * 32}])
def test_grpc_gives_nothing_without_the_key(server, call, headers) -> None:
    with (
        grpc.InferenceServerClient(f"127.0.0.1:{server.config.grpc_port}") as client,
        pytest.raises(InferenceServerException, match="restricted"),
    ):
        CALLS[call](client, headers)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "repository/index"),
        ("POST", "repository/models/recommend/load"),
        ("POST", "repository/models/recommend/unload"),
        ("POST", "systemsharedmemory/region/x/register"),
        ("GET", "systemsharedmemory/status"),
        ("GET", "cudasharedmemory/status"),
        ("POST", "trace/setting"),
        ("GET", "models/recommend/trace/setting"),
        ("POST", "logging"),
    ],
)
@pytest.mark.parametrize("key", [None, "", "0" * 32])
def test_http_gives_nothing_without_the_key(server, method, path, key) -> None:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.config.http_port}/v2/{path}",
        data=b"{}" if method == "POST" else None, headers={} if key is None else {"admin-key": key},
    )  # fmt: skip
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


def test_every_process_has_a_key_of_its_own(server) -> None:
    with server.admin() as (client, old):
        assert client.get_model_repository_index(headers=old).models
    server.restart()
    with server.admin() as (client, new):
        assert client.get_model_repository_index(headers=new).models
        with pytest.raises(InferenceServerException, match="restricted"):
            client.get_model_repository_index(headers=old)
