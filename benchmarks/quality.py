"""What each option does for retrieval: variants of a recipe, beside four baselines, in one table.

    python benchmarks/quality.py --recipe movielens
    python benchmarks/quality.py --recipe kuairand --variants "recipe,item bias"
    python benchmarks/quality.py --recipe user-lines

Every row answers the same test queries, over the whole catalogue, without what the query's user
had before. The seconds are those of `twotower train`, or of a baseline's one fit and its answers;
what was tried on validation is not counted. Beside recall and NDCG stands what they are above the
first variant's, with the 95% interval of that, over users. The result is written to
benchmarks/results/quality-<recipe>.json, row by row; with --keep, a run goes on from the rows that
one of the same recipe left there, and trains the first variant anew, to compare with.

A variant is a line of VARIANTS: dotted keys of the YAML and their values. A feature is found by its
name, and left out by null: {"data.item.genres": None}.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from baselines import Answer, Judge, baselines, recall_and_ndcg
from measure import RESULTS, ROOT, write_result
from stand_ins import write_next_items, write_user_lines

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.data.queries import Queries
from twotower.towers.catalogue import catalogue_vectors
from twotower.train.checkpoint.towers import load_towers
from twotower.train.config import EvaluateConfig
from twotower.train.evaluation import answer, judged_queries

WITH_SEEN: dict[str, Any] = {"train.negatives.exclude_seen": False}
# The plain in-batch model, whose candidates are all of a step's items.
PLAIN = {**WITH_SEEN, "data.query.history.pooling": "attention"}
PLAIN_FILMS = {**PLAIN, "data.query.history.item_features": []}
# Narrower and shorter than the recipe, since every option is measured.
PLAIN_VIDEOS = {
    **PLAIN, "train.every_position": False, "train.batch_size": 2048, "train.max_epochs": 5,
    "model.dim": 64,
}  # fmt: skip
# Skipped events are those below a label, so they need a recipe that is judged by the others.
LIKED = {"data.columns.label": "rating", "data.columns.positive_from": 4, **PLAIN_FILMS}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe, and what it is compared by.

    Attributes:
        job: its YAML.
        data: folder of its data below --data.
        changes: for all rows, see VARIANTS.
        k: cut-off of the metrics.
        stand_in: writes the data from a file of that folder to another folder.
        sasrec: settings of SASRec, where it is among the baselines.
    """

    job: str
    data: str = "kuairand-pure"
    changes: dict[str, Any] = field(default_factory=dict)
    k: int = 20
    stand_in: Callable[[Path, Path], None] | None = None
    sasrec: dict[str, Any] | None = None


RECIPES = {
    "movielens": Recipe(
        job="configs/movielens.yaml", data="ml-latest-small", changes=PLAIN_FILMS
    ),
    "movielens-liked": Recipe(
        job="configs/movielens.yaml", data="ml-latest-small", changes=LIKED
    ),
    "kuairand": Recipe(job="configs/benchmarks/kuairand.yaml", changes=PLAIN_VIDEOS),
    "user-lines": Recipe(
        job="configs/benchmarks/gowalla.yaml", stand_in=partial(write_user_lines, sparse=False)
    ),
    "user-lines-sparse": Recipe(
        job="configs/benchmarks/gowalla.yaml", stand_in=partial(write_user_lines, sparse=True)
    ),
    "next-item": Recipe(
        job="configs/benchmarks/ml-1m.yaml", changes={"data.interactions": "log.txt"}, k=10,
        stand_in=partial(write_next_items, sparse=False), sasrec={"length": 50, "dropout": 0.2},
    ),
    "next-item-sparse": Recipe(
        job="configs/benchmarks/beauty.yaml", changes={"data.interactions": "log.txt"}, k=10,
        stand_in=partial(write_next_items, sparse=True), sasrec={"length": 50, "dropout": 0.5},
    ),
}  # fmt: skip
SEQUENCES = "train_user_sequences.parquet"
HISTORY = {"name": "history", "kind": "history", "length": 200, "table": "item_id",
           "pooling": "mean"}  # fmt: skip
