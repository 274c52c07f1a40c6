"""The synthetic log: any size gives a sound one, and the same one is left alone."""

import tempfile
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twotower.data.demo_log import FILES, DemoLogConfig, write_demo_log


@settings(max_examples=30, deadline=None)
@given(
    users=st.integers(10, 400), items=st.integers(80, 200), events=st.integers(100, 6000),
    seed=st.integers(0, 2**32),
)  # fmt: skip
@example(users=300, items=150, events=5000, seed=0)  # a sub-genre of which nothing is out at first
def test_any_size_gives_a_sound_log(users, items, events, seed) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "log")
        sizes = {"users": users, "items": items, "events": events}
        counts, written = write_demo_log(DemoLogConfig(output=str(output), seed=seed, **sizes))
        log, user_table, item_table = (pq.read_table(output / name) for name in FILES)
    assert written
    assert 0 < counts["events"] == log.num_rows <= events
    assert user_table.num_rows == users
    assert item_table.num_rows == items
    for name, table in (("user_id", user_table), ("item_id", item_table)):
        assert pc.all(pc.is_in(log[name], value_set=table[name].combine_chunks())).as_py()
    assert log.group_by(["user_id", "item_id"]).aggregate([]).num_rows == log.num_rows
    assert (np.diff(log["timestamp"].to_numpy()) >= 0).all()


def times(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in [folder, *folder.iterdir()]}


def test_the_very_same_log_is_left_untouched(twotower, tmp_path) -> None:
    sizes = {"users": 20, "items": 80, "events": 300}
    same = DemoLogConfig(output=str(tmp_path / "log"), **sizes)
    assert write_demo_log(same)[1]
    before = times(tmp_path / "log")
    done = twotower("demo-log", "--output=log", *(f"--{k}={v}" for k, v in sizes.items()),
                    cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "left untouched" in done.stdout
    assert times(tmp_path / "log") == before
    content = {name: (tmp_path / "log" / name).read_bytes() for name in FILES}
    assert write_demo_log(DemoLogConfig(output=str(tmp_path / "log"), seed=1, **sizes))[1]
    assert (tmp_path / "log" / FILES[0]).read_bytes() != content[FILES[0]]
    assert write_demo_log(same)[1], "another log was there"
    (tmp_path / "log" / FILES[1]).write_bytes(content[FILES[1]][:-1])
    assert write_demo_log(same)[1], "a file was damaged"
    assert content == {name: (tmp_path / "log" / name).read_bytes() for name in FILES}
