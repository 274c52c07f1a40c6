"""A running server takes another bundle and goes back, under load; what is unfit is refused."""

import json
import random
import re
import shutil
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from twotower.errors import UserError
from twotower.export.bundle import read_bundle, seal
from twotower.serve.client import RecommendClient
from twotower.serve.control import command

from ..conftest import FinishedRun
from .conftest import start_serving, stubs_of
from .tiny import tiny_bundle

DATA = {
    "interactions": "log.parquet", "item": [{"name": "item_id", "kind": "id"}],
    "query": [{"name": "user_id", "kind": "id"}],
}  # fmt: skip


def tiny_job(cwd: Path, *versions: int, **serve: object) -> FinishedRun:
    for version in versions:
        tiny_bundle(cwd / "run" / "bundles", version)
    job = {"name": "tiny", "run_dir": "run", "data": DATA, "serve": serve}
    (cwd / "job.yaml").write_text(yaml.safe_dump(job))
    return FinishedRun(cwd, ["--config", "job.yaml"], "")


class Served:
    """`twotower serve` of a job, as a process."""

    def __init__(self, job: FinishedRun) -> None:
        self.job, self.work_dir = job, job.run_dir / "server"
        self.process, file = start_serving(job)
        self.state = json.loads(file.read_text())

    def url(self, protocol: str) -> str:
        return f"127.0.0.1:{self.state[f'{protocol}_port']}"

    def rollout(self, to: int | None = None, back: bool = False, new_schema: bool = False) -> str:
        request = {"to": to, "back": back, "new_schema": new_schema}
        return command(self.work_dir, request, lambda _: None)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.url('health')}{path}") as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def metric(self, name: str) -> float:
        (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(value)

    def version(self) -> int:
        """Return which version answers a golden query of its own rightly."""
        with RecommendClient(self.url("grpc"), timeout_s=5) as client:
            version = client.schema().version
            for golden in read_bundle(self.job.run_dir / "bundles" / str(version)).golden():
                answer = client.recommend(golden.features, k=6, exclude=golden.exclude)
                assert (answer.item_ids, answer.version) == (golden.item_ids, version)
        return version

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        output, _ = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, output
        return output

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    job = tiny_job(
        tmp_path_factory.mktemp("rollout"), 1, probe_interval_s=0.3, memory_limit_mb=2000
    )
    running = Served(job)
    yield running
    running.kill()


class Load:
    """Threads that ask over both protocols; every answer must be its version's golden one."""

    def __init__(self, served: Served, *versions: int) -> None:
        bundles = [read_bundle(served.job.run_dir / "bundles" / str(v)) for v in versions]
        self.golden = [(b.manifest.version, g) for b in bundles for g in b.golden()]
        self.failures: list[str] = []
        self.answered = dict.fromkeys(versions, 0)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(served.url(protocol), protocol))
            for protocol in ("grpc", "http", "grpc", "http")
        ]

    def _ask(self, url: str, protocol: str) -> None:
        with RecommendClient(url, protocol, timeout_s=10) as client:
            while not self._stop.is_set():
                version, golden = random.choice(self.golden)
                try:
                    answer = client.recommend(golden.features, k=6, exclude=golden.exclude)
                except UserError as error:
                    self.failures.append(str(error))
                    continue
                if answer.version == version and answer.item_ids != golden.item_ids:
                    self.failures.append(f"{version} answered {answer.item_ids}")
                self.answered[answer.version] += 1

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_no_request_fails_while_versions_change_to_and_fro(served) -> None:
    tiny_bundle(served.job.run_dir / "bundles", 2)
    with Load(served, 1, 2) as load:
        assert "version 2 answers, version 1 is drained" in served.rollout()
        assert served.version() == 2
        for expected in (1, 2, 1):
            served.rollout(back=True)
            assert served.version() == expected
    assert load.failures == []
    assert min(load.answered.values()) > 20
    assert served.get("/healthz") == (200, "ok\n")
    assert served.metric("twotower_version") == 1
    assert served.metric("twotower_probe_failures_total") == 0
    # What is not served takes neither memory nor disk.
    folders = sorted(p.name for p in (served.work_dir / "repository").rglob("[0-9]*"))
    assert folders == ["1"]
    assert len(stubs_of(served.state["pid"])) == 1
    assert json.loads((served.work_dir / "rollout.json").read_text()) == {"serve": 1, "before": 2}


def copy_of(served: Served, version: int, change) -> None:
    """Make another version of version 1, with other golden queries or another manifest."""
    bundles = served.job.run_dir / "bundles"
    path = bundles / str(version)
    shutil.copytree(bundles / "1", path)
    manifest = read_bundle(bundles / "1").manifest
    seal(path, change(path, manifest, {"version": version}))


@pytest.fixture
def refused(served):
    """Asks for a rollout that must be refused while the old version answers; gives the reason."""

    def ask(**request: object) -> str:
        before = served.metric('twotower_rollouts_total{outcome="refused"}')
        with Load(served, 1) as load, pytest.raises(UserError) as caught:
            served.rollout(**request)
        assert load.failures == []
        assert served.version() == 1
        assert served.metric('twotower_rollouts_total{outcome="refused"}') == before + 1
        assert served.get("/healthz")[0] == 200
        assert not (served.work_dir / "repository" / "candidate").exists()
        assert len(stubs_of(served.state["pid"])) == 1
        return str(caught.value)

    return ask
