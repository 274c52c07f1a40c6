"""A server of towers with dynamic ids, seen and unseen, answers as eager PyTorch does."""

import pytest

from twotower.errors import UserError
from twotower.serve.client import RecommendClient
from twotower.serve.supervisor import running_server

from ..export.bundles import dynamic_bundle
from .conftest import FREE


def test_golden_queries_of_dynamic_ids_are_answered_as_by_eager_pytorch(make, tmp_path) -> None:
    _, _, bundle = dynamic_bundle(make, tmp_path)
    (tmp_path / "server").mkdir()
    with running_server(bundle.path, FREE, tmp_path / "server") as server:
        assert server.prove() < 1e-4
        request = {"user_id": 10**15, "friends": [3, -9], "city": "no city"}
        items = {"history": ["item 1", "no item"], "liked": []}
        with RecommendClient(server.grpc_url) as client:
            answers = [
                client.recommend(request | items | changes, k=5).scores
                for changes in ({}, {"user_id": 1}, {"history": ["item 2"]}, {"city": None})
            ]
            assert len({tuple(scores) for scores in answers}) == 4, "ids make a difference"
            for wrong, words in (
                ("one", "'user_id' must hold integer ids, got 'one'"),
                (True, "'user_id' must hold integer ids"),
                (2**63, "does not fit 64 bits"),
                (10**5000, "'user_id': the id a value of type int does not fit 64 bits"),
            ):
                with pytest.raises(UserError, match=words):
                    client.recommend(request | items | {"user_id": wrong})
