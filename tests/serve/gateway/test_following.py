"""A running gateway follows a rollout to a bundle with other features, and back."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from twotower.export.bundle import read_bundle, seal
from twotower.files import write_json
from twotower.serve.gateway.defaults import Defaults
from twotower.serve.supervisor import running_server

from ..conftest import FREE
from ..live import Asking, Served, tiny_job
from ..tiny import ITEM_IDS, spec, tiny_bundle, write_graph
from .conftest import Gateway, wait_until

KNOWN = {"user_id": None, "text": [0.1, 0.2, 0.3]}


def with_another_feature(bundle: Path) -> None:
    """Have a bundle's queries take a number more, which changes no answer."""
    graph = onnx.load(bundle / "query.onnx")
    graph.graph.input.append(helper.make_tensor_value_info("age", TensorProto.FLOAT, ["B", 1]))
    onnx.save(graph, bundle / "query.onnx")
    golden = json.loads((bundle / "golden.json").read_text())
    for query in golden:
        query["features"]["age"] = 31.0
    write_json(bundle / "golden.json", golden)
    manifest = read_bundle(bundle, verify=False).manifest
    (bundle / "manifest.json").unlink()
    seal(bundle, replace(manifest, query=[*manifest.query, spec("age", "number", "float32")]))


def with_item_tower(bundle: Path, *more: str) -> None:
    """Give a bundle's items a tower, of their ids and of so many numbers more."""
    write_graph(
        bundle / "item.onnx",
        [helper.make_node("Cast", ["item_id"], ["id"], to=TensorProto.FLOAT),
         helper.make_node("Concat", ["id", *more, *["id"] * (2 - len(more))], ["all"], axis=-1),
         helper.make_node("LpNormalization", ["all"], ["vector"], axis=-1, p=2)],
        [("item_id", TensorProto.INT64, ["B", 1])]
        + [(name, TensorProto.FLOAT, ["B", 1]) for name in more],
        [("vector", TensorProto.FLOAT, ["B", 3])], {},
    )  # fmt: skip
    manifest = read_bundle(bundle, verify=False).manifest
    (bundle / "manifest.json").unlink()
    numbers = [spec(name, "number", "float32") for name in more]
    seal(bundle, replace(manifest, item=[*manifest.item, *numbers]))


def write_defaults(run_dir: Path, **more: Any) -> None:
    Defaults(
        user_id_dtype="int64", user_features=["user_id"], features=KNOWN | more, segment_by=None,
        popular=ITEM_IDS[:9].tolist(), segments={},
    ).write(run_dir / "gateway" / "defaults.json")  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """On version 1; queries of version 2 have a feature more, and items of version 3."""
    models = ["recommend", "embed_query", "embed_items"]
    job = tiny_job(tmp_path_factory.mktemp("following"), default_k=5, models=models)
    bundles = job.run_dir / "bundles"
    tiny_bundle(bundles, 3)
    with_another_feature(bundles / "2")
    for version, more in (("1", ()), ("2", ()), ("3", ("price",))):
        with_item_tower(bundles / version, *more)
    running = Served(job)
    try:
        running.rollout(to=1, new_schema=True)
        yield running
    finally:
        running.kill()


@contextmanager
def running_gateway(served: Served, run_dir: Path, *servers: str) -> Iterator[Gateway]:
    folder = run_dir / "gateway"
    (folder / "users.jsonl").write_text(
        json.dumps({"user": 1, "features": {"age": 20.0}, "items": [100], "times": [None]}) + "\n"
    )
    state, log = folder / "gateway.json", folder / "log"
    with log.open("w") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "twotower", "gateway", *served.job.arguments,
             f"--run_dir={run_dir}", f"--gateway.triton=[{','.join(servers)}]",
             "--gateway.port=0", "--gateway.deadline_ms=2000", "--gateway.retry_s=0.2"],
            cwd=served.job.cwd, stdout=handle, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    wait_until(lambda: state.exists() or process.poll() is not None, "no gateway", 60)
    assert process.poll() is None, log.read_text()
    running = Gateway(process, json.loads(state.read_text())["url"], log)
    try:
        yield running
    finally:
        assert running.stop() == 0


@pytest.fixture(scope="module")
def gateway(served) -> Iterator[Gateway]:
    write_defaults(served.job.run_dir)
    with running_gateway(served, served.job.run_dir, served.url("grpc")) as running:
        yield running


