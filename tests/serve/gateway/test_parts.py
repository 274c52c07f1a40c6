"""Parts that transform: the query that is made of a request, and bodies of any model's features."""

import asyncio
import itertools
import json
import time

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.serve.gateway.breaker import Breaker
from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.defaults import Defaults, read_defaults
from twotower.serve.gateway.observe import Metrics
from twotower.serve.gateway.recommender import Ask, Recommender
from twotower.serve.gateway.replicas import Replicas
from twotower.serve.gateway.schemas import make_bodies
from twotower.serve.gateway.store import MemoryStore, Record, RedisStore, read_users, write_users
from twotower.serve.gateway.users import Users
from twotower.serve.request import Schema, encode

CONFIG, COUNT = GatewayConfig(), itertools.count()
ITEMS = st.integers(0, 2**63 - 1)


def spec(name: str, kind: str, dtype: str = "int64", length: int = 1, of: str = "") -> TensorSpec:
    return TensorSpec(name=name, kind=kind, dtype=dtype, length=length, of=of)


def schema_of(*features: TensorSpec) -> Schema:
    return Schema(1, "int64", 10, 5, 10, 8, False, {}, list(features))


def recommender(schema: Schema, features: dict, store=None) -> Recommender:
    bodies, metrics = make_bodies(schema, "int64", CONFIG), Metrics()
    defaults = Defaults(user_id_dtype="int64", user_features=["who"], features=features,
                        segment_by=None, popular=[], segments={})  # fmt: skip
    users = Users(store or MemoryStore({}, 500), None, bodies, CONFIG, metrics)
    return Recommender(defaults, users, Replicas([], CONFIG, metrics, None), CONFIG, metrics)


@given(
    st.lists(ITEMS, max_size=30), st.lists(ITEMS, max_size=30) | st.none(), st.booleans(),
    st.integers(1, 20), st.integers(1, 20), st.data(),
)  # fmt: skip
def test_every_window_holds_the_newest_with_their_times(
    stored, sent, known, short, long, data
) -> None:
    schema = schema_of(
        spec("who", "id"), spec("short", "history", length=short),
        spec("long", "history", length=long), spec("long_times", "times", length=long, of="long"),
        spec("age", "number", "float32"),
    )  # fmt: skip
    seconds = st.integers(-(2**39), 2**39) | st.none()
    times = data.draw(st.lists(seconds, min_size=len(stored), max_size=len(stored)))
    record = Record({"age": 30.0}, stored, times) if known else None
    ask = Ask(user=7, features={}, history=sent, k=5, exclude=[], filter_seen=True, timeout_ms=9)
    query = recommender(schema, {"who": None, "age": 40.0}).features_of(
        ask, record, schema.features
    )
    items = stored if known else []
    items, when = (items, times if known else []) if sent is None else (sent, [None] * len(sent))
    assert query == {
        "who": 7, "age": 30.0 if known else 40.0, "short": items[-short:], "long": items[-long:],
        "long_times": when[-long:],
    }  # fmt: skip
    encode(schema, query, 5, [])


@given(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True))
def test_features_may_have_any_names(names) -> None:
    features = [spec(name, "number", "float32") for name in names]
    bodies = make_bodies(schema_of(*features), "int64", CONFIG)
    sent = {name: float(i) for i, name in enumerate(names[1:])}
    body = bodies.recommend.model_validate({"features": sent})
    assert body.features.model_dump(by_alias=True, exclude_unset=True) == sent
    assert bodies.names("/v1/recommend", ["body", "features"]) == names
    json.dumps(bodies.recommend.model_json_schema())


@pytest.mark.parametrize("name", ["json", "copy", "model_config", "_hidden", "class", "a-b"])
def test_features_may_be_called_as_pydantics_own(name) -> None:
    test_features_may_have_any_names.hypothesis.inner_test([name, "other"])


def test_lists_and_vectors_have_their_sizes() -> None:
    schema = schema_of(spec("tags", "ids", "string", 2), spec("text", "vector", "float32", 3))
    features = make_bodies(schema, "string", CONFIG).features
    features.model_validate({"tags": [], "text": [1, 2.5, -3]})
    for bad in ({"tags": ["a"] * 3}, {"tags": [""]}, {"tags": None}, {"text": [1.0] * 2},
                {"text": [1e39, 0, 0]}, {"text": [float("nan"), 0, 0]}):  # fmt: skip
        with pytest.raises(ValidationError):
            features.model_validate(bad)


@given(
    st.lists(st.tuples(
        st.integers(-(2**62), 2**62) | st.text(max_size=5),
        st.dictionaries(st.text(max_size=4), st.integers() | st.text(max_size=4), max_size=3),
        st.lists(st.tuples(ITEMS, st.integers(-(2**39), 2**39) | st.none()), max_size=4),
    ), max_size=5, unique_by=lambda user: user[0]),
)  # fmt: skip
def test_a_file_of_users_is_read_as_it_was_written(tmp_path_factory, users) -> None:
    path = tmp_path_factory.mktemp("users") / "users.jsonl"
    records = {u: Record(f, [i for i, _ in e], [t for _, t in e]) for u, f, e in users}
    assert write_users(path, records.items()) == len(records)
    assert read_users(path) == records


