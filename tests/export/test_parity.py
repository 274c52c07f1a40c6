"""Parity is a gate: eager PyTorch, ONNX Runtime and Triton agree, or there is no bundle."""

import numpy as np
import pytest

from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Split
from twotower.export.bundle import read_bundle
from twotower.export.config import ExportConfig
from twotower.export.export import export
from twotower.export.golden import onnx_answers
from twotower.export.parity import (
    ParityError,
    check_answers,
    eager_answers,
    golden_rows,
)
from twotower.export.search import open_search
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint.towers import load_towers

from .bundles import dynamic_bundle


def test_200_golden_queries_agree_between_eager_and_onnx(finished_run) -> None:
    """`tests/serve` asks the running server the same."""
    bundle = read_bundle(finished_run.bundle)
    golden = bundle.golden()
    assert len(golden) == 200
    assert any(g.exclude for g in golden)
    assert any(not g.features["history"] for g in golden)
    data = PreparedDataset(finished_run.run_dir / "prepared")
    model = load_towers(finished_run.run_dir / "train")
    vectors = np.load(bundle.path / "item_vectors.npy")
    rows = [g.features | {"exclude": g.exclude} for g in golden]
    again = eager_answers(model, vectors, data, rows, 10)
    assert check_answers(golden, [(g.item_ids, g.scores) for g in again], 1e-6, "eager") < 1e-6
    ids = data.items["id"].to_pylist()
    search = open_search(bundle.path, vars(bundle.manifest.index)).search
    answers = onnx_answers(bundle.path, bundle.manifest.query, golden, ids, 10, search)
    assert check_answers(golden, answers, 1e-4, "ONNX Runtime") < 1e-4
    for g in golden:
        assert not set(g.exclude) & set(g.item_ids)
        assert len(g.item_ids) == 10


def test_golden_queries_of_dynamic_ids_agree_between_eager_and_onnx(make, tmp_path) -> None:
    """`tests/serve` asks the running server the same."""
    data, model, bundle = dynamic_bundle(make, tmp_path)
    for name, slots in (("user_id", 200), ("item_id", 30), ("tags", 6)):
        known = len(model.dynamic_slots(name).assigned()[0])
        assert 0 < known < slots
        assert known < len(data.users if name == "user_id" else data.items), "some ids have none"
    golden = bundle.golden()
    assert len(golden) > 40
    assert bundle.manifest.parity["scores"] < 1e-6
    assert bundle.manifest.parity["item_vectors"] < 1e-6
    # The mapping came back from the checkpoint: the towers in memory answer alike.
    vectors = np.load(bundle.path / "item_vectors.npy")
    rows = [g.features | {"exclude": g.exclude} for g in golden]
    again = eager_answers(model, vectors, data, rows, 10)
    assert check_answers(golden, [(g.item_ids, g.scores) for g in again], 1e-6, "eager") < 1e-6


def test_a_test_split_of_repeated_items_has_golden_queries(make) -> None:
    events = {
        "user_id": [1, 1, 2, 2, 3, 3, 3, 1, 2, 2], "item_id": list("abbccdabcb"),
        "timestamp": list(range(10, 110, 10)),
        "split": ["train"] * 7 + ["validation"] + ["test"] * 2,
    }  # fmt: skip
    data = make(events, split=Split(kind="given", column="split"))
    specs = data.encoder.specs(data.config, "query")
    rows = golden_rows(data, specs, 200, 0)
    assert [set(row["exclude"]) for row in rows] == [{"b", "c"}, set()]
    tables = {name: t["rows"] for name, t in data.summary["tables"].items()}
    model = TwoTower(data.config, tables, ModelConfig(dim=8, hidden=[16])).eval()
    vectors = np.eye(4, 8, dtype=np.float32)
    golden = eager_answers(model, vectors, data, rows, 4)
    assert [set(g.item_ids) for g in golden] == [{"a", "d"}, set("abcd")]


def test_a_difference_beyond_the_tolerance_leaves_no_bundle(finished_run, tmp_path) -> None:
    # Far below the rounding of fp32, so that the two runtimes must differ.
    strict = ExportConfig(tolerance=1e-12)
    with pytest.raises(ParityError, match=r"golden query \d+: ONNX Runtime answers"):
        export(
            PreparedDataset(finished_run.run_dir / "prepared"), finished_run.run_dir / "train",
            tmp_path / "bundles", config=strict, job={}, name="x", fingerprint="x",
            metrics={}, seed=0, progress=lambda *_: None,
        )  # fmt: skip
    assert list((tmp_path / "bundles").iterdir()) == []


def test_a_wrong_answer_is_named(finished_run) -> None:
    golden = read_bundle(finished_run.bundle).golden()
    answers = [(g.item_ids, g.scores) for g in golden]
    answers[17] = (golden[17].item_ids[::-1], golden[17].scores)
    with pytest.raises(ParityError, match="golden query 17: a server answers"):
        check_answers(golden, answers, 1e-4, "a server")
