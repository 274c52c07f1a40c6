"""Drift: the index against a plain recount; a planted shift is named, and nothing else."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import HISTORY, ITEM
from tests.data.test_inspect import DAY, USER, plain_log, schema, write
from twotower.data.inspect.config import InspectConfig
from twotower.data.inspect.inspection import inspect_log
from twotower.data.inspect.psi import explained_by_chance, stability_terms
from twotower.data.prepare.prepare import prepare
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import Feature
from twotower.data.table import Table

COUNTS = st.lists(st.integers(0, 500), min_size=2, max_size=12)


@given(was=COUNTS, now=COUNTS, times=st.integers(1, 9))
def test_psi_is_never_negative_and_zero_for_equal_distributions(was, now, times) -> None:
    size = min(len(was), len(now))
    was, now = np.array(was[:size]) + [1] * size, np.array(now[:size])
    if now.sum():
        assert (stability_terms(was, now) >= 0).all()
    assert stability_terms(was, was * times).sum() == pytest.approx(0, abs=1e-9)


def test_psi_is_the_textbook_sum_and_chance_is_rare() -> None:
    was, now = np.array([50, 30, 20]), np.array([20, 30, 50])
    assert stability_terms(was, now).sum() == pytest.approx(2 * 0.3 * math.log(2.5))
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(8))
    limit = explained_by_chance(8, 3000, 2000)
    index = [
        stability_terms(rng.multinomial(3000, p), rng.multinomial(2000, p)).sum()
        for _ in range(3000)
    ]
    # One in 1,000 is expected, three of these; 12 would come by chance once in 10,000 tests.
    assert sum(i > limit for i in index) <= 12


DRIFT_QUERY = [
    HISTORY, USER, Feature(name="device", kind="id"), Feature(name="dwell", kind="number"),
    Feature(name="mood", kind="vector", width=3), Feature(name="words", kind="ids", length=4),
    Feature(name="town", kind="id"), Feature(name="age", kind="number"),
]  # fmt: skip
DRIFT_ITEM = [
    ITEM, Feature(name="genre", kind="id"), Feature(name="tags", kind="ids"),
    Feature(name="price", kind="number"), Feature(name="text", kind="vector", width=2),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreparedDataset]:
    """A log and the dataset prepared from it."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(5)
    users = {"user_id": np.arange(200), "town": [f"t{u % 30}" for u in range(200)],
             "age": [None if u % 10 == 0 else float(u * u % 61) for u in range(200)]}  # fmt: skip
    items = {"item_id": np.arange(80), "genre": np.arange(80) % 6,
             "tags": [[i % 5, 50 + i % 7] for i in range(80)], "price": np.arange(80) * 1.5,
             "text": list(rng.normal(size=(80, 2)))}  # fmt: skip
    write(folder, log=plain_log(rng), users=users, items=items)
    (folder / "prepared").mkdir()
    prepare(schema(folder, DRIFT_QUERY, DRIFT_ITEM), folder / "prepared")
    return folder, PreparedDataset(folder / "prepared")


def drift(
    trained: Any, folder: Path, log: dict[str, Any], query: Any = DRIFT_QUERY, **more: Any
) -> Any:
    base, dataset = trained
    write(folder, log=log)
    tables = {"users": str(base / "users.parquet"), "items": str(base / "items.parquet")}
    config = schema(folder, query, DRIFT_ITEM, **(tables | more))
    return inspect_log(config, InspectConfig(), folder / "scratch", dataset)["drift"]


def new_days(seed: int, events: int = 6000) -> dict[str, Any]:
    log = plain_log(np.random.default_rng(seed), events)
    return log | {"session": log["session"] + 10**6, "timestamp": log["timestamp"] + 50 * DAY}


SHIFTS: dict[str, Any] = {
    "device": lambda log: np.where(np.arange(6000) % 10 < 8, "a", log["device"]),
    "dwell": lambda log: log["dwell"] + 1.5,
    "mood": lambda log: [m + np.array([0, 0, 1.5]) for m in log["mood"]],
    "words": lambda log: [[w[0] % 2, w[1] % 3] for w in log["words"]],
}


