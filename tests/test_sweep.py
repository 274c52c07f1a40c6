"""`twotower sweep`: real trials on a small log, killed and resumed; spaces that are refused."""

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.errors import UserError
from twotower.job import Job, write_job
from twotower.sweep.config import Dimension, SweepConfig
from twotower.sweep.space import searchable, with_values

from .conftest import QUICKSTART, read_job

SPACE = {
    "train.table_lr": {"low": 0.02, "high": 0.4, "log": True},
    "model.hidden": {"choices": [[32], [32, 16]]},
}


def job_file(folder: Path, log: Path, sweep: dict, **train) -> Path:
    job = yaml.safe_load(QUICKSTART.read_text())
    job |= {"run_dir": "run", "tracking": {"wandb": "off"}, "sweep": sweep}
    job["data"]["root"] = str(log)
    job["train"] = {"batch_size": 256, "max_epochs": 2} | train
    (folder / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))
    return folder / "job.yaml"


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "sweep" / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> list[str]:
    found = (folder / "run" / "sweep").glob("trial=*/train*/**/checkpoint.json")
    return sorted({p.relative_to(folder / "run" / "sweep").parts[0] for p in found})


def test_a_killed_sweep_goes_on_and_ends_as_one_never_killed(demo_log, twotower, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        job_file(folder, demo_log, {"trials": 3, "space": SPACE}, checkpoint_every_steps=20)
    done = twotower("sweep", "--config", "job.yaml", cwd=whole)
    assert done.returncode == 0, done.stdout + done.stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "sweep", "--config", "job.yaml", "--sweep.trials=2"],
        cwd=killed, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    second = killed / "run" / "sweep" / "trial=1" / "train.partial" / "checkpoints"
    while not any(second.glob("step=*")):
        assert process.poll() is None, "the sweep ended before its second trial"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What a kill in the middle of writing leaves.
    with (killed / "run/sweep/journal.log").open("a") as journal:
        journal.write('{"op_code":6,"wor')
    (killed / "run/sweep/journal.log.lock").symlink_to("journal.log")
    again = twotower("sweep", "--config", "job.yaml", cwd=killed)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "trial 0:" not in again.stdout, "what was finished is not done again"

    ours, theirs = trials(killed), trials(whole)
    assert [t["trial"] for t in ours] == ["0", "1", "2"]
    for mine, other in zip(ours, theirs, strict=True):
        for key in (*SPACE, "state", "epochs"):
            assert mine[key] == other[key]
        assert float(mine["val/ndcg@20"]) == pytest.approx(float(other["val/ndcg@20"]), abs=1e-4)
    best = max(ours, key=lambda t: float(t["val/ndcg@20"]))
    assert weights(killed) == [f"trial={best['trial']}"]
    assert (killed / "run/sweep/sweep.png").stat().st_size > 5_000

    other = twotower("sweep", "--config", "job.yaml", "--seed=1", cwd=killed)
    assert other.returncode == 2
    assert "holds the trials of another job, log or space" in other.stderr
    journal = killed / "run/sweep/journal.log"
    journal.write_text("{}\n" + journal.read_text())
    damaged = twotower("sweep", "--config", "job.yaml", cwd=killed)
    assert damaged.returncode == 2
    assert "journal.log: damaged" in damaged.stderr

    job = read_job(killed / "run" / "sweep" / "best.yaml")
    assert (job.name, job.run_dir) == ("quickstart", "run")
    assert job.train.table_lr == float(best["train.table_lr"])
    assert job.model.hidden == yaml.safe_load(best["model.hidden"])
    assert job.sweep == SweepConfig()
    trained = twotower("train", "--config", "run/sweep/best.yaml", cwd=killed)
    assert trained.returncode == 0, trained.stderr
    score = json.loads((killed / "run/train/train.json").read_text())["score"]
    assert score == pytest.approx(float(best["val/ndcg@20"]), abs=2e-4)
    reuse = f"run/sweep/trial={best['trial']}/job.yaml"
    assert "unchanged" in twotower("train", "--config", reuse, cwd=killed).stdout


