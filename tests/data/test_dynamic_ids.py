"""Preparing tables with dynamic ids: keys stand wherever a vocabulary's rows would."""

import numpy as np
import pyarrow as pa
import pytest

from twotower.data.batches import BatchBuilder
from twotower.data.schema import Feature
from twotower.data.table import Table
from twotower.data.vocabulary import hashed_keys

from ..conftest import EVENTS, HISTORY, ITEM

USERS = {"user_id": [1, 2, 3], "friends": [[2, 3], [], None], "city": ["x", None, "y"]}
QUERY = [
    HISTORY,
    Feature(name="user_id", kind="id"),
    Feature(name="friends", kind="ids", table="user_id"),
    Feature(name="city", kind="id"),
    Feature(name="device", kind="id"),
    Feature(name="words", kind="ids"),
]
LOG = EVENTS | {
    "device": ["web", None] * 5,
    "words": [["a", "b"], [], None, ["c"], ["a"], ["b", "d", "e"], ["a"], [], ["f"], ["a", "a"]],
}


def keys(ids) -> list[int]:
    ids = [i for i in ids if i is not None]
    return hashed_keys(pa.array(ids, None if ids else pa.string())).tolist()


@pytest.fixture
def data(make):
    tables = ("item_id", "user_id", "city", "device", "words")
    return make(
        LOG, users=USERS, query=QUERY, item=[ITEM], tables={n: Table(slots=50) for n in tables}
    )


def test_batches_hold_the_keys_of_the_raw_ids(data) -> None:
    rows = np.arange(10)
    ids = BatchBuilder(data).events(rows).ids
    columns = data.event_columns
    raw = {f.name: [] for f in QUERY} | {"item_id": []}
    for row in rows:
        user = int(columns["user"][row])
        seen = data.timeline[data.history_from[user] : columns["history_to"][row]]
        request = data.raw_query(user, int(row), seen)
        for name, value in request.items():
            raw[name].append(value if isinstance(value, list) else [value])
        raw["item_id"].append([data.items["id"][int(columns["item"][row])].as_py()])
    for name, lists in raw.items():
        found = ids[f"{'item' if name == 'item_id' else 'query'}.{name}"]
        assert [v.tolist() for v in found.to_dense()] == [keys(ids) for ids in lists], name


def test_a_request_is_encoded_as_the_batches_are(data) -> None:
    requests = [data.raw_query(user, None, np.array([0, 2])) for user in range(3)]
    columns = data.encoder.encode_rows(data.config, "query", requests)
    assert columns["user_id"].to_pylist() == keys([1, 2, 3])
    assert columns["friends"].to_pylist() == [keys([2, 3]), [], []]
    assert columns["city"].to_pylist() == [*keys(["x"]), -1, *keys(["y"])]
    assert columns["history"].to_pylist() == [keys(["a", "c"])] * 3
    assert [s.dtype for s in data.encoder.specs(data.config, "query")] == [
        "string", "int64", "int64", "string", "string", "string"
    ]  # fmt: skip


def test_there_is_no_vocabulary_and_prepared_json_says_so(data) -> None:
    assert list((data.path / "tables").iterdir()) == []
    assert data.summary["tables"]["item_id"] == {"rows": 50, "slots": 50, "dtype": "string"}
    assert data.summary["tables"]["user_id"] == {"rows": 50, "slots": 50, "dtype": "int64"}
