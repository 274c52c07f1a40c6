"""Who may ask, how often, and what any caller may send: keys, rates, and random requests."""

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import UserError
from twotower.serve.gateway.keys import Keys, parse_keys

from .conftest import ask_at_random

KEY, SLOW, NOT_ASCII = "tt-8cc2f0b1", "tt-slow", "tt-clé"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {key}".encode()}


@pytest.fixture(scope="module")
def gateway(start, server, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# name, SHA-256, requests a second\nshop {digest(KEY)}\n\n"
                    f"slow {digest(SLOW)} 0.01\nfrench {digest(NOT_ASCII)}\n")  # fmt: skip
    return start(server, f"--gateway.keys={file}")


@pytest.mark.parametrize(
    "headers",
    [{}, bearer("wrong"), bearer(digest(KEY)), {"Authorization": KEY},
     {"Authorization": f"Basic {KEY}"}, bearer(KEY + "x"), {"Authorization": "Bearer"}],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/recommend", "/v1/events", "/metrics", "/openapi.json",
                                  "/docs", "/nothing"])  # fmt: skip
def test_nothing_without_the_right_key(gateway, headers, path) -> None:
    response = gateway.client.get(path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert set(response.json()) == {"error"}


def test_the_right_key_opens_and_probes_need_none(gateway) -> None:
    assert gateway.post("/v1/recommend", {"user": 7}, headers=bearer(KEY)).status_code == 200
    assert gateway.post("/v1/recommend", {}, headers=bearer(NOT_ASCII)).status_code == 200
    assert gateway.client.get("/healthz").json()["status"] == "ok"
    assert gateway.metric('twotower_gateway_requests_total{endpoint="/v1/recommend",key="shop"',
                          headers=bearer(KEY)) >= 1  # fmt: skip
    assert KEY not in gateway.log.read_text()


def test_a_key_that_asks_too_often_waits(gateway) -> None:
    assert gateway.post("/v1/recommend", {"user": 7}, headers=bearer(SLOW)).status_code == 200
    refused = gateway.post("/v1/recommend", {"user": 7}, headers=bearer(SLOW))
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 100
    assert gateway.post("/v1/recommend", {"user": 7}, headers=bearer(KEY)).status_code == 200


def test_keys_come_from_the_environment_too(start, server) -> None:
    lines = f"shop {digest(KEY)}\n"
    gateway = start(server, env=os.environ | {"TWOTOWER_GATEWAY_KEYS": lines})
    assert gateway.post("/v1/recommend", {"user": 7}).status_code == 401
    assert gateway.post("/v1/recommend", {"user": 7}, headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shop tt-8cc2f0b1", "line 1: is no key"),
        (f"\nshop {digest(KEY)} fast", "line 2: requests a second"),
        (f"shop {digest(KEY)} 0", "requests a second"),
        (f"shop {digest(KEY)}\nshop {digest(SLOW)}", "line 2: the name shop stands twice"),
        ("shop", "line 1: is no key"),
    ],
)
def test_a_bad_line_is_named_without_what_it_holds(text, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse_keys(text, "keys", 10.0)
    assert KEY not in str(caught.value)
    assert digest(KEY) not in str(caught.value)


@given(st.lists(st.binary(min_size=1), unique=True, max_size=8), st.binary())
def test_a_key_is_found_if_and_only_if_it_is_there(tokens, other) -> None:
    digests = [hashlib.sha256(t).hexdigest() for t in tokens]
    keys = Keys(parse_keys("\n".join(f"k{i} {d}" for i, d in enumerate(digests)), "keys", 10.0))
    for i, token in enumerate(tokens):
        assert keys.find(token).name == f"k{i}"
    assert (keys.find(other) is None) == (other not in tokens)


@given(st.text())
def test_any_file_of_keys_is_read_or_refused_in_one_line(text) -> None:
    try:
        parse_keys(text, "keys", 10.0)
    except UserError as error:
        refusal = str(error)
    else:
        refusal = ""
    assert "\n" not in refusal


def test_no_random_request_is_a_server_error(gateway, tmp_path) -> None:
    ask_at_random(gateway, tmp_path, "-H", f"Authorization: Bearer {KEY}")
