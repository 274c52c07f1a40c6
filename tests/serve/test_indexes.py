"""A real server answers with whatever index the bundle holds, and with items added later."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import twotower.export.index as index_module
from twotower.export.bundle import read_bundle
from twotower.export.config import IndexConfig
from twotower.export.update import update_bundle
from twotower.serve.client import RecommendClient
from twotower.serve.supervisor import running_server

from .conftest import FREE, GOOD, exported


@pytest.mark.parametrize("kind", ["int8", "pq", "hnsw"])
def test_a_server_answers_with_the_bundles_index(kind, finished_run, tmp_path) -> None:
    bundle = exported(finished_run, tmp_path, index=IndexConfig(kind=kind))
    assert bundle.manifest.index.recall > 0.95
    with running_server(bundle.path, FREE, tmp_path / "server") as server:
        assert server.prove() < 1e-4
        with RecommendClient(server.grpc_url) as client:
            best = client.recommend(GOOD, k=10)
            assert best.version == 1
            less = client.recommend(GOOD, k=5, exclude=best.item_ids[:5])
            assert set(less.item_ids) & set(best.item_ids[:5]) == set()
            assert len(client.recommend(GOOD, k=300).item_ids) == 300


def test_a_server_has_the_scan_of_its_index(finished_run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(index_module, "SCANNED_FROM", 1)
    bundle = exported(finished_run, tmp_path)
    scan = {"scan.onnx", "item_scan.npy", "item_scan_scales.npy"}
    assert scan < set(bundle.manifest.files)
    with running_server(bundle.path, FREE, tmp_path / "server") as server:
        assert scan < {path.name for path in (server.repository / "recommend" / "1").iterdir()}
        assert server.prove() < 1e-4


@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_items_added_later_are_answered(kind, finished_run, demo_log, tmp_path) -> None:
    bundle = exported(finished_run, tmp_path, index=IndexConfig(kind=kind))
    rows = pq.read_table(demo_log / "items.parquet").slice(0, 5)
    new = [f"new-{n}" for n in range(5)]
    pq.write_table(rows.set_column(0, "item_id", pa.array(new)), tmp_path / "items.parquet")
    made = update_bundle(bundle, tmp_path / "items.parquet", ["item-000007"], None, lambda *_: None)
    assert read_bundle(made.path).manifest.version == 2
    with running_server(made.path, FREE, tmp_path / "server") as server:
        assert server.prove() < 1e-4
        with RecommendClient(server.grpc_url) as client:
            answer = client.recommend(GOOD, k=304)
            assert set(new) < set(answer.item_ids)
            assert "item-000007" not in answer.item_ids
            assert answer.version == 2
            rest = [i for i in answer.item_ids if i not in new]
            assert set(client.recommend(GOOD, k=5, exclude=rest).item_ids) == set(new)
