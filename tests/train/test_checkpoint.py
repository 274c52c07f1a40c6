"""Checkpoints load on any number of ranks, hold no pickle, and are whole or refused."""

import json
import math
import pickle
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tests.train.ranks import run_on_ranks
from twotower.errors import UserError
from twotower.train.checkpoint import storage
from twotower.train.checkpoint.manifest import NAME, check, read_manifest
from twotower.train.checkpoint.state import MARKS, decode, encode, tensors_of
from twotower.train.checkpoint.tools import read_rows
from twotower.train.checkpoint.towers import load_towers

from ..conftest import QUICKSTART

SETTINGS = [
    "--train.batch_size=256", "--train.max_epochs=2", "--train.checkpoint_every_steps=5",
    "--tracking.wandb=off", "--train.processes=2", "--model.dim=16", "--model.hidden=[32]",
]  # fmt: skip


def arguments(log: Path, *more: str) -> list[str]:
    return ["--config", str(QUICKSTART), f"--data.root={log}", "--run_dir=run", *SETTINGS, *more]


@pytest.fixture(scope="module")
def trained(demo_log: Path, twotower, tmp_path_factory) -> Path:
    """A run_dir that two ranks trained."""
    cwd = tmp_path_factory.mktemp("trained")
    for step in ("prepare", "train"):
        done = twotower(step, *arguments(demo_log), cwd=cwd)
        assert done.returncode == 0, done.stderr
    assert read_manifest(cwd / "run" / "train" / "checkpoint").ranks == 2
    return cwd / "run"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "train", tmp_path / "train")
    return tmp_path / "train"


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner)
    | st.dictionaries(st.integers(), inner) | st.dictionaries(st.sampled_from(MARKS), inner),
)  # fmt: skip


def same(a: object, b: object) -> bool:
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(VALUE)
def test_state_comes_back_from_json_as_it_was(value) -> None:
    text = json.dumps(encode(value), allow_nan=False)
    assert same(decode(json.loads(text)), value)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_small_tensors_come_back_from_json_as_they_were(kind, shape) -> None:
    tensor = (torch.rand(shape) * 9).to(kind)
    got = decode(json.loads(json.dumps(encode({"best": tensor, "n": np.float32(1.5)}))))
    assert got["best"].dtype == kind
    assert torch.equal(got["best"], tensor)
    assert got["n"] == 1.5


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot hold a set"):
        encode({"a": {1}})


def test_two_ranks_save_and_one_four_and_two_predict_the_same(trained, tmp_path) -> None:
    prepared, source = trained / "prepared", trained / "train" / "checkpoint"
    vectors = []
    for ranks in (1, 4, 2):
        out = tmp_path / str(ranks)
        out.mkdir()
        shutil.copy(trained / "train" / "model.json", out)
        run_on_ranks(ranks, "predict", {
            "prepared": str(prepared), "source": str(source), "target": str(out / "checkpoint"),
            "out": str(out / "vectors.pt"),
        }, tmp_path)  # fmt: skip
        source = out / "checkpoint"
        assert read_manifest(source).ranks == ranks
        vectors.append(torch.load(out / "vectors.pt"))
    assert vectors[0].std() > 0.05
    for other in vectors[1:]:
        torch.testing.assert_close(other, vectors[0], atol=1e-6, rtol=0)
    first, last = (read_manifest(path) for path in (trained / "train" / "checkpoint", source))
    for name, tensor in last.tensors.items():
        rows = tensor.shape[0] if tensor.shape else 1
        before = read_rows(trained / "train" / "checkpoint", first.tensors[name], 0, rows)
        assert torch.equal(read_rows(source, tensor, 0, rows), before), name


