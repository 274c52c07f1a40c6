"""The bundle: whole and unchanged, or refused with the file's name."""

import json
import shutil

import numpy as np
import pytest

from twotower.errors import UserError
from twotower.export.bundle import answer_difference, read_bundle


@pytest.fixture
def bundle(finished_run, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(finished_run.bundle, tmp_path / "1")


def test_a_whole_bundle_opens_and_names_its_versions(finished_run) -> None:
    manifest = read_bundle(finished_run.bundle).manifest
    assert manifest.version == 1
    assert {"torch", "torchrec", "onnxruntime", "twotower"} <= set(manifest.versions)
    assert manifest.metrics["ndcg@20"] > 0
    assert manifest.parity["scores"] < 1e-4
    on_disk = {p.name for p in finished_run.bundle.iterdir()} - {"manifest.json"}
    assert set(manifest.files) == on_disk


@pytest.mark.parametrize("name", ["query.onnx", "item_vectors.npy", "item_ids.npy", "golden.json"])
def test_a_flipped_byte_is_refused(bundle, name) -> None:
    file = bundle / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: its bytes do not match"):
        read_bundle(bundle)


def test_a_truncated_file_is_refused(bundle) -> None:
    file = bundle / "item_vectors.npy"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"item_vectors\.npy.*truncated"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["query.onnx", "index.onnx", "manifest.json"])
def test_a_missing_file_is_refused(bundle, name) -> None:
    (bundle / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 99}, "newer than this twotower"),
        ({"files": {}}, "lists no 'query.onnx'"),
        ({"query": [{"nonsense": 1}]}, "not a bundle's manifest"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(bundle, change, words) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=words):
        read_bundle(bundle)


def test_a_manifest_may_not_point_outside_the_bundle(bundle) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["files"]["../secret"] = "0" * 64
    (bundle.parent / "secret").write_text("x")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="secret"):
        read_bundle(bundle)


def test_a_damaged_bundle_is_not_served(finished_run, bundle, twotower, tmp_path) -> None:
    (tmp_path / "run" / "bundles").mkdir(parents=True)
    bundle = bundle.rename(tmp_path / "run" / "bundles" / "1")
    (bundle / "index.onnx").write_bytes(b"")
    done = twotower("serve", *finished_run.arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "index.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_file_needs_pickle(finished_run) -> None:
    for file in finished_run.bundle.glob("*.npy"):
        np.load(file, allow_pickle=False)
    assert not [p for p in finished_run.bundle.iterdir() if p.suffix in (".pkl", ".pt", ".pth")]


WANT = (["a", "b", "c"], [0.9, 0.5, 0.5])


@pytest.mark.parametrize(
    ("ids", "scores", "same"),
    [
        (["a", "b", "c"], [0.9, 0.5, 0.5], True),
        (["a", "c", "b"], [0.9, 0.5, 0.5], True),
        (["a", "b", "d"], [0.9, 0.5, 0.5], True),
        (["b", "a", "c"], [0.9, 0.5, 0.5], False),
        (["a", "b", "c"], [0.9, 0.5, 0.4], False),
        (["d", "b", "c"], [0.9, 0.5, 0.5], False),
        (["a", "b", "b"], [0.9, 0.5, 0.5], False),
        (["a", "b"], [0.9, 0.5], False),
        (["a", "b", "c"], [float("nan"), 0.5, 0.5], False),
    ],
)
def test_answers_are_the_same_up_to_ties(ids, scores, same) -> None:
    assert (answer_difference(*WANT, ids, scores, 1e-4) <= 1e-4) == same
