"""A server of towers that know the times of entries answers with times, and without."""

import pytest

from twotower.errors import UserError
from twotower.serve.client import RecommendClient
from twotower.serve.supervisor import running_server

from ..export.bundles import timed_bundle
from .conftest import FREE


def test_times_are_answered_as_by_eager_pytorch_and_may_be_left_out(make, tmp_path) -> None:
    _, _, bundle = timed_bundle(make, tmp_path)
    (tmp_path / "server").mkdir()
    request = {"timed_sum": [1, 2], "transformer": [1, 2, 3], "hstu": [1, 2]}
    times = {"transformer_times": [10, 500, 9000], "hstu_times": [10, None]}
    early = {"timed_sum_times": [10, 20]}
    refused = [
        ({"hstu_times": [1]}, "'hstu_times' has 1 entries, the hstu another number"),
        ({"hstu_times": None}, "'hstu_times' must be a list, got None"),
        ({"hstu_times": [1.5, 2]}, "'hstu_times' must hold whole seconds since 1970"),
        ({"hstu_times": [2**40, 2]}, "'hstu_times' must hold whole seconds since 1970"),
        ({"hstu_time": [1, 2]}, "no feature 'hstu_time'; did you mean 'hstu_times'"),
    ]
    with running_server(bundle.path, FREE, tmp_path / "server") as server:
        assert server.prove() < 1e-4
        with RecommendClient(server.grpc_url) as client:
            plain = client.recommend(request, k=5)
            unknown = {"transformer_times": [None] * 3, "hstu_times": [None] * 2}
            assert client.recommend(request | unknown, k=5).scores == plain.scores
            timed = client.recommend(request | times, k=5)
            assert timed.scores != plain.scores
            assert client.recommend(request | times | early, k=5).scores != timed.scores
            assert client.recommend({name: [] for name in request}, k=5).scores
            for change, words in refused:
                with pytest.raises(UserError, match=words):
                    client.recommend(request | change)