class Callers(Asking):
    """Threads that ask all the time, while the block runs."""

    def __init__(self, gateway: Gateway) -> None:
        self.answers: list[dict[str, Any]] = []
        self._gateway = gateway
        super().__init__(*[self._ask] * 4)

    def _ask(self) -> None:
        while self.going:
            for path in ("/v1/embed", "/v1/recommend"):
                response = self._gateway.post(path, {"user": 1})
                self.answers.append(
                    {"status": response.status_code, "text": response.text} | response.json()
                )

    def failed(self) -> list[dict[str, Any]]:
        return [a for a in self.answers if a["status"] != 200 or a.get("fallback")]

    def wait_for(self, version: int) -> None:
        wait_until(
            lambda: {a.get("version") for a in self.answers[-20:]} == {version},
            f"no answers of version {version}",
        )


def features(gateway: Gateway, of: str = "Features") -> set[str]:
    document = gateway.client.get("/openapi.json").json()
    return set(document["components"]["schemas"][of]["properties"])


def test_a_rollout_to_other_features_and_back_is_followed(served, gateway) -> None:
    assert features(gateway) == {"user_id", "text"}
    write_defaults(served.job.run_dir, age=30.0)  # as load-store does for the new features
    with Callers(gateway) as callers:
        served.rollout(to=2, new_schema=True)
        callers.wait_for(2)
    assert callers.failed() == []
    golden = read_bundle(served.bundle(2)).golden()[1]
    ids = gateway.ids(
        user=1, k=6, filter_seen=False, exclude=golden.exclude, features=golden.features
    )
    assert ids == golden.item_ids
    assert features(gateway) == {"user_id", "text", "age"}
    with Callers(gateway) as callers:
        served.rollout(back=True, new_schema=True)
        callers.wait_for(1)
    assert callers.failed() == []
    followed = [line["version"] for line in gateway.lines() if line["message"] == "schema followed"]
    assert followed == [2, 1]
    response = gateway.post("/v1/recommend", {"features": {"age": 3.0}})
    assert (response.status_code, "there is no 'age' here" in response.text) == (422, True)


def test_other_features_of_items_alone_are_followed(served, gateway) -> None:
    def embed(**item: Any) -> Any:
        return gateway.post("/v1/embed", {"item_features": {"item_id": 100} | item})

    assert features(gateway, "ItemFeatures") == {"item_id"}
    assert embed().json()["version"] == 1
    with Callers(gateway) as callers:  # who ask for no item's vector
        served.rollout(to=3)
        callers.wait_for(3)
    try:
        assert callers.failed() == []
        assert embed(price=100.0).json() == {"vector": pytest.approx([3**-0.5] * 3), "version": 3}
        assert features(gateway, "ItemFeatures") == {"item_id", "price"}
        assert embed().json()["error"]["where"] == "body.item_features.price"
    finally:
        served.rollout(to=1)
    # One answer says that the bundle is another, and the next request asks what it takes.
    wait_until(
        lambda: gateway.recommend(user=1)["version"] == 1 and embed().status_code == 200,
        "not followed back",
    )
    assert embed(price=100.0).status_code == 422


def test_what_it_knows_nothing_of_is_followed_once_it_does(served, gateway) -> None:
    write_defaults(served.job.run_dir)
    served.rollout(to=2, new_schema=True)
    try:
        for _ in range(3):
            assert gateway.recommend(user=1)["reason"] == "model"
        assert gateway.client.get("/healthz").json()["status"] == "degraded"
        (line,) = [x for x in gateway.lines() if x["message"] == "schema not followed"]
        assert (
            "knows no feature 'age', which the served model has: run `twotower load-store`"
            in (line["reason"])
        )
        write_defaults(served.job.run_dir, age=30.0)
        wait_until(lambda: gateway.recommend(user=1)["version"] == 2, "not followed")
        assert features(gateway) == {"user_id", "text", "age"}
    finally:
        served.rollout(to=1, new_schema=True)
    wait_until(lambda: gateway.recommend(user=1)["version"] == 1, "not followed back")


def test_servers_of_different_bundles_are_each_asked_in_their_way(served, tmp_path) -> None:
    write_defaults(tmp_path, age=30.0)
    with (
        running_server(served.bundle(2), FREE, tmp_path / "server") as other,
        running_gateway(served, tmp_path, served.url("grpc"), other.grpc_url) as gateway,
    ):
        answers = [gateway.recommend(user=1, k=4) for _ in range(8)]
    assert [a["version"] for a in answers] in ([1, 2] * 4, [2, 1] * 4)
