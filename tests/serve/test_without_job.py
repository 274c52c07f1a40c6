"""A bundle, a folder of them, or a rendered repository is served with nothing else at hand."""

import json
import os
import re
import shutil
import signal
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from twotower.cli import TRAINING_LIBRARIES, dispatch
from twotower.errors import UserError
from twotower.serve.client import RecommendClient
from twotower.serving_path import names_path

from ..conftest import FinishedRun
from ..export.test_signature import write_key
from .conftest import stubs_of
from .live import Served, wait_until
from .tiny import tiny_bundle

WALL = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {libraries!r}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Wall())
"""


@pytest.fixture(scope="module")
def base_install(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a process that finds none of the libraries that training needs."""
    folder = tmp_path_factory.mktemp("wall")
    (folder / "sitecustomize.py").write_text(WALL.format(libraries=TRAINING_LIBRARIES))
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path)}


def on(cwd: Path, *arguments: str) -> FinishedRun:
    return FinishedRun(cwd, list(arguments), "")


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    for version in (1, 2):
        tiny_bundle(tmp_path / "run" / "bundles", version, max_k=20, default_k=7)
    return tmp_path / "run" / "bundles"


@pytest.fixture
def serving() -> Iterator[list[Served]]:
    """Servers that end with the test."""
    started: list[Served] = []
    yield started
    for served in started:
        served.kill()


def limits(served: Served) -> tuple[int, int]:
    with RecommendClient(served.url("grpc")) as client:
        schema = client.schema()
    return schema.max_k, schema.default_k


