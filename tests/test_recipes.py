"""The recipes of configs/benchmarks, end to end, on stand-ins for data that is not at hand."""

import json

import yaml

from twotower.cli import build_parser
from twotower.data.prepared import PreparedDataset
from twotower.job import Job

from .conftest import ROOT
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

    parser = build_parser()
    for recipe, (path, _) in quality.RECIPES.items():
        jobs = []
        for name, changes in quality.VARIANTS[recipe].items():
            config = yaml.safe_load((ROOT / path).read_text())
            file = tmp_path / "job.yaml"
            file.write_text(yaml.safe_dump(quality.changed(config, changes)))
            options = parser.instantiate(parser.parse_args(["train", "--config", str(file)]))
            job = Job(**{k: v for k, v in vars(options["train"]).items() if k != "config"})
            job.validate()
            assert job not in jobs, f"{recipe}: {name} changes nothing"
            jobs.append(job)
