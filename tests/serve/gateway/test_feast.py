"""User features from Feast: a real `feast serve` of the repository that docs/gateway.md shows."""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.data.prepared import PreparedDataset
from twotower.serve.client import RecommendClient
from twotower.serve.gateway.feast import parse_features
from twotower.serve.gateway.store import DamagedRecord
from twotower.serving import request_of

from ...conftest import ROOT
from .conftest import Gateway, free_port, wait_until

# What Feast holds, and the log does not: user, country, age, device.
USERS = [(7, "c3", 61.0, "tv"), (8, None, None, "tv"), (9, "c1", 1e300, "tv"),
         (987654, "c2", 20.0, "web")]  # fmt: skip
SERVICE = "--gateway.feast.service=recommend"


class Feast:
    """`feast serve` of a repository with a SQLite registry and online store."""

    def __init__(self, binary: str, folder: Path) -> None:
        self.binary, self.folder = binary, folder
        self.url = f"http://127.0.0.1:{free_port()}"
        # Feast's server keeps a socket in the home directory.
        self.env = os.environ | {"HOME": str(folder), "FEAST_USAGE": "False"}
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: str) -> None:
        done = subprocess.run(
            [self.binary, *arguments], cwd=self.folder, env=self.env, capture_output=True,
            text=True, check=False, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        log = (self.folder / "serve.log").open("wb")
        self.process = subprocess.Popen(
            [self.binary, "serve", "--port", self.url.rpartition(":")[2]], cwd=self.folder,
            env=self.env, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)  # the server, and its worker

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def feast(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Feast]:
    own = Path(sys.prefix, "feast", "bin", "feast")  # from `make test`
    binary = str(own) if own.exists() else shutil.which("feast")
    if binary is None:
        pytest.skip("no feast: make test installs it")
    folder = tmp_path_factory.mktemp("feast")
    text = (ROOT / "docs" / "gateway.md").read_text()
    for name, language in (("feature_store.yaml", "yaml"), ("features.py", "python")):
        (block,) = re.findall(rf"^```{language}\n# {name}\n(.*?)^```$", text, re.M | re.S)
        (folder / name).write_text(block)
    now = datetime.now(timezone.utc)
    names = ("user_id", "country", "age", "device")
    columns = dict(zip(names, map(list, zip(*USERS, strict=True)), strict=True))
    columns["updated"] = [now - timedelta(hours=1)] * len(USERS)
    pq.write_table(pa.table(columns), folder / "users.parquet")
    server = Feast(binary, folder)
    server.run("apply")
    server.run("materialize-incremental", now.strftime("%Y-%m-%dT%H:%M:%S"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def gateway(start, server, feast) -> Gateway:
    gateway = start(server, f"--gateway.feast.url={feast.url}", SERVICE, "--gateway.retry_s=0.3",
                    "--gateway.feast.timeout_ms=500")  # fmt: skip
    wait_until(lambda: gateway.recommend(user=7)["fallback"] is None, "no Feast", 60)
    return gateway


def test_what_feast_knows_goes_before_the_store(gateway, server, loaded_run) -> None:
    data = PreparedDataset(loaded_run.run_dir / "prepared")
    with RecommendClient(server.grpc_url) as client:
        for user, own in (
            (7, {"country": "c3", "age": 61.0, "device": "tv"}), (8, {"device": "tv"}), (10, {}),
            (987654, {"country": "c2", "age": 20.0, "device": "web"}),
        ):  # fmt: skip
            features, seen = request_of(data, user)
            expected = client.recommend(features | own, k=12, exclude=seen)
            answer = gateway.recommend(user=user, k=12)
            assert [item["id"] for item in answer["items"]] == expected.item_ids
            assert [item["score"] for item in answer["items"]] == pytest.approx(expected.scores)
        features, _ = request_of(data, 7)
        own = {"country": "c3", "age": 18.0, "device": "tv"}
        expected = client.recommend(features | own, k=9)
        asked = {"features": {"age": 18}, "filter_seen": False}
        assert gateway.ids(user=7, k=9, **asked) == expected.item_ids


def test_a_value_that_cannot_be_is_done_without(gateway) -> None:
    failures = 'twotower_gateway_store_failures_total{kind="damaged",of="features"'
    before = gateway.metric(failures)
    assert gateway.recommend(user=9)["reason"] == "features"
    assert gateway.metric(failures) == before + 1
    assert gateway.recommend(user=7)["fallback"] is None, "one damaged user opens no circuit"


@pytest.mark.parametrize("how", ["hung", "killed"])
def test_feast_gone(gateway, feast, loaded_run, how) -> None:
    defaults = json.loads((loaded_run.run_dir / "gateway" / "defaults.json").read_text())
    features, seen = request_of(PreparedDataset(loaded_run.run_dir / "prepared"), 7)
    good = gateway.recommend(user=7, k=5)
    if how == "hung":
        feast.signal(signal.SIGSTOP)
    else:
        feast.stop()
    popular = defaults["segments"][features["country"]]
    for _ in range(8):
        answer = gateway.recommend(user=7, k=5)
        assert (answer["fallback"], answer["reason"]) == ("popularity", "features")
        # By what the store still tells.
        ids = [item["id"] for item in answer["items"]]
        assert ids == [i for i in popular if i not in seen][:5]
        time.sleep(0.05)
    assert gateway.recommend(features={"age": 30})["fallback"] is None, "nobody to look up"
    circuit = 'twotower_gateway_circuit_open{of="features"'
    wait_until(lambda: bool(gateway.ids(user=7)) and gateway.metric(circuit) == 1, "never open")
    assert gateway.metric('twotower_gateway_fallbacks_total{reason="features"') >= 8
    kind = "time-out" if how == "hung" else "error"
    failures = f'twotower_gateway_store_failures_total{{kind="{kind}",of="features"'
    assert gateway.metric(failures) >= 5
    wait_until(lambda: gateway.client.get("/healthz").json()["status"] == "degraded", "healthy")
    event = {"user": 600, "events": [{"item": "item-000001"}]}
    assert gateway.post("/v1/events", event).status_code == 200, "the store takes no part in it"
    assert any(x.get("of") == "features" for x in gateway.lines()), "no line says why"
    if how == "hung":
        feast.signal(signal.SIGCONT)
    else:
        feast.start()
    wait_until(lambda: gateway.recommend(user=7, k=5) == good, "no recovery", 60)
    wait_until(lambda: gateway.client.get("/healthz").json()["status"] == "ok", "not healthy")
    assert gateway.metric(circuit) == 0


class Odd(http.server.BaseHTTPRequestHandler):
    """Answers what is no feature server's answer, or one without the model's features."""

    asked: list[tuple[str, dict]] = []  # noqa: RUF012
    status, text = 200, "[]"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.headers.get("Authorization", ""), json.loads(body)))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Odd)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}/feast/"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (404, "<html>\nno such\n  page", "(HTTP 404: <html> no such page): name a service"),
        (401, "", "TWOTOWER_FEAST_TOKEN holds the token"),
        (200, "[]", "answers, but not as a feature server of Feast"),
        (200, '{"metadata": {"feature_names": ["user_id", "tall"]}, "results": '
              '[{"values": [0], "statuses": ["PRESENT"]}, {"values": [1], "statuses": ["NULL"]}]}',
         "has the features tall, of which the model takes none: it takes country, age, device"),
    ],
)  # fmt: skip
def test_a_service_that_cannot_serve_is_refused(
    odd, server, loaded_run, twotower, monkeypatch, status, text, words
) -> None:
    monkeypatch.setattr(Odd, "status", status)
    monkeypatch.setattr(Odd, "text", text)
    monkeypatch.setenv("TWOTOWER_FEAST_TOKEN", "tt-secret")
    done = twotower(
        "gateway", *loaded_run.arguments, f"--gateway.triton=[{server.grpc_url}]",
        "--gateway.port=0", f"--gateway.feast.url={odd}", SERVICE, cwd=loaded_run.cwd,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, "a traceback, or an unclosed connection"
    body = {"feature_service": "recommend", "entities": {"user_id": [0]}}
    assert Odd.asked[-1] == ("Bearer tt-secret", body)


def test_a_feast_that_is_not_there_yet_does_not_hold_up_the_start(start, server) -> None:
    gateway = start(server, f"--gateway.feast.url=http://127.0.0.1:{free_port()}", SERVICE)
    assert gateway.recommend(user=7)["reason"] == "features"
    assert any(x.get("message") == "feature store silent" for x in gateway.lines())


VALUES = st.none() | st.integers() | st.text() | st.lists(st.floats(allow_nan=False), max_size=2)
STATUS = st.sampled_from(["PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE"])


@given(st.dictionaries(st.text(), st.tuples(VALUES, STATUS), max_size=4))
def test_features_that_are_there_are_read(columns) -> None:
    answer = {
        "metadata": {"feature_names": list(columns)},
        "results": [{"values": [v], "statuses": [s]} for v, s in columns.values()],
    }
    found = parse_features(json.dumps(answer).encode())
    assert found == {n: v if s == "PRESENT" else None for n, (v, s) in columns.items()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["metadata", "feature_names", "results", "values", "statuses"]), inner
    ),
)  # fmt: skip


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_answer_is_read_or_damaged(text) -> None:
    try:
        found = parse_features(text)
    except DamagedRecord as error:
        refusal, found = str(error), {}
    else:
        refusal = ""
    assert "\n" not in refusal
    assert isinstance(found, dict)