@pytest.mark.parametrize("name", [None, *SHIFTS])
def test_a_shift_in_one_feature_is_named_and_nothing_else(name, trained, tmp_path: Path) -> None:
    log = new_days(6)
    if name is not None:
        log[name] = SHIFTS[name](log)
    found = drift(trained, tmp_path, log)
    assert [subject for subject, _ in found["flags"]] == ([] if name is None else [name])
    compared = {f["name"] for f in found["features"] if "psi" in f}
    own = {"user_id", "item_id", "history"}
    assert compared == {f.name for f in (*DRIFT_QUERY, *DRIFT_ITEM)} - own
    if name == "mood":
        assert next(f for f in found["features"] if f["name"] == "mood")["dimension"] == 2


def test_the_index_is_that_of_a_plain_recount(trained, tmp_path: Path) -> None:
    base, dataset = trained
    log = new_days(7, 3000)
    log["device"] = [None if e % 7 == 0 else "new" if e % 5 == 0 else d
                     for e, d in enumerate(log["device"])]  # fmt: skip
    features = {f["name"]: f for f in drift(trained, tmp_path, log)["features"]}
    old = pq.read_table(base / "log.parquet").to_pydict()
    size = len(dataset.section(0))
    was, now = Counter(old["device"][:size]), Counter(log["device"])
    bins = sorted(was, key=lambda d: -was[d])
    counts = [[c[b] for b in (*bins, "new", None)] for c in (was, now)]
    expected = stability_terms(*map(np.array, counts)).sum()
    assert features["device"]["psi"] == pytest.approx(expected)
    known = [d for d in log["device"] if d is not None]
    assert features["device"]["unseen"] == {
        "was": 0.0, "now": pytest.approx(known.count("new") / len(known)),
    }  # fmt: skip
    # A number of the users: a missing age is kept apart, though it is prepared as the mean.
    age = pq.read_table(base / "users.parquet")["age"].to_pylist()
    first = sorted(a for u in old["user_id"][:size] if (a := age[u]) is not None)
    edges = sorted({first[-(-k * len(first) // 10) - 1] for k in range(1, 10)})
    counts = []
    for users in (old["user_id"][:size], log["user_id"]):
        values = [age[u] for u in users]
        binned = np.searchsorted(edges, [v for v in values if v is not None])
        counts.append([*np.bincount(binned, minlength=len(edges) + 1), values.count(None)])
    expected = stability_terms(*map(np.array, counts)).sum()
    assert features["age"]["psi"] == pytest.approx(expected)


def test_of_dynamic_ids_those_are_unseen_that_training_did_not_see(trained, tmp_path) -> None:
    base, dataset = trained
    tables = {"device": Table(slots=20)}
    config = replace(schema(base, DRIFT_QUERY, DRIFT_ITEM), tables=tables)
    (tmp_path / "prepared").mkdir()
    prepare(config, tmp_path / "prepared")
    log = new_days(7, 3000)
    log["device"] = ["new" if e % 5 == 0 else d for e, d in enumerate(log["device"])]
    found = [
        drift((base, data), tmp_path / str(i), log, **more)
        for i, (data, more) in enumerate((
            (dataset, {}), (PreparedDataset(tmp_path / "prepared"), {"tables": tables}),
        ))
    ]  # fmt: skip
    ours, dynamic = ({f["name"]: f for f in side["features"]} for side in found)
    assert dynamic["device"]["unseen"]["now"] > 0.1
    assert dynamic == ours


def test_unseen_ids_volume_and_missing_tables_are_told(trained, tmp_path: Path) -> None:
    log = new_days(8)
    log["item_id"] = np.where(np.arange(6000) % 2 == 0, 500 + log["item_id"], log["item_id"])
    found = drift(trained, tmp_path, log)
    assert found["unseen"] == {"users": 0.0, "items": pytest.approx(0.5)}
    assert "items" in {subject for subject, _ in found["flags"]}
    log = new_days(9, 3000)
    found = drift(trained, tmp_path, log)
    assert found["volume"]["ratio"] == pytest.approx(0.5, rel=0.02)
    assert [subject for subject, _ in found["flags"]] == ["volume"]
    log = new_days(9)
    del log["words"]
    config = {"users": None, "query": [f for f in DRIFT_QUERY if f.name != "words"]}
    found = drift(trained, tmp_path, log, **config)
    reasons = {f["name"]: f["not_compared"] for f in found["features"] if "not_compared" in f}
    assert reasons == {
        "history": "made of items, which are compared", "words": "not in the job",
        "town": "data.users is not given", "age": "data.users is not given",
    }  # fmt: skip
    assert found["flags"] == []
