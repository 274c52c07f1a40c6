"""What is written by ranks that share tensors by columns, that fail, that die, or are stopped."""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from twotower.errors import UserError
from twotower.train.checkpoint import storage
from twotower.train.checkpoint.manifest import NAME, check, read_manifest
from twotower.train.checkpoint.tools import read_rows

# Two ranks with a table of 10 x 8: rank 0 has columns 0-1 and 4-5, rank 1 the others.
RANK = """
import datetime, os, resource, sys
import torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards
from twotower.errors import UserError
from twotower.train.checkpoint import storage
from twotower.train.checkpoint.tools import reshard

path, rank, meeting, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group(
    "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2,
    timeout=datetime.timedelta(seconds=60),
)
whole = torch.arange(80.0).reshape(10, 8)
columns = [2 * rank, 4 + 2 * rank]


def table(fill):
    return init_from_local_shards([
        Shard.from_tensor_and_offsets(fill(whole[:, c : c + 2]).contiguous(), [0, c], rank)
        for c in columns
    ], 10, 8)


def share_columns():
    tensors = {"t": table(torch.clone), "n": torch.tensor(7)}
    storage.save(path, tensors, {"rank": rank})
    saving = storage.save_async(
        path.with_name("later"), tensors, {"rank": rank}, group=dist.new_group()
    )
    for shard in tensors["t"].local_shards():
        shard.tensor.zero_()
    saving.result()
    if rank == 0:
        reshard(path, path.with_name("three"), 3)
    dist.barrier()
    for name in (path.name, "later", "three"):
        got = {"t": table(torch.zeros_like), "n": torch.tensor(0)}
        assert storage.load(path.with_name(name), got) == {"rank": 0}
        for shard, c in zip(got["t"].local_shards(), columns, strict=True):
            assert torch.equal(shard.tensor, whole[:, c : c + 2]), name
        assert got["n"] == 7


def fail():
    table_ = {"t": table(torch.clone)}
    attempts = [
        lambda: storage.load(path.with_name("damaged"), table_),
        lambda: storage.save(path, table_, {"a": {1}}),
        lambda: storage.save(path, table_, {}),
        lambda: storage.save_async(path, table_, {}, group=None).result(),
    ]
    for number, attempt in enumerate(attempts):
        if number == 2 and rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
        try:
            attempt()
        except (OSError, TypeError, UserError) as error:
            print(type(error).__name__, error)


def big():
    storage.save(path, {f"{rank}": torch.ones(5_000_000)}, {})


{"share columns": share_columns, "fail": fail, "big": big}[what]()
dist.destroy_process_group()
sys.stdout.flush()
os._exit(0)
"""


def start(path: Path, what: str) -> list["subprocess.Popen[str]"]:
    # Beside the test's folder, of which some look at all that is there.
    meeting = path.parent.with_name(f"{path.parent.name}-meeting")
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK, str(path), str(rank), str(meeting), what],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip


def on_two_ranks(path: Path, what: str) -> list[str]:
    processes = start(path, what)
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


@pytest.fixture
def old(tmp_path: Path) -> Path:
    storage.save(tmp_path / "checkpoint", {"t": torch.ones(10, 8)}, {"n": 1})
    return tmp_path / "checkpoint"


def is_old(path: Path) -> bool:
    tensor = torch.zeros(10, 8)
    state = storage.load(path, {"t": tensor})
    return state == {"n": 1} and bool((tensor == 1).all())


def test_columns_of_which_a_rank_has_several(tmp_path) -> None:
    on_two_ranks(tmp_path / "checkpoint", "share columns")
    whole = torch.arange(80.0).reshape(10, 8)
    for name, chunks in (("checkpoint", 4), ("later", 4), ("three", 3)):
        manifest = check(tmp_path / name)
        assert len(manifest.tensors["t"].chunks) == chunks
        assert {chunk.file for chunk in manifest.tensors["t"].chunks} == set(manifest.files)
        alone = {"t": torch.zeros(10, 8, dtype=torch.float64), "n": torch.tensor(0)}
        storage.load(tmp_path / name, alone)
        assert torch.equal(alone["t"], whole.double())
        assert torch.equal(read_rows(tmp_path / name, manifest.tensors["t"], 3, 7), whole[3:7])


def test_what_one_rank_meets_all_ranks_say(old) -> None:
    damaged = old.with_name("damaged")
    shutil.copytree(old, damaged)
    (damaged / "rank-00000.safetensors").write_bytes(b"")
    full = f"OSError {old}: File too large"
    for output in on_two_ranks(old, "fail"):
        found, unfit, *others = output.splitlines()
        assert re.match(r"UserError .*rank-00000.safetensors: the checkpoint is damaged", found)
        assert unfit == "TypeError a checkpoint cannot hold a set: {1}"  # not a full disk
        assert others == [full, full]
    assert {path.name for path in old.parent.iterdir()} == {old.name, damaged.name}
    assert is_old(old)


