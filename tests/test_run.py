"""The main job as a user runs it: one command from a log to answers of a real Triton server."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_run_ends_with_ten_items_for_each_of_three_users(finished_run) -> None:
    output = finished_run.output
    assert "Triton answers over gRPC" in output
    users = re.findall(r"^user (\d+): \d+ items seen", output, re.MULTILINE)
    assert len(set(users)) == 3
    answers = output[output.index("Triton answers") :]
    assert len(re.findall(r"│ +\d+ │ item-\d{6} │", answers)) == 30


def test_the_model_is_well_ahead_of_popularity(finished_run) -> None:
    results = json.loads((finished_run.run_dir / "evaluation" / "metrics.json").read_text())
    towers, popularity = (results["results"][n] for n in ("two towers", "popularity"))
    for metric in ("recall@20", "ndcg@20"):
        assert towers[metric] > 1.5 * popularity[metric]
    assert towers["recall@20/cold"] > popularity.get("recall@20/cold", 0)


def test_every_step_leaves_what_it_says(finished_run) -> None:
    for name in (
        "prepared/prepared.json", "train/train.json", "train/curves.png",
        "train/checkpoint/checkpoint.json", "evaluation/metrics.json", "evaluation/evaluation.png",
        "bundles/1/manifest.json",
    ):  # fmt: skip
        assert (finished_run.run_dir / name).stat().st_size > 0
    leftovers = [
        p for p in finished_run.run_dir.rglob("*") if p.name.endswith((".partial", ".old"))
    ]
    assert leftovers == []
    assert not (finished_run.run_dir / "server" / "server.json").exists()


def test_a_second_run_skips_every_step(finished_run, twotower) -> None:
    again = twotower("run", *finished_run.arguments, cwd=finished_run.cwd)
    assert again.returncode == 0
    for step in ("prepare", "train", "evaluate", "export"):
        assert f"{step}: inputs unchanged" in again.stdout
    assert [p.name for p in (finished_run.run_dir / "bundles").iterdir()] == ["1"]


def test_a_step_whose_inputs_changed_is_refused_until_the_one_before_ran(
    finished_run, twotower
) -> None:
    done = twotower("train", *finished_run.arguments, "--data.split.test=0.2", cwd=finished_run.cwd)
    assert done.returncode == 2
    assert "run `twotower prepare` again" in done.stderr
    done = twotower("export", *finished_run.arguments, "--model.dim=32", cwd=finished_run.cwd)
    assert done.returncode == 2
    assert "run `twotower train` again" in done.stderr


def test_the_run_is_tracked_offline_with_config_metrics_and_bundle(finished_run) -> None:
    runs = list((finished_run.run_dir / "train" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 2, "one of training, one of the bundle"
    run_id = json.loads((finished_run.run_dir / "train" / "train.json").read_text())["wandb_run"]
    assert all(run_id in r.name for r in runs)
    content = b"".join(r.read_bytes() for r in runs)
    for word in (b"val/ndcg@20", b"batch_size", b"twotower-bundle", b"item_vectors.npy"):
        assert word in content


def test_curves_are_a_picture(finished_run) -> None:
    from matplotlib.image import imread

    for name in ("train/curves.png", "evaluation/evaluation.png"):
        image = imread(finished_run.run_dir / name)
        assert image.shape[0] > 300
        assert image.std() > 0.05, "the picture is empty"


def test_movielens_beats_both_baselines(given_data, twotower, tmp_path) -> None:
    done = twotower(
        "run", "--config", ROOT / "configs" / "movielens.yaml", f"--run_dir={tmp_path / 'ml'}",
        f"--data.root={given_data / 'ml-latest-small'}", "--train.max_epochs=2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "ml/evaluation/metrics.json").read_text())["results"]
    for metric in ("recall@20", "ndcg@20"):
        for baseline in ("popularity", "co-occurrence"):
            assert results["two towers"][metric] > results[baseline][metric]
    assert re.search(r"\(\d{4}\)", done.stdout), "titles are shown"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("batch_size", "batchsize"),
            "unknown key 'train.batchsize'; did you mean 'train.batch_size'",
        ),
        (("pooling", "poling"), "did you mean 'pooling'"),
        (("display", "dispaly"), "did you mean 'data.display'"),
        (("seed:", "sead:"), "did you mean 'seed'"),
        (("kind: temporal", "kind: temporral"), "did you mean 'temporal'"),
        (("kind: history", "kind: histori"), "did you mean 'history'"),
        (("seed: 0", "seed: zero"), "seed"),
        (("run_dir: runs/quickstart", ""), "run_dir"),
    ],
)
def test_a_mistake_in_the_yaml_is_explained(change, expected, twotower, tmp_path) -> None:
    text = (ROOT / "configs" / "quickstart.yaml").read_text() + "\ntrain:\n  batch_size: 64\n"
    text = re.sub(r"\ntrain:\n(  .*\n)+(?=.*\ntrain:)", "\n", text)
    assert change[0] in text
    (tmp_path / "job.yaml").write_text(text.replace(*change))
    done = twotower("prepare", "--config", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "job.yaml"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["run"], "--config JOB.yaml"),
        (["run", "--train.batchsize=3"], "did you mean 'train.batch_size'"),
        (["trian"], "train"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(
    arguments, expected, twotower, tmp_path
) -> None:
    done = twotower(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_print_config_writes_a_documented_yaml_that_runs(twotower, tmp_path, demo_log) -> None:
    quickstart = ROOT / "configs" / "quickstart.yaml"
    done = twotower("prepare", "--config", quickstart, "--print_config=comments", cwd=tmp_path)
    assert done.returncode == 0
    assert "# Events a step" in done.stdout
    (tmp_path / "job.yaml").write_text(done.stdout)
    done = twotower(
        "prepare", "--config", "job.yaml", f"--data.root={demo_log}", "--run_dir=out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "prepared" / "prepared.json").exists()


@pytest.mark.parametrize(
    "command",
    ["demo-log", "prepare", "train", "sweep", "evaluate", "export", "serve", "recommend", "run"],
)
def test_help_teaches(command, twotower, tmp_path) -> None:
    done = twotower(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 10
    assert "default:" in done.stdout


def test_the_demo_log_is_the_same_for_the_same_seed(twotower, tmp_path, demo_log) -> None:
    import pyarrow.parquet as pq

    sizes = ["--users=600", "--items=300", "--events=12000"]
    for name, seed in (("same", 0), ("other", 1)):
        done = twotower("demo-log", f"--output={name}", f"--seed={seed}", *sizes, cwd=tmp_path)
        assert done.returncode == 0
    for table in ("interactions", "users", "items"):
        first, same, other = (
            pq.read_table(folder / f"{table}.parquet")
            for folder in (demo_log, tmp_path / "same", tmp_path / "other")
        )
        assert first.equals(same)
        assert not first.equals(other)
