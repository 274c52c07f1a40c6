"""The bundle: whole and unchanged, or refused with the file's name."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.export.bundle import answer_difference, read_bundle
from twotower.export.config import ExportConfig
from twotower.export.export import export
from twotower.export.manifest import read_manifest


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


def reseal(bundle, change) -> None:
    """Change the manifest as another writer would: with a checksum that fits."""
    manifest = json.loads((bundle / "manifest.json").read_text()) | change
    rest = {k: v for k, v in manifest.items() if k != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 99}, "newer than this twotower"),
        ({"format": "1"}, "no bundle's manifest"),
        ({"files": {}}, "lists no 'query.onnx'"),
        ({"files": None}, "files is None"),
        ({"files": {"query.onnx": 7}}, "files is {'query.onnx': 7}"),
        ({"query": [{"nonsense": 1}]}, "no bundle's manifest"),
        ({"query": [{"name": 1, "kind": "id", "dtype": "int64", "length": 1}]}, "name is 1"),
        ({"query": None}, "no bundle's manifest"),
        ({"num_items": "300"}, "num_items is '300'"),
        ({"dim": True}, "dim is True"),
        ({"metrics": {"ndcg@20": "high"}}, "metrics is"),
        ({"more": 1}, "no bundle's manifest"),
        ({"version": 3}, "holds version 3, but .* rename it to 3"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(bundle, change, words) -> None:
    reseal(bundle, {})
    read_bundle(bundle)
    reseal(bundle, change)
    with pytest.raises(UserError, match=words):
        read_bundle(bundle)


def test_a_manifest_may_not_point_outside_the_bundle(bundle) -> None:
    (bundle.parent / "secret").write_text("x")
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    reseal(bundle, {"files": files | {"../secret": "0" * 64}})
    with pytest.raises(UserError, match="secret"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/../query.onnx", "./query.onnx", "a//b", "..", ""]
)
def test_a_path_that_is_none_inside_the_bundle_is_refused(bundle, name) -> None:
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    reseal(bundle, {"files": files | {name: "0" * 64}})
    with pytest.raises(UserError, match=r"no path inside the bundle|missing"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", ["query.onnx", "manifest.json"])
def test_a_symbolic_link_is_refused_though_its_bytes_fit(bundle, name) -> None:
    (bundle / name).rename(bundle.parent / "elsewhere")
    (bundle / name).symlink_to(bundle.parent / "elsewhere")
    with pytest.raises(UserError, match=f"{name}: is a symbolic link"):
        read_bundle(bundle)


def test_a_bundle_of_the_first_format_is_still_read(bundle) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name in ("index", "base"):
        del manifest[name]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    reseal(bundle, {"format": 1, "created": "2025-01-01T00:00:00+00:00"})
    manifest = read_bundle(bundle).manifest
    assert manifest.index.is_exact(manifest.dim)


def test_the_same_checkpoint_gives_the_same_bytes(finished_run, tmp_path) -> None:
    """Made by another process, at another time, in another folder."""
    manifest = read_bundle(finished_run.bundle).manifest
    job = json.loads((finished_run.bundle / "job.json").read_text())
    again = export(
        PreparedDataset(finished_run.run_dir / "prepared"), finished_run.run_dir / "train",
        tmp_path / "bundles", config=ExportConfig(), job=job, name=manifest.name,
        fingerprint=manifest.fingerprint, metrics=manifest.metrics, seed=job["seed"],
        progress=lambda *_: None,
    )  # fmt: skip
    for file in sorted(finished_run.bundle.iterdir()):
        assert file.read_bytes() == (again.path / file.name).read_bytes(), file.name
    for name in ("query.onnx", "item.onnx", "index.onnx"):
        assert str(Path(__file__).parents[2]).encode() not in (again.path / name).read_bytes()


def test_every_flipped_bit_of_the_manifest_is_refused(finished_run) -> None:
    content = (finished_run.bundle / "manifest.json").read_bytes()
    assert read_manifest(content).version == 1
    changed = bytearray(content)
    for place in range(len(content)):
        for bit in range(8):
            changed[place] ^= 1 << bit
            with pytest.raises(UserError):
                read_manifest(bytes(changed))
            changed[place] ^= 1 << bit


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"7", b"{}", b'"format"', b"\xff", b"[" * 100_000]
)
def test_what_is_no_manifest_is_refused(content) -> None:
    with pytest.raises(UserError, match="no bundle's manifest"):
        read_manifest(content)


@pytest.fixture(scope="module")
def damaged(finished_run, tmp_path_factory):
    """A copy whose files one test may cut and mend."""
    return shutil.copytree(finished_run.bundle, tmp_path_factory.mktemp("damaged") / "1")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_truncated_file_is_refused(damaged, data) -> None:
    file = data.draw(st.sampled_from(sorted(p for p in damaged.iterdir())))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(UserError, match=re.escape(file.name)):
            read_bundle(damaged)
    finally:
        file.write_bytes(content)
    read_bundle(damaged)


def test_a_damaged_bundle_is_made_again_and_tracked_until_it_is(
    finished_run, twotower, tmp_path
) -> None:
    skip = shutil.ignore_patterns("server*")  # what a killed one leaves is not for copying
    shutil.copytree(finished_run.run_dir, tmp_path / "run", ignore=skip)
    vectors = tmp_path / "run" / "bundles" / "1" / "item_vectors.npy"
    content = bytearray(vectors.read_bytes())
    content[-1] ^= 1
    vectors.write_bytes(content)
    tracked = tmp_path / "run" / "train" / "tracked.json"
    assert json.loads(tracked.read_text()) == [1]
    done = twotower("export", *finished_run.arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "damaged, made again" in done.stdout
    assert read_bundle(tmp_path / "run" / "bundles" / "2").manifest.version == 2
    assert json.loads(tracked.read_text()) == [1, 2]
    tracked.unlink()
    done = twotower("export", *finished_run.arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "export: inputs unchanged" in done.stdout
    assert json.loads(tracked.read_text()) == [2], "what was not tracked is tracked now"


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