def test_a_folder_of_bundles_is_served_and_rolled_out_from(
    bundles, serving, base_install, twotower, tmp_path
) -> None:
    there = ("run/bundles", "--work-dir=run/server")
    serving.append(served := Served(on(tmp_path, *there), env=base_install))
    assert served.version() == 2
    assert limits(served) == (20, 7), "as its own job says"
    done = twotower("rollout", *there, "--to=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "version 1 answers, version 2 is drained and unloaded" in done.stdout
    assert served.version() == 1
    assert "version 2 answers" in served.rollout(back=True)


def test_one_bundle_is_served_by_its_jobs_settings_then_the_configs_then_the_options(
    bundles, serving, base_install, tmp_path
) -> None:
    (tmp_path / "serve.yaml").write_text("serve:\n  default_k: 4\n  max_k: 15\n")
    run = on(tmp_path, "run/bundles/1", "--config", "serve.yaml", "--serve.max_k=16")
    serving.append(served := Served(run, "--work-dir", "run/server", env=base_install))
    assert served.version() == 1
    assert limits(served) == (16, 4)
    with pytest.raises(UserError, match="run/bundles/1: a bundle has no other version"):
        served.rollout(to=2)
    assert served.metric('twotower_rollouts_total{outcome="refused"}') == 1
    assert "twotower serve: stopped" in served.stop()


def test_a_rendered_repository_is_served_as_it_is(
    bundles, serving, base_install, twotower, tmp_path
) -> None:
    done = twotower("render", "run/bundles", "--target=cpu", "--output=elsewhere", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "twotower serve elsewhere" in done.stdout
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "repository")  # as to another host
    config = tmp_path / "repository" / "recommend" / "configs" / "cpu.pbtxt"
    text = config.read_text()
    text = text.replace("max_batch_size: 64", "max_batch_size: 7")
    config.write_text(re.sub(r'"/[^"]*/triton"', '"/not/here"', text))
    assert '"/not/here"' in config.read_text()
    shutil.rmtree(tmp_path / "elsewhere")
    serving.append(served := Served(
        on(tmp_path, "repository", "--work-dir=run/server", "--serve.probe_interval_s=0.3"),
        env=base_install,
    ))  # fmt: skip
    assert served.version() == 2
    with urllib.request.urlopen(f"http://{served.url('http')}/v2/models/recommend/config") as told:
        assert json.load(told)["max_batch_size"] == 7
    before = stubs_of(served.state["pid"])
    for stub in before:
        stub.kill()
    wait_until(lambda: served.metric("twotower_reloads_total") >= 1)
    wait_until(lambda: served.get("/healthz")[0] == 200)
    assert served.version() == 2
    shutil.rmtree(tmp_path / "repository")  # what is served stays as it was at the start
    os.kill(served.state["pid"], signal.SIGKILL)
    wait_until(lambda: served.metric("twotower_restarts_total") >= 1)
    wait_until(lambda: served.get("/healthz")[0] == 200)
    assert served.version() == 2
    with pytest.raises(UserError, match="repository: a repository has no other version"):
        served.rollout()
    served.stop()


def test_the_servers_folder_is_beside_what_it_serves(bundles, twotower, tmp_path) -> None:
    done = twotower("rollout", ".", cwd=bundles / "2")
    assert f"no server of this job is running ({bundles / '2.server'})" in done.stderr


def refusal(*arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        dispatch(["serve", *map(str, arguments), *(
            f"--serve.{name}_port=0" for name in ("http", "grpc", "metrics", "health")
        )])  # fmt: skip
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_served_is_refused_in_a_line(bundles, tmp_path) -> None:
    assert "no such folder: name a bundle" in refusal(tmp_path / "nowhere")
    assert "nothing to serve here: name a bundle" in refusal(tmp_path)
    _, public = write_key(tmp_path, "ours", ed25519.Ed25519PrivateKey.generate())
    key = f"--serve.require_signature={public}"
    assert "is not signed, and a signature by" in refusal(bundles, key)
    for path in (bundles / "2", bundles):
        assert "serve.instances must be >= 1" in refusal(path, "--serve.instances=0")
    (bundles / "1").rename(bundles / "renamed")
    assert "rename it to 1" in refusal(bundles / "renamed")
    with (bundles / "2" / "index.onnx").open("ab") as file:
        file.write(b"x")
    assert "index.onnx: its bytes do not match" in refusal(bundles)
    (bundles / "2" / "job.json").write_text("{")
    assert "job.json: damaged" in refusal(bundles)
    (bundles / "2" / "job.json").unlink()
    assert "job.json: missing from the bundle" in refusal(bundles / "2")


def test_a_repository_that_cannot_be_served_is_refused_in_a_line(
    bundles, twotower, tmp_path
) -> None:
    repository, model = tmp_path / "repository", tmp_path / "repository" / "recommend"
    done = twotower("render", bundles, "--target=cpu", f"--output={repository}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    key = "--serve.require_signature=key.pem"
    assert "a repository's code and configurations are not signed" in refusal(repository, key)
    assert "serve.models: " in refusal(repository, "--serve.models=[recommend,similar]")
    said = refusal(repository, "--serve.instances=3")
    assert re.search(r"serve\.instances: .* is rendered with 1, got 3: leave it out", said)
    config, whole = model / "configs" / "cpu.pbtxt", (model / "configs/cpu.pbtxt").read_text()
    config.write_text(whole.replace("backend", "bckend"))
    assert "cpu.pbtxt: no configuration of a model (" in refusal(repository)
    config.write_text(whole)
    (model / "2" / "answers.py").write_text("def (")
    assert "answers.py: is no Python (" in refusal(repository)
    golden = (model / "2" / "golden.json").read_text()
    (model / "2" / "golden.json").unlink()
    assert "golden.json: missing from the repository" in refusal(repository)
    (model / "2" / "golden.json").write_text(golden + " ")
    assert "golden.json: its bytes do not match" in refusal(repository)
    (model / "2" / "job.json").unlink()
    assert "job.json: missing: make it again with `twotower render`" in refusal(repository)
    shutil.copytree(model / "2", model / "3")
    assert "must hold one version" in refusal(repository)
    (model / "config.pbtxt").write_text(whole)
    config.unlink()
    assert "rendered for gpu, and the local server has no GPU backends" in refusal(repository)


def test_a_path_and_a_job_contradict_each_other(bundles, twotower, tmp_path) -> None:
    (tmp_path / "job.yaml").write_text(json.dumps({"name": "x", "run_dir": "run"}))
    for options in (["--config=job.yaml"], ["--run_dir=run"]):
        done = twotower("serve", "run/bundles", *options, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "is of a job, but PATH says what is served: give one of them" in done.stderr


@pytest.mark.parametrize(
    ("line", "has"),
    [
        ("serve bundles/1", True), ("serve --config=a.yaml bundles", True),
        ("serve --serve.http_port 0 bundles", True), ("serve --serve.http_port 0", False),
        ("serve --config job.yaml", False), ("serve --config job.yaml --run_dir x", False),
        ("serve", False), ("serve --help", False), ("rollout --back bundles", True),
        ("rollout bundles --to 2", True), ("rollout --config job.yaml --to 2", False),
        ("verify bundles/1", False), ("", False),
    ],
)  # fmt: skip
def test_a_path_is_a_word_that_is_no_options_value(line, has) -> None:
    assert names_path(line.split()) is has
