"""The gateway's answers and refusals, before a real Triton, with the store in memory."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.serve.client import RecommendClient
from twotower.serve.gateway.config import FeastConfig, GatewayConfig
from twotower.serve.gateway.keys import read_keys
from twotower.serving import request_of

from .conftest import wait_until


@pytest.fixture(scope="module")
def gateway(start, server):
    return start(server)


@pytest.fixture(scope="module")
def data(loaded_run):
    return PreparedDataset(loaded_run.run_dir / "prepared")


def test_a_user_is_answered_as_recommend_answers(gateway, server, data) -> None:
    with RecommendClient(server.grpc_url) as client:
        for user in (1, 7, 311, 987654):
            features, seen = request_of(data, user)
            expected = client.recommend(features, k=12, exclude=seen)
            answer = gateway.recommend(user=user, k=12)
            assert [item["id"] for item in answer["items"]] == expected.item_ids
            assert [item["score"] for item in answer["items"]] == pytest.approx(expected.scores)
            assert (answer["version"], answer["fallback"], answer["reason"]) == (1, None, None)


def test_what_a_caller_says_goes_before_the_store(gateway, server, data) -> None:
    features, seen = request_of(data, 7)
    own = {"country": "c3", "age": 61, "device": None}
    history = ["item-000003", "item-000200"]
    with RecommendClient(server.grpc_url) as client:
        said = {"history": history, "history_times": [None, 1_738_000_000]}
        expected = client.recommend(
            features | own | said, k=9, exclude=[*seen, *history, "item-000040"]
        )
        answered = gateway.ids(user=7, features=own, k=9, exclude=["item-000040"], **said)
        assert answered == expected.item_ids
        expected = client.recommend(features, k=300)
        assert gateway.ids(user=7, k=300, filter_seen=False) == expected.item_ids
        unknown, _ = request_of(data, 987654)
        expected = client.recommend(unknown, k=5)
        assert gateway.ids(k=5) == expected.item_ids


def test_a_history_longer_than_the_window_is_cut_but_all_seen(gateway, server, data) -> None:
    history = [f"item-{i:06}" for i in range(100)]
    features, _ = request_of(data, 987654)
    with RecommendClient(server.grpc_url) as client:
        newest = {"history": history[-50:], "history_times": [None] * 50}
        expected = client.recommend(features | newest, k=7, exclude=history)
    assert gateway.ids(user=987654, history=history, k=7) == expected.item_ids


def test_events_are_history_at_once(gateway) -> None:
    user = 400
    first = gateway.ids(user=user, k=3)
    events = [{"item": first[0], "time": 1_700_000_000}, {"item": first[1]}]
    accepted = gateway.post("/v1/events", {"user": user, "events": events})
    assert accepted.json() == {"accepted": 2}
    again = gateway.ids(user=user, k=50)
    assert not {first[0], first[1]} & set(again)
    explained = gateway.ids(user=user, k=50, exclude=first[:2], filter_seen=False)
    assert explained != again, "older items are filtered too"
    gateway.post("/v1/events", {"user": 10**9, "events": [{"item": first[0]}]})
    assert first[0] not in gateway.ids(user=10**9, k=300)


def test_the_documentation_shows_the_models_features(gateway) -> None:
    document = gateway.client.get("/openapi.json").json()
    features = document["components"]["schemas"]["Features"]["properties"]
    assert set(features) == {"country", "age", "device"}
    assert features["age"]["type"] == "number"
    k = document["components"]["schemas"]["Recommend"]["properties"]["k"]
    assert (k["maximum"], k["default"]) == (300, 10)
    assert set(document["paths"]) == {"/v1/recommend", "/v1/events", "/healthz"}


@pytest.mark.parametrize(
    ("body", "status", "where", "words"),
    [
        ({"features": {"contry": "c1"}}, 422, "body.features.contry", "did you mean 'country'"),
        ({"usr": 7}, 422, "body.usr", "did you mean 'user'"),
        ({"events": []}, 422, "body.events", "one of user, features, history, history_times, k"),
        ({"user": "7"}, 422, "body.user", "valid integer"),
        ({"user": True}, 422, "body.user", "valid integer"),
        ({"user": 2**63}, 422, "body.user", "less than"),
        ({"features": {"age": "old"}}, 422, "body.features.age", "valid number"),
        ({"features": {"age": None}}, 422, "body.features.age", "valid number"),
        ({"features": {"age": 1e22}}, 422, "body", "overflows"),
        ({"k": 301}, 422, "body.k", "less than or equal to 300"),
        ({"k": 0}, 422, "body.k", "greater than or equal to 1"),
        ({"history": [7]}, 422, "body.history.0", "valid string"),
        ({"history": ["a\0b"]}, 422, "body.history.0", "match pattern"),
        ({"timeout_ms": 0}, 422, "body.timeout_ms", "greater than 0"),
        ([1], 422, "body", "valid dictionary"),
        (b'{"user": 7', 400, "body", "quotes and brackets"),
        (b'{"features": {"age": NaN}}', 422, "body.features.age", "number"),
        (b'{"features": {"country": "\\ud800"}}', 422, "body.features.country", "string"),
        (b'{"user": 1' + b"0" * 5000 + b"}", 400, "", ""),
        (b"\xff\xfe", 400, "", ""),
        (b"[" * 100_000, 400, "", ""),
        (b" " * 300_000, 413, "body", "262144 bytes"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_mistake_is_explained(gateway, body, status, where, words) -> None:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = gateway.client.post(
        "/v1/recommend", headers={"Content-Type": "application/json"}, **sent
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"what", "where", "expected", "remedy"}
    assert where in error["where"]
    assert words in response.text
    assert len(response.content) < 600
    assert "127.0.0.1" not in response.text


@pytest.mark.parametrize(
    ("body", "where", "words"),
    [
        ({"usr": 7}, "body.usr", "did you mean 'user'"),
        ({"user": 7, "events": []}, "body.events", "at least 1"),
        ({"user": None, "events": [{"item": "a"}]}, "body.user", "integer"),
        ({"user": 7, "events": [{"itm": "a"}]}, "body.events.0.itm", "did you mean 'item'"),
        ({"user": 7, "events": [{"item": "a", "time": 1 << 40}]}, "body.events.0.time", "less"),
        ({"user": 7, "events": [{"item": "a"}] * 101}, "body.events", "at most 100"),
    ],
)
def test_a_mistake_in_events_is_explained(gateway, body, where, words) -> None:
    response = gateway.post("/v1/events", body)
    assert response.status_code == 422
    assert response.json()["error"]["where"] == where
    assert words in response.text


@pytest.mark.parametrize(("method", "path", "status"), [
    ("GET", "/v1/recommend", 405), ("POST", "/v1/recomend", 404), ("DELETE", "/", 404),
])  # fmt: skip
def test_wrong_paths_and_methods_are_json_too(gateway, method, path, status) -> None:
    response = gateway.client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["remedy"]


def test_a_request_has_an_id_and_a_line_in_the_log(gateway) -> None:
    response = gateway.post("/v1/recommend", {"user": 7}, headers={"X-Request-ID": "page-17"})
    assert response.headers["x-request-id"] == "page-17"
    made = gateway.post("/v1/recommend", {"user": 7}, headers={"X-Request-ID": "two words"})
    assert re.fullmatch("[0-9a-f]{32}", made.headers["x-request-id"])
    wait_until(
        lambda: any(x.get("request_id") == made.headers["x-request-id"] for x in gateway.lines()),
        "no line",
    )
    (line,) = [x for x in gateway.lines() if x.get("request_id") == "page-17"]
    assert {"path": "/v1/recommend", "status": 200, "version": 1, "fallback": None}.items() <= (
        line.items()
    )


def test_a_slow_server_is_hedged(start, relay, server) -> None:
    relay.delay_s = 1.5
    gateway = start(f"{relay.address},{server.grpc_url}", "--gateway.hedge_after_ms=30")
    before = gateway.metric("twotower_gateway_hedges_total")
    for _ in range(4):
        assert gateway.recommend(user=7, timeout_ms=1000)["version"] == 1
    assert relay.asked >= 2
    assert gateway.metric("twotower_gateway_hedges_total") >= before + 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"port": 65536}, "gateway.port must be in 0..65535"),
        ({"store": "postgres://x"}, "gateway.store must be one of memory, redis://"),
        ({"max_under_way": 0}, "gateway.max_under_way must be >= 1"),
        ({"store_timeout_ms": 0.0}, "gateway.store_timeout_ms must be > 0"),
        ({"store_timeout_ms": 300.0}, "gateway.store_timeout_ms must be < gateway.deadline_ms"),
        ({"hedge_after_ms": 250.0}, "gateway.hedge_after_ms must be above 0 and below"),
        ({"triton": ["http://localhost:8001"]}, "gateway.triton must hold gRPC addresses"),
        ({"triton": ["localhost"]}, "gateway.triton must hold gRPC addresses HOST:PORT"),
        ({"feast": {"url": "localhost:6566"}}, "gateway.feast.url must be http://HOST:PORT"),
        ({"feast": {"url": "http://me:secret@x"}}, "https://HOST:PORT, got 'x'"),
        ({"feast": {"url": "http://x:6566"}}, "gateway.feast.service and gateway.feast.entity"),
        (
            {"feast": {"url": "http://x:6566", "service": "s", "timeout_ms": 250.0}},
            "gateway.feast.timeout_ms must be above 0 and below gateway.deadline_ms (250), got 250",
        ),
    ],
)
def test_settings_that_could_not_work_are_refused(change, words) -> None:
    if feast := change.get("feast"):
        change = {"feast": FeastConfig(**feast)}
    with pytest.raises(UserError, match=re.escape(words)):
        GatewayConfig(**change).validate()
    GatewayConfig().validate()


@pytest.mark.parametrize(("host", "local"), [
    ("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
    ("gateway.example", False), ("10.0.0.1", False),
])  # fmt: skip
def test_what_others_reach_needs_keys(host, local, monkeypatch) -> None:
    monkeypatch.delenv("TWOTOWER_GATEWAY_KEYS", raising=False)
    if local:
        assert read_keys(GatewayConfig(host=host)) is None
    else:
        with pytest.raises(UserError, match="which other machines reach, but there are no API k"):
            read_keys(GatewayConfig(host=host))


WALL = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fastapi":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Wall())
from twotower.cli import main
sys.argv = ["twotower", "gateway", *sys.argv[1:], "--gateway.triton=[127.0.0.1:9]"]
main()
"""


