"""Dynamic ids under DistributedModelParallel: the same on any number of ranks, and reloaded."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from twotower.train.checkpoint import storage

from . import dynamic_rank
from .dynamic_rank import batch, towers


def train(ranks: int, folder: Path, **arguments: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir()
    arguments |= {
        "port": port, "ranks": ranks, "save": str(folder / "saved"), "vectors": str(folder / "v"),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, dynamic_rank.__file__, json.dumps(arguments | {"rank": rank})],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def reloaded(folder: Path, pooling: str) -> Any:
    """Return the towers of a checkpoint, unsharded."""
    model = towers(pooling)
    storage.load(folder / "saved", {f"model/{n}": v for n, v in model.state_dict().items()})
    return model.eval()


def test_ranks_agree_and_what_they_save_loads_anywhere(tmp_path) -> None:
    pooling = "attention"  # of the items; the users' table is pooled by a sum
    jobs = {
        "one": {"ranks": 1, "steps": [0, 8], "load": None},
        "two": {"ranks": 2, "steps": [0, 8], "load": None},
        # Between two admissions of the users' table, which happen every third step.
        "begun": {"ranks": 2, "steps": [0, 5], "load": None},
    }
    with ThreadPoolExecutor(2) as pool:
        begun = [
            pool.submit(train, folder=tmp_path / name, pooling=pooling, **job)
            for name, job in jobs.items()
        ]
        for job in begun:
            job.result()
    saved = str(tmp_path / "begun" / "saved")
    train(1, tmp_path / "resumed", pooling=pooling, steps=[5, 8], load=saved)
    expected = reloaded(tmp_path / "one", pooling)
    state = expected.state_dict()
    assert expected.dynamic_slots("item_id").open_slots().item() == 0, "ids had to give way"
    waiting = reloaded(tmp_path / "begun", pooling).dynamic_slots("user_id").waiting_keys
    assert (waiting >= 0).sum() > 50
    for name in ("two", "resumed"):
        model = reloaded(tmp_path / name, pooling)
        vectors = torch.load(tmp_path / name / "v")
        # What the ranks answered, and what one process does that loads their checkpoint: the
        # rounding of a few fp32 layers, on vectors of length 1.
        torch.testing.assert_close(
            model.query_vectors(batch(pooling, 1000)), vectors, atol=1e-6, rtol=0
        )
        for key, value in model.state_dict().items():
            if value.dtype == torch.int64:
                assert torch.equal(value, state[key]), (name, key)
            else:
                torch.testing.assert_close(value, state[key], atol=1e-6, rtol=0, msg=key)