def test_a_hopeless_trial_is_pruned(demo_log, twotower, tmp_path) -> None:
    space = {
        # A rate of 1e-9 learns nothing.
        "train.table_lr": {"choices": [0.1, 1e-9]},
        "train.dense_lr": {"choices": [0.001, 1e-9]},
    }
    sweep = {"trials": 4, "seed": 3, "sampler": "random", "space": space}
    job_file(tmp_path, demo_log, sweep, max_epochs=4)
    done = twotower("sweep", "--config", "job.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = trials(tmp_path)
    pruned = [t for t in found if t["state"] == "pruned"]
    assert pruned, found
    assert all(int(t["epochs"]) < 4 for t in pruned)
    best = max(float(t["val/ndcg@20"]) for t in found)
    assert all(float(t["val/ndcg@20"]) < best for t in pruned)


def test_sigterm_ends_the_training_too_and_keeps_its_place(demo_log, tmp_path) -> None:
    job_file(tmp_path, demo_log, {"trials": 1, "space": SPACE}, max_epochs=200, patience=200)
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "sweep", "--config", "job.yaml"], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    checkpoints = tmp_path / "run/sweep/trial=0/train.partial/checkpoints"
    while not any(checkpoints.glob("step=*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "give the same command to go on" in said
    assert "Traceback" not in said
    log = (tmp_path / "run/sweep/trial=0/train.log").read_text()
    assert "to go on from step" in log
    assert weights(tmp_path) == ["trial=0"]
    alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in alive.stdout


BASE = {
    "train.table_lr": ({"low": 0.1}, "must have low and high, or choices"),
    "train.dense_lr": ({"low": 0.5, "high": 0.1}, "low must be < high"),
    "train.weight_decay": ({"low": 0.0, "high": 0.1, "log": True}, "low must be > 0 where log"),
    "train.batch_size": ({"low": 64.5, "high": 128}, "low must be int, got 64.5"),
    "train.warmup_steps": ({"low": -5, "high": 10}, "train.warmup_steps must be >= 0, got -5"),
    "train.table_optimizer": ({"choices": ["sgd", "lamb"]}, "train.table_optimizer must be one of"),
    "train.schedule": ({"low": 1, "high": 2}, "is str, which has no range: give choices"),
    "train.correct_positive": ({"choices": [True, 1]}, "choices must be bool, got 1"),
    "train.clip_norm": ({"choices": [None, "1"]}, "choices must be float or null, got '1'"),
    "model.dropout": ({"low": 0.0, "high": 1.0}, "model.dropout must be in [0, 1), got 1.0"),
    "model.hidden": ({"choices": [[64]]}, "at least two values"),
    "model.interaction": ({"choices": ["dot", "dot"]}, "names a value twice"),
    "model.residual": ({"choices": [True, False], "low": 1}, "not both"),
    "model.droput": ({"low": 0.0, "high": 0.5}, "'model.droput'; did you mean 'model.dropout'"),
    "trian.table_lr": ({"low": 0.1, "high": 1.0}, "did you mean 'train.table_lr'"),
    "data.split.test": ({"low": 0.1, "high": 0.2}, "share the prepared dataset"),
    "evaluate.monitor": ({"choices": ["ndcg@10", "ndcg@20"]}, "only keys below model and train"),
}  # fmt: skip


@pytest.fixture(scope="module")
def job() -> Job:
    return read_job(QUICKSTART)


@pytest.mark.parametrize("key", BASE)
def test_a_space_that_no_job_can_have_is_refused(key, job) -> None:
    dimension, expected = BASE[key]
    space = {key: Dimension(**dimension), "train.accumulate": Dimension(low=1, high=2)}
    with pytest.raises(UserError, match=r"sweep\.space") as refusal:
        replace(job, sweep=SweepConfig(space=space)).validate()
    assert expected in str(refusal.value)


def test_values_that_only_fit_another_keys_are_left_to_the_trials(job) -> None:
    space = {
        "train.sharding": Dimension(choices=["row_wise", "column_wise"]),
        "train.table_optimizer": Dimension(choices=["sgd", "rowwise_adagrad"]),
    }
    replace(job, sweep=SweepConfig(space=space)).validate()


@pytest.mark.parametrize(
    ("sweep", "expected"),
    [
        ({"trials": 0, "space": SPACE}, "sweep.trials must be >= 1, got 0"),
        ({"sampler": "tpee", "space": SPACE}, "sweep.sampler must be one of tpe, random"),
        ({"prunner": "none", "space": SPACE}, "did you mean 'sweep.pruner'"),
        ({"space": {"train.table_lr": {"low": 0.1, "hihg": 1.0}}}, "hihg"),
        ({"space": {"train.table_lr": {"low": "small", "high": 1.0}}}, "small"),
        ({"space": {"train.tabel_lr": {"low": 0.1, "high": 1.0}}}, "did you mean 'train.table_lr'"),
        ({"trials": 3}, "sweep.space is empty"),
    ],
)
def test_a_mistake_in_the_section_is_one_line_before_anything_runs(
    sweep, expected, twotower, tmp_path, demo_log
) -> None:
    job_file(tmp_path, demo_log, sweep)
    done = twotower("sweep", "--config", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stdout
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


VALUES = {
    "train.table_lr": st.floats(1e-6, 10), "train.batch_size": st.integers(2, 10**6),
    "train.clip_norm": st.none() | st.floats(1e-3, 1e3), "train.log_q": st.floats(0, 2),
    "train.profile": st.none() | st.just([3, 9]), "model.dim": st.integers(1, 512),
    "model.hidden": st.lists(st.integers(1, 512), max_size=3),
    "model.interaction": st.sampled_from(["concat", "dot", "cross"]),
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional=VALUES), st.text(max_size=20))
@settings(deadline=None, max_examples=15)
def test_a_written_job_is_read_as_it_was(tmp_path_factory, job, values, name) -> None:
    changed = with_values(replace(job, name=f"n{name.strip()}"), values)
    path = tmp_path_factory.mktemp("yaml") / "job.yaml"
    write_job(changed, path, values, "two\nlines")
    assert read_job(path) == changed
    assert path.read_text().startswith("# two\n# lines\n")
    content = yaml.safe_load(path.read_text())
    for key in values:
        section, field = key.split(".")
        assert field in content[section], "what was searched is written though it is the default"


def test_keys_of_model_and_train_alone_can_be_searched(job) -> None:
    known = searchable(job)
    assert {"model.dim", "train.table_lr", "train.log_q", "model.temperature"} <= set(known)
    assert all(key.split(".")[0] in ("model", "train") for key in known)
