"""A server of towers whose histories bring item features is asked with ids alone."""

import numpy as np
import pytest

from twotower.data.batches import BatchBuilder
from twotower.errors import UserError
from twotower.serve.client import RecommendClient
from twotower.serve.supervisor import running_server

from ..export.bundles import ITEMS, featured_bundle
from .conftest import FREE


def test_ids_alone_are_answered_as_by_eager_pytorch(make, tmp_path) -> None:
    data, model, bundle = featured_bundle(make, tmp_path)
    assert bundle.manifest.parity["scores"] < 1e-5
    names = [f.name for f in data.config.query]
    times = [f.times_name for f in data.config.timed_histories()]
    assert [s.name for s in bundle.manifest.query] == [
        "mean", "attention", "timed_sum", "timed_sum_times", "transformer", "hstu", "hstu_times",
    ]  # fmt: skip
    vectors = np.load(bundle.path / "item_vectors.npy")
    ids = data.items["id"].to_pylist()
    (tmp_path / "server").mkdir()
    with running_server(bundle.path, FREE, tmp_path / "server") as server:
        assert server.prove() < 1e-5
        with RecommendClient(server.grpc_url) as client:
            # Of a cold item, and of one that is not in the catalogue.
            for past in ([], ["item 3", "item 1"], [f"item {ITEMS}"], ["item 1", "never seen"]):
                request = dict.fromkeys(names, past)
                answer = client.recommend(request, k=7)
                row = request | dict.fromkeys(times, [None] * len(past))
                query = model.query_vectors(BatchBuilder(data).requests("query", [row]))
                score = dict(zip(ids, vectors @ query.detach().numpy()[0], strict=True))
                expected = [score[item] for item in answer.item_ids]
                np.testing.assert_allclose(answer.scores, expected, atol=1e-5)
                assert answer.scores[0] == pytest.approx(max(score.values()), abs=1e-5)
            with pytest.raises(UserError, match="no feature 'tags'"):
                client.recommend(request | {"tags": []})
