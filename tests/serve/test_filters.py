"""Which items a request asks for: attribute filters, allow lists, and how it was answered."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

import twotower.serve.triton as triton
from twotower.errors import UserError
from twotower.export.filters import write_filters
from twotower.export.update import update_bundle
from twotower.serve.client import RecommendClient
from twotower.serve.supervisor import running_server

from .conftest import FREE, GOOD, exported, raw_inputs

ALL = 300
VALUES = {
    "text": ["a", "b", "é", ""], "number": [-1, 0, 7], "flag": [True, False], "tags": ["x", "y"],
}  # fmt: skip


@pytest.fixture(scope="module")
def filtering(finished_run, tmp_path_factory):
    """A server of a bundle with filters, and its bundle."""
    folder = tmp_path_factory.mktemp("filters")
    bundle = exported(finished_run, folder, filters=["genre"])
    with running_server(bundle.path, FREE, folder / "server") as server:
        yield server, bundle


@pytest.fixture(scope="module")
def client(filtering):
    with RecommendClient(filtering[0].grpc_url) as client:
        yield client


@pytest.fixture(scope="module")
def genres(filtering) -> dict[str, str]:
    table = pq.read_table(filtering[1].path / "items.parquet")
    return dict(zip(table["id"].to_pylist(), table["genre"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def ranking(client):
    """All items, best first, and their scores."""
    answer = client.recommend(GOOD, k=ALL)
    return dict(zip(answer.item_ids, answer.scores, strict=True))


def test_a_filter_leaves_the_items_of_a_genre_in_their_order(client, genres, ranking) -> None:
    some = sorted(set(genres.values()))[:2]
    for condition, keeps in (
        (some[0], lambda g: g == some[0]),
        (some, lambda g: g in some),
        ({"not": some}, lambda g: g not in some),
        ([], lambda g: False),
        (["no such genre"], lambda g: False),
        ({"not": "no such genre"}, lambda g: True),
    ):
        answer = client.recommend(GOOD, k=7, filters={"genre": condition})
        wanted = [i for i in ranking if keeps(genres[i])]
        assert answer.item_ids == wanted[:7], condition
        np.testing.assert_allclose(answer.scores, [ranking[i] for i in wanted[:7]], atol=1e-6)


def test_a_list_of_candidates_is_scored_and_ordered(client, ranking) -> None:
    some = list(ranking)[5::50]
    answer = client.recommend(GOOD, k=ALL, allow=[*reversed(some), "no such item", some[0]])
    assert answer.item_ids == some
    np.testing.assert_allclose(answer.scores, [ranking[i] for i in some], atol=1e-6)
    assert client.recommend(GOOD, k=2, allow=some).item_ids == some[:2]
    assert client.recommend(GOOD, k=2, allow=[]).item_ids == []


def test_lists_and_filters_meet(client, genres, ranking) -> None:
    genre = sorted(set(genres.values()))[0]
    own = [i for i in ranking if genres[i] == genre]
    answer = client.recommend(
        GOOD, k=3, allow=[*own[1:6], next(i for i in ranking if genres[i] != genre)],
        exclude=own[2:3], filters={"genre": genre}, explain=True,
    )  # fmt: skip
    assert answer.item_ids == [own[1], *own[3:5]]
    assert answer.explanation == {
        "version": 1, "index": "exact", "exact": True, "catalogue": ALL,
        "filter": {"genre": [genre]}, "asked_for": 5, "excluded": 1, "k": 3,
    }  # fmt: skip
    assert client.recommend(GOOD, k=3).explanation is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"filters": {"gender": "x"}},
            "the model has no attribute 'gender'; did you mean 'genre'?",
        ),
        ({"filters": {"genre": 3}}, "'genre' must hold values of type string, got 3"),
        ({"filters": {"genre": {"no": "x"}}}, "must be a value, a list of values or {'not': …}"),
        ({"filters": ["genre"]}, "filters must be a dict of attributes"),
        ({"allow": "item-000001"}, "'allow' must be a list"),
        ({"allow": [3]}, "'allow' must hold string ids, got 3"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_it_is_sent(client, arguments, says) -> None:
    with pytest.raises(UserError) as refused:
        client.recommend(GOOD, **arguments)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "filter is no JSON"), (b"[1]", "filter must be an object of attributes, got [1]"),
        (b'{"gender": "x"}', "there is no attribute 'gender', did you mean 'genre'?"),
        (b'{"genre": 7}', "'genre' holds values of type string, got 7"),
        (b'{"genre": {"no": 1}}', "'genre' must be a value, a list of them"),
        (b"\xff", "filter holds bytes that are not UTF-8"),
    ],
)  # fmt: skip
def test_a_server_refuses_a_bad_filter_and_answers_its_batch(filtering, text, says) -> None:
    bad = {"filter": ("BYTES", np.array([[text]], dtype=object))}
    with grpc.InferenceServerClient(filtering[0].grpc_url) as client:
        pending = [
            client.infer("recommend", raw_inputs(filter=("BYTES", np.array([[b""]], dtype=object))))
            for _ in range(3)
        ]
        with pytest.raises(InferenceServerException) as refused:
            client.infer("recommend", raw_inputs(**bad))
        assert says in refused.value.message()
        assert all(len(answer.as_numpy("item_ids")[0]) == 10 for answer in pending)


def test_new_items_are_found_by_their_attributes(filtering, demo_log, tmp_path) -> None:
    rows = pq.read_table(demo_log / "items.parquet").slice(0, 3)
    new = ["new-0", "new-1", "new-2"]
    rows = rows.set_column(0, "item_id", pa.array(new))
    place = rows.column_names.index("genre")
    pq.write_table(rows.set_column(place, "genre", pa.array(["opera"] * 3)), tmp_path / "i.parquet")
    made = update_bundle(filtering[1], tmp_path / "i.parquet", [], None, lambda *_: None)
    with (
        running_server(made.path, FREE, tmp_path / "server") as server,
        RecommendClient(server.grpc_url) as client,
    ):
        answer = client.recommend(GOOD, k=50, filters={"genre": "opera"})
        assert sorted(answer.item_ids) == new


def inside_triton(name: str):
    """Return a module that is copied into Triton, without what Triton itself brings."""
    folder = Path(triton.__file__).parent
    sys.modules.setdefault("triton_python_backend_utils", types.ModuleType("utils"))
    for file in ("wire", "features", name):
        spec = importlib.util.spec_from_file_location(file, folder / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[file] = module
        spec.loader.exec_module(module)
    return module


def condition(name: str):
    values = st.lists(st.sampled_from(VALUES[name]), max_size=3)
    return st.one_of(values, st.builds(lambda v: {"not": v}, values), st.sampled_from(VALUES[name]))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(
        st.none() | st.sampled_from(VALUES["text"]), st.none() | st.sampled_from(VALUES["number"]),
        st.none() | st.booleans(),
        st.none() | st.lists(st.none() | st.sampled_from(VALUES["tags"]), max_size=3),
    ), min_size=1, max_size=12),
    conditions=st.fixed_dictionaries({}, optional={name: condition(name) for name in VALUES}),
)  # fmt: skip
def test_a_filter_keeps_what_its_words_say(tmp_path_factory, rows, conditions) -> None:
    folder = tmp_path_factory.mktemp("f")
    columns = dict(zip(VALUES, map(list, zip(*rows, strict=True)), strict=True))
    types_ = [pa.string(), pa.int32(), pa.bool_(), pa.list_(pa.string())]
    table = pa.table({
        name: pa.array(column, t)
        for (name, column), t in zip(columns.items(), types_, strict=True)
    })  # fmt: skip
    pq.write_table(table, folder / "items.parquet")
    kinds = write_filters(folder, list(VALUES))
    assert kinds == {"text": "string", "number": "int64", "flag": "bool", "tags": "string"}
    found = inside_triton("filters").Filters(folder, kinds, len(rows)).rows(json.dumps(conditions))

    def passes(row) -> bool:
        for name, wanted in conditions.items():
            own = row[list(VALUES).index(name)]
            own = set(own or []) if name == "tags" else {own}
            turned = isinstance(wanted, dict)
            wanted = wanted["not"] if turned else wanted
            wanted = wanted if isinstance(wanted, list) else [wanted]
            if bool((own - {None}) & set(wanted)) == turned:
                return False
        return True

    assert found.tolist() == [i for i, row in enumerate(rows) if passes(row)]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["genr"], "export.filters: 'genr' is not in data.display; did you mean 'genre'?"),
        (["price"], "'price' is of type double: strings, integers and booleans"),
    ],
)
def test_columns_that_cannot_be_filtered_by_are_refused(names, says, tmp_path) -> None:
    pq.write_table(pa.table({"genre": ["x"], "price": [1.5]}), tmp_path / "items.parquet")
    with pytest.raises(UserError) as refused:
        write_filters(tmp_path, names)
    assert says in str(refused.value)
    assert not (tmp_path / "filters.npz").exists()
