"""Trouble around the command: one line that says where and what to do, nothing lost or left."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from .forker import Forker

JOB = {
    "name": "trouble",
    "run_dir": "run",
    "tracking": {"wandb": "off"},
    "data": {
        "interactions": "log",
        "query": [{"name": "history", "kind": "history", "table": "item_id"}],
        "item": [{"name": "item_id", "kind": "id"}],
    },
}
CSV = "user_id,item_id,timestamp\n1,a,10\n1,b,20\n2,a,30\n2,b,40\n"


@pytest.fixture(scope="module")
def forker() -> Iterator[Forker]:
    forker = Forker()
    yield forker
    forker.close()


def set_up(folder: Path, days: int = 1, rows: int = 10, **data: Any) -> None:
    for day in range(days):
        write_day(folder, day, rows)
    job = JOB | {"data": JOB["data"] | data}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))


def write_day(folder: Path, day: int, rows: int = 10, name: str | None = None) -> None:
    (folder / "log").mkdir(exist_ok=True)
    table = pa.table({
        "user_id": [f"u{k % 7}" for k in range(rows)],
        "item_id": [k * k % 11 for k in range(rows)],
        "timestamp": [86_400 * day + k for k in range(rows)],
    })  # fmt: skip
    pq.write_table(table, folder / "log" / (name or f"day{day}.parquet"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def refused(forker: Forker, folder: Path, run: str = "run", before: str = "") -> str:
    """Run the command, which refuses with one line; returns it."""
    code, _ = forker.prepare(folder, run, before=before)
    output = (folder / "stderr.txt").read_text()
    assert code == 2, output
    assert output.startswith("twotower: error: ")
    assert output.count("\n") == 1, output
    return output


def done(forker: Forker, folder: Path, run: str = "run") -> dict[str, bytes]:
    assert forker.prepare(folder, run)[0] == 0, (folder / "stderr.txt").read_text()
    assert [f.name for f in (folder / run).iterdir()] == ["prepared"]
    return content(folder / run)


@pytest.mark.parametrize("again", [0, 1])
def test_a_day_twice_or_out_of_order_changes_nothing_and_the_way_on_is_told(
    forker, tmp_path, again
) -> None:
    set_up(tmp_path)
    write_day(tmp_path, 1)
    (tmp_path / "log" / "day0.parquet").rename(tmp_path / "day0")
    before = done(forker, tmp_path)
    write_day(tmp_path, again, name="new.parquet")
    message = refused(forker, tmp_path)
    for words in ("new.parquet", "10 new events are not after the newest", "1970-01-02 00:00:09",
                  "run/prepared", "nothing was changed"):  # fmt: skip
        assert words in message
    assert content(tmp_path / "run") == before
    (tmp_path / "log" / "new.parquet").unlink()
    assert done(forker, tmp_path) == before, "without the file it goes on"
    write_day(tmp_path, 2)
    assert done(forker, tmp_path) != before


def test_preparing_anew_is_refused_where_it_would_lose_days(forker, tmp_path) -> None:
    set_up(tmp_path, days=2)
    before = done(forker, tmp_path)
    (tmp_path / "log" / "day0.parquet").unlink()
    set_up(tmp_path, days=0, display=[], split={"test": 0.2})
    message = refused(forker, tmp_path)
    assert "day0.parquet" in message
    assert "would lose them" in message
    assert content(tmp_path / "run") == before


CHANGES = """
import os, sys
def hook(event, args):
    if event == "open" and str(args[0]).endswith("log/1.csv"):
        {action}