LINES: dict[str, dict[str, Any]] = {
    "recipe": {},
    "128 wide": {"model.dim": 128},
    "64 wide": {"model.dim": 64},
    "temperature 0.1": {"model.temperature": 0.1},
    "temperature 0.2": {"model.temperature": 0.2},
    "rowwise Adagrad": {"train.table_optimizer": "rowwise_adagrad", "train.table_lr": 0.05},
    "user id too": {"data.query": [{"name": "user_id", "kind": "id"}, HISTORY]},
    "without item bias": {"model.item_bias": False},
    "without logQ": {"train.log_q": 0},
    "bilateral": {"train.loss": {"kind": "bilateral"}},
    "without seen": {"train.negatives.exclude_seen": True},
}
NEXT_ITEM: dict[str, dict[str, Any]] = {
    "recipe": {},
    "64 wide": {"model.dim": 64},
    "without dropout": {"model.dropout": 0},
    "temperature 0.1": {"model.temperature": 0.1},
    "temperature 0.2": {"model.temperature": 0.2},
    "with seen": WITH_SEEN,
    "whole catalogue": {"train.negatives": {"catalogue": True, "exclude_seen": True}},
    "item bias": {"model.item_bias": True},
    "Transformer": {
        "data.query.history.pooling": "transformer", "train.batch_size": 128,
        "train.max_epochs": 40, "model.dim": 64,
    },
    "event by event": {"train.every_position": False, "train.batch_size": 2048},
}  # fmt: skip
# What any recipe may be given.
WITHOUT_SEEN: dict[str, Any] = {"train.negatives.exclude_seen": True}
EVERY_POSITION: dict[str, Any] = {
    "data.query.history.pooling": "transformer", "train.every_position": True,
    "train.batch_size": 64,
}  # fmt: skip
ATTENTION_AT_EVERY_POSITION = {
    **EVERY_POSITION, **WITHOUT_SEEN, "data.query.history.pooling": "attention",
}  # fmt: skip
TIMED_SUM: dict[str, Any] = {"data.query.history.pooling": "timed_sum"}
FILMS: dict[str, Any] = {"data.query.history.item_features": ["genres", "year"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "without logQ": {"train.log_q": 0},
    "half of logQ": {"train.log_q": 0.5},
    "logQ from the steps": {"train.log_q_from": "stream"},
    "positive uncorrected": {"train.correct_positive": False},
    "half uniform": {"train.negatives": {"in_batch": 0.5, "uniform": 0.5}},
    "half memory": {"train.negatives": {"in_batch": 0.5, "memory": 0.5}},
    "half mined": {"train.negatives": {"in_batch": 0.5, "mined": 0.5}},
    "a tenth mined": {"train.negatives": {"in_batch": 0.9, "mined": 0.1}},
    "whole catalogue": {"train.negatives": {"catalogue": True}},
    "without seen": WITHOUT_SEEN,
    "without unreleased": {"train.negatives.exclude_unreleased": True},
    "whole catalogue without seen": {
        "train.negatives": {"catalogue": True, "exclude_seen": True}
    },
    "bilateral": {"train.loss": {"kind": "bilateral"}},
    "bce": {"train.loss": {"kind": "bce"}},
    "item bias": {"model.item_bias": True},
    "layer norm": {"model.layer_norm": True},
    "widths 16 and 32": {"model.widths": [16, 32]},
    "id dropout": {"train.id_dropout": 0.1},
    "item L2 of 10": {"train.item_l2": 10.0},
    "item L2 of 100": {"train.item_l2": 100.0},
    "mean pooling": {"data.query.history.pooling": "mean"},
    "timed sum": TIMED_SUM,
    "transformer": {"data.query.history.pooling": "transformer"},
    "hstu": {"data.query.history.pooling": "hstu"},
    "every position": EVERY_POSITION,
    "every position without seen": {**EVERY_POSITION, **WITHOUT_SEEN},
    "attention at every position without seen": ATTENTION_AT_EVERY_POSITION,
    "time gaps at every position without seen": {
        **EVERY_POSITION, **WITHOUT_SEEN, "data.query.history.time_gaps": True,
    },
    "hstu at every position without seen": {
        **EVERY_POSITION, **WITHOUT_SEEN, "data.query.history.pooling": "hstu",
    },
    "temperature 0.05": {"model.temperature": 0.05},
    "temperature 0.2": {"model.temperature": 0.2},
}  # fmt: skip
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "movielens": {
        **OPTIONS,
        "ids alone": {"data.item.genres": None, "data.item.year": None},
        "256 wide": {"model.dim": 256},
        "half-life 1 year": {"train.half_life_days": 365},
        "item features": FILMS,
        "item features without seen": {**FILMS, **WITHOUT_SEEN},
        "timed sum and item features without seen": {**TIMED_SUM, **FILMS, **WITHOUT_SEEN},
        "item features without seen; item L2 of 10": {
            **FILMS,
            **WITHOUT_SEEN,
            "train.item_l2": 10.0,
        },
        "item features at every position": {**EVERY_POSITION, **FILMS},
        "item features and attention at every position without seen": {
            **ATTENTION_AT_EVERY_POSITION,
            **FILMS,
        },
    },
    "movielens-liked": {
        **OPTIONS,
        "256 wide": {"model.dim": 256},
        "item features without seen": {**FILMS, **WITHOUT_SEEN},
        "half skipped": {"train.negatives": {"in_batch": 0.5, "skipped": 0.5}},
        "a tenth skipped": {"train.negatives": {"in_batch": 0.9, "skipped": 0.1}},
    },
    "kuairand": {
        **OPTIONS,
        "ids alone": {"data.item.author_id": None, "data.item.tag": None},
        "256 wide without seen": {"model.dim": 256, **WITHOUT_SEEN},
        "256 wide and attention at every position without seen": {
            **ATTENTION_AT_EVERY_POSITION,
            "model.dim": 256,
        },
        "timed sum at every position without seen": {**ATTENTION_AT_EVERY_POSITION, **TIMED_SUM},
        "256 wide and timed sum at every position without seen for 10 epochs": {
            **ATTENTION_AT_EVERY_POSITION,
            **TIMED_SUM,
            "model.dim": 256,
            "train.max_epochs": 10,
        },
        "half-life 1 day": {"train.half_life_days": 1},
        "item features": {"data.query.history.item_features": ["author_id", "tag"]},
        "heads": {
            "data.columns.outcomes": ["is_like", "play_time_ms"],
            "train.heads": {
                "like": {"column": "is_like", "weight": 0.1},
                "watch": {"column": "play_time_ms", "kind": "regression", "weight": 0.1},
            },
        },
    },
    "user-lines": LINES,
    "user-lines-sparse": LINES,
    "next-item": NEXT_ITEM,
    "next-item-sparse": NEXT_ITEM,
}


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """Return a YAML's content with the values of dotted keys put in; it is changed in place."""
    # A copy, since a later change may reach into a value that variants share.
    for key, value in copy.deepcopy(changes).items():
        *parts, last = key.split(".")
        place = config
        for part in parts:
            place = _entry(place, part) if isinstance(place, list) else place.setdefault(part, {})
        if isinstance(place, list):
            place.remove(_entry(place, last))
            if value is not None:
                place.append({"name": last, **value})
        else:
            place[last] = value
    return config