def test_the_base_install_says_what_is_missing(loaded_run) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WALL, *loaded_run.arguments], cwd=loaded_run.cwd,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "twotower: error: this command needs fastapi, which the base install leaves out: install "
        "twotower[gateway]"
    ]


def test_it_can_be_stopped_while_it_waits_for_a_server(loaded_run) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "gateway", *loaded_run.arguments,
         "--gateway.triton=[127.0.0.1:9]", "--gateway.port=0"],
        cwd=loaded_run.cwd, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    wait_until(lambda: int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> 14 & 1,
               "SIGTERM is not listened for", 60)  # fmt: skip
    process.terminate()
    _, text = process.communicate(timeout=10)
    assert process.returncode == 143
    assert text.splitlines()[-1].startswith("twotower: stopped by SIGTERM")


def test_it_takes_connections_once_its_state_file_is_there(server, loaded_run, tmp_path) -> None:
    folder = tmp_path / "run" / "gateway"
    shutil.copytree(loaded_run.run_dir / "gateway", folder)
    state = folder / "gateway.json"
    with subprocess.Popen(
        [sys.executable, "-m", "twotower", "gateway", *loaded_run.arguments, "--gateway.port=0",
         f"--run_dir={tmp_path / 'run'}", f"--gateway.triton=[{server.grpc_url}]"],
        cwd=loaded_run.cwd, stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            while not state.exists() and process.poll() is None:
                time.sleep(0.0005)  # it once listened milliseconds after it had said so
            host, port = json.loads(state.read_text())["url"].removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=10) as connection:
                connection.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        finally:
            process.terminate()


def test_it_stops_cleanly_and_says_where_it_cannot_start(
    start, server, loaded_run, twotower, tmp_path
) -> None:
    gateway = start(server)
    gateway.recommend(user=7)
    assert gateway.stop() == 0
    assert "Traceback" not in gateway.log.read_text()
    base = ["gateway", *loaded_run.arguments, f"--gateway.triton=[{server.grpc_url}]"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, words in (
            ([f"--gateway.port={port}"], f"cannot bind 127.0.0.1:{port}"),
            (["--gateway.triton=[127.0.0.1:9]", "--serve.load_timeout_s=0.1"], "no answer from"),
            ([f"--run_dir={tmp_path}"], "defaults.json: not there"),
        ):
            done = twotower(*base, *arguments, cwd=loaded_run.cwd)
            assert done.returncode == 2, done.stderr
            assert words in done.stderr
            assert "Traceback" not in done.stderr
    done = twotower(
        "load-store", *loaded_run.arguments, "--gateway.segment_by=contry", cwd=loaded_run.cwd
    )
    assert done.returncode == 2
    assert "did you mean 'country'" in done.stderr
