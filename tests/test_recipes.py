"""The recipes of configs/benchmarks, end to end, on stand-ins for data that is not at hand."""

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import yaml

from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries, split_queries

from .conftest import ROOT, read_job
from .data.line_logs import write_stand_in

RECIPES = ROOT / "configs" / "benchmarks"


def test_user_lines_from_the_files_to_one_judged_query_a_user(tmp_path, twotower) -> None:
    write_stand_in(tmp_path)
    job = ["--config", RECIPES / "gowalla.yaml", "--data.root=.", "--run_dir=run",
           "--train.max_epochs=5"]  # fmt: skip
    for command in ("prepare", "train", "evaluate"):
        done = twotower(command, *job, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    data = PreparedDataset(tmp_path / "run" / "prepared")
    counts = data.summary["counts"]
    lines = (tmp_path / "train.txt").read_text().splitlines()
    assert counts["users"] == len(lines) == 3000
    assert counts["train_events"] + counts["validation_events"] == sum(
        len(line.split()) - 1 for line in lines
    )
    report = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert report["queries"] == 3000
    towers, popularity = (report["results"][n]["recall@20"] for n in ("two towers", "popularity"))
    assert towers > 2 * popularity


def test_next_item_recipes_read_both_line_formats(tmp_path, twotower) -> None:
    users = {f"u{u}": [f"i{(u + k) % 9}" for k in range(3 + u % 4)] for u in range(12)}
    (tmp_path / "Beauty.txt").write_text(
        "".join(f"{user} {item}\n" for user, items in users.items() for item in items)
    )
    (tmp_path / "ml-1m.txt").write_text(
        "".join(f"{user} {' '.join(items)}\n" for user, items in users.items())
    )
    counts = []
    for name, more in (("beauty", []), ("ml-1m", ["--data.format=user_lines"])):
        job = ["--config", RECIPES / f"{name}.yaml", "--data.root=.", f"--run_dir={name}", *more]
        done = twotower("prepare", *job, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        counts.append(PreparedDataset(tmp_path / name / "prepared").summary["counts"])
    assert counts[0] == counts[1]
    assert counts[0]["validation_events"] == counts[0]["test_events"] == 12


def test_every_variant_of_the_quality_benchmark_is_a_job(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import quality

    for recipe, compared in quality.RECIPES.items():
        jobs = []
        for name, changes in quality.VARIANTS[recipe].items():
            assert "," not in name, "--variants has commas between the names"
            config = yaml.safe_load((ROOT / compared.job).read_text())
            file = tmp_path / "job.yaml"
            changes = {**compared.changes, **changes}
            file.write_text(yaml.safe_dump(quality.changed(config, changes)))
            job = read_job(file)
            job.validate()
            assert job not in jobs, f"{recipe}: {name} changes nothing"
            jobs.append(job)


def test_the_benchmarks_sasrec_learns_what_comes_next(tmp_path, monkeypatch, twotower) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import sasrec

    # Whatever a user began with, the item after i is i + 1 of 30.
    lines = (f"u{u} " + " ".join(f"i{(u + k) % 30}" for k in range(9 + u % 9)) for u in range(300))
    (tmp_path / "ml-1m.txt").write_text("\n".join(lines) + "\n")
    job = ["--config", RECIPES / "ml-1m.yaml", "--data.root=.", "--data.format=user_lines"]
    done = twotower("prepare", *job, "--run_dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = PreparedDataset(tmp_path / "run" / "prepared")
    validation, test = (split_queries(data, split, 1000, 0) for split in (1, 2))

    def hits(queries: Queries, answer: Any) -> float:
        return float((answer(queries, 1)[:, 0] == queries.relevant).mean())

    monkeypatch.setattr(sasrec, "EPOCHS", 40)
    answer = sasrec.fit_sasrec(data, partial(hits, validation), length=8, dropout=0.0)
    assert hits(test, answer) > 0.95


@pytest.mark.parametrize("users", [6, 30])
def test_the_benchmarks_ease_is_the_closed_form_without_the_history(users, monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from baselines import fit_ease

    rng = np.random.default_rng(users)
    taken = (rng.random((users, 9)) < 0.4).astype(np.float32)
    taken[:, 4] = 0  # an item that training never saw
    known = [0, 1, 2, 3, 5, 6, 7, 8]
    inverse = np.linalg.inv(taken[:, known].T @ taken[:, known] + 2 * np.eye(8))
    score = taken[:, known] @ (np.eye(8) - inverse / np.diag(inverse))
    score[taken[:, known] > 0] = -np.inf
    rows, seen = np.nonzero(taken)
    offset = np.searchsorted(rows, np.arange(users + 1))
    asked = Queries(np.arange(users), np.empty(0), np.zeros(users + 1), seen, offset)
    answers = fit_ease(sp.csr_matrix(taken), 2.0)(asked, 3)
    for row in range(users):
        assert answers[row].tolist() == np.array(known)[np.argsort(-score[row])[:3]].tolist()


def test_the_search_for_a_baselines_settings_climbs_to_the_best(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from baselines import climb

    grid = {"a": (1.0, 2.0, 3.0, 4.0, 5.0), "b": (1.0, 2.0, 3.0)}
    best, tried = climb(grid, lambda s: -((s["a"] - 5) ** 2) - (s["b"] - 1) ** 2 * 3)
    assert best == {"a": 5.0, "b": 1.0}
    assert len(tried) < 15