TAKEN = st.lists(st.tuples(ITEMS, st.integers(-(2**39), 2**39) | st.none()), max_size=6)
FEATURES = st.dictionaries(st.text(max_size=4), st.floats(allow_nan=False) | st.text(), max_size=3)


@settings(max_examples=40, deadline=None)
@given(FEATURES, TAKEN, st.lists(TAKEN.filter(bool), max_size=3),
       st.sampled_from(["int64", "string"]), st.integers(1, 8),
       st.integers() | st.text(max_size=5))  # fmt: skip
def test_redis_and_memory_hold_the_same(redis, features, taken, added, dtype, length, user) -> None:
    kind = str if dtype == "string" else int
    columns = [([kind(i) for i, _ in part], [t for _, t in part]) for part in (taken, *added)]
    record = Record(features, *columns[0])

    async def held_by(store) -> Record:
        for items, times in columns[1:]:
            await store.append(user, items, times)
        return await store.get(user)

    async def both() -> tuple[Record, Record, Record | None]:
        store = RedisStore(redis.url, f"test-{next(COUNT)}", dtype, length, 5)
        try:
            before = await store.get(user)
            assert await store.put([(user, Record({}, columns[0][0][:1], columns[0][1][:1]))]) == 1
            assert await store.put([(user, record)]) == 1
            return await held_by(store), await held_by(MemoryStore({user: record}, length)), before
        finally:
            await store.close()

    in_redis, in_memory, before = asyncio.run(both())
    assert before is None
    assert in_redis == in_memory


@pytest.mark.parametrize(
    "line", ["{", "[]", '"x"', "{}", '{"user": 1, "items": [1], "times": []}x',
             '{"user": 1, "items": [1, 2], "times": [3]}', '{"user": [1]}',
             '{"user": 1, "items": 7}'],
)  # fmt: skip
def test_a_bad_line_of_users_is_named(tmp_path, line) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text(f'{{"user": 1}}\n{line}\n')
    with pytest.raises(UserError, match=r"users\.jsonl, line 2: is no user"):
        read_users(path)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"popular": []}'])
def test_damaged_defaults_are_refused(tmp_path, text) -> None:
    (tmp_path / "defaults.json").write_text(text)
    with pytest.raises(UserError, match=r"defaults\.json: damaged .* load-store"):
        read_defaults(tmp_path / "defaults.json")


def test_defaults_of_another_model_are_refused(tmp_path) -> None:
    defaults = Defaults(user_id_dtype="int64", user_features=[], features={"age": 1},
                        segment_by=None, popular=[], segments={})  # fmt: skip
    defaults.write(tmp_path / "new" / "defaults.json")
    assert read_defaults(tmp_path / "new" / "defaults.json") == defaults
    with pytest.raises(UserError, match="knows no feature 'country'"):
        defaults.check([spec("age", "number", "float32"), spec("country", "id")], tmp_path)
    with pytest.raises(UserError, match=r"of another model .*'age' must be a list, got 1"):
        defaults.check([spec("age", "vector", "float32", 3)], tmp_path)


@given(st.lists(st.integers(0, 9), unique=True), st.lists(st.integers(0, 9), unique=True),
       st.sets(st.integers(0, 9)), st.integers(1, 10))  # fmt: skip
def test_popularity_is_the_segments_then_everybodys(everybody, segment, exclude, k) -> None:
    defaults = Defaults(user_id_dtype="int64", user_features=[], features={}, segment_by="s",
                        popular=everybody, segments={"7": segment})  # fmt: skip
    items = defaults.most_popular(7, k, exclude)
    left = [i for i in segment if i not in exclude]
    left += [i for i in everybody if i not in exclude and i not in segment]
    assert items == left[:k]
    assert defaults.most_popular(8, k, exclude) == [i for i in everybody if i not in exclude][:k]


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_an_answer_that_a_late_loop_has_not_read_yet_counts(redis, run) -> None:
    schema = schema_of(spec("who", "id"))
    store = RedisStore(redis.url, "late", "int64", 500, 5)
    asked = recommender(schema, {"who": None}, store)

    async def look_up() -> list[Record]:
        await store.put([(7, Record({}, [1, 2], [None, None]))])
        found = []
        for _ in range(10):
            # Longer than the store's time-out.
            asyncio.get_running_loop().call_later(0.001, time.sleep, 0.1)
            record, silent = await asked.users.look_up(7, 5.0)
            assert silent is None
            found.append(record)
        await store.close()
        return found

    assert [record.items for record in run(look_up())] == [[1, 2]] * 10


def test_a_circuit_opens_lets_one_try_and_closes() -> None:
    breaker = Breaker(failures=2, retry_s=0, lasting_s=0)
    breaker.failed()
    breaker.succeeded()
    breaker.failed()
    assert not breaker.is_open
    breaker.failed()
    assert breaker.is_open
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.is_open
    patient = Breaker(failures=1, retry_s=1000, lasting_s=0)
    patient.failed()
    assert not patient.allows()


def test_a_hiccup_opens_no_circuit() -> None:
    breaker = Breaker(failures=2, retry_s=1000, lasting_s=1000)
    for _ in range(50):
        breaker.failed()
    assert breaker.allows()
