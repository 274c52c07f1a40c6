"""A running server takes another bundle and goes back, under load; what is unfit is refused."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from twotower.errors import UserError
from twotower.export.bundle import read_bundle, seal
from twotower.export.manifest import Manifest
from twotower.files import write_json
from twotower.serve.rollout import Rollouts, chosen_bundle
from twotower.serve.server import Judged
from twotower.serve.supervisor import running_server

from ..export.test_signature import write_key
from .conftest import FREE, stubs_of
from .live import Load, Served, tiny_job
from .tiny import QUERY, spec, tiny_bundle


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    key = ed25519.Ed25519PrivateKey.generate()
    return write_key(tmp_path_factory.mktemp("keys"), "ours", key)


@pytest.fixture(scope="module")
def served(keys, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """On version 1, watched, with little memory to spare."""
    job = tiny_job(
        tmp_path_factory.mktemp("rollout"), keys[0], require_signature=keys[1],
        probe_interval_s=0.3, memory_limit_mb=350,
    )  # fmt: skip
    running = Served(job)
    try:
        running.rollout(to=1)
        yield running
    finally:
        running.kill()


def test_no_request_fails_while_versions_change_to_and_fro(served) -> None:
    with Load(served.urls, served.bundle(1), served.bundle(2)) as load:
        assert "version 2 answers, version 1 is drained" in served.rollout(to=2)
        assert served.version() == 2
        served.rollout(back=True)
        assert served.version() == 1
    assert load.failures == []
    assert min(load.answered.values()) > 20
    assert served.get("/healthz") == (200, "ok\n")
    assert served.metric("twotower_version") == 1
    assert served.metric("twotower_probe_failures_total") == 0
    assert served.metric("twotower_reloads_total") == 0
    # What is not served takes neither memory nor disk.
    folders = sorted(p.name for p in (served.work_dir / "repository").rglob("[0-9]*"))
    assert folders == ["1"]
    assert len(stubs_of(served.state["pid"])) == 1
    assert json.loads((served.work_dir / "rollout.json").read_text()) == {"serve": 1, "before": 2}


@pytest.fixture
def refused(served):
    """Asks for a rollout that must be refused while the old version answers; gives the reason."""

    def ask(**request: object) -> str:
        before = served.metric('twotower_rollouts_total{outcome="refused"}')
        with Load(served.urls, served.bundle(1)) as load, pytest.raises(UserError) as caught:
            served.rollout(**request)
        assert load.failures == []
        assert served.version() == 1
        assert served.metric('twotower_rollouts_total{outcome="refused"}') == before + 1
        assert served.get("/healthz")[0] == 200
        assert [p.name for p in (served.work_dir / "repository").iterdir()] == ["recommend"]
        assert len(stubs_of(served.state["pid"])) == 1
        return str(caught.value)

    return ask


def damaged(path: Path, manifest: Manifest) -> Manifest:
    with (path / "query.onnx").open("ab") as file:
        file.write(b"x")
    return manifest


def another_schema(path: Path, manifest: Manifest) -> Manifest:
    return replace(manifest, query=[QUERY[0], spec("text", "vector", "float32", 4)])


def other_answers(path: Path, manifest: Manifest) -> Manifest:
    golden = json.loads((path / "golden.json").read_text())
    golden[3]["item_ids"][:2] = reversed(golden[3]["item_ids"][:2])
    write_json(path / "golden.json", golden)
    return manifest


def large(path: Path, manifest: Manifest) -> Manifest:
    (path / "query.weights").write_bytes(bytes(350_000_000))
    return manifest


def broken(path: Path, manifest: Manifest) -> Manifest:
    (path / "index.onnx").write_bytes(b"no graph")
    return manifest


@pytest.mark.parametrize(
    ("number", "change", "words"),
    [
        (11, damaged, r"11/query\.onnx: its bytes do not match"),
        (12, another_schema, r"another schema than the served 1: 'text' has the length 4, not 3"),
        (13, other_answers, r"golden query 3: version 13 answered"),
        (14, large, r"would not fit beside version 1: .* its files are \+350 MB\), the limit is"),
        (15, broken, r"did not load version 15: .*index\.onnx"),
        (16, lambda _, manifest: manifest, r"is not signed, and a signature by .* is demanded"),
    ],
)
def test_an_unfit_bundle_is_refused_and_the_old_one_goes_on(
    served, refused, keys, number, change, words
) -> None:
    path = served.bundle(number)
    shutil.copytree(served.bundle(1), path)
    for name in ("manifest.json", "manifest.sig"):
        (path / name).unlink()
    manifest = replace(read_bundle(served.bundle(1)).manifest, version=number)
    if change is not damaged:
        manifest = change(path, manifest)
    seal(path, manifest, None if number == 16 else keys[0])
    if change is damaged:
        damaged(path, manifest)
    assert re.search(words, refused(to=number))


def test_a_rollout_to_nowhere_is_refused(served, refused) -> None:
    assert "no version 77, there are 1, 2" in refused(to=77)
    assert refused(to=1) == "version 1 is served already"


def test_the_command_rolls_out_and_says_why_not(served, twotower) -> None:
    def rollout(*options: str):
        return twotower("rollout", *served.job.arguments, *options, cwd=served.job.cwd)

    served.rollout(to=2)
    done = rollout("--back")
    assert done.returncode == 0, done.stderr
    assert "5 golden queries answered beside version 2" in done.stdout
    assert "version 1 answers, version 2 is drained and unloaded" in done.stdout
    assert served.version() == 1
    done = rollout("--to=1")
    assert done.returncode == 2
    assert done.stderr.strip() == "twotower: error: version 1 is served already"


def test_a_roll_back_outlives_the_process(tmp_path) -> None:
    job = tiny_job(tmp_path)
    first = Served(job)
    try:
        with pytest.raises(UserError, match="nothing to go back to"):
            first.rollout(back=True)
        assert first.version() == 2, "the newest"
        first.rollout(to=1)
    finally:
        first.kill()
    with pytest.raises(UserError, match="no server of this job is running"):
        first.rollout()
    second = Served(job)
    try:
        assert second.version() == 1
        output = second.stop()
    finally:
        second.kill()
    assert "version 1 is served, as the last rollout chose; 2 is newer" in output
    shutil.rmtree(second.bundle(1))
    with pytest.raises(UserError, match="no version 1, which the last rollout chose"):
        chosen_bundle(second.bundle(2).parent, second.work_dir)


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[tuple]:
    """A server in this process on version 1 of two, and its rollouts."""
    for version in (1, 2):
        tiny_bundle(tmp_path / "bundles", version)
    with running_server(tmp_path / "bundles" / "1", FREE, tmp_path / "server") as server:
        yield server, Rollouts(server, tmp_path / "bundles")


def rollout(rollouts: Rollouts) -> str:
    return rollouts.run(lambda _: None, to=2, back=False, new_schema=False)


def test_a_load_that_hangs_is_given_up_and_the_next_one_succeeds(inside, monkeypatch) -> None:
    server, rollouts = inside
    render = server.render

    def render_hanging(judged: Judged, model: str) -> None:
        render(judged, model)
        folder = server.repository / model / str(judged.version)
        shutil.rmtree(folder / "__pycache__")
        code = (folder / "answers.py").read_text()
        start = "        folder = Path(args"
        assert start in code
        code = code.replace(start, f"        import time; time.sleep(1000)\n{start}")
        (folder / "answers.py").write_text(code)

    urls = {"grpc": server.grpc_url, "http": server.http_url}
    server.config = replace(server.config, load_timeout_s=2.0)
    with monkeypatch.context() as patch:
        patch.setattr(server, "render", render_hanging)
        with (
            Load(urls, server.bundle.path) as load,
            pytest.raises(UserError, match=r"not ready within serve\.load_timeout_s=2"),
        ):
            rollout(rollouts)
    assert load.failures == []
    assert len(stubs_of(server.process.pid)) == 1
    server.config = replace(server.config, load_timeout_s=60.0)
    assert "version 2 answers" in rollout(rollouts)
    assert server.prove() < 1e-4


def test_a_version_that_errs_only_once_it_answers_is_taken_back(inside) -> None:
    server, rollouts = inside
    other = read_bundle(rollouts.bundles / "2")
    golden = other.golden()
    wrong = replace(golden[0], item_ids=golden[0].item_ids[::-1])
    urls = {"grpc": server.grpc_url, "http": server.http_url}
    with (
        Load(urls, server.bundle.path, other.path) as load,
        pytest.raises(UserError, match="golden query 0: version 2 answered"),
    ):
        server.flip(Judged(other, [wrong]))
    assert load.failures == []
    assert server.served.version == 1
    assert server.prove() < 1e-4
    server.probe()
    assert [p.name for p in server.repository.rglob("[0-9]*")] == ["1"]


def test_one_rollout_at_a_time(inside) -> None:
    _, rollouts = inside
    second: list[str] = []

    def ask_again(_: str) -> None:
        with pytest.raises(UserError) as caught:
            rollout(rollouts)
        second.append(str(caught.value))

    rollouts.run(ask_again, to=2, back=False, new_schema=False)
    assert "another rollout of this server is under way" in second[0]
