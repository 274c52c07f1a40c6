"""`twotower serve` as a process on bundles made by hand, and clients that keep it busy."""

import json
import random
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import yaml

from twotower.errors import UserError
from twotower.export.bundle import read_bundle
from twotower.serve.client import RecommendClient
from twotower.serve.control import command

from ..conftest import FinishedRun
from .conftest import start_serving
from .tiny import tiny_bundle

DATA = {
    "interactions": "log.parquet", "item": [{"name": "item_id", "kind": "id"}],
    "query": [{"name": "user_id", "kind": "id"}],
}  # fmt: skip


def tiny_job(cwd: Path, sign_with: str | None = None, **serve: object) -> FinishedRun:
    """Return a job with two bundles, ready to be served."""
    for version in (1, 2):
        tiny_bundle(cwd / "run" / "bundles", version, sign_with)
    job = {"name": "tiny", "run_dir": "run", "data": DATA, "serve": serve}
    (cwd / "job.yaml").write_text(yaml.safe_dump(job))
    return FinishedRun(cwd, ["--config", "job.yaml"], "")


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Served:
    """`twotower serve` of a job, as a process."""

    def __init__(
        self, job: FinishedRun, *options: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.job, self.work_dir = job, job.run_dir / "server"
        self.process, file = start_serving(job, *options, env=env)
        self.state = json.loads(file.read_text())
        try:
            wait_until(lambda: self.get("/healthz") == (200, "ok\n"))
        except BaseException:
            self.kill()
            raise

    def bundle(self, version: int) -> Path:
        return self.job.run_dir / "bundles" / str(version)

    @property
    def urls(self) -> dict[str, str]:
        return {protocol: self.url(protocol) for protocol in ("grpc", "http")}

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
            for golden in read_bundle(self.bundle(version)).golden():
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
        (self.work_dir / "server.json").unlink(missing_ok=True)


class Asking:
    """Threads that ask until the block ends.

    Args:
        asks: what each does, over and over, while `going`.
    """

    def __init__(self, *asks: Callable[[], None]) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=ask) for ask in asks]

    @property
    def going(self) -> bool:
        return not self._stop.is_set()

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Load(Asking):
    """Threads that ask over both protocols; every answer must be its version's golden one."""

    def __init__(self, urls: dict[str, str], *bundles: Path) -> None:
        self.golden = [(int(b.name), g) for b in bundles for g in read_bundle(b).golden()]
        self.failures: list[str] = []
        self.answered = {int(b.name): 0 for b in bundles}
        super().__init__(*(
            partial(self._ask, url, protocol)
            for protocol, url in (*urls.items(), *urls.items())
        ))  # fmt: skip

    def _ask(self, url: str, protocol: str) -> None:
        with RecommendClient(url, protocol, timeout_s=10) as client:
            while self.going:
                version, golden = random.choice(self.golden)
                try:
                    answer = client.recommend(golden.features, k=6, exclude=golden.exclude)
                except UserError as error:
                    self.failures.append(str(error))
                    continue
                if answer.version == version and answer.item_ids != golden.item_ids:
                    self.failures.append(f"{version} answered {answer.item_ids}")
                self.answered[answer.version] += 1
