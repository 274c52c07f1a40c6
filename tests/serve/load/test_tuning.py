"""`twotower tune-serving`: what is tried, what is given up, and when the job's settings stay."""

import itertools
import json
import re
from collections import Counter

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from twotower.errors import UserError
from twotower.serve.config import ServeConfig
from twotower.serve.load.config import TuneConfig
from twotower.serve.load.measurement import Measurement
from twotower.serve.load.tuning import Setting, chosen, setting_of, settings_to_try, tune

GOAL_MS = 20.0
CONFIG = TuneConfig(p99_ms=GOAL_MS, repeats=3)


def found(p99: float | None, rate: float, **changes) -> Measurement:
    values = {
        "asked_rate": None, "clients": 32, "seconds": 3.0, "requests": 3000, "answered_rate": rate,
        "latency_ms": {"p50": 1.0, "p90": 2.0, "p99": p99, "p99.9": None}, "max_ms": 9.0,
        "errors": {}, "late_ms": 0.0, "client_busy": 0.1, "batches": {1: 9}, "queue_ms": 0.1,
        "compute_ms": 0.1,
    }  # fmt: skip
    return Measurement(**values | changes)


def settings(number: int) -> list[Setting]:
    own = setting_of(ServeConfig())
    others = [Setting(instances=1, threads=1, max_queue_delay_us=d, max_batch_size=64)
              for d in range(1, number)]  # fmt: skip
    return [own, *others]


def tuned(tried, measure, config=CONFIG):
    return tune(tried, measure, config, 0, lambda *_: None)


@given(
    cores=st.integers(1, 96),
    instances=st.lists(st.integers(1, 64), max_size=3),
    threads=st.lists(st.integers(1, 64), max_size=3),
    own=st.builds(ServeConfig, instances=st.integers(1, 8), threads=st.integers(1, 8)),
)
def test_no_setting_keeps_more_threads_busy_than_cores_unasked(
    cores, instances, threads, own
) -> None:
    config = TuneConfig(instances=instances, threads=threads)
    tried = settings_to_try(config, own, cores)
    assert tried[0] == setting_of(own)
    assert len(set(tried)) == len(tried)
    for s in tried[1:]:
        assert s.instances in instances or (not instances and s.instances <= cores)
        assert s.threads in threads or (not threads and s.threads <= cores)
        if not instances and not threads:
            assert s.instances * s.threads <= cores
    for i, t in itertools.product(instances, threads):
        assert any((s.instances, s.threads) == (i, t) for s in tried)


@given(best=st.integers(1, 11), number=st.integers(12, 20))
def test_the_best_is_found_and_the_hopeless_are_given_up(best, number) -> None:
    tried, asked = settings(number), Counter()

    def measure(setting: Setting) -> Measurement:
        asked[setting] += 1
        away = abs(setting.max_queue_delay_us - best)
        # Alternating noise, smaller than a step.
        return found(10.0 + away, 1000 - 10 * away + 3 * (asked[setting] % 2))

    trials = tuned(tried, measure)
    assert trials[0].setting == tried[best]
    assert chosen(trials, tried[0], GOAL_MS) == (trials[0], True)
    assert asked[tried[best]] == asked[tried[0]] == CONFIG.repeats
    assert sum(n == 1 for n in asked.values()) >= number // 2 - 1
    assert len(trials) == number


def test_a_setting_that_misses_the_goal_is_no_match_for_one_that_reaches_it() -> None:
    fast, slow = settings(3)[1:]

    def measure(setting: Setting) -> Measurement:
        return found(25.0, 9000) if setting == fast else found(19.0, 100)

    trials = tuned(settings(3), measure)
    assert trials[-1].setting == fast
    assert slow in {t.setting for t in trials[:2]}


def test_failures_are_worse_than_any_latency() -> None:
    own, fails = settings(2)
    trials = tuned([own, fails], lambda s: found(None if s == fails else 500.0, 10))
    assert [t.setting for t in trials] == [own, fails]


def test_an_open_loop_wants_the_lowest_latency_of_a_server_that_keeps_up() -> None:
    own, quick, behind = settings(3)
    p99 = {own: 15.0, quick: 5.0, behind: 1.0}

    def measure(s: Setting) -> Measurement:
        rate = 90.0 if s == behind else 100.0
        return found(p99[s], rate, asked_rate=100.0, clients=None)

    trials = tuned([own, quick, behind], measure)
    assert [t.setting for t in trials] == [quick, own, behind]


def test_the_jobs_own_settings_stay_where_noise_could_explain_the_gain() -> None:
    own, other = settings(2)
    runs = {own: iter([1000, 900, 1010]), other: iter([1020, 1005, 1100])}
    trials = tuned([own, other], lambda s: found(10.0, next(runs[s])))
    assert trials[0].setting == other, "better by the median"
    best, better = chosen(trials, own, GOAL_MS)
    assert (best.setting, better) == (own, False)


def test_too_few_requests_are_no_99th_percentile() -> None:
    with pytest.raises(UserError, match="30 requests came in 3 seconds"):
        tuned(settings(2), lambda _: found(None, 10, requests=30))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"p99_ms": 0.0}, "p99-ms must be > 0 and at most deadline-ms (2000), got 0"),
        ({"p99_ms": 3000.0}, "p99-ms must be > 0 and at most deadline-ms (2000), got 3000"),
        ({"instances": [1, 0]}, "instances must be >= 1, got 0"),
        ({"max_batch_size": [-4]}, "max-batch-size must be >= 1, got -4"),
        ({"max_queue_delay_us": []}, "max-queue-delay-us must be values >= 0"),
        ({"clients": 0}, "clients must be >= 1"),
        ({"repeats": 1}, "repeats must be >= 2, got 1"),
        ({"rate": 10.0}, "rate times seconds must be >= 500 requests"),
        ({"seconds": -1.0}, "seconds must be > 0, got -1"),
    ],
)
def test_what_tunes_nothing_is_refused(change, words) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        TuneConfig(**change).validate()


def test_the_command_writes_a_section_that_serve_reads(finished_run, twotower) -> None:
    done = twotower(
        "tune-serving", *finished_run.arguments, "--p99-ms=2000", "--instances=[1]",
        "--threads=[1]", "--max-queue-delay-us=[0,3000]", "--repeats=2", "--seconds=2",
        "--warmup-seconds=0.2", "--clients=16", cwd=finished_run.cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = finished_run.run_dir / "tuning"
    written = yaml.safe_load((folder / "serve.yaml").read_text())
    assert written["serve"].keys() == {
        "instances", "threads", "max_queue_delay_us", "max_batch_size"
    }  # fmt: skip
    trials = json.loads((folder / "trials.json").read_text())
    assert trials["reached"]
    assert {t["max_queue_delay_us"] for t in trials["trials"]} == {0, 3000}
    assert all(len(t["runs"]) == 2 for t in trials["trials"])
    assert "within the goal of 2000 ms" in done.stdout
    again = twotower(
        "serve", *finished_run.arguments, "--config", folder / "serve.yaml", "--print_config",
        cwd=finished_run.cwd,
    )  # fmt: skip
    served = yaml.safe_load(again.stdout)["serve"]
    assert written["serve"].items() <= served.items()