def _entry(features: list[dict[str, Any]], name: str) -> dict[str, Any]:
    found = [f for f in features if f["name"] == name]
    if not found:
        raise SystemExit(f"the recipe has no feature '{name}'")
    return found[0]


def run(command: str, config: dict[str, Any], folder: Path) -> float:
    """Run one step of a job in a process of its own; returns its seconds."""
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    job = [f"--config={folder / 'job.yaml'}", f"--run_dir={folder}", "--tracking.wandb=off"]
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "twotower", command, *job],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{config['name']}, {command}: {done.stderr.strip()}")
    return time.monotonic() - started


def train_towers(config: dict[str, Any], folder: Path) -> tuple[float, PreparedDataset, Answer]:
    """Train a job; returns the seconds of training, the dataset, and what answers queries."""
    run("prepare", config, folder)
    seconds = run("train", config, folder)
    data, size = PreparedDataset(folder / "prepared"), EvaluateConfig().batch_size
    builder, model = BatchBuilder(data), load_towers(folder / "train")
    item_ND = catalogue_vectors(model.item_vectors, builder, torch.device("cpu"), size)
    return seconds, data, lambda q, k: answer(model.query_vectors, item_ND, builder, q, k, size)


def measure_variant(
    changes: dict[str, Any], config: dict[str, Any], folder: Path, judge: Judge
) -> dict[str, Any]:
    """Train a variant and judge it; returns its row."""
    seconds, data, answers = train_towers(config, folder)
    test = judged_queries(data, 2, EvaluateConfig(k=[judge.k]), config["seed"])
    if not _same(judge.queries, test):
        raise SystemExit(f"{changes}: has other test queries than the recipe")
    row = judge.row(answers(judge.queries, judge.k))
    return {"changes": changes, "seconds": round(seconds, 1), **row}


