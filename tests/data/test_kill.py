"""Killing a preparation: a reader meets the old dataset or the new one, a rerun ends the same."""

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.files import atomic_directory, publish, recover

from .forker import Forker

KILLS = 20
CONTEXT = ("device", "hour", "place")
JOB = {
    "name": "kill",
    "run_dir": "run",
    "tracking": {"wandb": "off"},
    "data": {
        "interactions": "log",
        "query": [
            {"name": "history", "kind": "history", "table": "item_id"},
            {"name": "user_id", "kind": "id"},
            *({"name": name, "kind": "id"} for name in CONTEXT),
        ],
        "item": [{"name": "item_id", "kind": "id"}],
    },
}

# What a filesystem without an atomic swap of two directories answers.
NO_SWAP = """
import ctypes
def _none(*_, **__): raise OSError("no such library")
ctypes.CDLL = _none
"""
# SIGKILL right before the `at`-th thing that Python does to the filesystem: every one of them is
# an audit event (PEP 578).
AT_EVENT = """
import os, signal, sys
seen = 0
def _hook(event, args):
    global seen
    if event in {events} and {where}:
        seen += 1
        if seen == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(_hook)
"""
TOUCHES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.scandir")


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.close()


def write_day(folder: Path, day: int, rows: int = 4000) -> None:
    rng = np.random.default_rng(day)
    columns: dict[str, Any] = {
        "user_id": [f"u{u}" for u in rng.integers(0, 300, rows)],
        "item_id": rng.integers(0, 200, rows),
        "timestamp": rng.integers(86_400 * day, 86_400 * (day + 1), rows),
    }
    columns |= {name: [f"{name} {v}" for v in rng.integers(0, 9, rows)] for name in CONTEXT}
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"day{day}.parquet")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for day in range(3):
        write_day(tmp_path / "log", day)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(JOB))
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()
    }  # fmt: skip


def read_all(run: Path) -> dict[str, bytes] | None:
    """Return what a reader gets, None when it is told that nothing is prepared."""
    try:
        data = PreparedDataset(run / "prepared")
    except UserError:
        return None
    assert len(data.events) == data.summary["counts"]["events"]
    assert len(data.timeline) >= int(data.event_columns["history_to"].max())
    return content(run / "prepared")


def names(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir())


def test_killed_at_random_a_first_preparation_is_whole_or_absent(forker, place) -> None:
    code, seconds = forker.prepare(place, "whole")
    assert code == 0, (place / "stderr.txt").read_text()
    whole = content(place / "whole" / "prepared")
    rng, codes = random.Random(0), []
    for kill in range(KILLS):
        codes.append(forker.prepare(place, after=rng.uniform(0, seconds))[0])
        assert read_all(place / "run") in (None, whole)
        # Every other rerun is killed too.
        if kill % 2:
            assert forker.prepare(place)[0] == 0, (place / "stderr.txt").read_text()
            assert read_all(place / "run") == whole
            assert names(place / "run") == ["prepared"]
            shutil.rmtree(place / "run")
    assert -signal.SIGKILL in codes


def test_killed_at_random_an_append_leaves_the_old_dataset_or_the_new_one(forker, place) -> None:
    days = [place / "log" / f"day{d}.parquet" for d in range(3)]
    days[2].rename(place / "later")
    assert forker.prepare(place, "before")[0] == 0
    (place / "later").rename(days[2])
    # What was prepared cannot be read again.
    days[0].unlink()
    shutil.copytree(place / "before", place / "whole")
    code, seconds = forker.prepare(place, "whole")
    assert code == 0, (place / "stderr.txt").read_text()
    old, new = (content(place / n / "prepared") for n in ("before", "whole"))
    assert old != new
    rng, codes = random.Random(1), []
    for kill in range(KILLS):
        if kill % 2 == 0:
            shutil.copytree(place / "before", place / "run")
        codes.append(forker.prepare(place, after=rng.uniform(0, seconds))[0])
        assert read_all(place / "run") in (old, new)
        if kill % 2:
            assert forker.prepare(place)[0] == 0, (place / "stderr.txt").read_text()
            assert read_all(place / "run") == new
            assert names(place / "run") == ["prepared"]
            shutil.rmtree(place / "run")
    assert -signal.SIGKILL in codes


