"""Supervision as an on-call engineer and an orchestrator see it: health, kills, draining."""

import threading
import time
from collections.abc import Iterator

import psutil
import pytest

from twotower.errors import UserError
from twotower.export.bundle import read_bundle
from twotower.serve.client import RecommendClient

from .conftest import answers_again, stubs_of
from .live import Load, Served, tiny_job, wait_until


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    running = Served(tiny_job(tmp_path, probe_interval_s=0.3))
    yield running
    running.kill()


def test_five_killed_stubs_are_brought_back_and_counted(served) -> None:
    golden = read_bundle(served.bundle(2)).golden()[0]
    for kills in range(1, 6):
        (stub,) = stubs_of(served.state["pid"])
        stub.kill()
        assert answers_again(served.url("grpc"), golden, 30)
        wait_until(lambda: served.get("/healthz") == (200, "ok\n"))
        assert served.metric("twotower_reloads_total") >= kills
    assert served.metric("twotower_restarts_total") == 0
    assert served.metric("twotower_probe_failures_total") >= 5
    assert served.metric("twotower_ready") == 1
    output = served.stop()
    assert output.count("twotower serve: model loaded anew in") >= 5
    assert "Traceback" not in output


def test_health_says_why_not(served) -> None:
    (stub,) = stubs_of(served.state["pid"])
    stub.suspend()
    reasons: list[str] = []
    wait_until(lambda: reasons.append(served.get("/healthz")[1]) or reasons[-1] != "ok\n")
    assert "golden query" in reasons[-1]
    wait_until(lambda: served.get("/healthz")[0] == 200)
    assert served.get("/")[0] == 404
    # What hung has been replaced, and must not hold its memory.
    gone, _ = psutil.wait_procs([stub], timeout=40)
    if not gone:
        stub.kill()
    assert gone or stub.status() == psutil.STATUS_ZOMBIE
    time.sleep(1)  # three probes
    assert f"the stub of pid {stub.pid} has ended" not in served.stop()


def test_clients_that_heed_health_lose_nothing_when_the_server_stops(served) -> None:
    leaving = threading.Event()

    def watch() -> None:
        while served.get("/healthz")[0] == 200:
            time.sleep(0.02)
        leaving.set()

    watcher = threading.Thread(target=watch)
    with Load(served.urls, served.bundle(2)) as load:
        watcher.start()
        served.process.terminate()
        assert leaving.wait(30)
    output, _ = served.process.communicate(timeout=60)
    watcher.join()
    assert served.process.returncode == 0, output
    assert load.failures == []
    assert load.answered[2] > 0


def test_what_is_under_way_at_sigterm_is_answered(served) -> None:
    golden = read_bundle(served.bundle(2)).golden()[0]
    answers: list[object] = []

    def ask() -> None:
        with RecommendClient(served.url("grpc"), timeout_s=20) as client:
            client.schema()
            (stub,) = stubs_of(served.state["pid"])
            stub.suspend()
            # Less than Triton waits before it takes a stub for dead.
            threading.Timer(0.6, stub.resume).start()
            threading.Timer(0.2, served.process.terminate).start()
            try:
                answers.append(client.recommend(golden.features, k=6, exclude=golden.exclude))
            except UserError as error:
                answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    output, _ = served.process.communicate(timeout=60)
    thread.join()
    assert served.process.returncode == 0, output
    assert answers[0].item_ids == golden.item_ids