def add(name: str, row: dict[str, Any], result: dict[str, Any]) -> None:
    """Print a row of the table and write it."""
    result["rows"][name] = row
    packages = ("twotower", "torch", "implicit", "scipy")
    write_result(f"quality-{result['recipe']}", result, packages)
    cells = [
        f"{row['metrics'][metric]:.4f} {effect:+.4f} {low:+.4f} to {high:+.4f}"
        for metric, (effect, low, high, _) in row["effects"].items()
    ]
    more = " ".join(f"{k}={v:g}" for k, v in row.get("settings", {}).items())
    print(f"{name:40} {'   '.join(cells)} {row['seconds']:8.0f}  {more}", flush=True)


def _same(a: Queries, b: Queries) -> bool:
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("event", "relevant", "seen"))


def main() -> None:
    """Measure one recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=RECIPES, required=True)
    parser.add_argument("--variants", help="names, with commas between; all without it")
    parser.add_argument("--keep", action="store_true", help="go on from the rows that are there")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data",
                        help="folder of the data sets' folders")  # fmt: skip
    arguments = parser.parse_args()
    recipe, variants = RECIPES[arguments.recipe], VARIANTS[arguments.recipe]
    names = arguments.variants.split(",") if arguments.variants else list(variants)
    for name in names:
        if name not in variants:
            raise SystemExit(f"no variant '{name}', expected some of {', '.join(variants)}")
    text = (ROOT / recipe.job).read_text()
    result: dict[str, Any] = {
        "recipe": arguments.recipe, "job": changed(yaml.safe_load(text), recipe.changes),
        "k": recipe.k, "queries": 0, "rows": {},
    }  # fmt: skip
    file = RESULTS / f"quality-{arguments.recipe}.json"
    if arguments.keep and file.exists():
        before = json.loads(file.read_text())
        if before["job"] == result["job"]:
            result["rows"] = before["rows"]
    titles = f"{f'recall@{recipe.k}':32}   {f'NDCG@{recipe.k}':32}"
    print(f"{arguments.recipe:40} {titles} {'seconds':>8}")
    judged = EvaluateConfig(k=[recipe.k])
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.data / recipe.data
        if recipe.stand_in is not None:
            recipe.stand_in(root / SEQUENCES, Path(folder))
            root = Path(folder)
        jobs = {
            name: changed(
                yaml.safe_load(text), {"data.root": str(root), **recipe.changes, **variants[name]}
            )
            for name in [*variants][:1] + names
        }
        plain, *_ = jobs.values()
        seconds, data, answers = train_towers(plain, Path(folder, "plain"))
        validation = judged_queries(data, 1, judged, plain["seed"])
        test = judged_queries(data, 2, judged, plain["seed"])
        result["queries"] = len(test.event)

        def missing(name: str) -> bool:
            # Rows of before have no effects.
            return "effects" not in result["rows"].get(name, {})

        rows = answers(test, recipe.k)
        judge = Judge(data, test, recipe.k, recall_and_ndcg(rows, test, data, recipe.k))
        first = {"changes": {}, "seconds": round(seconds, 1), **judge.row(rows)}
        add(next(iter(jobs)), first, result)
        for name, measured in baselines(judge, validation, recipe.sasrec).items():
            if missing(name):
                add(name, measured(), result)
        for number, name in enumerate(names):
            if missing(name):
                where = Path(folder, str(number))
                add(name, measure_variant(variants[name], jobs[name], where, judge), result)


if __name__ == "__main__":
    main()
