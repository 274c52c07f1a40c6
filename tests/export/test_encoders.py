"""A history's encoder goes all the way: from the log to a bundle that passes its parity gate."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

from twotower.data.schema import ENCODERS, DataConfig, Feature, TensorSpec
from twotower.export.bundle import read_bundle
from twotower.export.graphs import PaddedTower, tower_graph
from twotower.towers.config import EncoderConfig, ModelConfig
from twotower.towers.two_tower import TwoTower

from ..conftest import QUICKSTART

# What TensorRT refuses, or what makes an engine of many parts (DESIGN section 7).
UNFIT = {"Loop", "If", "Scan", "NonZero", "Unique", "SequenceAt", "ScatterND", "ScatterElements"}


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_graph_of_the_usual_size_agrees_and_fits_tensorrt(kind) -> None:
    length = 50
    data = DataConfig(
        interactions="log.parquet", item=[Feature(name="item_id", kind="id")],
        query=[Feature(name="past", kind="history", table="item_id", length=length, pooling=kind)],
    )  # fmt: skip
    torch.manual_seed(0)
    config = ModelConfig(dim=64, encoder=EncoderConfig(heads=2))
    model = TwoTower(data, {"item_id": 1000}, config).eval()
    spec = TensorSpec(name="past", kind="history", dtype="int64", length=length)
    graph = tower_graph(model, "query", [spec])
    assert not {node.op_type for node in graph.graph.node} & UNFIT
    assert max(o.version for o in graph.opset_import if not o.domain) <= 20
    served = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    twin = PaddedTower(model, "query").eval()
    random = np.random.default_rng(0)
    for batch, width in ((1, 1), (1, length), (9, length), (64, 7)):
        rows = random.integers(0, 1000, (batch, width))
        rows[np.arange(width) >= random.integers(0, width + 1, (batch, 1))] = -1
        (got,) = served.run(None, {"past_encoded": rows})
        expected = twin(torch.from_numpy(rows)).detach().numpy()
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_trained_encoder_passes_the_parity_gate(kind, demo_log, tmp_path, twotower) -> None:
    job = tmp_path / "job.yaml"
    text = QUICKSTART.read_text()
    assert "pooling: timed_sum" in text
    job.write_text(text.replace("pooling: timed_sum", f"pooling: {kind}"))
    options = [
        "--run_dir=run", f"--data.root={demo_log}", "--train.batch_size=256",
        "--train.max_steps=60", "--model.encoder.heads=2",
    ]  # fmt: skip
    for step in ("prepare", "train", "export"):
        done = twotower(step, "--config", job, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    bundle = read_bundle(Path(tmp_path) / "run" / "bundles" / "1")
    assert len(bundle.golden()) == 200
    assert bundle.manifest.parity["scores"] < 1e-5


def test_heads_that_do_not_divide_are_one_line(demo_log, tmp_path, twotower) -> None:
    done = twotower(
        "train", "--config", QUICKSTART, "--run_dir=run", f"--data.root={demo_log}",
        "--model.encoder.heads=5", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    expected = "model.encoder.heads must divide model.dim (128), got 5: change one"
    assert done.stderr.strip().splitlines()[-1].endswith(expected)
