"""`twotower load`: real client processes ask a real Triton server."""

import json
import math
import multiprocessing
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import UserError
from twotower.serve.load.arrivals import arrival_times
from twotower.serve.load.asker import Target
from twotower.serve.load.config import BEYOND, LoadConfig
from twotower.serve.load.generator import LoadGenerator
from twotower.serve.load.measurement import percentile
from twotower.serve.load.perf_analyzer import BINARY, find_perf_analyzer
from twotower.serve.server import TritonServer
from twotower.serve.supervisor import running_server

from ..conftest import FREE, GOOD, start_serving
from ..relay import Relay


@pytest.fixture(scope="module")
def server(finished_run, tmp_path_factory):
    """A server that nobody probes, so that what it counts is ours."""
    models = ["recommend", "embed_query"]
    unwatched = replace(FREE, probe_interval_s=1000.0, models=models)
    with running_server(finished_run.bundle, unwatched, tmp_path_factory.mktemp("s")) as running:
        yield running


def target(server: TritonServer, **changes: object) -> Target:
    features = GOOD | changes
    return Target(
        url=server.grpc_url, proxy=False, deadline_s=20.0, k=5,
        requests=[(features, []), (features, ["item-000002"])],
    )  # fmt: skip


@settings(deadline=None)
@given(
    kind=st.sampled_from(["poisson", "constant"]), rate=st.floats(0.5, 500),
    seconds=st.floats(0.1, 20), seed=st.integers(0, 9),
)  # fmt: skip
def test_arrivals_come_at_their_rate(kind, rate, seconds, seed) -> None:
    due = arrival_times(kind, rate, seconds, seed)
    assert (np.diff(due) >= 0).all()
    assert ((due >= 0) & (due < seconds)).all()
    # Six standard deviations of a Poisson number.
    assert abs(len(due) - rate * seconds) <= (1 if kind == "constant" else 7 + 6 * len(due) ** 0.5)
    if kind == "constant":
        np.testing.assert_allclose(np.diff(due), 1 / rate, rtol=1e-6)
    np.testing.assert_array_equal(due, arrival_times(kind, rate, seconds, seed))


def test_poisson_arrivals_are_independent() -> None:
    gaps = np.diff(arrival_times("poisson", 100.0, 200.0, 1))
    # An exponential distribution's deviation is its mean; 20,000 gaps tell it within 5%.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.05


@given(
    values=st.lists(st.one_of(st.floats(0, 1e4), st.just(math.inf)), max_size=3000),
    thousandths=st.sampled_from([500, 900, 990, 999]),
)
def test_a_percentile_is_what_that_share_is_within(values, thousandths) -> None:
    ascending = np.sort(np.array(values, float))
    found = percentile(ascending, thousandths)
    enough = len(values) * (1000 - thousandths) >= BEYOND * 1000
    within = [v for v in ascending if np.mean(ascending <= v) >= thousandths / 1000 - 1e-12]
    expected = within[0] if enough and within and math.isfinite(within[0]) else None
    assert found == expected


def test_vectors_are_asked_for_too(server) -> None:
    asked = replace(target(server), model="embed_query")
    with LoadGenerator(asked, 1, 0) as generator:
        found = generator.open_loop(100.0, 0.5, warmup_seconds=0.0, arrivals="constant")
    assert (found.requests, found.errors) == (50, {})
    assert sum(size * runs for size, runs in found.batches.items()) > 0


def test_what_is_asked_is_answered_and_counted(server) -> None:
    with LoadGenerator(target(server), 2, seed=0) as generator:
        found = generator.open_loop(100, 2.0, warmup_seconds=0.3, arrivals="constant")
        closed = generator.closed_loop(8, 1.0, warmup_seconds=0.2)
    assert found.requests == 200
    assert found.errors == closed.errors == {}
    assert 0 < found.latency_ms["p50"] <= found.latency_ms["p90"] <= found.max_ms
    assert found.latency_ms["p99"] is None, "too few to speak of"
    # What is under way at the ends is counted by one side alone.
    rows = sum(size * n for size, n in found.batches.items())
    assert rows == pytest.approx(200, abs=20)
    assert found.mean_batch >= 1
    assert closed.clients == 8
    assert closed.requests > 0
    assert closed.mean_batch > 1, "eight at once are batched"


