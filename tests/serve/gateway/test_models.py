"""What a gateway offers where the server has more models, and a bundle has attributes."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from twotower.data.prepared import PreparedDataset
from twotower.serve.client import RecommendClient
from twotower.serve.config import MODELS
from twotower.serve.server import TritonServer
from twotower.serve.supervisor import running_server
from twotower.serving import request_of

from ..conftest import FREE, exported
from .conftest import ask_at_random


@pytest.fixture(scope="module")
def rich(finished_run, tmp_path_factory) -> Iterator[TritonServer]:
    """A server of every model, of a bundle whose items have a genre."""
    folder = tmp_path_factory.mktemp("rich")
    bundle = exported(finished_run, folder, filters=["genre"])
    config = replace(FREE, models=list(MODELS))
    with running_server(bundle.path, config, folder / "server") as server:
        yield server


@pytest.fixture(scope="module")
def gateway(start, rich):
    return start(rich)


@pytest.fixture(scope="module")
def genres(rich) -> dict[str, str]:
    table = pq.read_table(rich.bundle.path / "items.parquet")
    return dict(zip(table["id"].to_pylist(), table["genre"].to_pylist(), strict=True))


def test_items_are_filtered_by_what_they_are(gateway, genres) -> None:
    ranking = gateway.ids(user=7, k=300, filter_seen=False)
    some = sorted(set(genres.values()))[:2]
    for condition, keeps in (
        (some[0], lambda g: g == some[0]), (some, lambda g: g in some),
        ({"not": some}, lambda g: g not in some), ({"not": some[0]}, lambda g: g != some[0]),
    ):  # fmt: skip
        found = gateway.ids(user=7, k=9, filter_seen=False, filters={"genre": condition})
        assert found == [i for i in ranking if keeps(genres[i])][:9], condition
    scored = gateway.ids(user=7, k=300, filter_seen=False, allow=ranking[20:2:-4])
    assert scored == ranking[4:21:4]


def test_an_answer_says_how_it_came_about(gateway, genres) -> None:
    genre = genres["item-000001"]
    answer = gateway.recommend(user=7, k=5, filters={"genre": genre}, explain=True)
    explanation = answer["explanation"]
    assert explanation["filter"] == {"genre": genre} or explanation["filter"] == {"genre": [genre]}
    assert explanation["asked_for"] == sum(g == genre for g in genres.values())
    assert (explanation["version"], explanation["exact"]) == (1, True)
    assert gateway.recommend(user=7, k=5)["explanation"] is None


def test_similar_items_are_those_of_the_model(gateway, rich) -> None:
    with RecommendClient(rich.grpc_url, model="similar") as client:
        for item in ("item-000003", "item-000250"):
            expected = client.recommend({"item": item}, k=6)
            response = gateway.post("/v1/similar", {"item": item, "k": 6})
            assert response.status_code == 200, response.text
            assert [i["id"] for i in response.json()["items"]] == expected.item_ids
            assert item not in expected.item_ids
    response = gateway.post("/v1/similar", {"item": "no such item"})
    assert response.status_code == 422
    assert "item 'no such item' is not in the catalogue" in response.text


def test_a_querys_vector_scores_items_as_recommend_does(gateway, rich, loaded_run) -> None:
    vectors = np.load(rich.bundle.path / "item_vectors.npy")
    ids = [i.decode() for i in np.load(rich.bundle.path / "item_ids.npy")]
    response = gateway.post("/v1/embed", {"user": 7})
    assert response.status_code == 200, response.text
    answer = gateway.recommend(user=7, k=20, filter_seen=False)
    scores = vectors @ np.array(response.json()["vector"], np.float32)
    for item in answer["items"]:
        assert item["score"] == pytest.approx(scores[ids.index(item["id"])], abs=1e-5)
    features, _ = request_of(PreparedDataset(loaded_run.run_dir / "prepared"), 7)
    with RecommendClient(rich.grpc_url) as client:
        expected = client.embed("embed_query", features)
    assert response.json() == {"vector": pytest.approx(expected.vector, abs=1e-6), "version": 1}


@pytest.fixture(scope="module")
def items(rich, loaded_run):
    """Row of the catalogue -> every feature of the item, as the log has it."""
    data = PreparedDataset(loaded_run.run_dir / "prepared")
    names = [s.name for s in rich.bundle.manifest.item]
    columns = data.items.select([f"raw.{n}" for n in names]).rename_columns(names)
    return lambda row: columns.slice(row, 1).to_pylist()[0]


def test_an_items_vector_is_that_of_the_catalogue(gateway, rich, items) -> None:
    vectors = np.load(rich.bundle.path / "item_vectors.npy")
    for row in (0, 17, 299):
        response = gateway.post("/v1/embed", {"item_features": items(row)})
        assert response.status_code == 200, response.text
        assert response.json() == {
            "vector": pytest.approx(vectors[row].tolist(), abs=1e-5), "version": 1,
        }  # fmt: skip
    with RecommendClient(rich.grpc_url) as client:
        new = items(17) | {"item_id": None, "tags": []}
        expected = client.embed("embed_items", new).vector
        response = gateway.post("/v1/embed", {"item_features": new, "timeout_ms": 1000})
        assert response.json()["vector"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("change", "beside", "where", "says"),
    [
        ({"price": "dear"}, {}, "body.item_features.price", "valid number"),
        ({"price": None}, {}, "body.item_features.price", "valid number"),
        ({"text": [1.0]}, {}, "body.item_features.text", "at least 16"),
        ({"colour": 1}, {}, "body.item_features.colour", "one of item_id, genre, tags, price"),
        ({"gnre": "x"}, {}, "body.item_features.gnre", "did you mean 'genre'"),
        ({"price": 1e38, "text": [3e38] * 16}, {}, "body", "overflows"),
        ({}, {"user": 7}, "body", "item_features stands beside user"),
        ({}, {"features": {}, "history": []}, "body", "beside features, history"),
    ],
)
def test_an_item_that_does_not_fit_is_explained(
    gateway, items, change, beside, where, says
) -> None:
    response = gateway.post("/v1/embed", {"item_features": items(3) | change, **beside})
    assert response.status_code == 422
    assert response.json()["error"]["where"] == where
    assert says in response.text
    partial = {n: v for n, v in items(3).items() if n != "genre"}
    response = gateway.post("/v1/embed", {"item_features": partial})
    assert response.json()["error"]["where"] == "body.item_features.genre"


def test_no_random_request_for_a_vector_is_a_server_error(gateway, tmp_path) -> None:
    ask_at_random(gateway, tmp_path, "--include-path", "/v1/embed", may_be_late=True)


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("recommend", {"filters": {"gender": "x"}}, 422, "did you mean 'genre'"),
        ("recommend", {"filters": {"genre": 3}}, 422, "filters.genre"),
        ("recommend", {"filters": {"genre": {"no": "x"}}}, 422, "filters.genre"),
        ("similar", {}, 422, "body.item"), ("similar", {"item": 3}, 422, "body.item"),
        ("embed", {"k": 3}, 422, "there is no 'k' here"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_explained(gateway, path, body, status, says) -> None:
    response = gateway.post(f"/v1/{path}", body)
    assert response.status_code == status
    assert says in response.text


def test_the_documentation_shows_what_the_server_has(gateway, start, server) -> None:
    document = gateway.client.get("/openapi.json").json()
    assert {"/v1/similar", "/v1/embed"} < set(document["paths"])
    item = document["components"]["schemas"]["ItemFeatures"]
    assert item["required"] == ["item_id", "genre", "tags", "price", "released", "text"]
    plain = start(server)
    document = plain.client.get("/openapi.json").json()
    assert not {"/v1/similar", "/v1/embed"} & set(document["paths"])
    assert "filters" not in document["components"]["schemas"]["Recommend"]["properties"]


def test_where_the_model_is_silent_filters_are_not_broken(
    start, finished_run, rich, genres
) -> None:
    gateway = start(rich, "--gateway.deadline_ms=300")
    rich.process.send_signal(19)  # SIGSTOP
    try:
        popular = gateway.recommend(user=7, k=5)
        assert popular["fallback"] == "popularity"
        assert popular["items"]
        chosen = [popular["items"][i]["id"] for i in (3, 1)]
        assert gateway.ids(user=7, k=5, allow=chosen) == chosen[::-1]
        assert gateway.ids(user=7, k=5, filters={"genre": next(iter(genres.values()))}) == []
        response = gateway.post("/v1/embed", {"user": 7})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        similar = gateway.post("/v1/similar", {"item": popular["items"][0]["id"], "k": 3}).json()
        assert similar["reason"] == "model"
        assert popular["items"][0]["id"] not in [i["id"] for i in similar["items"]]
    finally:
        rich.process.send_signal(18)  # SIGCONT
