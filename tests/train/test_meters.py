"""What a training logs of itself is there, and true."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.train.config import TrainConfig
from twotower.train.meters import RANGE, Latest, Meters, in_batch_accuracy
from twotower.train.negatives import Candidates
from twotower.train.optimizers import rate_factor
from twotower.train.plots import Series, plot_curves, read_metrics
from twotower.train.step_split import split_step

from ..conftest import QUICKSTART

PARTS = ("lookup", "dense", "communication", "other")


@pytest.fixture(scope="module")
def trained(demo_log: Path, twotower, tmp_path_factory) -> Path:
    """What two processes trained."""
    cwd = tmp_path_factory.mktemp("meters")
    arguments = [
        "--config", str(QUICKSTART), "--run_dir=run", f"--data.root={demo_log}",
        "--train.batch_size=256", "--train.max_epochs=2", "--train.processes=2",
        "--train.profile=[20,22]", "--train.warmup_steps=10", "--train.schedule=linear",
        "--train.dense_lr=0.002", "--tracking.wandb=off",
    ]  # fmt: skip
    for step in ("prepare", "train"):
        done = twotower(step, *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
    return cwd / "run" / "train"


@pytest.fixture(scope="module")
def logged(trained: Path) -> Series:
    return read_metrics(trained)


def test_every_tenth_step_is_logged(logged) -> None:
    for name in (
        "train/loss", "train/accuracy", "train/grad_norm", "speed/examples_per_s",
        "step/total_ms", "step/data_ms", "memory/most_gb", "lr/tables", "lr/dense",
    ):  # fmt: skip
        assert list(logged[name]) == [9, 19, 29, 39], name
    for step, ms in logged["step/total_ms"].items():
        of_ranks = [logged[f"memory/rank{rank}_gb"][step] for rank in range(2)]
        assert logged["memory/most_gb"][step] == max(of_ranks)
        # A Python process with torch in it, and no more than this machine has.
        assert 0.2 < min(of_ranks) < 100
        assert logged["train/grad_norm"][step] > 0
        # The mean batch: its last one is smaller.
        examples = logged["speed/examples_per_s"][step] * ms / 1000
        assert examples == pytest.approx(250, rel=0.03)
        assert 0 < logged["step/data_ms"][step] < ms
    accuracy = list(logged["train/accuracy"].values())
    assert 0 <= accuracy[0] < accuracy[-1] <= 1


def test_the_parts_of_a_profiled_step_are_the_clocks_time(logged, finished_run) -> None:
    for series in (logged, read_metrics(finished_run.run_dir / "train")):
        # The first steps warm up; at least the one behind them is profiled.
        assert min(series["step/profiled_ms"]) == 19
        for step, clock_ms in series["step/profiled_ms"].items():
            parts_ms = [series[f"step/{part}_ms"][step] for part in PARTS]
            assert min(parts_ms) > 0
            # The clock is read outside of the profiler's range, and is another clock than its: a
            # busy machine may pause between the two readings, but not for most of a step.
            assert clock_ms / 10 < sum(parts_ms) < clock_ms * 1.01


def test_learning_rates_follow_the_schedule(logged) -> None:
    config = TrainConfig(warmup_steps=10, schedule="linear", dense_lr=0.002)
    for name, rate in (("lr/tables", config.table_lr), ("lr/dense", config.dense_lr)):
        for step, value in logged[name].items():
            # Logged when the step is done, that it was done with.
            assert value == pytest.approx(rate * rate_factor(config, step, 44), rel=1e-9)


@given(st.sampled_from(["constant", "linear", "cosine"]), st.integers(0, 50), st.integers(1, 200))
def test_a_schedule_rises_and_falls_once(schedule, warmup, steps) -> None:
    config = TrainConfig(schedule=schedule, warmup_steps=warmup)
    factors = [rate_factor(config, step, steps) for step in range(steps + 1)]
    assert all(0 <= f <= 1 for f in factors)
    rising, falling = factors[:warmup], factors[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    if schedule != "constant" and steps > warmup:
        assert falling[0] == 1
        assert falling[-1] == pytest.approx(0, abs=1e-12)


def test_a_trace_of_the_wanted_steps_names_what_a_step_does(trained) -> None:
    for rank in range(2):
        with gzip.open(trained / "trace" / f"rank{rank}.json.gz", "rt") as handle:
            events = json.load(handle)["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        steps = [name for name in names if name.startswith(RANGE + "step")]
        assert steps == [f"{RANGE}step {number}" for number in (20, 21, 22)]
        for name in ("data", "towers", "loss", "backward", "optimizer"):
            assert names.count(RANGE + name) == 3, name
        assert any(name.startswith("[lookup]") for name in names)
        assert any("sampled_softmax" in event.get("name", "") for event in events)
        for name in steps:
            (range_us,) = [event["dur"] for event in events if event.get("name") == name]
            parts_ms = split_step({"traceEvents": events}, name)
            assert list(parts_ms) == ["lookup", "dense", "communication", "other"]
            assert sum(parts_ms.values()) == pytest.approx(range_us / 1000, rel=1e-6)
            assert min(parts_ms.values()) > 0
    assert [file.name for file in sorted((trained / "trace").iterdir())] == [
        "rank0.json.gz", "rank1.json.gz",
    ]  # fmt: skip


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path, capsys) -> None:
    (tmp_path / "trace").write_text("in the way")
    meters = Meters(100.0, [0, 9], tmp_path / "trace")
    trainer: Any = SimpleNamespace(global_step=5, global_rank=0, is_global_zero=True)
    meters.on_fetch_start(trainer)
    meters.on_fetch_end(0.0)
    meters.on_train_end(trainer, None)  # type: ignore[arg-type]
    assert "WARNING: the trace of train.profile was not written to" in capsys.readouterr().err


def test_a_trace_that_would_begin_after_the_end_is_said_to_be_missing(tmp_path, capsys) -> None:
    trainer: Any = SimpleNamespace(global_step=44, is_global_zero=True)
    Meters(100.0, [44, 50], tmp_path).on_train_end(trainer, None)  # type: ignore[arg-type]
    assert "begins at step 44, but training ended after 44 steps" in capsys.readouterr().err
    Meters(100.0, [43, 50], tmp_path).on_train_end(trainer, None)  # type: ignore[arg-type]
    assert capsys.readouterr().err == "", "an earlier process had written it"


def test_accuracy_counts_positives_that_outscore_what_is_no_hit() -> None:
    query = torch.eye(4)
    item = torch.stack([query[0], query[2], query[2] * 0.5, query[3]])
    one, found = torch.tensor(1.0), Candidates(item, torch.tensor([7, 8, 8, -1]), torch.zeros(4))
    latest = Latest(query, found, torch.arange(4), one, corrected=True)
    # The first is right; the second ties with the others, at 0, which is not outscoring them; the
    # third is beaten by its own item alone; the fourth is a filler.
    assert in_batch_accuracy(latest).tolist() == [2, 3]
    # Of two candidates of another rank and then our own, and with a popular one put right by logQ.
    item = torch.stack([query[0] * 2, query[1], query[0]])
    for log_q, own, right in ((0.0, 0.0, 0), (1.5, 0.0, 1), (1.5, 1.0, 0)):
        found = Candidates(item, torch.arange(3), torch.tensor([log_q, 0.0, own]))
        of_ranks = Latest(query[:1], found, torch.tensor([2]), one, corrected=True)
        assert in_batch_accuracy(of_ranks).tolist() == [right, 1]
        of_ranks = Latest(query[:1], found, torch.tensor([2]), one, corrected=False)
        assert in_batch_accuracy(of_ranks).tolist() == [float(log_q > 0), 1]


def event(name: str, ts: int, end: int, tid: int = 1, cat: str = "cpu_op", id: int = 0) -> Any:
    return {
        "ph": "X", "cat": cat, "name": name, "ts": ts, "dur": end - ts, "tid": tid,
        "args": {"External id": id},
    }  # fmt: skip


HOST = [
    event("step", 1000, 11_000, cat="user_annotation", id=1),
    event("aten::mm", 500, 900),  # before the step
    event("[lookup]_[bags]_[row_wise]", 2000, 4000, cat="user_annotation", id=2),
    event("aten::empty", 2000, 3000, id=3),  # called by the lookup
    event("## Request wait() ##", 3000, 4000, cat="user_annotation"),
    event("aten::mm", 4000, 6000, id=4),
    event("c10d::allreduce_", 9000, 9500, id=5),
]  # fmt: skip


def test_a_cpus_time_belongs_to_the_innermost_operation_that_says_so() -> None:
    # gloo's work counts in the step, where our thread is not at work: not in aten::mm.
    gloo = [
        event("gloo:all_gather", 500, 1500, tid=2, cat="user_annotation"),
        event("gloo:all_reduce", 5000, 8000, tid=2, cat="user_annotation"),
    ]
    elsewhere = event("aten::mm", 6000, 10_000, tid=3)
    trace = {"traceEvents": [*HOST, *gloo, elsewhere, {"ph": "M", "name": "process_name"}]}
    assert split_step(trace, "step") == {
        "lookup": 1.0, "dense": 2.0, "communication": 0.5 + 1.0 + 2.0 + 0.5, "other": 3.0,
    }  # fmt: skip


def test_a_gpus_time_is_that_of_kernels_and_of_communication_that_none_hides() -> None:
    kernels = [
        event("split_embedding_backward_kernel", 2000, 4000, tid=7, cat="kernel", id=9),
        event("elementwise_kernel", 4000, 5000, tid=7, cat="kernel", id=3),  # of the lookup
        event("gemm", 5000, 7000, tid=7, cat="kernel", id=4),
        event("ncclDevKernel_AllReduce", 6000, 9000, tid=8, cat="kernel", id=5),
        event("Memcpy HtoD", 8000, 10_000, tid=9, cat="gpu_memcpy"),
        event("step", 2000, 10_000, tid=7, cat="gpu_user_annotation", id=1),
    ]  # fmt: skip
    assert split_step({"traceEvents": [*HOST, *kernels]}, "step") == {
        "lookup": 3.0, "dense": 2.0, "communication": 2.0, "copy": 1.0, "other": 2.0,
    }  # fmt: skip


def test_curves_are_drawn_of_a_whole_run_and_of_one_that_logged_nothing(logged, tmp_path) -> None:
    sizes = []
    for name, series in (("whole.png", logged), ("none.png", {})):
        plot_curves(series, "val/ndcg@20", tmp_path / name)
        sizes.append((tmp_path / name).stat().st_size)
    assert sizes[0] > sizes[1] > 10_000