def test_nothing_is_unpickled(trained, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was loaded")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"),
                         (torch, "load")):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    load_towers(trained / "train")
    for file in (trained / "train" / "checkpoint").iterdir():
        assert file.suffix in (".safetensors", ".json")
        # A pickle's first byte, and that of the archive that torch puts pickles in.
        assert file.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"PK")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def rename_inside(manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace("rank-00001", "../rank-00001"))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("rank-00001.safetensors", flip, "rank-00001.safetensors: .* its content is another"),
        ("rank-00001.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-8]), "bytes, not"),
        ("rank-00001.safetensors", Path.unlink, "this file is missing"),
        (NAME, lambda f: f.write_text(f.read_text()[:-50]), "damaged, or not a checkpoint's"),
        (NAME, lambda f: f.write_text("[]"), "damaged, or not a checkpoint's"),
        (NAME, Path.unlink, "holds no checkpoint"),
        (NAME, rename_inside, "damaged, or not a checkpoint's"),
        (NAME, lambda f: f.write_text(f.read_text().replace('"format": 1', '"format": 9')),
         "is of format 9, this version reads 1"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused(name, damage, message, copy) -> None:
    damage(copy / "checkpoint" / name)
    with pytest.raises(UserError, match=message):
        check(copy / "checkpoint")


def test_a_link_in_a_checkpoint_is_refused(copy) -> None:
    file = copy / "checkpoint" / "rank-00001.safetensors"
    file.rename(copy / "elsewhere")
    file.symlink_to(copy / "elsewhere")
    with pytest.raises(UserError, match="this file is missing"):
        check(copy / "checkpoint")


def test_a_checkpoint_of_another_model_is_refused_with_the_difference(copy) -> None:
    spec = json.loads((copy / "model.json").read_text())
    spec["table_rows"]["country"] += 5
    spec["model"]["hidden"] = [32, 8]
    (copy / "model.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="is of another model") as refused:
        load_towers(copy, copy / "checkpoint")
    assert re.search(r"table_country.weight is \d+ x 16 in it, \d+ x 16 here", str(refused.value))
    assert re.search(r"layers\S+ is not in it", str(refused.value))


def test_a_training_goes_on_from_the_last_whole_checkpoint(demo_log, twotower, trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prepared").symlink_to(trained / "prepared")
    keep = arguments(demo_log, "--train.keep_every_steps=5")
    process = subprocess.Popen(
        [sys.executable, "-m", "twotower", "train", *keep],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder = tmp_path / "run" / "train.partial" / "checkpoints"
    while not (folder / "step=10").is_dir():
        assert process.poll() is None
    process.kill()
    process.wait()
    newest = max(folder.glob("step=*[0-9]"), key=lambda p: int(p.name[5:]))
    flip(newest / "rank-00000.safetensors")
    done = twotower("train", *arguments(demo_log), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(
        rf"WARNING: \S*{newest.name}/rank-00000.safetensors: .* not resumed from", done.stderr
    )
    before = int(newest.name[5:]) - 5
    summary = json.loads((tmp_path / "run" / "train" / "train.json").read_text())
    assert summary["resumed_from"] == f"step={before}"
    expected = load_towers(trained / "train").state_dict()
    for name, value in load_towers(tmp_path / "run" / "train").state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=0, msg=name)


def limit_files(size: int) -> None:
    """Let no file grow beyond a size, as a full disk would not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_stops_no_training_and_is_said(demo_log, trained, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prepared").symlink_to(trained / "prepared")
    done = subprocess.run(
        [sys.executable, "-m", "twotower", "train", *arguments(demo_log)],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=200,
        preexec_fn=lambda: limit_files(50_000),
    )  # fmt: skip
    assert "WARNING: a checkpoint was not written" in done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert "no checkpoint that was judged could be written" in done.stderr
    folder = tmp_path / "run" / "train.partial" / "checkpoints"
    assert not list(folder.iterdir()), "nothing half-made is left"


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path) -> None:
    script = """
import resource, sys, torch
from pathlib import Path
from twotower.train.checkpoint import storage
path = Path(sys.argv[1])
storage.save(path, {"a": torch.ones(10)}, {"n": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
for save in (storage.save, lambda *a: storage.save_async(*a, group=None).result()):
    try:
        save(path, {"a": torch.zeros(10_000)}, {"n": 2})
    except OSError as error:
        print("refused:", error)
"""
    path = tmp_path / "checkpoint"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.count(f"refused: {path}: File too large") == 2, done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    tensors = {"a": torch.zeros(10)}
    assert storage.load(path, tensors) == {"n": 1}
    assert torch.equal(tensors["a"], torch.ones(10))


def test_what_is_saved_in_the_background_is_what_was_there(tmp_path) -> None:
    tensor = torch.arange(100_000.0)
    saving = storage.save_async(tmp_path / "c", tensors_of({"a": [tensor]}), {}, group=None)
    tensor.zero_()
    saving.result()
    loaded = {"a/0": torch.zeros(100_000, dtype=torch.float64)}  # another type is converted
    storage.load(tmp_path / "c", loaded)
    assert torch.equal(loaded["a/0"], torch.arange(100_000.0).double())


def test_checkpoints_are_kept_by_policy(demo_log, twotower, trained, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prepared").symlink_to(trained / "prepared")
    more = ("--train.max_epochs=3", "--train.keep_best=2", "--train.keep_every_steps=15",
            "--train.table_lr=0.2")  # fmt: skip
    done = twotower("train", *arguments(demo_log, *more), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "train"
    summary = json.loads((folder / "train.json").read_text())
    kept = {int(p.name[5:]) for p in (folder / "checkpoints").iterdir()}
    last = summary["steps"]
    assert {summary["best_step"], last} | set(range(15, last, 15)) <= kept
    judged = [step for step in kept if step % 15]
    assert len(judged) in (2, 3), "the two best, and the last"
    for path in (folder / "checkpoints").iterdir():
        check(path)


def test_the_commands_inspect_reshard_and_consolidate(trained, twotower, tmp_path) -> None:
    done = twotower("checkpoint", "inspect", trained, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "every file is as it was written" in done.stdout
    assert re.search(r"ranks that wrote it\s+│ 2", done.stdout)
    assert "table_country" in done.stdout
    done = twotower("checkpoint", "reshard", trained, "three", "--ranks", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    source, three = trained / "train" / "checkpoint", tmp_path / "three"
    manifest = check(three)
    assert (manifest.ranks, len(manifest.files)) == (3, 3)
    for name, tensor in read_manifest(source).tensors.items():
        rows = tensor.shape[0] if tensor.shape else 1
        whole = read_rows(source, tensor, 0, rows)
        assert torch.equal(read_rows(three, manifest.tensors[name], 0, rows), whole), name
    done = twotower("checkpoint", "consolidate", trained, "towers.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plain, towers = load_file(tmp_path / "towers.safetensors"), load_towers(trained / "train")
    assert plain.keys() == towers.state_dict().keys()
    assert all(torch.equal(plain[name], value) for name, value in towers.state_dict().items())
    with safe_open(tmp_path / "towers.safetensors", framework="pt") as file:
        assert file.metadata()["model"] == (trained / "train" / "model.json").read_text()
    flip(three / "rank-00002.safetensors")
    done = twotower("checkpoint", "inspect", "three", cwd=tmp_path)
    assert done.returncode == 2
    assert "DAMAGED" in done.stdout
    for wrong, message in (
        (("reshard", trained, "three", "--ranks", 2), "three: is there already"),
        (("reshard", trained, "four", "--ranks", 0), "--ranks must be >= 1, got 0"),
        (("reshard", "three", "four", "--ranks", 2), "rank-00002.safetensors: the checkpoint is"),
        (("inspect", "nowhere"), "nowhere: holds no checkpoint"),
    ):
        done = twotower("checkpoint", *wrong, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "four").exists()
