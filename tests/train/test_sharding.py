"""Any number of ranks, and any sharding, trains the same model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.train.ranks import run_on_ranks
from twotower.data.schema import DataConfig, Feature
from twotower.errors import UserError
from twotower.kernels.sampled_softmax import sampled_softmax
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint.towers import load_towers
from twotower.train.config import TableSharding, TrainConfig
from twotower.train.sharding import FILL_ROWS, Hardware, _fill, plan_tables

# 50 steps; 250 is no multiple of 4, so that some batches end with a filler.
COMMON = {"batch_size": 250, "max_epochs": 9, "max_steps": 50, "patience": 9}
# Large enough to move every table; weights that are powers of e would run away.
SGD = {"table_optimizer": "sgd", "table_lr": 5.0, "dense_optimizer": "sgd", "dense_lr": 0.1}
KINDS = ("table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel")
QUERY = (
    "--data.query=[{name: user_id, kind: id}, {name: history, kind: history, length: 50, "
    "table: item_id, pooling: sum, item_features: [genre, tags, text]}, {name: country, kind: id}, "
    "{name: age, kind: number}, {name: device, kind: id}]"
)
# What TorchRec cannot do with a table that is looked up entry by entry.
NOT_FOR_LISTS = ("table_row_wise", "data_parallel")


def spread(kind: str) -> dict[str, object]:
    by_row = {"sharding": "row_wise"}
    tables = {"item_id": by_row, "tags": by_row} if kind in NOT_FOR_LISTS else {}
    return {**COMMON, "sharding": kind, "tables": tables}


def weights(directory: Path) -> dict[str, Tensor]:
    return load_towers(directory).state_dict()


@pytest.fixture(scope="module")
def prepared(demo_log: Path, tmp_path_factory: pytest.TempPathFactory, twotower) -> Path:
    cwd = tmp_path_factory.mktemp("sharding")
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    done = twotower(
        "prepare", "--config", quickstart, "--run_dir=job", f"--data.root={demo_log}", QUERY,
        cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return cwd / "job" / "prepared"


@pytest.fixture(scope="module")
def alone(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """The weights that one process trains, by SGD and by rowwise Adagrad with AdamW."""
    cwd = tmp_path_factory.mktemp("alone")
    settings = [{**COMMON, **SGD}, COMMON]
    run_on_ranks(1, "train", {"prepared": str(prepared), "settings": settings}, cwd)
    summary = json.loads((cwd / "0" / "train.json").read_text())
    assert summary["steps"] == 50
    return [weights(cwd / "0"), weights(cwd / "1")]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_and_shardings_train_the_same_weights(ranks, prepared, alone, tmp_path) -> None:
    cases = [(kind, SGD, alone[0], 1e-5) for kind in KINDS]
    cases += [(kind, {}, alone[1], 1e-4) for kind in KINDS if kind != "column_wise"]
    settings = [{**spread(kind), **changes} for kind, changes, _, _ in cases]
    run_on_ranks(ranks, "train", {"prepared": str(prepared), "settings": settings}, tmp_path)
    for number, (kind, _, expected, limit) in enumerate(cases):
        got = weights(tmp_path / str(number))
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                got[name], value, atol=limit, rtol=0, msg=lambda m, at=(kind, name): f"{at}: {m}"
            )
    first = {name: value for name, value in alone[0].items() if "embedding" in name}
    moved = max((value - alone[1][name]).abs().max() for name, value in first.items())
    assert moved > 0.01, "the two optimizers were to train different tables"


def test_schedule_clipping_and_pipeline_are_the_same_on_two_ranks(prepared, tmp_path) -> None:
    options = {
        **COMMON, "max_steps": 30, "warmup_steps": 10, "schedule": "cosine", "clip_norm": 0.3,
    }  # fmt: skip
    variants = [options, {**options, "pipeline": "on"}, {**options, "checkpoint_async": True}]
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        run_on_ranks(ranks, "train", {"prepared": str(prepared), "settings": variants}, cwd)
    expected = weights(tmp_path / "1" / "0")
    for other in ("1/1", "1/2", "2/0", "2/1", "2/2"):
        for name, value in weights(tmp_path / other).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=other)


def test_mixed_negatives_are_the_same_on_two_ranks(prepared, tmp_path) -> None:
    mixtures = {
        "mixed": {"in_batch": 0.6, "uniform": 0.3, "memory": 0.1},
        "uniform": {"in_batch": 0.0, "uniform": 1.0, "candidates": 301},
        "catalogue": {"catalogue": True},
        "mined": {
            "in_batch": 0.5, "memory": 0.1, "mined": 0.4,
            "mining": {"every": 6, "skip": 5, "depth": 20},
        },
        "mined, pipelined": {
            "in_batch": 0.5, "memory": 0.1, "mined": 0.4,
            "mining": {"every": 6, "skip": 5, "depth": 20},
        },
    }  # fmt: skip
    # Steps few enough that what is mined at the 6th, by scores whose last bits differ, is the same.
    variants = [
        {**COMMON, **SGD, "max_steps": 8, "negatives": mixture, "correct_positive": False}
        for mixture in mixtures.values()
    ]
    variants[0]["log_q_from"] = "stream"
    variants[-1]["pipeline"] = "on"
    names = [*mixtures, "mixed, with an L2"]
    variants.append({**variants[0], "log_q_from": "counts", "item_l2": 20.0})
    variants.append({**COMMON, **SGD, "max_steps": 8})
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        run_on_ranks(ranks, "train", {"prepared": str(prepared), "settings": variants}, cwd)
    plain = weights(tmp_path / "1" / str(len(names)))
    for number, name in enumerate(names):
        expected = weights(tmp_path / "1" / str(number))
        for key, value in weights(tmp_path / "2" / str(number)).items():
            torch.testing.assert_close(
                value, expected[key], atol=1e-5, rtol=0, msg=lambda m, at=(name, key): f"{at}: {m}"
            )
        moved = max((value - plain[key]).abs().max() for key, value in expected.items())
        assert moved > 1e-3, f"{name} is no other loss"


def test_precisions_accumulation_and_compilation_on_two_ranks(prepared, tmp_path) -> None:
    common = {**COMMON, "max_steps": 20}
    variants = {
        "plain": common, "accumulate": {**common, "accumulate": 3},
        "compile": {**common, "compile": True}, "bf16": {**common, "precision": "bf16"},
        "fp16": {**common, "table_precision": "fp16"},
    }  # fmt: skip
    got: dict[tuple[int, str], dict[str, Tensor]] = {}
    for ranks in (1, 2):
        cwd = tmp_path / str(ranks)
        cwd.mkdir()
        settings = list(variants.values())
        run_on_ranks(ranks, "train", {"prepared": str(prepared), "settings": settings}, cwd)
        for number, name in enumerate(variants):
            got[ranks, name] = weights(cwd / str(number))

    def apart(one: tuple[int, str], other: tuple[int, str], part: str = "") -> float:
        return max(
            (value.float() - got[other][name].float()).abs().max().item()
            for name, value in got[one].items()
            if part in name
        )

    for name in ("plain", "accumulate"):
        assert apart((1, name), (2, name)) < 1e-5, name
    assert apart((1, "plain"), (1, "accumulate")) > 1e-3
    assert apart((2, "plain"), (2, "compile")) < 1e-5
    # A value of 1 has steps of 2**-8 in bf16 and of 2**-10 in fp16. What is rounded otherwise on
    # another number of ranks is no more than what the precision itself changes.
    for name, step in (("bf16", 2**-8), ("fp16", 2**-10)):
        assert 1e-5 < apart((1, "plain"), (1, name)) < 4 * step, name
        assert 1e-6 < apart((1, name), (2, name)) < 4 * step, name


def test_loss_and_gradients_of_two_ranks_are_those_of_the_joined_batch(tmp_path) -> None:
    random = torch.Generator().manual_seed(0)
    joined = {
        "query": torch.nn.functional.normalize(torch.randn(7, 8, generator=random)),
        "item": torch.nn.functional.normalize(torch.randn(7, 8, generator=random)),
        "id": torch.tensor([0, 1, 2, 0, 3, 2, 4]),  # accidental hits within and across ranks
        "weight": torch.rand(7, generator=random),
        "log_q": torch.rand(5, generator=random).log(),
    }
    torch.save(joined, tmp_path / "joined.pt")
    run_on_ranks(2, "negatives", {"out": str(tmp_path)}, tmp_path)
    query, item = (joined[name].clone().requires_grad_() for name in ("query", "item"))
    temperature = torch.tensor(0.2, requires_grad=True)
    loss = sampled_softmax(
        query, item, temperature, log_q_N=joined["log_q"][joined["id"]],
        candidate_id_N=joined["id"], weight_B=joined["weight"],
    )  # fmt: skip
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for got in parts:
        torch.testing.assert_close(got[0], loss.detach(), atol=1e-6, rtol=0)
        torch.testing.assert_close(got[1], temperature.grad, atol=1e-6, rtol=1e-6)
    for place, tensor in ((2, query), (3, item)):
        gradient = torch.cat([got[place] for got in parts])
        torch.testing.assert_close(gradient, tensor.grad, atol=1e-6, rtol=0)


DATA = DataConfig(
    interactions="log.parquet",
    query=[Feature(name="user_id", kind="id"),
           Feature(name="history", kind="history", table="item_id", pooling="attention")],
    item=[Feature(name="item_id", kind="id"), Feature(name="tags", kind="ids", length=5)],
)  # fmt: skip
ROWS = {"user_id": 1_000_000, "item_id": 200_000, "tags": 3}
FOUR = Hardware(
    device="cpu", ranks=4, local_ranks=4, device_bytes=0, host_bytes=300_000_000
)  # fmt: skip


def planned(config: TrainConfig, hardware: Hardware = FOUR):
    model = TwoTower(DATA, ROWS, ModelConfig(dim=64), table_device="meta")
    return plan_tables(model, config, hardware)


def test_the_plan_spreads_what_does_not_fit_on_one_rank() -> None:
    placed = {table.name: table for table in planned(TrainConfig()).tables}
    assert placed["user_id"].bytes == 256_000_000  # more than a rank may hold of tables
    assert placed["user_id"].sharding == "row_wise"
    assert sorted(placed["user_id"].rank_bytes) == [0, 1, 2, 3]
    assert placed["tags"].sharding == "table_wise"
    loads = [sum(t.rank_bytes.get(r, 0) for t in placed.values()) for r in range(4)]
    assert max(loads) < 2 * min(loads), "balanced"


@pytest.mark.parametrize(
    ("tables", "changes", "message"),
    [
        ({"user_id": "table_wise"}, {}, r"'user_id' \(1,000,000 x 64, fp32, table_wise\) needs "
         r"260.0 MB, one rank can hold 240.0 MB: 20.0 MB are missing: use more ranks"),
        ({"tags": "row_wise"}, {}, r"tables.tags: 3 rows cannot be spread row_wise over 4 ranks"),
        ({"item_id": "data_parallel"}, {}, r"tables.item_id: .* pooled by attention cannot"),
        ({"item": "row_wise"}, {}, r"tables.item: no embedding table has this name; known: "),
    ],
)  # fmt: skip
def test_what_cannot_be_spread_is_refused_with_the_reason(tables, changes, message) -> None:
    spread = {name: TableSharding(sharding=kind) for name, kind in tables.items()}
    with pytest.raises(UserError, match=message):
        planned(TrainConfig(tables=spread, **changes))


def test_tables_that_fit_nowhere_say_how_much_is_missing() -> None:
    small = replace(FOUR, host_bytes=50_000_000)
    with pytest.raises(UserError, match=r"'user_id' .* all ranks together can hold 160.0 MB"):
        planned(TrainConfig(), small)


def test_a_kernel_that_needs_cuda_is_refused_on_a_cpu() -> None:
    tables = {"user_id": TableSharding(kernel="fused_uvm")}
    with pytest.raises(UserError, match="fused_uvm needs CUDA"):
        planned(TrainConfig(tables=tables))
    with pytest.raises(UserError, match="table_precision is bf16, which needs CUDA"):
        planned(TrainConfig(table_precision="bf16"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharding": "column_wise"}, r"train.sharding is column_wise, but .* rowwise_adagrad"),
        ({"sharding": "row_wide"}, r"train.sharding must be one of .* did you mean 'row_wise'"),
        ({"batch_size": 6, "processes": 4}, r"train.batch_size must be >= 2 a process"),
        ({"profile": [5]}, r"train.profile must be a first and a last step"),
        ({"tables": {"a": TableSharding(sharding="data_parallel", kernel="fused")}}, "no fused"),
        ({"tables": {"a": TableSharding(cache_fraction=0.1)}}, "needs .*fused_uvm_caching"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes).validate()


def test_the_first_weights_of_a_row_depend_on_no_shard() -> None:
    whole = torch.empty(2 * FILL_ROWS + 10, 8)
    _fill(whole, "item_id", 5, 0.5)
    assert whole.abs().max() <= 0.5
    assert whole.std().item() == pytest.approx(1 / 12**0.5, rel=0.02)
    assert len({tuple(row) for row in whole[:: FILL_ROWS // 4].tolist()}) == 9, "no block repeats"
    other = torch.empty_like(whole)
    _fill(other, "user_id", 5, 0.5)
    assert not torch.equal(whole, other)