@pytest.fixture
def relay(server) -> Iterator[Relay]:
    with closing(Relay(server.grpc_url)) as relay:
        yield relay


def test_a_stall_counts_for_all_that_came_meanwhile(server, relay) -> None:
    """A closed loop would have seen one slow answer: coordinated omission."""
    asked = replace(target(server), url=relay.url)
    with LoadGenerator(asked, 1, seed=0) as generator:
        pause = threading.Timer(1.0, relay.open.clear)
        resume = threading.Timer(2.0, relay.open.set)
        pause.start()
        resume.start()
        found = generator.open_loop(200, 2.5, warmup_seconds=0.2, arrivals="constant")
        resume.join()
    assert found.errors == {}
    assert found.max_ms > 700
    # Of 2.5 s, those of one waited, evenly from all of it to nothing.
    assert found.latency_ms["p90"] > 400


def test_failures_are_named_and_improve_no_percentile(server, relay) -> None:
    asked = replace(target(server), url=relay.url, deadline_s=0.3)
    with LoadGenerator(asked, 1, seed=0) as generator:
        pause = threading.Timer(0.1, relay.open.clear)
        resume = threading.Timer(2.5, relay.open.set)
        pause.start()
        resume.start()
        late = generator.open_loop(100, 1.0, warmup_seconds=0.5, arrivals="constant")
        resume.join()
    assert late.errors == {"deadline": 100}
    assert set(late.latency_ms.values()) == {None}
    assert late.max_ms is None
    assert late.answered_rate == 0
    with LoadGenerator(target(server, age=1e22), 1, seed=0) as generator:
        refused = generator.open_loop(50, 1.0, warmup_seconds=0.0, arrivals="constant")
    assert refused.errors == {"refused": 50}


def test_a_server_that_falls_under_load_is_shown(finished_run, tmp_path) -> None:
    unwatched = replace(FREE, probe_interval_s=1000.0)
    with (
        running_server(finished_run.bundle, unwatched, tmp_path) as own,
        LoadGenerator(target(own), 1, seed=0) as generator,
    ):
        kill = threading.Timer(0.7, own.process.kill)
        kill.start()
        found = generator.open_loop(100, 1.0, warmup_seconds=0.0, arrivals="constant")
        kill.join()
    assert found.errors.keys() == {"lost"}
    assert 0 < found.answered_rate < 100
    assert (found.batches, found.queue_ms, found.mean_batch) == ({}, None, None)


def test_a_request_that_fits_no_feature_is_refused_before_any_is_sent(server) -> None:
    with pytest.raises(UserError, match="no feature 'devise'"):
        LoadGenerator(target(server, devise="web"), 1, seed=0)
    assert multiprocessing.active_children() == []


def test_a_client_process_that_ends_is_missed(server) -> None:
    with LoadGenerator(target(server), 2, seed=0) as generator:
        multiprocessing.active_children()[0].kill()
        time.sleep(0.2)
        with pytest.raises(UserError, match="a client process of the load test has ended"):
            generator.open_loop(50, 0.2, warmup_seconds=0.0, arrivals="constant")