@pytest.mark.parametrize("swap", [True, False])
def test_no_event_is_lost_when_killed_while_the_new_dataset_takes_its_name(
    forker, place, swap
) -> None:
    (place / "log" / "day2.parquet").rename(place / "later")
    assert forker.prepare(place, "before")[0] == 0
    (place / "later").rename(place / "log" / "day2.parquet")
    (place / "log" / "day0.parquet").unlink()
    shutil.copytree(place / "before", place / "whole")
    assert forker.prepare(place, "whole")[0] == 0
    new, before = content(place / "whole" / "prepared"), "" if swap else NO_SWAP
    # All that happens to the names beside the dataset: swapped or renamed, then removed.
    where = "str(args[0]).endswith(('/prepared', '/prepared.partial', '/prepared.old'))"
    where = where.replace("str(args[0])", "('/' + str(args[0]))")
    killed = 0
    for at in range(1, 30):
        shutil.copytree(place / "before", place / "run")
        hook = AT_EVENT.format(events=("os.rename", "shutil.rmtree"), where=where, at=at)
        code, _ = forker.prepare(place, before=before + hook)
        killed += code == -signal.SIGKILL
        if swap:
            assert read_all(place / "run") is not None
        assert forker.prepare(place, before=before)[0] == 0, (place / "stderr.txt").read_text()
        assert content(place / "run" / "prepared") == new
        assert names(place / "run") == ["prepared"]
        shutil.rmtree(place / "run")
        if code == 0:
            break
    assert code == 0
    assert killed >= (2 if swap else 5)


def write(folder: Path, word: str) -> None:
    (folder / "deep").mkdir(parents=True)
    for name in ("a", "b", "deep/c"):
        (folder / name).write_text(f"{word} {name}")
    (folder / "manifest").write_text(word)


def whole(folder: Path) -> str:
    """Return the word of a directory that is whole."""
    word = (folder / "manifest").read_text()
    assert content(folder) == {n: f"{word} {n}".encode() for n in ("a", "b", "deep/c")} | {
        "manifest": word.encode()
    }
    return word


def in_a_child(before: str, function: Any) -> int:
    pid = os.fork()
    if not pid:
        try:
            exec(before, {})
            function()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("swap", [True, False])
def test_killed_at_every_step_of_publishing_a_directory_is_whole(tmp_path, swap) -> None:
    final = tmp_path / "final"
    for at in range(1, 200):
        shutil.rmtree(final, ignore_errors=True)
        write(final, "old")
        write(tmp_path / "final.partial", "new")
        hook = AT_EVENT.format(events=TOUCHES, where="True", at=at)
        code = in_a_child(
            ("" if swap else NO_SWAP) + hook, lambda: publish(tmp_path / "final.partial", final)
        )
        if swap:
            assert whole(final) in ("old", "new"), "at every moment"
        elif not final.exists():
            assert whole(tmp_path / "final.old") == "old"
        # The next writer fails: it restores what it found.
        with pytest.raises(ZeroDivisionError), atomic_directory(final) as partial:
            (partial / "half").write_text(str(1 / 0))
        assert whole(final) in ("old", "new")
        assert names(tmp_path) == ["final"]
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert code == 0
    assert at > 10


def test_an_old_directory_is_found_again_only_while_there_is_no_new_one(tmp_path) -> None:
    final = tmp_path / "final"
    write(tmp_path / "final.old", "old")
    recover(final)
    assert whole(final) == "old"
    write(tmp_path / "final.old", "older")
    recover(final)
    assert whole(final) == "old"
    assert names(tmp_path) == ["final"]
