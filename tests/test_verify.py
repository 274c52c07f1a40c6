"""`twotower verify`: real runtimes answer a bundle's golden queries, and differences are shown."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from twotower.export.bundle import read_bundle, seal
from twotower.serve.config import ServeConfig
from twotower.serve.supervisor import running_server

ANY_PORT = ServeConfig(http_port=0, grpc_port=0, metrics_port=0)


def altered(bundle: Path, target: Path, change=lambda golden: None) -> Path:
    """A whole bundle of the version that the target names, whose golden queries are others."""
    shutil.copytree(bundle, target)
    golden = json.loads((target / "golden.json").read_text())
    change(golden)
    (target / "golden.json").write_text(json.dumps(golden))
    manifest = read_bundle(bundle).manifest
    seal(target, replace(manifest, version=int(target.name), files={}))
    return target


def test_both_runtimes_answer_as_pytorch_did(finished_run, twotower) -> None:
    done = twotower("verify", finished_run.run_dir, cwd=finished_run.cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    for runtime in ("ONNX Runtime", "Triton"):
        assert f"worst query of {runtime}" in done.stdout
    assert done.stdout.count("passes") == 2
    assert "DIFFERS" not in done.stdout


def test_a_wrong_answer_is_shown_and_fails(finished_run, twotower, tmp_path) -> None:
    worst = 7

    def swap(golden) -> None:
        ids = golden[worst]["item_ids"]
        ids[0], ids[-1] = ids[-1], ids[0]

    bundle = altered(finished_run.bundle, tmp_path / "1", swap)
    done = twotower("verify", bundle, "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = json.loads(done.stdout)
    whole = read_bundle(finished_run.bundle).golden()[worst]
    for found in report["runtimes"]:
        assert not found["passes"]
        assert found["worst_query"]["features"] == whole.features
        assert found["worst_answer"][0] == whole.item_ids
    shown = twotower("verify", bundle, "--no-server", cwd=tmp_path)
    assert shown.returncode == 1
    assert "DIFFERS" in shown.stdout
    assert f"number {worst}" in shown.stdout
    assert "Triton" not in shown.stdout


def test_the_threshold_is_the_users(finished_run, twotower, tmp_path) -> None:
    def shift(golden) -> None:
        golden[3]["scores"] = [s + 0.01 for s in golden[3]["scores"]]

    bundle = altered(finished_run.bundle, tmp_path / "1", shift)
    strict = twotower("verify", bundle, "--no-server", cwd=tmp_path)
    loose = twotower("verify", bundle, "--no-server", "--tolerance=0.02", cwd=tmp_path)
    assert (strict.returncode, loose.returncode) == (1, 0), strict.stdout + loose.stdout
    assert "1.0e-02" in loose.stdout


def test_a_running_server_is_asked(finished_run, twotower, tmp_path) -> None:
    other = altered(finished_run.bundle, tmp_path / "2")
    with running_server(finished_run.bundle, ANY_PORT, tmp_path / "server") as server:
        right = twotower("verify", finished_run.bundle, f"--url={server.grpc_url}", cwd=tmp_path)
        wrong = twotower("verify", other, f"--url={server.grpc_url}", cwd=tmp_path)
    assert right.returncode == 0, right.stdout + right.stderr
    assert wrong.returncode == 2
    assert "answers with version 1" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--url=127.0.0.1:1"], "127.0.0.1:1"), (["--url=a:1", "--no-server"], "contradict")],
)
def test_mistakes_are_one_line(arguments, words, finished_run, twotower) -> None:
    done = twotower("verify", finished_run.run_dir, *arguments, cwd=finished_run.cwd)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