def test_the_command_starts_a_server_and_writes_a_page(finished_run, twotower) -> None:
    done = twotower(
        "load", *finished_run.arguments, "--rates=[60,30]", "--seconds=1",
        "--warmup-seconds=0.2", "--requests=50", "--arrivals=constant", cwd=finished_run.cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a server of its own" in done.stdout
    assert "of the log's newest events" in done.stdout
    assert [int(n) for n in re.findall(r"│ +(\d+) │ +\d+ │ +\d+\.\d │", done.stdout)] == [30, 60]
    folder = finished_run.run_dir / "load"
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == 2
    assert "p50" in page
    assert not re.search(r"https?:|src=|href=|<script", page), "it fetches nothing"
    report = json.loads((folder / "load.json").read_text())
    assert [m["requests"] for m in report["measurements"]] == [30, 60]


def test_a_server_is_asked_with_golden_queries_where_there_is_no_log(
    server, finished_run, twotower, tmp_path
) -> None:
    shutil.copytree(finished_run.bundle, tmp_path / "run" / "bundles" / "1")
    done = twotower(
        "load", *finished_run.arguments, f"--url={server.grpc_url}", "--rates=[40]", "--seconds=1",
        "--json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["about"]["requests"] == "200 of the bundle's golden queries, k=10"
    assert server.grpc_url in report["about"]["server"]
    assert report["measurements"][0]["errors"] == {}


def test_the_jobs_running_server_is_asked(finished_run, twotower) -> None:
    process, state = start_serving(finished_run)
    try:
        port = json.loads(state.read_text())["grpc_port"]
        done = twotower(
            "load", *finished_run.arguments, "--rates=[20]", "--seconds=1", "--json",
            cwd=finished_run.cwd,
        )  # fmt: skip
    finally:
        process.terminate()
        process.communicate(timeout=60)
    assert done.returncode == 0, done.stderr
    server = json.loads(done.stdout)["about"]["server"]
    assert server.startswith(f"the job's running server at 127.0.0.1:{port}, version 1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rates": [1.0, 0.0]}, "rates must be > 0 requests a second, got 0"),
        ({"rates": [math.nan]}, "rates must be > 0"),
        ({"rates": [1e9]}, "rates times seconds must be at most 10,000,000 requests"),
        ({"seconds": 0.0}, "seconds must be > 0, got 0"),
        ({"warmup_seconds": -1.0}, "warmup-seconds must be >= 0, got -1"),
        ({"arrivals": "bursts"}, "arrivals must be one of poisson, constant"),
        ({"processes": -1}, "processes must be >= 0, got -1"),
        ({"requests": 0}, "requests must be >= 1, got 0"),
        ({"k": 0}, "k must be >= 1, got 0"),
        ({"deadline_ms": math.inf}, "deadline-ms must be > 0, got inf"),
    ],
)
def test_what_measures_nothing_is_refused(change, words) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        LoadConfig(**change).validate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seconds=0"], "seconds must be > 0, got 0"),
        (["--url=127.0.0.1:9", "--rates=[5]"], "no answer from 127.0.0.1:9"),
        (["--k=301", "--rates=[5]"], "k must be in 1..300"),
        (["--perf-analyzer"], "install it with"),
        (["--load-rate=[5]"], "unknown option"),
    ],
)
def test_a_mistake_is_one_line(finished_run, twotower, arguments, words) -> None:
    if arguments == ["--perf-analyzer"] and has_perf_analyzer():
        pytest.skip("perf_analyzer is installed")
    done = twotower("load", *finished_run.arguments, *arguments, cwd=finished_run.cwd)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def has_perf_analyzer() -> bool:
    try:
        find_perf_analyzer()
    except UserError:
        return False
    return True


def test_perf_analyzer_asks_the_same(server, tmp_path: Path) -> None:
    if not has_perf_analyzer():
        pytest.skip(f"{BINARY} is not installed")
    from twotower.serve.client import RecommendClient
    from twotower.serve.load.perf_analyzer import run_perf_analyzer

    with RecommendClient(server.grpc_url) as client:
        schema = client.schema()
    config = LoadConfig(seconds=1.5)
    (found,) = run_perf_analyzer(target(server), schema, [100.0], config, tmp_path)
    assert found["asked_rate"] == 100
    assert found["max_ms"] >= found["latency_ms"]["p50"] > 0
