"""The server's life: started, supervised, stopped; as processes, with nothing left behind."""

import json
import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from twotower.errors import UserError
from twotower.serve.supervisor import running_server

from .conftest import FREE, answers_again, shared_memory, start_serving, stubs_of


def test_a_killed_stub_is_brought_back(server) -> None:
    triton = server.process.pid
    before = stubs_of(triton)
    assert before
    for stub in before:
        stub.kill()
    assert answers_again(server.grpc_url, server.golden[0], 30)
    assert server.process.pid == triton, "the server itself went on"
    assert not {s.pid for s in before} & {s.pid for s in stubs_of(triton)}


def test_a_hung_stub_is_brought_back(server) -> None:
    stubs = stubs_of(server.process.pid)
    assert stubs
    for stub in stubs:
        stub.suspend()
    try:
        assert answers_again(server.grpc_url, server.golden[0], 60)
    finally:
        for stub in stubs:
            if stub.is_running():
                stub.kill()


def test_a_killed_server_is_brought_back_on_the_same_ports(server) -> None:
    url, before = server.grpc_url, server.process.pid
    os.kill(before, signal.SIGKILL)
    assert answers_again(server.grpc_url, server.golden[0], 30)
    assert server.grpc_url == url
    assert server.process.pid != before
    deadline = time.monotonic() + 10
    while not (server.work_dir / "server.json").exists():  # written once all is proven
        assert time.monotonic() < deadline
        time.sleep(0.05)
    state = json.loads((server.work_dir / "server.json").read_text())
    assert state["pid"] == server.process.pid


@pytest.fixture
def serving(finished_run):
    """`twotower serve` as a process, its state file read."""
    process, state = start_serving(finished_run)
    yield process, state
    process.kill()
    process.wait()
    state.unlink(missing_ok=True)  # a killed process leaves it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serve_stops_cleanly(serving, number) -> None:
    process, state = serving
    triton = psutil.Process(json.loads(state.read_text())["pid"])
    family = [triton, *triton.children(recursive=True)]
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "200 answered as at the export" in output
    assert not [p for p in family if p.is_running()]
    assert not state.exists()
    assert shared_memory(process.pid) == []


def test_no_server_outlives_a_killed_twotower(serving) -> None:
    process, state = serving
    triton = psutil.Process(json.loads(state.read_text())["pid"])
    process.kill()
    triton.wait(30)
    for leftover in shared_memory(process.pid):
        leftover.unlink()


def test_recommend_asks_the_running_server(serving, finished_run, twotower) -> None:
    done = twotower(
        "recommend", *finished_run.arguments, "--user=7", "-k", "12",
        "--exclude=[item-000001]", cwd=finished_run.cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "│ item-" in line]
    assert len(rows) == 12
    assert "story" in rows[0], "titles are shown"
    from twotower.data.prepared import PreparedDataset

    data = PreparedDataset(finished_run.run_dir / "prepared")
    seen = data.items["id"].take(data.timeline_of(data.user_row(7))).to_pylist()
    assert f"{len(seen)} items seen" in done.stdout
    for item in [*seen, "item-000001"]:
        assert not any(item in row for row in rows)
    unknown = twotower("recommend", *finished_run.arguments, "--user=987654", cwd=finished_run.cwd)
    assert unknown.returncode == 0
    assert "0 items seen" in unknown.stdout
    for arguments, words in (
        (["--user=seven"], "integer ids"),
        (["--user=7", "-k", "301"], "k must be in 1..300"),
        (["--user=7", "--url=127.0.0.1:9"], "no answer from 127.0.0.1:9"),
    ):
        done = twotower("recommend", *finished_run.arguments, *arguments, cwd=finished_run.cwd)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr
    second = twotower("serve", *finished_run.arguments, cwd=finished_run.cwd)
    assert second.returncode == 2
    assert "serves this job already" in second.stderr


def test_a_port_in_use_is_named_before_anything_starts(finished_run, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"serve\.grpc_port: cannot bind 127\.0\.0\.1:{port}"),
            running_server(finished_run.bundle, replace(FREE, grpc_port=port), tmp_path),
        ):
            pass
    assert not (tmp_path / "server.json").exists()


def test_a_server_that_cannot_load_shows_its_log(finished_run, tmp_path) -> None:
    from twotower.export.bundle import read_bundle
    from twotower.serve.server import TritonServer

    server = TritonServer(read_bundle(finished_run.bundle), FREE, tmp_path)
    render = tmp_path / "repository" / "recommend" / "1"
    server.start()
    server.stop()
    # The repository's files are links to the bundle's, which may not change.
    (render / "index.onnx").unlink()
    (render / "index.onnx").write_bytes(b"no graph")
    state = tmp_path / "server.json"
    assert not state.exists()
    state.write_text('{"pid": 1}')
    server._launch()
    try:
        with pytest.raises(UserError, match=r"before it was ready(.|\n)*index\.onnx"):
            server._wait_ready()
    finally:
        server.stop()
    assert state.exists(), "the state file of another server"


def test_the_repository_holds_one_whole_version(server) -> None:
    model = Path(server.repository) / "recommend"
    assert sorted(p.name for p in model.iterdir()) == ["1", "configs"]
    assert (model / "configs" / "cpu.pbtxt").exists()
    assert {"model.py", "query.onnx", "index.onnx"} <= {p.name for p in (model / "1").iterdir()}
    modules, compiled = set(model.rglob("*.py")), list(model.rglob("*.pyc"))
    assert len(compiled) == len(modules)
    # Flag 1: compiled by the renderer; a file of the stub's own would carry a time instead.
    assert {c.read_bytes()[4:8] for c in compiled} == {b"\x01\0\0\0"}
