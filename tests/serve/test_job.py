"""A job's server beside the job's other commands, as processes on a copy of the finished run."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import yaml

from twotower.cli import TRAINING_LIBRARIES
from twotower.errors import UserError
from twotower.export.bundle import read_bundle
from twotower.serve.client import AsyncRecommendClient, RecommendClient, ServerUnavailable
from twotower.serve.hold import held, passing_directory
from twotower.serve.runtime import setup_runtime
from twotower.serving import id_list

from ..conftest import ROOT, FinishedRun
from .conftest import answers_again, start_serving

# Nothing listens there: whatever asks this proxy gets no answer.
PROXIES = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https", "grpc")}


@pytest.fixture(scope="module")
def job(finished_run, tmp_path_factory) -> FinishedRun:
    """A copy of the finished run, free to be changed."""
    cwd = tmp_path_factory.mktemp("copy")
    shutil.copytree(
        finished_run.run_dir, cwd / "run", ignore=shutil.ignore_patterns("server*", "wandb")
    )
    return replace(finished_run, cwd=cwd)


@pytest.fixture(scope="module")
def live(job) -> Iterator[dict[str, object]]:
    """What the state file says of `twotower serve`, which runs where a proxy is set."""
    process, state = start_serving(job, env=os.environ | PROXIES)
    yield json.loads(state.read_text())
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert not state.exists()


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PROXIES.items():
        monkeypatch.setenv(name, value)


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    live, job, proxied, twotower
) -> None:
    done = twotower("recommend", *job.arguments, "--user=7", cwd=job.cwd)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"│ item-\d{6} │", done.stdout)) == 10, "serve.default_k"
    for host in ("127.0.0.1", "localhost"):
        for protocol in ("grpc", "http"):
            url = f"{host}:{live[f'{protocol}_port']}"

            async def ask(url: str, protocol: str) -> int:
                async with AsyncRecommendClient(url, protocol, 10) as client:
                    return (await client.schema()).version

            with RecommendClient(url, protocol, 10) as client:
                assert client.schema().version == asyncio.run(ask(url, protocol)) == 1


def test_a_distant_server_is_asked_through_the_proxy(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(20)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        with RecommendClient("192.0.2.1:8001", timeout_s=1) as client:
            with pytest.raises(ServerUnavailable):
                client.schema()
            connection, _ = proxy.accept()
            with connection:
                assert connection.recv(100).startswith(b"CONNECT 192.0.2.1:8001")


def test_a_run_leaves_the_server_of_its_job_alone(live, job, twotower) -> None:
    state = job.run_dir / "server" / "server.json"
    leftover = job.run_dir / "server.check" / "repository" / "recommend" / "7"
    leftover.mkdir(parents=True)  # of a run that was killed
    # Another name makes another bundle of the same training.
    done = twotower(
        "run", *job.arguments, "--name=other", "--tracking.wandb=off", "--serve.max_k=5",
        "--serve.default_k=5", cwd=job.cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = done.stdout[done.stdout.index("Triton answers") :]
    assert len(re.findall(r"│ +\d+ │ item-\d{6} │", answers)) == 3 * 5, "serve.max_k"
    assert "version 2 answers" in answers
    assert not (job.run_dir / "server.check").exists()

    assert json.loads(state.read_text()) == live
    second = twotower("serve", *job.arguments, cwd=job.cwd)
    assert second.returncode == 2
    assert re.search(r"server: process \d+ serves this job already", second.stderr)
    assert json.loads(state.read_text()) == live
    # What a stub is made from anew is still there, and so is the version that it loads.
    (version,) = (job.run_dir / "server" / "repository" / "recommend").glob("[0-9]*")
    assert version.name == "1"
    assert {"model.py", "query.onnx", "index.onnx"} <= {p.name for p in version.iterdir()}
    golden = read_bundle(job.bundle).golden()[50]
    assert answers_again(f"{live['host']}:{live['grpc_port']}", golden, 30)


def test_of_servers_started_at_once_one_serves(job, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copytree(job.bundle, tmp_path / "run" / "bundles" / "1")
    ports = [f"--serve.{name}_port=0" for name in ("http", "grpc", "metrics", "health")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "twotower", "serve", *job.arguments, *ports], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(running := [p for p in processes if p.poll() is None]) > 1:
            assert time.monotonic() < deadline, f"{len(running)} servers of one job"
            time.sleep(0.05)
        for process in processes:
            if process not in running:
                output, _ = process.communicate()
                assert process.returncode == 2, output
                assert "serves this job already" in output
        while not (tmp_path / "run" / "server" / "server.json").exists():
            assert running[0].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running[0].send_signal(signal.SIGTERM)
        assert running[0].wait(60) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_directory_is_held_by_one_and_free_again_after_it(tmp_path) -> None:
    server = tmp_path / "server"
    with (
        held(server),
        pytest.raises(UserError, match=rf"process {os.getpid()} serves this job already"),
        held(server),
    ):
        pass
    # A tritonserver whose twotower was killed may still be there, which holds no lock.
    state = server / "server.json"
    code = ["-c", "import time; time.sleep(600)", f"--model-repository={server / 'repository'}"]
    with subprocess.Popen([sys.executable, *code]) as orphan:
        state.write_text(json.dumps({"pid": orphan.pid}))
        try:
            with (
                pytest.raises(UserError, match=rf"process {orphan.pid} serves this job already"),
                held(server),
            ):
                pass
        finally:
            orphan.kill()
    with held(server):
        assert not state.exists()
    # The pid of a dead server may belong to anything by now.
    state.write_text(json.dumps({"pid": os.getpid()}))
    with held(server):
        assert not state.exists()


def test_a_passing_directory_is_empty_at_first_and_gone_at_last(tmp_path) -> None:
    path = tmp_path / "check"
    (path / "repository").mkdir(parents=True)
    (path / "triton.log").write_text("of a killed process")
    with passing_directory(path):
        assert [p.name for p in path.iterdir()] == ["lock"]
        (path / "repository").mkdir()
        with pytest.raises(UserError, match="already"), passing_directory(path):
            pass
        assert (path / "repository").exists()
    assert not path.exists()
    with pytest.raises(KeyboardInterrupt), passing_directory(path):
        raise KeyboardInterrupt
    assert not path.exists()
    with pytest.raises(UserError, match="its log"), passing_directory(path):
        raise UserError(f"failed, see its log, {path / 'triton.log'}")
    assert path.exists(), "the message names a file in it"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("[318,296]", ["318", "296"]),
        ("[a, b]", ["a", "b"]),
        ("318", ["318"]),
        ("a,b", ["a", "b"]),
        ('["a,b", "c"]', ["a,b", "c"]),
        ("['a', 'b']", ["a", "b"]),
        ("[007,1e5,no,null]", ["007", "1e5", "no", "null"]),
        ("[1,a]", ["1", "a"]),
        ("[-5]", ["-5"]),
        ("[]", []),
        ("", []),
    ],
)
def test_ids_on_the_command_line_stay_as_they_were_typed(text, ids) -> None:
    assert id_list(text) == ids


def test_recommend_takes_integer_ids(make, twotower, tmp_path) -> None:
    data = make({
        "user_id": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3],
        "item_id": [318, 296, 7, 318, 7, 8, 296, 318, 8, 9],
        "timestamp": [10, 20, 90, 15, 25, 95, 30, 35, 92, 99],
    })  # fmt: skip
    section = {"interactions": "log.parquet", "item": [{"name": "item_id", "kind": "id"}],
               "query": [{"name": "history", "kind": "history", "table": "item_id"}]}  # fmt: skip
    job = {"name": "integers", "run_dir": str(data.path.parent), "data": section}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    def ask(*options: str) -> str:
        done = twotower("recommend", "--config=job.yaml", "--user=1", *options, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        return done.stderr

    # Both lists are read, and only then is the server missed.
    assert "no server of this job" in ask("--history=[318,296]", "--exclude=[1,2]")
    assert "'x7' is not an id: the log's items have integer ids" in ask("--exclude=[318,x7]")


def test_every_library_of_the_train_extra_is_known_to_be_one() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^train = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    names = {n.replace("-", "_") for n in re.findall(r'^\s*"([\w-]+)', extra, re.MULTILINE)}
    assert len(names) > 5
    modules = {name.removesuffix("_cpu") for name in names}
    assert modules == TRAINING_LIBRARIES


BASE = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {libraries!r}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Wall())
from twotower.cli import main
sys.argv = ["twotower", *{arguments!r}]
main()
"""


def test_the_base_install_says_what_a_command_needs(job, tmp_path) -> None:
    code = BASE.format(libraries=TRAINING_LIBRARIES, arguments=["prepare", *job.arguments])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "needs duckdb, which the base install leaves out" in done.stderr
    assert "Traceback" not in done.stderr


def test_setup_deletes_no_folder_but_its_own(tmp_path, monkeypatch) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    monkeypatch.setenv("TWOTOWER_TRITON_RUNTIME", str(tmp_path))
    with pytest.raises(UserError, match="not an environment of the local Triton server"):
        setup_runtime()
    assert precious.read_text() == "mine"
