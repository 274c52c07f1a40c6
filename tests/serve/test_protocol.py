"""The commands of docs/protocol.md and of the README, run as they stand against a real server."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import pytest

from twotower.serve.client import RecommendClient

from ..conftest import ROOT

# The user of the examples.
USER = {"country": "c1", "age": 31, "device": "web"}
# When what the examples name was taken.
TIMES = [1739000000, 1739500000]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def example(page: str, language: str, words: str) -> str:
    (block,) = [b for b in blocks(page, language) if words in b]
    return block


def run(command, server, cwd) -> str:
    if isinstance(command, str):
        command = ["bash", "-euo", "pipefail", "-c", command]
    *before, text = command
    for port, url in (("8000", server.http_url), ("8001", server.grpc_url)):
        text = text.replace(f"localhost:{port}", url)
    # The reader's `python3` is the environment's: this test's own.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*before, text],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expected(server, **request) -> tuple[list[str], list[float]]:
    with RecommendClient(server.grpc_url, timeout_s=20) as client:
        history = request.pop("history")
        features = USER | {"history": history, "history_times": TIMES[: len(history)]}
        answer = client.recommend(features, **request)
    return answer.item_ids, answer.scores


def test_the_configuration_says_what_the_model_takes(server, tmp_path) -> None:
    schema = json.loads(run(example("docs/protocol.md", "sh", "/config"), server, tmp_path))
    assert [f["name"] for f in schema["features"]] == [
        "history", "history_times", "country", "age", "device"
    ]  # fmt: skip
    assert (schema["version"], schema["default_k"], schema["max_k"]) == (1, 10, 300)


@pytest.mark.parametrize(
    ("page", "language", "history", "k"),
    [
        ("docs/protocol.md", "sh", ["item-000001", "item-000007"], 3),
        ("README.md", "", ["item-000001"], 10),
    ],
)
def test_the_curl_example_answers(server, tmp_path, page, language, history, k) -> None:
    answer = json.loads(run(example(page, language, "recommend/infer"), server, tmp_path))
    found = {o["name"]: o["data"] for o in answer["outputs"]}
    exclude = history if page.startswith("docs") else []
    ids, scores = expected(server, history=history, k=k, exclude=exclude)
    assert found["item_ids"] == ids
    assert found["scores"] == pytest.approx(scores, abs=1e-5)
    assert found["version"] == [1]


def test_the_python_example_answers(server, tmp_path) -> None:
    code = example("docs/protocol.md", "python", "ModelInfer")
    ids, scores, version = re.match(
        r"(\[.*\]) (\(.*\)) (\d+)", run([sys.executable, "-c", code], server, tmp_path)
    ).groups()
    best, best_scores = expected(server, history=["item-000001"], k=3)
    assert literal_eval(ids) == best
    assert literal_eval(scores) == pytest.approx(best_scores, abs=1e-5)
    assert version == "1"


@pytest.mark.skipif(not shutil.which("grpcurl"), reason="grpcurl is not installed")
def test_the_grpcurl_example_answers(server, tmp_path) -> None:
    run(example("docs/protocol.md", "sh", 'triton.protoset", "wb'), server, tmp_path)
    answer = json.loads(run(example("docs/protocol.md", "sh", "grpcurl"), server, tmp_path))
    best, _ = expected(server, history=["item-000001"], k=3)
    assert [o["name"] for o in answer["outputs"]] == ["item_ids", "scores", "version"]
    raw = base64.b64decode(answer["raw_output_contents"][0])
    assert [raw[i + 4 : i + 15].decode() for i in range(0, len(raw), 15)] == best


def test_the_descriptors_are_those_of_the_service(server, tmp_path) -> None:
    run(example("docs/protocol.md", "sh", 'triton.protoset", "wb'), server, tmp_path)
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    files = FileDescriptorSet.FromString((tmp_path / "triton.protoset").read_bytes())
    methods = [m.name for f in files.file for s in f.service for m in s.method]
    assert "ModelInfer" in methods
