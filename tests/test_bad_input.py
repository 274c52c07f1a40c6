"""Bad input: one line that names the place and the remedy, exit code 2, nothing left behind."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
import pytest
import yaml

GOOD = {
    "user_id": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3],
    "item_id": ["a", "b", "c", "a", "c", "d", "b", "a", "d", "e"],
    "timestamp": [10, 20, 90, 15, 25, 95, 30, 35, 92, 99],
}
ITEMS = {"item_id": ["a", "b"], "price": [1.0, 2.0], "text": [[1.0, 2.0], [3.0, 4.0]]}
JOB = {
    "name": "bad",
    "run_dir": "run",
    "tracking": {"wandb": "off"},
    "data": {
        "interactions": "log.parquet",
        "query": [{"name": "history", "kind": "history", "table": "item_id"}],
        "item": [{"name": "item_id", "kind": "id"}],
    },
}


def changed(column: str, row: int, value: Any) -> dict[str, list[Any]]:
    values = list(GOOD[column])
    values[row] = value
    return GOOD | {column: values}


def job(**data: Any) -> dict[str, Any]:
    return JOB | {"data": JOB["data"] | data}


def item_feature(**feature: Any) -> dict[str, Any]:
    return job(items="items.parquet", item=[*JOB["data"]["item"], feature])


# name -> (log, items table, job, what the message must say)
CASES: dict[str, tuple[Any, Any, dict[str, Any], list[str]]] = {
    "missing file": (None, None, JOB, ["log.parquet", "no such file", "data.interactions"]),
    "empty log": ({k: v[:0] for k, v in GOOD.items()}, None, JOB, ["log.parquet", "empty"]),
    "missing column": (
        {"user": GOOD["user_id"], "item_id": GOOD["item_id"], "timestamp": GOOD["timestamp"]},
        None, JOB, ["no column 'user_id'", "data.columns.user", "did you mean 'user'"],
    ),
    "ids of a wrong type": (
        GOOD | {"user_id": [i / 2 for i in range(10)]}, None, JOB,
        ["column 'user_id'", "double", "expected string or integer"],
    ),
    "times of a wrong type": (
        GOOD | {"timestamp": ["soon"] * 10}, None, JOB, ["column 'timestamp'", "soon"],
    ),
    "pull without an item id": (
        GOOD, ITEMS,
        job(items="items.parquet", item=[{"name": "price", "kind": "number"}])
        | {"train": {"item_l2": 1.0}},
        ["train.item_l2", "no feature of data.item is the item's own id", "set it to 0"],
    ),
    "null user": (changed("user_id", 4, None), None, JOB, ["'user_id'", "row 5", "null"]),
    "null item": (changed("item_id", 2, None), None, JOB, ["'item_id'", "row 3", "null"]),
    "empty item id": (changed("item_id", 2, ""), None, JOB, ["'item_id'", "row 3", "empty"]),
    "null time": (changed("timestamp", 9, None), None, JOB, ["'timestamp'", "row 10", "null"]),
    "negative time": (
        changed("timestamp", 1, -5), None, JOB, ["row 2", "before 1970", "-5"],
    ),
    "absurd time": (
        changed("timestamp", 3, 1_700_000_000_000), None, JOB,
        ["row 4", "after 2100", "timestamp_unit, now 's'"],
    ),
    "duplicate item rows": (
        GOOD, ITEMS | {"item_id": ["a", "a"]}, item_feature(name="price", kind="number"),
        ["items.parquet", "'item_id'", "row 2", "'a'"],
    ),
    "a split that leaves no test events": (
        GOOD, None, job(split={"kind": "temporal", "test_from": "2030-01-01"}),
        ["no test events", "data.split.test_from"],
    ),
    "a split that leaves no training events": (
        GOOD, None,
        job(split={"kind": "temporal", "validation_from": "1970-01-01", "test_from": "1970-01-01"}),
        ["no train events"],
    ),
    "an unknown word in a given split": (
        GOOD | {"split": ["train"] * 9 + ["tset"]}, None,
        job(split={"kind": "given", "column": "split"}), ["'split'", "row 10", "'tset'"],
    ),
    "one user": (GOOD | {"user_id": [1] * 10}, None, JOB, ["1 user(s)", "at least two"]),
    "one item": (GOOD | {"item_id": ["a"] * 10}, None, JOB, ["1 item(s)", "at least two"]),
    "unknown kind": (
        GOOD, ITEMS, item_feature(name="price", kind="numbr"),
        ["feature 'price'", "'numbr'", "did you mean 'number'"],
    ),
    "wrong vector width": (
        GOOD, ITEMS, item_feature(name="text", kind="vector", width=3),
        ["items.parquet", "'text'", "row 1", "width 3", "2"],
    ),
    "vector without a width": (
        GOOD, ITEMS, item_feature(name="text", kind="vector"), ["feature 'text'", "width"],
    ),
    "NaN in numbers": (
        GOOD, ITEMS | {"price": [1.0, float("nan")]}, item_feature(name="price", kind="number"),
        ["'price'", "row 2", "not a finite number"],
    ),
    "text for numbers": (
        GOOD, ITEMS | {"price": ["cheap", "dear"]}, item_feature(name="price", kind="number"),
        ["'price'", "string", "expected numbers"],
    ),
    "a feature's missing column": (
        GOOD, ITEMS, item_feature(name="prize", kind="number"),
        ["feature 'prize'", "did you mean 'price'"],
    ),
    "no items table": (
        GOOD, None, job(item=[{"name": "genre", "kind": "id"}]), ["'genre'", "no column 'genre'"],
    ),
    "item ids of another type": (
        GOOD, ITEMS | {"item_id": [1, 2]}, item_feature(name="price", kind="number"),
        ["items.parquet", "int64", "string"],
    ),
    "a table that nothing uses": (
        GOOD, None, job(tables={"itemid": {"min_count": 2}}), ["data.tables.itemid", "'item_id'"],
    ),
    "a batch of one": (GOOD, None, JOB | {"train": {"batch_size": 1}}, ["train.batch_size", "2"]),
    "an unknown metric": (
        GOOD, None, JOB | {"evaluate": {"monitor": "ndcg@3"}}, ["evaluate.monitor", "ndcg@10"],
    ),
    "two servers on one port": (
        GOOD, None, JOB | {"serve": {"http_port": 8001}}, ["serve", "must differ"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_explained_and_leaves_nothing(name, twotower, tmp_path: Path) -> None:
    log, items, config, expected = CASES[name]
    if log is not None:
        pq.write_table(pa.table(log), tmp_path / "log.parquet")
    if items is not None:
        pq.write_table(pa.table(items), tmp_path / "items.parquet")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    before = sorted(tmp_path.rglob("*.*"))
    done = twotower("prepare", "--config", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for words in expected:
        assert words in done.stderr
    assert sorted(tmp_path.rglob("*.*")) == before, "something half-made was left"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"not parquet at all", ["log.parquet", "cannot be read"]),
        (b"", ["log.parquet", "cannot be read"]),
    ],
)
def test_a_damaged_file_is_explained(content, expected, twotower, tmp_path) -> None:
    (tmp_path / "log.parquet").write_bytes(content)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    done = twotower("prepare", "--config", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for words in expected:
        assert words in done.stderr


def test_a_csv_with_a_broken_row_is_explained(twotower, tmp_path) -> None:
    csv.write_csv(pa.table(GOOD), tmp_path / "log.csv")
    with (tmp_path / "log.csv").open("a") as file:
        file.write("7,x\n")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job(interactions="log.csv")))
    done = twotower("prepare", "--config", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "log.csv" in done.stderr


def test_a_run_dir_that_cannot_be_written_is_explained(twotower, tmp_path) -> None:
    pq.write_table(pa.table(GOOD), tmp_path / "log.parquet")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB | {"run_dir": "file/run"}))
    done = twotower("prepare", "--config", "job.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert "file/run" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_that_is_not_there_is_explained(twotower, tmp_path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    pq.write_table(pa.table(GOOD), tmp_path / "log.parquet")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    assert twotower("prepare", "--config", "job.yaml", cwd=tmp_path).returncode == 0
    done = twotower("train", "--config", "job.yaml", "--train.accelerator=cuda", cwd=tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_prepare_keeps_the_dataset_that_was_there(twotower, tmp_path) -> None:
    pq.write_table(pa.table(GOOD), tmp_path / "log.parquet")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    assert twotower("prepare", "--config", "job.yaml", cwd=tmp_path).returncode == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    pq.write_table(pa.table(changed("user_id", 0, None)), tmp_path / "log.parquet")
    assert twotower("prepare", "--config", "job.yaml", cwd=tmp_path).returncode == 2
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_steps_out_of_order_say_what_to_run(twotower, tmp_path) -> None:
    pq.write_table(pa.table(GOOD), tmp_path / "log.parquet")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    for command, remedy in (
        (["train"], "twotower prepare"), (["evaluate"], "twotower prepare"),
        (["serve"], "twotower export"), (["recommend", "--user=1"], "twotower prepare"),
    ):  # fmt: skip
        done = twotower(*command, "--config", "job.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert f"run `{remedy}` first" in done.stderr
