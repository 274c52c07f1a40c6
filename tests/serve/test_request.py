"""What is refused, with the reason: by the client before it is sent, and by the server."""

import re

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from twotower.errors import UserError
from twotower.serve.client import RecommendClient

from .conftest import GOOD, raw_inputs


@pytest.fixture
def client(server):
    with RecommendClient(server.grpc_url) as client:
        yield client


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"age": None}, "'age' must hold numbers"),
        ({"age": float("nan")}, "'age' must hold finite numbers, got nan"),
        ({"age": "old"}, "'age' must hold numbers, got 'old'"),
        ({"history_times": [1, 2]}, "'history_times' has 2 entries, the history another number"),
        ({"history_times": ["now"]}, "'history_times' must hold whole seconds since 1970"),
        ({"country": 7}, "'country' must hold string ids, got 7"),
        ({"history": "item-000001"}, "'history' must be a list"),
        ({"history": [1]}, "'history' must hold string ids"),
        ({"history": ["item-000001"] * 51}, "51 entries, the model's window is 50"),
        ({"devise": "web"}, "no feature 'devise'; did you mean 'device'"),
        ({7: "web"}, "no feature '7'"),
        ({"age": 10**400}, "'age' must hold finite numbers, got 1000"),
        ({"age": 10**5000}, "'age' must hold finite numbers, got a value of type int"),
        ({"age": 1e39}, "'age' must hold finite numbers, got 1e+39"),
        ({"country": "c\ud800"}, r"'country': the id 'c\ud800' is no text"),
        ({"history": ["a", "c\ud800", "b"]}, r"'history': the id 'c\ud800' is no text"),
        ({"history": ["a", "b\0c"]}, r"'history' must hold string ids, got 'b\x00c'"),
        ({"history": ["a", 7]}, "'history' must hold string ids, got 7"),
        ({"history": ["\udcff"]}, r"'history': the id '\udcff' is no text"),
        ({"history": {"item-000001": 1}}, "'history' must be a list, got {'item-000001': 1}"),
        ({"history": {"item-000001"}}, "'history' must be a list, got {'item-000001'}"),
        ({"history": np.array("item-000001")}, "'history' must be a list, got array("),
        ({"history": None}, "'history' must be a list, got None"),
        ({"age": 1e22}, "age holds a number of size 1e+22, which overflows"),
    ],
)
def test_the_client_explains_a_mistake(client, change, words) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        client.recommend(GOOD | change)
    assert len(str(caught.value).encode()) < 400


@pytest.mark.parametrize(
    ("exclude", "words"),
    [
        ("item-000001", "'exclude' must be a list, got 'item-000001'"),
        (None, "'exclude' must be a list, got None"),
        ({"item-000001": 1}, "'exclude' must be a list, got {"),
        (7, "'exclude' must be a list, got 7"),
        (["item-\udc80"], "'exclude': the id"),
    ],
)
def test_what_excludes_nothing_is_refused(client, exclude, words) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        client.recommend(GOOD, exclude=exclude)


@pytest.mark.parametrize("features", [None, [1, 2], "user", {"age"}])
def test_features_that_are_no_dict_are_refused(client, features) -> None:
    with pytest.raises(UserError, match="must be a dict of history, history_times, country, age"):
        client.recommend(features)


def test_numpy_and_sets_are_as_good_as_lists_where_order_says_nothing(client) -> None:
    best = client.recommend(GOOD, k=9).item_ids
    as_numpy = GOOD | {"history": np.array(GOOD["history"]), "age": np.int64(30)}
    for exclude in ({*best[:2]}, np.array(best[:2]), tuple(best[:2]), iter(best[:2])):
        answer = client.recommend(as_numpy, k=np.int64(5), exclude=exclude)
        assert answer.item_ids == best[2:7]
    for k in (True, 5.0, "5", 10**5000):
        with pytest.raises(UserError, match="k must be"):
            client.recommend(GOOD, k=k)


def test_the_client_names_a_missing_feature(client) -> None:
    with pytest.raises(UserError, match=r"'age' .* is missing"):
        client.recommend({k: v for k, v in GOOD.items() if k != "age"})


@pytest.mark.parametrize("k", [0, -1, 301, 10**6])
def test_k_beyond_the_catalogue_is_refused(client, k) -> None:
    with pytest.raises(UserError, match=r"k must be in 1\.\.300 \(catalogue: 300 items\)"):
        client.recommend(GOOD, k=k)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"age": ("FP32", np.array([[np.nan]], np.float32))}, "age holds NaN or infinity"),
        ({"age": ("FP32", np.array([[np.inf]], np.float32))}, "age holds NaN or infinity"),
        ({"age": ("FP32", np.array([[1e22]], np.float32))}, "age holds a number of size 1e.22"),
        ({"age": ("FP32", np.array([[-3e38]], np.float32))}, "age holds a number of size 3e.38"),
        ({"age": ("INT64", np.array([[3]]))}, "data-type"),
        ({"age": None}, "expected .* inputs"),
        ({"extra": ("INT64", np.array([[3]]))}, "extra"),
        ({"history_times": ("INT64", np.array([[3, 4]]))}, "history_times has the shape"),
        (
            {"history": ("BYTES", np.array([[b"x"] * 51], dtype=object))},
            "history has 51 entries, the model's window is 50",
        ),
        ({"country": ("BYTES", np.array([[b"\xff"]], dtype=object))}, "country .* not UTF-8"),
        ({"k": ("INT32", np.array([[301]], np.int32))}, r"k must be in 1\.\.300"),
        ({"k": ("INT32", np.array([[0]], np.int32))}, r"k must be in 1\.\.300"),
    ],
)
def test_the_server_explains_a_mistake_of_any_client(server, change, words) -> None:
    with grpc.InferenceServerClient(server.grpc_url) as raw:
        with pytest.raises(InferenceServerException, match=words):
            raw.infer("recommend", raw_inputs(**change))
        assert raw.infer("recommend", raw_inputs()).as_numpy("item_ids").shape == (1, 10)
