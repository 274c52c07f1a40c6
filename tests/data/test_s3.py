"""A log on S3 (moto's own server), read by the command as a user would run it."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from twotower.data.prepared import PreparedDataset

from ..conftest import EVENTS
from .logs import days, meaning, prepared, write_formats, write_nested


@dataclass
class Store:
    """Moto's S3 server, with what it was asked for."""

    url: str
    sent: dict[str, int] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What a user sets to reach it."""
        keep = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        return keep | {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true", "COLUMNS": "200",
        }  # fmt: skip


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    store = Store("")

    def counted(environ: Any, start: Any) -> Iterator[bytes]:
        for part in app(environ, start):
            path = environ["PATH_INFO"]
            if environ["REQUEST_METHOD"] == "GET":
                store.sent[path] = store.sent.get(path, 0) + len(part)
            yield part

    server = make_server("127.0.0.1", 0, counted, threaded=True)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield store
    server.shutdown()
    thread.join()


@pytest.fixture
def bucket(store: Store) -> Any:
    import boto3

    session = boto3.session.Session("test", "test", region_name="us-east-1")
    client = session.client("s3", endpoint_url=store.url)
    client.create_bucket(Bucket="bucket")
    yield client
    for entry in client.list_objects_v2(Bucket="bucket").get("Contents", []):
        client.delete_object(Bucket="bucket", Key=entry["Key"])
    client.delete_bucket(Bucket="bucket")


def command(
    cwd: Path, log: str, environment: dict[str, str], before: str = ""
) -> "subprocess.CompletedProcess[str]":
    job = {
        "name": "s3", "run_dir": "run", "tracking": {"wandb": "off"},
        "data": {
            "interactions": log,
            "query": [{"name": "history", "kind": "history", "table": "item_id"}],
            "item": [{"name": "item_id", "kind": "id"}],
        },
    }  # fmt: skip
    (cwd / "job.yaml").write_text(yaml.safe_dump(job))
    code = f"{before}\nfrom twotower.cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code, "prepare", "--config", "job.yaml"], cwd=cwd,
        capture_output=True, text=True, check=False, env=environment, timeout=300,
    )  # fmt: skip


def test_a_log_on_s3_gives_the_bytes_of_local_files(store, bucket, tmp_path) -> None:
    write_nested(tmp_path / "log")
    for file in (tmp_path / "log").rglob("*"):
        if file.is_file():
            bucket.upload_file(str(file), "bucket", str(file.relative_to(tmp_path)))
    local = meaning(prepared(tmp_path, "log"))
    for place in ("s3://bucket/log", "s3://bucket/log/**/*.p*q*"):
        if "*" in place:
            for noise in ("_temporary/0/x.parquet", ".a.parquet.crc"):
                bucket.delete_object(Bucket="bucket", Key=f"log/{noise}")
        done = command(tmp_path, place, store.environment)
        assert done.returncode == 0, done.stderr
        assert meaning(PreparedDataset(tmp_path / "run" / "prepared")) == local
    again = command(tmp_path, place, store.environment)
    assert "unchanged" in again.stdout
    bucket.upload_file(str(tmp_path / "log" / "a.parquet"), "bucket", "log/z.parquet")
    done = command(tmp_path, place, store.environment)
    assert done.returncode == 2
    assert "log/z.parquet: 12 new events are not after" in done.stderr


@pytest.mark.parametrize("ending", ["csv.gz", "jsonl"])
def test_text_on_s3_gives_the_bytes_of_local_files(store, bucket, tmp_path, ending) -> None:
    log = {n: v for n, v in days(1, 40)[0].items() if n != "hour"}
    write_formats(tmp_path, log | {"price": [1.0] * 40, "tags": [[]] * 40})
    bucket.upload_file(str(tmp_path / f"log.{ending}"), "bucket", f"part.{ending}")
    done = command(tmp_path, f"s3://bucket/part.{ending}", store.environment)
    assert done.returncode == 0, done.stderr
    data = PreparedDataset(tmp_path / "run" / "prepared")
    assert meaning(data) == meaning(prepared(tmp_path, f"log.{ending}"))


def test_of_parquet_on_s3_only_the_columns_needed_are_fetched(store, bucket, tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = 4000
    log = {
        "user_id": rng.integers(0, 50, rows), "payload": [rng.bytes(2000) for _ in range(rows)],
        "item_id": rng.integers(0, 50, rows), "timestamp": np.arange(rows),
    }  # fmt: skip
    pq.write_table(pa.table(log), tmp_path / "wide.parquet", row_group_size=1000)
    size = (tmp_path / "wide.parquet").stat().st_size
    assert size > 8_000_000
    bucket.upload_file(str(tmp_path / "wide.parquet"), "bucket", "wide.parquet")
    store.sent.clear()
    done = command(tmp_path, "s3://bucket/wide.parquet", store.environment)
    assert done.returncode == 0, done.stderr
    sent = sum(n for path, n in store.sent.items() if path.endswith("wide.parquet"))
    assert 0 < sent < size / 10
    data = PreparedDataset(tmp_path / "run" / "prepared")
    assert meaning(data) == meaning(prepared(tmp_path, "wide.parquet"))


def one_line(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("twotower: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("place", "said"),
    [("s3://no-such-bucket/log/*.parquet", "s3://no-such-bucket/log/*.parquet"),
     ("s3://no-such-bucket/log", "s3://no-such-bucket/log"),
     ("s3://bucket/nothing/*.parquet", "no such file (data.interactions)"),
     ("s3://bucket/nothing.parquet", "no such file (data.interactions)")],
)  # fmt: skip
def test_what_is_not_on_s3_is_named(store, bucket, tmp_path, place, said) -> None:
    assert said in one_line(command(tmp_path, place, store.environment))


def test_wrong_and_missing_credentials_are_explained(store, bucket, tmp_path) -> None:
    from moto.core import set_initial_no_auth_action_count

    pq.write_table(pa.table(EVENTS), tmp_path / "log.parquet")
    bucket.upload_file(str(tmp_path / "log.parquet"), "bucket", "log.parquet")
    none = {k: v for k, v in store.environment.items() if "ACCESS" not in k}

    @set_initial_no_auth_action_count(0)
    def ask() -> list[str]:
        """Ask while the server checks who asks."""
        return [one_line(command(tmp_path, "s3://bucket/log.parquet", environment))
                for environment in (store.environment, none | {"HOME": str(tmp_path)})]  # fmt: skip

    for answer in ask():
        assert "s3://bucket/log.parquet: cannot be opened (data.interactions): " in answer


def test_a_store_that_does_not_answer_is_explained(store, tmp_path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        environment = store.environment | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{taken.getsockname()[1]}",
            "AWS_MAX_ATTEMPTS": "1",
        }
        message = one_line(command(tmp_path, "s3://bucket/log.parquet", environment))
    assert "s3://bucket/log.parquet: cannot be opened" in message


def test_without_s3fs_the_extra_is_named(tmp_path) -> None:
    before = "import sys; sys.modules['s3fs'] = None"
    message = one_line(command(tmp_path, "s3://bucket/log.parquet", dict(os.environ), before))
    assert "twotower[s3]" in message
