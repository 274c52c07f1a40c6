"""What the clients do when the connection or the server fails them, before a real Triton server."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import UserError
from twotower.serve.client import AsyncRecommendClient, RecommendClient, ServerUnavailable
from twotower.serve.retry import FIRST_PAUSE_S, MOST_PAUSE_S, Retries
from twotower.serve.supervisor import running_server

from .conftest import FREE, GOOD
from .relay import Relay

PROTOCOLS = ("grpc", "http")


@pytest.fixture
def relays(server) -> Iterator[object]:
    made = []

    def relay(protocol: str, **options) -> Relay:
        url = server.grpc_url if protocol == "grpc" else server.http_url
        made.append(Relay(url, **options))
        return made[-1]

    yield relay
    for each in made:
        each.close()


def ask(url: str, protocol: str, asynchronous: bool, **options) -> list[object]:
    """Answer a good request; the client is one of its own."""
    if not asynchronous:
        with RecommendClient(url, protocol, **options) as client:
            return client.recommend(GOOD, k=3).item_ids

    async def asked() -> list[object]:
        async with AsyncRecommendClient(url, protocol, **options) as client:
            return (await client.recommend(GOOD, k=3)).item_ids

    return asyncio.run(asked())


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_lost_connection_is_made_anew(relays, protocol, asynchronous) -> None:
    relay = relays(protocol, lose=1)
    assert len(ask(relay.url, protocol, asynchronous, timeout_s=20)) == 3
    assert relay.accepted > 1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_who_wants_no_second_try_is_told_at_once(relays, protocol, asynchronous) -> None:
    relay = relays(protocol, lose=1000)
    with pytest.raises(ServerUnavailable, match="no answer from") as caught:
        ask(relay.url, protocol, asynchronous, timeout_s=20, retries=0)
    assert caught.value.kind == "lost"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_answer_that_trickles_in_does_not_outlast_the_deadline(
    relays, protocol, asynchronous
) -> None:
    relay = relays(protocol, drip=True)
    with pytest.raises(ServerUnavailable) as caught:
        ask(relay.url, protocol, asynchronous, timeout_s=0.5)
    assert caught.value.kind == "deadline"


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_connection_serves_all_requests_of_a_client(relays, protocol) -> None:
    relay = relays(protocol)
    with RecommendClient(relay.url, protocol, 20) as client:
        for _ in range(20):
            client.recommend(GOOD)
    assert relay.accepted == 1


def test_a_refused_request_is_asked_once(finished_run, tmp_path) -> None:
    def asked(client: RecommendClient) -> int:
        (model,) = client.statistics()["model_stats"]
        return int(model["inference_count"])

    unwatched = replace(FREE, probe_interval_s=1000.0)
    with (
        running_server(finished_run.bundle, unwatched, tmp_path) as server,
        RecommendClient(server.grpc_url, timeout_s=20) as client,
    ):
        before = asked(client)
        with pytest.raises(UserError, match="which overflows"):
            client.recommend(GOOD | {"age": 1e22})
        client.recommend(GOOD)
        deadline = time.monotonic() + 10
        # Triton counts after it has answered.
        while asked(client) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        # The supervisor's first probe may come between.
        assert before + 2 <= asked(client) <= before + 3


def test_a_server_that_says_nothing_is_late() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        for protocol in PROTOCOLS:
            with pytest.raises(ServerUnavailable) as caught:
                ask(url, protocol, False, timeout_s=0.3)
            assert caught.value.kind == "deadline"


def test_a_negative_number_of_retries_is_refused() -> None:
    with pytest.raises(UserError, match=r"retries must be >= 0, got -1"):
        RecommendClient("127.0.0.1:8001", retries=-1)


@given(
    most=st.integers(0, 9), tries=st.integers(1, 12), left=st.floats(0, 3), failed=st.integers(0, 9)
)
def test_a_retry_is_in_time_and_never_a_storm(most, tries, left, failed) -> None:
    retries = Retries(most)
    for _ in range(failed):
        retries.pause_s(1, 9)
    pause = retries.pause_s(tries, left)
    if pause is None:
        ends = min(MOST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1))
        assert tries > most or failed >= 5 or left <= ends
    else:
        assert FIRST_PAUSE_S / 2 <= pause < left
        assert tries <= most
        assert failed < 5, "half of the tokens are gone"
    for _ in range(100):
        retries.succeeded()
    assert most == 0 or retries.pause_s(1, 9) is not None