sys.addaudithook(hook)
"""


@pytest.mark.parametrize(
    ("action", "file", "said"),
    [("os.path.exists('log/2.csv') and os.remove('log/2.csv')", "2.csv", "is gone since"),
     ("os.utime('log/1.csv', (1, 1))", "1.csv", "changed while it was read")],
)  # fmt: skip
def test_a_file_that_goes_or_changes_meanwhile_is_named(
    forker, tmp_path, action, file, said
) -> None:
    set_up(tmp_path)
    (tmp_path / "log" / "day0.parquet").unlink()
    for number in (1, 2):
        (tmp_path / "log" / f"{number}.csv").write_text(CSV)
    message = refused(forker, tmp_path, before=CHANGES.format(action=action))
    assert file in message
    assert said in message
    assert not list((tmp_path / "run").iterdir())


def test_a_link_to_nothing_is_named(forker, tmp_path) -> None:
    set_up(tmp_path)
    (tmp_path / "log" / "day1.parquet").symlink_to("gone.parquet")
    assert "day1.parquet" in refused(forker, tmp_path)


def unprivileged() -> list[str]:
    """Return what makes root a user whom permissions bind."""
    if os.getuid():
        return []
    drop = "-dac_override,-dac_read_search"
    command = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}"]
    if not shutil.which("setpriv") or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("root without setpriv: no permission binds")
    return command


@pytest.mark.parametrize(
    ("denied", "mode", "said"),
    [("log/day2.parquet", 0o000, "log/day2.parquet"), ("log", 0o000, "log"),
     ("run", 0o500, "run/prepared.partial"), ("run/prepared", 0o000, "run/prepared")],
)  # fmt: skip
def test_what_may_not_be_read_or_written_is_named(tmp_path, denied, mode, said) -> None:
    set_up(tmp_path, days=2)
    command = [*unprivileged(), sys.executable, "-m", "twotower", "prepare", "--config", "job.yaml"]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    before = content(tmp_path / "run")
    write_day(tmp_path, 2)
    place = tmp_path / denied
    usual = place.stat().st_mode
    place.chmod(mode)
    try:
        again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        place.chmod(usual)
    assert again.returncode == 2, again.stderr
    assert again.stderr.startswith("twotower: error: ")
    assert again.stderr.count("\n") == 1, again.stderr
    assert said in again.stderr
    assert content(tmp_path / "run") == before
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["prepared"]


def test_a_full_disk_leaves_the_earlier_dataset_and_nothing_else(forker, tmp_path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root's rights")
    try:
        set_up(tmp_path, days=1, rows=3000)
        before = done(forker, tmp_path, "disk/run")
        write_day(tmp_path, 1, 3000)
        expected, failed = done_after(forker, tmp_path, before), 0
        for left in (0, 8, 64, 256, 1024, 2048, 4096):
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "ballast").write_bytes(bytes(max(0, free - left * 1024)))
            code, _ = forker.prepare(tmp_path, "disk/run")
            (disk / "ballast").unlink()
            if code == 0:
                break
            output = (tmp_path / "stderr.txt").read_text()
            assert code == 2, output
            assert output.count("\n") == 1, output
            assert "space" in output
            assert content(disk / "run") == before
            failed += 1
        assert failed >= 3
        assert done(forker, tmp_path, "disk/run") == expected
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=False)


def done_after(forker: Forker, folder: Path, before: dict[str, bytes]) -> dict[str, bytes]:
    """Return what appending ends with, prepared elsewhere from a copy of what was there before."""
    for name, data in before.items():
        file = folder / "copy" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return done(forker, folder, "copy")


def test_files_that_may_not_grow_leave_the_earlier_dataset(forker, tmp_path) -> None:
    set_up(tmp_path, days=1, rows=3000)
    before = done(forker, tmp_path)
    write_day(tmp_path, 1, 3000)
    expected, failed = done_after(forker, tmp_path, before), 0
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for size in (4096, 16_384, 65_536, 262_144, 1 << 20, 4 << 20, 16 << 20):
        limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {hard}))"
        code, _ = forker.prepare(tmp_path, before=limit)
        output = (tmp_path / "stderr.txt").read_text()
        if code == 0:
            break
        assert code == 2, output
        assert output.count("\n") == 1, output
        assert "the disk is full" in output
        assert content(tmp_path / "run") == before
        failed += 1
    assert failed >= 2
    assert code == 0
    assert content(tmp_path / "run") == expected


def test_a_damaged_dataset_is_made_anew_only_where_no_day_would_be_lost(forker, tmp_path) -> None:
    set_up(tmp_path, days=2)
    whole = done(forker, tmp_path)
    manifest = tmp_path / "run" / "prepared" / "prepared.json"
    other = re.sub(r'"format": (\d)', r'"format": 1\1', manifest.read_text())
    manifest.write_text(other)
    assert done(forker, tmp_path) == whole, "of another version, and every file is still there"
    (tmp_path / "log" / "day0.parquet").unlink()
    for text, said in ((other, "day0.parquet"), ("", "is damaged"), ("{", "is damaged")):
        manifest.write_text(text)
        message = refused(forker, tmp_path)
        assert said in message
        assert "remove run/prepared" in message
        assert manifest.read_text() == text
    shutil.rmtree(tmp_path / "run" / "prepared")
    assert done(forker, tmp_path) != whole


STOPPED = """
import os, signal, sys
def hook(event, args):
    if event == "open" and str(args[0]).endswith("prepared.json.partial"):
        os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(hook)
"""


def test_two_at_once_do_not_write_into_each_others_dataset(forker, tmp_path) -> None:
    set_up(tmp_path, days=2)
    whole = done(forker, tmp_path, "other")
    first, codes = Forker(), []
    thread = threading.Thread(
        target=lambda: codes.append(first.prepare(tmp_path, before=STOPPED)[0])
    )
    thread.start()
    while first.pid is None or " T " not in Path(f"/proc/{first.pid}/stat").read_text():
        time.sleep(0.01)
    try:
        assert "another process is writing here" in refused(forker, tmp_path)
    finally:
        os.kill(first.pid, signal.SIGCONT)
        thread.join()
        first.close()
    assert codes == [0]
    assert content(tmp_path / "run") == whole


def test_a_bad_row_is_told_as_it_stands(forker, tmp_path) -> None:
    split = {"test": 0.25, "validation": 0.0}
    set_up(tmp_path, days=0, interactions="log.csv", on_bad_rows="skip", split=split)
    (tmp_path / "log.csv").write_text(CSV + "[/yellow],[bold],[red],4\n")
    assert forker.prepare(tmp_path)[0] == 0, (tmp_path / "stderr.txt").read_text()
    assert "[/yellow],[bold],[red],4" in (tmp_path / "stdout.txt").read_text()
