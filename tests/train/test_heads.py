"""Heads: trained beside retrieval, judged by what they predict, the same on any number of ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.ranks import run_on_ranks
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Columns
from twotower.errors import UserError
from twotower.train.checkpoint.towers import load_heads, load_towers
from twotower.train.config import TrainConfig
from twotower.train.evaluation.outcomes import area_under_curve
from twotower.train.heads import Heads
from twotower.train.heads_config import HeadConfig

from ..conftest import EVENTS, QUICKSTART

HEADS = {
    "liked": {"column": "liked", "kind": "binary", "weight": 0.5},
    "watch": {"column": "watch_ms", "kind": "regression", "weight": 1.0},
}


@pytest.fixture(scope="module")
def job(demo_log: Path, tmp_path_factory: pytest.TempPathFactory, twotower) -> Path:
    """A prepared job, whose outcomes follow from the event's user and item, with some missing."""
    cwd = tmp_path_factory.mktemp("heads")
    log = pq.read_table(demo_log / "interactions.parquet")
    items = pq.read_table(demo_log / "items.parquet").sort_by("item_id")
    user = np.unique(log["user_id"].to_pylist(), return_inverse=True)[1]
    item = np.searchsorted(items["item_id"].to_pylist(), log["item_id"].to_pylist())
    random = np.random.default_rng(0)
    taste, quality = random.normal(size=(user.max() + 1, 2)), random.normal(size=(len(items), 2))
    # Mostly the genre's: many items of the test period are new.
    genre = np.unique(items["genre"].to_pylist(), return_inverse=True)[1]
    liking = 2 * random.normal(size=genre.max() + 1)
    affinity = (taste[user] * quality[item]).sum(1) + liking[genre[item]]
    missing = random.random(len(user)) < 0.2
    liked = pa.array(affinity > 0, mask=missing)
    watch = pa.array(np.exp(8 + affinity / 3).astype(np.int64), mask=random.random(len(user)) < 0.2)
    log = log.append_column("liked", liked).append_column("watch_ms", watch)
    content = yaml.safe_load(QUICKSTART.read_text())
    pq.write_table(log, cwd / "log.parquet")
    content["data"] |= {
        "root": str(demo_log), "interactions": str(cwd / "log.parquet"),
        "columns": {"outcomes": ["watch_ms", "liked"]},
    }  # fmt: skip
    content["run_dir"] = str(cwd / "run")
    content["train"] = {"heads": HEADS, "batch_size": 256, "max_epochs": 12}
    content["tracking"] = {"wandb": "off"}
    path = cwd / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    done = twotower("prepare", "--config", path, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return path


def test_outcomes_are_kept_with_their_events(job) -> None:
    data = PreparedDataset(job.parent / "run" / "prepared")
    log = pq.read_table(job.parent / "log.parquet")
    known = {
        (user, item, int(time)): (liked, watch)
        for user, item, time, liked, watch in zip(
            *(log[n].to_pylist() for n in ("user_id", "item_id", "timestamp", "liked", "watch_ms")),
            strict=True,
        )
    }
    c = data.event_columns
    users, items = data.users["id"].to_pylist(), data.items["id"].to_pylist()
    for row in np.random.default_rng(1).choice(len(data.events), 300, replace=False):
        key = users[c["user"][row]], items[c["item"][row]], int(c["time"][row] // 1_000_000)
        for name, value in zip(("liked", "watch_ms"), known[key], strict=True):
            kept = data.outcome(name)[row]
            assert np.isnan(kept) if value is None else kept == np.float32(value)


def test_a_job_with_heads_learns_them_and_reports_them(job, twotower) -> None:
    run = job.parent / "run"
    for step in ("train", "evaluate", "export"):
        done = twotower(step, "--config", job, cwd=job.parent)
        assert done.returncode == 0, done.stdout + done.stderr
        if step == "evaluate":
            assert "liked: auc" in done.stdout
            assert "watch: rmse" in done.stdout
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())["results"]["two towers"]
    assert metrics["liked_auc"] > 0.7
    data = PreparedDataset(run / "prepared")
    test = data.section(2)
    watch = data.outcome("watch_ms")
    train = watch[: data.section(0).stop]
    typical = np.expm1(np.log1p(train[~np.isnan(train)]).mean())
    test_watch = watch[test.start : test.stop]
    constant = np.abs(test_watch[~np.isnan(test_watch)] - typical).mean()
    assert metrics["watch_mae"] < 0.8 * constant
    logged = (next((run / "train" / "csv").rglob("metrics.csv"))).read_text().splitlines()[0]
    names = {"train/liked_loss", "train/watch_loss", "val/liked_auc", "val/watch_mae"}
    assert names <= set(logged.split(","))
    assert not any("heads" in name for name in load_towers(run / "train").state_dict())
    assert load_heads(run / "train", data, 127, _configs()).weight_HF.abs().max() > 0


def _configs() -> dict[str, HeadConfig]:
    return {name: HeadConfig(**head) for name, head in HEADS.items()}


def test_two_ranks_train_what_one_does(job, tmp_path) -> None:
    prepared = str(job.parent / "run" / "prepared")
    common = {
        "batch_size": 101, "max_epochs": 2, "max_steps": 12, "patience": 9, "heads": HEADS,
        "table_optimizer": "sgd", "table_lr": 2.0, "dense_optimizer": "sgd", "dense_lr": 0.1,
    }  # fmt: skip
    variants = [
        {**common, "pipeline": "on"},
        {**common, "accumulate": 2, "max_steps": 6, "clip_norm": 1.0},
        {**common, "negatives": {"catalogue": True}},
        {**common, "heads": {}},
        {**common, "precision": "bf16", "dense_optimizer": "adamw", "dense_lr": 0.001},
    ]
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        run_on_ranks(ranks, "train", {"prepared": prepared, "settings": variants}, cwd)
    data, found = PreparedDataset(Path(prepared)), {}
    for ranks in (1, 2):
        for number, variant in enumerate(variants):
            folder = tmp_path / str(ranks) / str(number)
            found[ranks, number] = dict(load_towers(folder).state_dict())
            if variant["heads"]:
                heads = load_heads(folder, data, 16, _configs())
                found[ranks, number]["heads"] = heads.weight_HF.detach()
    for number in range(4):
        for key, value in found[1, number].items():
            torch.testing.assert_close(
                found[2, number][key], value, atol=1e-5, rtol=0,
                msg=lambda m, at=(number, key): f"{at}: {m}",
            )  # fmt: skip
    assert all(value.isfinite().all() for value in found[2, 4].values())
    learned = max((v - found[1, 3][k]).abs().max() for k, v in found[1, 0].items() if k != "heads")
    assert learned > 1e-3, "towers learn from heads"


def test_a_stopped_run_goes_on_with_its_heads(job, tmp_path) -> None:
    prepared = str(job.parent / "run" / "prepared")
    common = {"batch_size": 256, "heads": HEADS, "patience": 9, "max_epochs": 2}
    run_on_ranks(1, "train", {"prepared": prepared, "settings": [common]}, tmp_path)
    whole = load_heads(tmp_path / "0", PreparedDataset(Path(prepared)), 16, _configs())
    # As a run that was killed in its second epoch leaves it.
    first = tmp_path / "again"
    first.mkdir()
    keep = {**common, "keep_every_steps": 1000, "keep_best": 9}
    run_on_ranks(1, "train", {"prepared": prepared, "settings": [keep]}, first)
    (first / "0").rename(first / "0.partial")
    steps = sorted((first / "0.partial" / "checkpoints").iterdir(), key=lambda p: int(
        p.name.split("=")[1]))  # fmt: skip
    last = steps.pop()
    for path in (last, first / "0.partial" / "checkpoint"):
        shutil.rmtree(path)
    run_on_ranks(1, "train", {"prepared": prepared, "settings": [keep]}, first)
    resumed = json.loads((first / "0" / "train.json").read_text())["resumed_from"]
    assert resumed == steps[-1].name
    again = load_heads(first / "0", PreparedDataset(Path(prepared)), 16, _configs())
    torch.testing.assert_close(again.weight_HF, whole.weight_HF, atol=1e-6, rtol=0)


def made(make, **outcomes):
    events = EVENTS | outcomes
    return make(events, columns=Columns(outcomes=list(outcomes)))


def test_losses_are_those_of_the_events_that_have_the_outcome(make) -> None:
    random = np.random.default_rng(0)
    liked = [True, False, None, True, False, False, True, None, True, False]
    watch = [10, 400, 35, None, 0, 9, 1000, 3, 7, 12]
    data = made(make, liked=liked, watch=watch)
    configs = {
        "like": HeadConfig(column="liked", weight=0.4),
        "watch": HeadConfig(column="watch", kind="regression", weight=2.0),
    }
    heads = Heads(data, 8, configs)
    with torch.no_grad():
        heads.weight_HF.copy_(torch.from_numpy(random.normal(size=(2, 25))) * 0.1)
    query, item = (
        torch.nn.functional.normalize(torch.from_numpy(random.normal(size=(5, 8)))).float()
        for _ in range(2)
    )
    nan = float("nan")
    outcome = torch.tensor([[1, 50], [nan, 3], [0, nan], [nan, nan], [1, 0]])
    weight = torch.tensor([1, 2, 0.5, 7, 3])
    loss_H = heads.losses(query, item, outcome, weight)
    said = heads(query, item)
    like = torch.nn.functional.binary_cross_entropy_with_logits(
        said[[0, 2, 4], 0], outcome[[0, 2, 4], 0], weight=weight[[0, 2, 4]], reduction="sum"
    ) / weight[[0, 2, 4]].sum()  # fmt: skip
    torch.testing.assert_close(loss_H[0], like)
    log = np.log1p(data.outcome("watch")[: data.section(0).stop])
    log = log[~np.isnan(log)]
    target = (outcome[[0, 1, 4], 1].log1p() - log.mean()) / log.std()
    off = torch.nn.functional.huber_loss(said[[0, 1, 4], 1], target, reduction="none")
    torch.testing.assert_close(loss_H[1], (off * weight[[0, 1, 4]]).sum() / weight[[0, 1, 4]].sum())
    torch.testing.assert_close(heads.weighted(loss_H), 0.4 * loss_H[0] + 2 * loss_H[1])
    nothing = heads.losses(query, item, torch.full((5, 2), nan), weight)
    assert nothing.tolist() == [0, 0]
    nothing.sum().backward()
    assert heads.weight_HF.grad.isfinite().all()


def test_a_new_head_says_what_is_true_of_all(make) -> None:
    data = made(make, liked=[1, 0, 1, 1, 0, 1, 1, 0, 0, 1], watch=[5.5] * 5 + [80] * 5)
    configs = {
        "like": HeadConfig(column="liked"), "watch": HeadConfig(column="watch", kind="regression")
    }  # fmt: skip
    said = Heads(data, 8, configs).predictions(torch.randn(3, 8), torch.randn(3, 8))
    train = slice(0, data.section(0).stop)
    expected = [data.outcome("liked")[train].mean(),
                np.expm1(np.log1p(data.outcome("watch")[train]).mean())]  # fmt: skip
    np.testing.assert_allclose(said.detach().numpy(), [expected] * 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "head", "words"),
    [([1] * 10, {}, "column 'x' has the value 1 alone in training.*train_on to all"),
     ([None] * 10, {}, "column 'x' has no value in training"),
     ([1, 0, 3] + [0] * 7, {}, "column 'x' holds 3: a binary is of 0 or 1; set the kind to"),
     ([1, -4] + [0] * 8, {"kind": "regression"}, "holds -4: a regression is of >= 0")],
)  # fmt: skip
def test_outcomes_that_teach_nothing_are_refused(values, head, words, make) -> None:
    with pytest.raises(UserError, match=rf"train\.heads\.h: .*{words}"):
        Heads(made(make, x=values), 8, {"h": HeadConfig(column="x", **head)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"kind": "ranking"}, r"train\.heads\.h\.kind must be one of binary, regression"),
     ({"weight": -1}, r"train\.heads\.h\.weight must be >= 0, got -1"),
     ({"weight": float("nan")}, r"train\.heads\.h\.weight must be >= 0, got nan")],
)  # fmt: skip
def test_heads_that_cannot_be_are_refused(changes, words) -> None:
    config = TrainConfig(heads={"h": HeadConfig(column="x", **changes)})
    with pytest.raises(UserError, match=words):
        config.validate()


def test_heads_need_events(make) -> None:
    config = TrainConfig(every_position=True, heads={"h": HeadConfig(column="x")})
    with pytest.raises(UserError, match="whose entries do not keep it: remove one of them"):
        config.validate()


@pytest.mark.parametrize(
    ("options", "words"),
    [("--train.heads={liked: {column: likd}}",
      "train.heads.liked.column: 'likd' is none of data.columns.outcomes, which are kept with the "
      "events; did you mean 'liked'?: name it there too"),
     ("--data.columns.outcomes=[liked, watch_m]", "column: 'watch_ms' is none of data")],
)  # fmt: skip
def test_a_head_of_no_outcome_is_one_line(options, words, job, twotower) -> None:
    done = twotower("train", "--config", job, options, cwd=job.parent)
    assert done.returncode == 2
    assert words in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_under_the_curve_is_the_share_of_pairs_in_order(pairs) -> None:
    score, positive = (np.array(x) for x in zip(*pairs, strict=True))
    if positive.all() or not positive.any():
        return
    apart = score[positive][:, None] - score[~positive][None, :]
    expected = ((apart > 0) + 0.5 * (apart == 0)).mean()
    assert area_under_curve(score.astype(float), positive) == pytest.approx(expected)
