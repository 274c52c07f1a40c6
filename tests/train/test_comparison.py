"""`twotower compare`: two real evaluations, and the pairs that are refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.data.schema import Split
from twotower.errors import UserError
from twotower.train.config import EvaluateConfig
from twotower.train.evaluation import compare_with_baselines, write_report
from twotower.train.evaluation.comparison import compare_runs

from ..towers.test_two_tower import build


def log(users: int = 60, seed: int = 0) -> dict[str, list]:
    rng = np.random.default_rng(seed)
    return {
        "user_id": [f"u{u}" for u in range(users) for _ in range(12)],
        "item_id": [f"i{i}" for _ in range(users) for i in rng.permutation(30)[:12]],
        "timestamp": (1_700_000_000 + rng.integers(0, 30 * 86_400, users * 12)).tolist(),
    }


@pytest.fixture
def evaluated(make, tmp_path):
    """Evaluate untrained towers on a log, as `twotower evaluate` does, and return the folder."""
    number = 0

    def evaluate(events=None, split=None, seed=0, **config):
        nonlocal number
        number += 1
        data = make(events or log(), split=split or Split(test=0.3))
        config = EvaluateConfig(**({"k": [2, 5], "monitor": "ndcg@5"} | config))
        report, queries = compare_with_baselines(build(data), data, config, seed)
        folder = tmp_path / f"run{number}" / "evaluation"
        folder.mkdir(parents=True)
        write_report(folder, {"fingerprint": "x", **report}, queries, config.monitor_k)
        return folder.parent

    return evaluate


def test_the_command_prints_a_table_and_draws_a_picture(finished_run, twotower, tmp_path) -> None:
    less = [*finished_run.arguments, "--train.max_steps=3", f"--run_dir={tmp_path / 'less'}"]
    shutil.copytree(finished_run.run_dir / "prepared", tmp_path / "less" / "prepared")
    for step in ("train", "evaluate"):
        done = twotower(step, *less, cwd=finished_run.cwd)
        assert done.returncode == 0, done.stderr
    done = twotower("compare", "run", tmp_path / "less", "--picture=c.png", cwd=finished_run.cwd)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[1]: line for line in done.stdout.splitlines() if "@20" in line}
    results = [
        json.loads((run / "evaluation/metrics.json").read_text())["results"]["two towers"]
        for run in (finished_run.run_dir, tmp_path / "less")
    ]
    for metric in ("recall@20", "ndcg@20", "coverage@20", "gini@20", "popularity_bias@20"):
        for result in results:
            assert f" {result[metric]:.4f} " in rows[metric]
    assert results[1]["ndcg@20"] < results[0]["ndcg@20"]
    assert rows["ndcg@20"].split()[-2] == "0.0001", "three steps of training are far worse"
    assert max(len(line) for line in done.stdout.splitlines() if "│" in line) <= 100
    from matplotlib.image import imread

    assert imread(finished_run.cwd / "c.png").std() > 0.05


def test_every_metric_of_a_report_has_its_interval_and_its_queries(finished_run) -> None:
    folder = finished_run.run_dir / "evaluation"
    report = json.loads((folder / "metrics.json").read_text())
    queries = pq.read_table(folder / "queries.parquet")
    assert queries.num_rows == report["queries"]
    assert len(set(queries["user"].to_pylist())) == report["users"]
    towers = report["results"]["two towers"]
    for metric in ("recall", "ndcg", "mrr", "hit_rate"):
        kept = np.mean(queries[f"{metric}@20"].to_numpy())
        assert kept == pytest.approx(towers[f"{metric}@20"])
    for model, metrics in report["results"].items():
        assert set(report["intervals"][model]) == set(metrics)
        for name in ("coverage", "gini", "novelty", "diversity", "arp", "popularity_bias"):
            assert f"{name}@50" in metrics
        for name, value in metrics.items():
            low, high = report["intervals"][model][name]
            assert low - 1e-9 <= value <= high + 1e-9, (model, name)
    assert 2 <= len(report["decay"]) <= 5
    parts = [(towers[f"recall@20/{b['name']}"], b["queries"]) for b in report["decay"]]
    whole = sum(value * size for value, size in parts) / sum(size for _, size in parts)
    assert whole == pytest.approx(towers["recall@20"])
    assert "recall, day" in finished_run.output


def test_equal_runs_differ_by_nothing(evaluated) -> None:
    found = compare_runs(evaluated(), evaluated() / "evaluation")
    assert found.queries > 50
    assert not found.notes
    for name, (difference, low, high, p) in found.differences.items():
        assert (difference, low, high, p) == (0, 0, 0, 1), name


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"monitor": "ndcg@2"}, "another k (evaluate.monitor): 5 against 2"),
        (
            {"split": Split(kind="leave_last_out")},
            "another split (data.split): kind=temporal test=0.3 against kind=leave_last_out",
        ),
        ({"split": Split(test=0.2)}, "other test events: 216 against 144"),
        ({"events": log(seed=1)}, "another"),
        ({"events": log(users=61)}, "other test events"),
    ],
)
def test_other_tests_are_refused_and_named(other, expected, evaluated) -> None:
    with pytest.raises(UserError, match="judged different tests") as refusal:
        compare_runs(evaluated(), evaluated(**other))
    assert expected in str(refusal.value)


def test_another_log_of_the_same_size_is_refused(evaluated) -> None:
    a, b = evaluated(), evaluated()
    file = b / "evaluation" / "queries.parquet"
    queries = pq.read_table(file)
    users = pa.array([f"x{u}" for u in queries["user"].to_pylist()])
    pq.write_table(queries.set_column(0, "user", users), file)
    with pytest.raises(UserError, match=r"another log: .* queries that only one judged"):
        compare_runs(a, b)
    relevant = pa.array(reversed(queries["relevant"].to_pylist()), queries["relevant"].type)
    pq.write_table(queries.set_column(2, "relevant", relevant), file)
    with pytest.raises(UserError, match="other items that were relevant"):
        compare_runs(a, b)


def test_two_samples_of_one_test_are_paired_where_they_meet(evaluated) -> None:
    a, b = evaluated(max_queries=120), evaluated(max_queries=120, seed=1)
    found = compare_runs(a, b)
    assert 20 < found.queries < 120
    assert len(found.notes) == 2
    assert "120 queries, a sample" in found.notes[0]


def test_what_is_no_evaluation_is_explained(evaluated, twotower, tmp_path) -> None:
    run = evaluated()
    done = twotower("compare", run, tmp_path / "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere: holds no evaluation" in done.stderr
    assert "Traceback" not in done.stderr
    done = twotower("compare", run, run, "--picture=c.jpg", cwd=tmp_path)
    assert (done.returncode, "--picture" in done.stderr) == (2, True)
    (run / "evaluation" / "queries.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(UserError, match=r"damaged .*twotower evaluate"):
        compare_runs(run, run)
    (run / "evaluation" / "queries.parquet").unlink()
    with pytest.raises(UserError, match=r"has no queries\.parquet, .*twotower evaluate"):
        compare_runs(run, run)