def test_a_rank_that_is_killed_while_it_writes_leaves_the_old_one(old) -> None:
    processes = start(old, "big")
    writing = old.with_name(f"{old.name}.partial") / "rank-00001.safetensors"
    try:
        while not (writing.is_file() and writing.stat().st_size):
            assert processes[1].poll() is None, processes[1].communicate()[0]
            time.sleep(0.002)
        processes[1].kill()
        assert processes[1].wait(60) == -signal.SIGKILL
        processes[0].communicate(timeout=120)
        assert processes[0].returncode != 0
    finally:
        for process in processes:
            process.kill()
    assert is_old(old)
    assert writing.parent.is_dir(), "it was killed in the middle"
    storage.save(old, {"t": torch.zeros(3)}, {})
    assert [path.name for path in old.parent.iterdir()] == [old.name]
    assert check(old).tensors["t"].shape == (3,)


def change(file: Path, edit) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content) + "\n")


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["state"].update(n=2),
        lambda content: content["tensors"]["t"].update(shape=[8, 10]),
        lambda content: content["files"]["rank-00000.safetensors"].update(bytes="many"),
        lambda content: content["tensors"]["t"].update(type="load"),
        lambda content: content.pop("sha256"),
    ],
)
def test_a_manifest_of_which_a_value_has_changed_is_refused(old, edit) -> None:
    change(old / NAME, edit)
    with pytest.raises(UserError, match=f"{NAME}: damaged, or not a checkpoint's"):
        read_manifest(old)


def test_a_manifest_that_cannot_be_read_is_refused(old) -> None:
    (old / NAME).unlink()
    (old / NAME).mkdir()
    with pytest.raises(UserError, match=f"{NAME}: cannot be read: Is a directory"):
        check(old)


def test_what_is_written_in_the_background_keeps_its_state(tmp_path) -> None:
    state = {"loop": {"scores": [1.0]}, "best": torch.ones(2)}
    tensors = {"t": torch.zeros(20_000_000)}
    saving = storage.save_async(tmp_path / "c", tensors, state, group=None)
    state["loop"]["scores"].append(2.0)
    state["best"].zero_()
    saving.result()
    kept = read_manifest(tmp_path / "c").state
    assert kept["loop"] == {"scores": [1.0]}
    assert torch.equal(kept["best"], torch.ones(2))


def test_stopping_it_while_it_saves_is_no_full_disk(tmp_path) -> None:
    script = """
import os, signal, sys, torch
from pathlib import Path
from twotower.train.checkpoint import storage
path, sent = Path(sys.argv[1]), []
def hook(event, args):
    # The file is opened twice; a second signal would come at any moment, the last one among them.
    if event == "open" and str(args[0]).endswith("rank-00000.safetensors") and not sent:
        sent.append(event)
        os.kill(os.getpid(), signal.SIGINT)
# Python has no handler where it was started with the signal ignored, as in a shell's background.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(hook)
try:
    storage.save(path, {"t": torch.ones(5_000_000)}, {})
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "interrupted\n", done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["reshard", "consolidate"])
def test_a_command_on_a_full_disk_says_so(command, old) -> None:
    out = old.with_name("out")
    more = ["--ranks", "2"] if command == "reshard" else []
    storage.save(old, {"model/t": torch.ones(10, 8)}, {})
    done = subprocess.run(
        [sys.executable, "-m", "twotower", "checkpoint", command, str(old), str(out), *more],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )  # fmt: skip
    assert done.returncode == 2
    assert "File too large: check the path" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in old.parent.iterdir()] == [old.name]


def test_tensors_of_the_towers_that_are_not_asked_for_are_named(tmp_path) -> None:
    ones = torch.ones(2)
    storage.save(tmp_path / "c", {"model/a": ones, "model/b": ones, "optimizer_0/a": ones}, {})
    storage.load(tmp_path / "c", {"model/a": torch.zeros(2), "model/b": torch.zeros(2)})
    with pytest.raises(UserError, match="is of another model: model/b is in it, not here"):
        storage.load(tmp_path / "c", {"model/a": torch.zeros(2)})


@pytest.mark.parametrize("chunks", [[], [{"shape": [2]}], [{"offset": [1]}]])
def test_a_manifest_whose_chunks_leave_something_out_is_refused(chunks, tmp_path) -> None:
    storage.save(tmp_path / "c", {"a": torch.ones(4)}, {})
    file = tmp_path / "c" / NAME
    content = json.loads(file.read_text())
    del content["sha256"]
    tensor = content["tensors"]["a"]
    tensor["chunks"] = [{**tensor["chunks"][0], **changed} for changed in chunks]
    seal = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    file.write_text(json.dumps({"sha256": seal, **content}))
    with pytest.raises(UserError, match="damaged, or not a checkpoint's"):
        check(tmp_path / "c")


def test_what_no_checkpoint_can_hold_is_not_taken_for_a_full_disk(tmp_path) -> None:
    with pytest.raises(TypeError, match=r"cannot hold a@0, of torch.complex64"):
        storage.save(tmp_path / "c", {"a": torch.ones(1, dtype=torch.complex64)}, {})
    assert not list(tmp_path.iterdir())
