"""What fails behind the gateway: answers go on, say so, and are whole again by themselves."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import httpx
import pytest
import redis as redis_library

from twotower.data.prepared import PreparedDataset
from twotower.export.bundle import read_bundle
from twotower.serve.client import RecommendClient
from twotower.serve.server import TritonServer
from twotower.serving import request_of

from ..conftest import FREE
from ..live import Asking
from .conftest import SEGMENT, Gateway, wait_until

FALLBACKS = 'twotower_gateway_fallbacks_total{reason="'


@pytest.fixture(scope="module")
def in_redis(start, server, redis, loaded_run, twotower) -> Gateway:
    """A gateway whose users are in Redis."""
    store = f"--gateway.store={redis.url}"
    done = twotower("load-store", *loaded_run.arguments, SEGMENT, store, cwd=loaded_run.cwd)
    assert done.returncode == 0, done.stderr
    assert "600" in done.stdout
    # Busy machines let more than 20 ms pass.
    return start(server, store, "--gateway.store_timeout_ms=300", "--gateway.retry_s=0.3")


@pytest.fixture(scope="module")
def expected(loaded_run, server) -> dict[int, list[str]]:
    """User -> the right answer."""
    data = PreparedDataset(loaded_run.run_dir / "prepared")
    found = {}
    with RecommendClient(server.grpc_url) as client:
        for user in range(1, 41):
            features, seen = request_of(data, user)
            found[user] = client.recommend(features, k=5, exclude=seen).item_ids
    return found


class Load(Asking):
    """Users who ask all the time, from some threads."""

    def __init__(self, gateway: Gateway, users: list[int]) -> None:
        self.gateway, self.users = gateway, users
        self.answers: list[tuple[int, int, dict]] = []
        super().__init__(*(partial(self._ask, i) for i in range(4)))

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.gateway.url, timeout=20, trust_env=False) as client:
            while self.going:
                user = self.users[number % len(self.users)]
                number += 4
                response = client.post("/v1/recommend", json={"user": user, "k": 5})
                self.answers.append((user, response.status_code, response.json()))
                time.sleep(0.005)

    def some_more(self, fallback: str | None) -> bool:
        """Whether one of the newest answers is of that kind."""
        newest = self.answers[-4:]
        return len(newest) == 4 and all(a[2].get("fallback") == fallback for a in newest)


def health(gateway: Gateway) -> dict[str, Any]:
    response = gateway.client.get("/healthz")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize("how", ["killed", "hung"])
def test_redis_gone_in_mid_load(in_redis, redis, expected, how) -> None:
    before = in_redis.metric(FALLBACKS + "store")
    with Load(in_redis, list(expected)) as load:
        wait_until(lambda: load.some_more(None), "no good answers")
        if how == "killed":
            redis.stop()
        else:
            os.kill(redis.process.pid, signal.SIGSTOP)
        wait_until(lambda: load.some_more("popularity"), "no fall-back")
        circuit = 'twotower_gateway_circuit_open{of="store"'
        wait_until(lambda: in_redis.metric(circuit) == 1, "never open")
        wait_until(lambda: not health(in_redis)["store"], "healthy")
        assert health(in_redis)["model"]
        if how == "killed":
            redis.start()
        else:
            os.kill(redis.process.pid, signal.SIGCONT)
        wait_until(lambda: load.some_more(None), "no recovery")
    assert {status for _, status, _ in load.answers} == {200}
    fallen = [a for _, _, a in load.answers if a["fallback"]]
    assert in_redis.metric(FALLBACKS + "store") - before == len(fallen)
    for user, _, answer in load.answers:
        ids = [item["id"] for item in answer["items"]]
        if answer["fallback"] is None:
            # Also that no answer of Redis which came too late was taken for another user's.
            assert ids == expected[user]
        else:
            assert (answer["reason"], answer["version"], len(ids)) == ("store", None, 5)
    wait_until(lambda: health(in_redis)["status"] == "ok", "not healthy")


def test_events_reach_redis_capped_and_in_order(start, server, redis, loaded_run) -> None:
    gateway = start(server, f"--gateway.store={redis.url}", "--gateway.history_length=3",
                    "--gateway.store_timeout_ms=500")  # fmt: skip
    events = [{"item": f"item-{i:06}", "time": 1000 + i} for i in range(4)]
    assert gateway.post("/v1/events", {"user": 70001, "events": events}).status_code == 200
    gateway.post("/v1/events", {"user": 70001, "events": [{"item": "item-000009"}]})
    with redis_library.Redis.from_url(redis.url) as raw:
        kept = raw.lrange("quickstart:history:70001", 0, -1)
        assert kept == [b":item-000009", b"1003:item-000003", b"1002:item-000002"]
        raw.set("quickstart:features:70002", "no JSON")
        raw.set("quickstart:features:70003", json.dumps({"age": "old", "of_another_job": 1}))
        raw.set("quickstart:history:70004", "no list")
        raw.lpush("quickstart:history:70006", f":{'x' * 2000}")
        raw.set("quickstart:features:70005", json.dumps({"age": 30, "of_another_job": 1}))
    for user in (70002, 70003, 70004, 70006):
        assert gateway.recommend(user=user)["reason"] == "store"
    assert gateway.recommend(user=70005)["fallback"] is None
    assert gateway.metric('twotower_gateway_store_failures_total{kind="damaged"') == 4
    assert gateway.recommend(user=7)["fallback"] is None, "one damaged user opens no circuit"


@pytest.fixture
def own_server(loaded_run, tmp_path) -> Iterator[TritonServer]:
    """A server that nothing supervises."""
    server = TritonServer(read_bundle(loaded_run.bundle), FREE, tmp_path)
    server.start(prove=False)
    yield server
    server.stop()


def test_triton_killed_and_started(start, own_server, loaded_run) -> None:
    gateway = start(own_server, "--gateway.retry_s=0.3")
    defaults = json.loads((loaded_run.run_dir / "gateway" / "defaults.json").read_text())
    good = gateway.recommend(user=7, k=5)
    assert good["fallback"] is None
    own_server.process.kill()
    own_server.process.wait()
    answer = gateway.recommend(features={"country": "c2"}, k=5)
    assert (answer["fallback"], answer["reason"]) == ("popularity", "model")
    assert [item["id"] for item in answer["items"]] == defaults["segments"]["c2"][:5]
    assert all(item["score"] is None for item in answer["items"])
    first = defaults["popular"][0]
    answer = gateway.recommend(user=987654, exclude=[first], k=3)
    assert [item["id"] for item in answer["items"]] == defaults["popular"][1:4]
    assert gateway.metric(FALLBACKS + "model") == 2
    wait_until(lambda: health(gateway)["status"] == "degraded", "healthy")
    own_server.restart()
    wait_until(lambda: gateway.recommend(user=7, k=5) == good, "no recovery")


def test_an_open_circuit_answers_at_once(start, relay) -> None:
    gateway = start(relay.address, "--gateway.failures=2", "--gateway.retry_s=60")
    relay.delay_s = 0.5
    for _ in range(2):
        assert gateway.recommend(user=7, timeout_ms=1900)["fallback"] is None
    relay.delay_s = 3
    asked = relay.asked
    for _ in range(4):
        assert gateway.recommend(user=7)["reason"] == "model"
    assert relay.asked == asked + 2
    assert gateway.metric("twotower_gateway_circuit_open{") == 1


def test_one_request_too_many_is_refused_at_once(start, relay) -> None:
    relay.delay_s = 1.0
    gateway = start(relay.address, "--gateway.max_under_way=1")
    first = threading.Thread(target=gateway.recommend, kwargs={"user": 7})
    first.start()
    wait_until(lambda: relay.asked > 1, "never asked")  # the first was the gateway's own
    refused = gateway.post("/v1/recommend", {"user": 7})
    first.join()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert gateway.recommend(user=7)["version"] == 1
