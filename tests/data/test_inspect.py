"""Inspecting a log: every figure against a plain recount, planted leaks and shifts are named."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import HISTORY, ITEM, QUICKSTART
from twotower.data.inspect.config import InspectConfig
from twotower.data.inspect.inspection import inspect_log
from twotower.data.inspect.page import render
from twotower.data.inspect.tables import Counted
from twotower.data.prepare.prepare import prepare
from twotower.data.schema import DataConfig, Feature, Split
from twotower.errors import UserError

DAY = 86_400
USER = Feature(name="user_id", kind="id")
FEW = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder: Path, **tables: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in tables.items():
        if columns is not None:
            pq.write_table(pa.table(columns), folder / f"{name}.parquet")


def schema(folder: Path, query: Any = (HISTORY,), item: Any = (ITEM,), **more: Any) -> DataConfig:
    found = {n: f"{n}.parquet" for n in ("users", "items") if (folder / f"{n}.parquet").exists()}
    return DataConfig(
        **({"root": str(folder), "interactions": "log.parquet", "query": list(query),
            "item": list(item), "memory_gb": 1.0} | found | more)
    )  # fmt: skip


def look(folder: Path, *args: Any, limits: InspectConfig | None = None, **more: Any) -> Any:
    config = schema(folder, *args, **more)
    return inspect_log(config, limits or InspectConfig(), folder / "scratch")


def leaks(found: Any) -> set[str]:
    return {f["subject"] for f in found["findings"] if f["kind"] == "suspected leak"}


@st.composite
def logs(draw):
    """Small logs with repeats, ties and users of one event."""
    size = draw(st.integers(6, 40))
    many = lambda top: draw(  # noqa: E731
        st.lists(st.integers(0, top), min_size=size, max_size=size)
    )
    return {"user_id": many(6), "item_id": [f"i{i}" for i in many(7)],
            "timestamp": [t * DAY // 4 for t in many(30)]}  # fmt: skip


def split_of(log: dict[str, list[Any]], kind: str) -> list[int]:
    """Each event's part, as `twotower.data.prepare` divides them."""
    rows = list(zip(log["user_id"], log["timestamp"], range(len(log["user_id"])), strict=True))
    if kind == "temporal":
        times = sorted(log["timestamp"])
        cuts = [times[round(len(times) * s)] for s in (0.8, 0.9)]
        return [sum(t >= c for c in cuts) for _, t, _ in rows]
    out = [0] * len(rows)
    for user in set(log["user_id"]):
        own = sorted(r for r in rows if r[0] == user)
        if len(own) >= 3:
            out[own[-1][2]], out[own[-2][2]] = 2, 1
    return out


@FEW
@given(log=logs(), kind=st.sampled_from(["temporal", "leave_last_out"]))
def test_figures_are_those_of_a_plain_recount(log, kind, tmp_path: Path) -> None:
    write(tmp_path, log=log)
    found = look(tmp_path, split=Split(kind=kind))
    events = list(zip(log["user_id"], log["item_id"], log["timestamp"], strict=True))
    counts = found["counts"]
    assert counts["events"] == len(events)
    assert counts["active_users"] == len({e[0] for e in events})
    assert counts["active_items"] == len({e[1] for e in events})
    assert counts["duplicates"] == len(events) - len(set(events))
    assert counts["repeats"] == len(events) - len({e[:2] for e in events})
    days = Counter(t // DAY for _, _, t in events)
    time = found["time"]
    assert time["daily"] == [[d, n] for d, n in sorted(days.items())]
    assert time["days"] == max(days) - min(days) + 1
    assert time["empty_days"] == time["days"] - len(days)
    every_day = [days.get(d, 0) for d in range(min(days), max(days) + 1)]
    median = np.quantile(every_day, 0.5, method="inverted_cdf")
    assert time["events_a_day"]["median"] == median

    part = split_of(log, kind)
    trained = [e for e, p in zip(events, part, strict=True) if p == 0]
    for number, name in ((0, "train"), (1, "validation"), (2, "test")):
        own = [e for e, p in zip(events, part, strict=True) if p == number]
        figures = found["split"]["parts"][name]
        assert figures["events"] == len(own)
        assert (figures["users"], figures["items"]) == tuple(
            len({e[k] for e in own}) for k in (0, 1)
        )
        for k, side in ((0, "users"), (1, "items")):
            unseen = sum(e[k] not in {t[k] for t in trained} for e in own)
            assert figures[f"unseen_{side}"] == pytest.approx(unseen / max(1, len(own)))
        if own:
            assert (figures["first"], figures["last"]) == (
                min(e[2] for e in own) * 10**6, max(e[2] for e in own) * 10**6,
            )  # fmt: skip
    before = [
        sum((q, u[2]) < (2, e[2]) and u[0] == e[0] for u, q in zip(events, part, strict=True))
        for e, p in zip(events, part, strict=True) if p == 2
    ]  # fmt: skip
    histories = found["histories"]["before_test"]
    if before:
        assert histories["mean"] == pytest.approx(np.mean(before))
        assert histories["without"] == pytest.approx(before.count(0) / len(before))


@FEW
@given(counts=st.lists(st.integers(1, 30), min_size=2, max_size=120))
def test_popularity_is_that_of_a_plain_recount(counts, tmp_path: Path) -> None:
    items = [f"i{i}" for i, n in enumerate(counts) for _ in range(n)]
    write(tmp_path, log={
        "user_id": list(range(len(items))), "item_id": items, "timestamp": list(range(len(items))),
    })  # fmt: skip
    found = look(tmp_path)["popularity"]
    ordered = sorted(counts, reverse=True)
    total = sum(counts)
    differences = sum(abs(a - b) for a in counts for b in counts)
    assert found["gini"] == pytest.approx(differences / (2 * len(counts) * total), abs=1e-12)
    assert found["top_item"] == pytest.approx(ordered[0] / total)
    best = math.ceil(len(counts) / 100)
    assert found["top_1_percent"] == pytest.approx(sum(ordered[:best]) / total)
    assert found["curve"] == [[r, ordered[r - 1]] for r, _ in found["curve"]]
    assert found["curve"][-1][0] == len(counts)


@given(values=st.lists(st.integers(0, 70), min_size=1, max_size=60))
def test_counted_values_have_the_quantiles_of_the_values(values) -> None:
    value, count = np.unique(values, return_counts=True)
    counted = Counted(value, count)
    for q in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert counted.quantile(q) == np.quantile(values, q, method="inverted_cdf")
    assert counted.mean() == pytest.approx(np.mean(values))
    bins = counted.doubling()
    for low, high, n in bins:
        assert n == sum(low <= v <= high for v in values)
    assert sum(n for _, _, n in bins) == len(values)


def test_features_are_described(tmp_path: Path) -> None:
    write(
        tmp_path,
        log={
            "user_id": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3],
            "item_id": ["a", "b", "c", "a", "c", "d", "b", "a", "d", "e"],
            "timestamp": [10, 20, 90, 15, 25, 95, 30, 35, 92, 99],
            "device": ["x", "y", None, "x", "x", "x", "x", "x", "y", "x"],
            "dwell": [1.0, 2.0, None, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0],
        },
        items={
            "item_id": ["a", "b", "zz"], "tags": [["s", "t"], None, ["t"]],
            "text": [[1.0, 2.0], None, [1.0, 2.0]], "price": [3e38, -3e38, 3e38],
        },
    )  # fmt: skip
    found = look(
        tmp_path,
        [HISTORY, USER, Feature(name="device", kind="id"), Feature(name="dwell", kind="number")],
        [ITEM, Feature(name="tags", kind="ids"), Feature(name="text", kind="vector", width=2),
         Feature(name="price", kind="number")],
    )  # fmt: skip
    features = {f["name"]: f for f in found["features"]}
    expected = {"device": (10, 1, 2), "dwell": (10, 1, 9), "tags": (3, 1, 2), "text": (3, 1, 1),
                "price": (3, 0, 2), "user_id": (3, 0, 3), "item_id": (6, 0, 6)}  # fmt: skip
    for name, figures in expected.items():
        f = features[name]
        assert (f["rows"], f["missing"], f["distinct"]) == figures, name
    assert features["device"]["top"] == [["x", 7], ["y", 2]]
    dwell = [v for v in range(1, 11) if v != 3]
    assert features["dwell"]["mean"] == pytest.approx(np.mean(dwell))
    assert features["dwell"]["std"] == pytest.approx(np.std(dwell))
    assert (features["dwell"]["least"], features["dwell"]["most"]) == (1, 10)
    assert features["tags"]["mean_length"] == pytest.approx(1.0)
    assert features["price"]["mean"] == pytest.approx(3e38 / 3)
    assert features["history"]["source"] == "derived"
    assert found["counts"]["items_without_a_row"] == 3


def test_useless_features_and_logs_that_prepare_would_refuse_are_told(tmp_path: Path) -> None:
    size = 150
    write(tmp_path, log={
        "user_id": [1] * size, "item_id": list("ab") * 75, "timestamp": list(range(size)),
        "same": ["x"] * size, "rare": [None] * 100 + list("xxyyx") * 10, "own": list(range(size)),
        "nothing": pa.array([None] * size, pa.float64()),
    })  # fmt: skip
    kinds = {"same": "id", "rare": "id", "own": "id", "nothing": "number"}
    found = look(tmp_path, [HISTORY, *(Feature(name=n, kind=k) for n, k in kinds.items())])
    said = {(f["kind"], f["subject"]): f["text"] for f in found["findings"]}
    assert set(said) == {
        ("stops prepare", "users"), ("stops prepare", "nothing"), ("note", "same"),
        ("note", "rare"), ("note", "own"),
    }  # fmt: skip
    assert "67%" in said["note", "rare"]
    found = look(tmp_path, split=Split(test_from="2030-01-01"))
    assert ("stops prepare", "split") in {(f["kind"], f["subject"]) for f in found["findings"]}


def test_the_split_that_the_log_gives_is_used(tmp_path: Path) -> None:
    parts = ["test", "train", "train", "validation", "train", "train"]
    write(tmp_path, log={
        "user_id": [1, 1, 2, 2, 3, 3], "item_id": list("abcaba"), "timestamp": [1, 2, 3, 4, 5, 6],
        "part": parts,
    })  # fmt: skip
    found = look(tmp_path, split=Split(kind="given", column="part"))["split"]
    assert found["cuts"] is None
    assert {n: p["events"] for n, p in found["parts"].items()} == Counter(parts)


# A log whose items a query can hardly know, and what leaks them when it is added.
def plain_log(rng: np.random.Generator, events: int = 6000) -> dict[str, Any]:
    item = rng.zipf(1.3, events) % 80
    return {
        "user_id": rng.integers(0, 200, events), "item_id": item,
        "timestamp": np.sort(rng.integers(0, 50 * DAY, events)),
        "device": rng.choice(["a", "b", "c"], events), "dwell": rng.normal(size=events).round(2),
        "session": np.arange(events), "mood": list(rng.normal(size=(events, 3))),
        "words": [list(w) for w in rng.integers(0, 9, (events, 2))],
    }  # fmt: skip


CLEAN = [
    HISTORY, USER, Feature(name="device", kind="id"), Feature(name="dwell", kind="number"),
    Feature(name="session", kind="id"), Feature(name="mood", kind="vector", width=3),
    Feature(name="words", kind="ids", length=4), Feature(name="town", kind="id"),
]  # fmt: skip


def test_leaks_are_named_and_a_clean_log_raises_none(tmp_path: Path) -> None:
    log = plain_log(np.random.default_rng(0))
    users = {"user_id": np.arange(200), "town": np.arange(200) % 50}
    write(tmp_path, log=log, users=users)
    found = look(tmp_path, CLEAN)
    assert leaks(found) == set()
    assert set(found["gains"]["features"]) == {f.name for f in CLEAN[2:]}
    item = log["item_id"]
    log |= {
        "the_item": item, "category": item % 10, "length": item * 0.5,
        "text": [[float(i), 1.0] for i in item], "tags": [[1000 + i % 10, i % 3] for i in item],
    }  # fmt: skip
    planted = [
        Feature(name="the_item", kind="id"), Feature(name="category", kind="id"),
        Feature(name="length", kind="number"), Feature(name="text", kind="vector", width=2),
        Feature(name="tags", kind="ids"),
    ]  # fmt: skip
    write(tmp_path, log=log)
    found = look(tmp_path, [*CLEAN, *planted])
    assert leaks(found) == {f.name for f in planted}
    assert found["gains"]["features"]["the_item"]["gain"] > 0.9
    # The limit is the job's.
    assert leaks(look(tmp_path, CLEAN, limits=InspectConfig(max_gain=0.0))) <= {"words", "device"}


def test_gains_are_those_of_the_formula(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    size = 60
    log = {
        "user_id": rng.integers(0, 9, size), "item_id": rng.integers(0, 7, size),
        "timestamp": np.arange(size), "place": rng.choice(["p", "q", None], size),
        "words": [list(w) for w in rng.integers(0, 5, (size, 2))],
    }  # fmt: skip
    write(tmp_path, log=log)
    query = [HISTORY, Feature(name="place", kind="id"), Feature(name="words", kind="ids")]
    found = look(tmp_path, query)["gains"]
    train, test = range(round(size * 0.8)), range(round(size * 0.9), size)
    n = Counter(log["item_id"][e] for e in train)
    items = len(set(log["item_id"]))
    p = {i: (n[i] + 1) / (len(train) + items) for i in set(log["item_id"])}
    judged = [e for e in test if n[log["item_id"][e]]]
    bits = np.mean([-math.log2(p[log["item_id"][e]]) for e in judged])
    assert found["events"] == len(judged)
    assert found["bits"] == pytest.approx(bits)
    for name, of in (
        ("place", lambda e: [log["place"][e]]), ("words", lambda e: log["words"][e]),
    ):  # fmt: skip
        joint = Counter((v, log["item_id"][e]) for e in train for v in of(e))
        total, kinds = Counter(), Counter()
        for (v, _), count in joint.items():
            total[v] += count
            kinds[v] += 1

        def told(v: Any, i: int, joint=joint, total=total, kinds=kinds) -> float:
            if v not in total:
                return p[i]
            return (joint[v, i] + kinds[v] * p[i]) / (total[v] + kinds[v])

        own = np.mean([
            -math.log2(np.mean([told(v, log["item_id"][e]) for v in of(e)])) for e in judged
        ])  # fmt: skip
        assert found["features"][name]["gain"] == pytest.approx(1 - own / bits), name


@pytest.mark.parametrize("source", ["users", "interactions"])
def test_a_list_that_holds_what_is_to_come_is_named(source, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    log = plain_log(rng, 1500)
    item, user = log["item_id"], log["user_id"]
    history = Feature(name="history", kind="history", table="item_id", column="earlier")

    def lists(of: Any) -> None:
        table = dict(log)
        users = {"user_id": np.arange(200)}
        if source == "users":
            users["earlier"] = [[int(i) for i in of(u)] for u in range(200)]
        else:
            table["earlier"] = [[int(i) for i in of(user[e], e)] for e in range(len(item))]
        write(tmp_path, log=table, users=users)

    lists(lambda u, e=0: rng.integers(1000, 2000, 5))
    found = look(tmp_path, [history])
    assert leaks(found) == set()
    assert found["listed"]["test"]["in_list"] == 0
    assert found["listed"]["test"]["first_time"] > 20
    lists(lambda u, e=None: item[user == u] if e is None else [7000, item[e]])
    found = look(tmp_path, [Feature(**(vars(history) | {"length": 500}))])
    assert leaks(found) == {"history"}
    assert found["listed"]["test"]["share"] == 1.0


def test_bad_rows_are_counted_and_said_to_stop_prepare(tmp_path: Path) -> None:
    write(tmp_path, log={
        "user_id": [1, 1, None, 2, 3, 3, 2, 1, 2, 3], "item_id": list("abcabcabca"),
        "timestamp": [1, 2, 3, -4, 5, 6, 7, 8, 9, 10],
    })  # fmt: skip
    found = look(tmp_path)
    assert (found["counts"]["events"], found["counts"]["bad_rows"]) == (8, 2)
    assert len(found["bad_rows"]) == 2
    assert [f["subject"] for f in found["findings"] if f["kind"] == "stops prepare"] == ["bad rows"]
    assert not look(tmp_path, on_bad_rows="skip")["findings"]


def test_the_page_is_one_file_that_escapes_what_the_log_holds(tmp_path: Path) -> None:
    evil = "<script>alert('$x_1$')</script>[/bold]"
    rng = np.random.default_rng(3)
    write(tmp_path, log={
        "user_id": [f"u{u}" for u in rng.integers(0, 9, 80)], "item_id": [evil, "b"] * 40,
        "timestamp": np.arange(80) * DAY, "device": [evil, "a", "a", "b"] * 20,
    }, items={"item_id": [evil, "b"], "genre": [evil, "x"]})  # fmt: skip
    (tmp_path / "data").mkdir()
    found = look(
        tmp_path, [HISTORY, Feature(name="device", kind="id")],
        [ITEM, Feature(name="genre", kind="id")],
    )  # fmt: skip
    page = render("<script>name", found)
    assert "<script" not in page
    assert "&lt;script&gt;alert(" in page
    assert "http:" not in page
    assert "https:" not in page
    assert page.count("<svg ") == 4
    assert "src=" not in page
    assert "<link" not in page


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_gain": 1.5}, "inspect.max_gain"), ({"max_psi": -1.0}, "inspect.max_psi"),
        ({"min_volume": 2.0}, "inspect.max_volume"),
        ({"max_missing": float("nan")}, "inspect.max_missing"),
    ],
)  # fmt: skip
def test_limits_that_mean_nothing_are_refused(changes, said) -> None:
    with pytest.raises(UserError, match=said):
        InspectConfig(**changes).validate()


def test_the_command_inspects_and_stops_a_pipeline(twotower, demo_log, tmp_path: Path) -> None:
    job = ["--config", QUICKSTART, "--run_dir=run", f"--data.root={demo_log}"]
    done = twotower("inspect", *job, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("popularity", "users unseen", "device", "run/inspection/index.html"):
        assert words in done.stdout
    found = json.loads((tmp_path / "run/inspection/inspection.json").read_text())
    assert not any(f["kind"] != "note" for f in found["findings"])
    assert found["counts"]["events"] == pq.read_metadata(demo_log / "interactions.parquet").num_rows
    assert sorted(p.name for p in (tmp_path / "run/inspection").iterdir()) == [
        "index.html", "inspection.json",
    ]  # fmt: skip

    assert twotower("prepare", *job, cwd=tmp_path).returncode == 0
    done = twotower("inspect", *job, "--against=run", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no drift" in done.stdout
    log = pq.read_table(demo_log / "interactions.parquet")
    half = log.slice(0, len(log)).take(list(range(0, len(log), 2)))
    shifted = half.set_column(
        half.column_names.index("device"), "device", pa.array(["tv[/red]"] * len(half))
    )
    pq.write_table(shifted, tmp_path / "new.parquet")
    new = f"--data.interactions={tmp_path / 'new.parquet'}"
    done = twotower("inspect", *job, new, "--against=run/prepared", cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    for words in ("drift device", "drift volume", "run/drift/index.html"):
        assert words in done.stdout
    assert "Nothing has moved" not in (tmp_path / "run/drift/index.html").read_text()
    flags = json.loads((tmp_path / "run/drift/inspection.json").read_text())["drift"]["flags"]
    assert {subject for subject, _ in flags} == {"device", "volume"}
    assert (tmp_path / "run/inspection/index.html").exists(), "the log's own page is kept"


def test_bad_input_is_one_line(twotower, tmp_path: Path) -> None:
    log = {"user_id": [1, 1, 2, 2, 3, 3] * 3, "item_id": list("abcabd") * 3,
           "timestamp": list(range(18))}  # fmt: skip
    write(tmp_path, log=log, empty={k: v[:0] for k, v in log.items()},
          words=log | {"user_id": [f"u{u}" for u in log["user_id"]]})  # fmt: skip
    (tmp_path / "run/prepared").mkdir(parents=True)
    config = schema(tmp_path, [USER])
    prepare(config, tmp_path / "run/prepared")
    job = {"name": "bad", "run_dir": "run", "data": {
        "interactions": "log.parquet", "query": [{"name": "user_id", "kind": "id"}],
        "item": [{"name": "item_id", "kind": "id"}],
    }}  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    for arguments, said in (
        (["--against=nowhere"], ["nowhere", "--against", "twotower prepare"]),
        (["--against=run", "--data.interactions=words.parquet"], ["string", "int64", "prepared"]),
        (["--against=run", "--data.interactions=empty.parquet"], ["empty.parquet", "no event"]),
    ):
        done = twotower("inspect", "--config=job.yaml", *arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        for words in said:
            assert words in done.stderr
    assert not (tmp_path / "run/inspection").exists()
    assert not (tmp_path / "run/drift").exists()
    for name, words in (("empty", "the log is empty"), ("gone", "no such file")):
        with pytest.raises(UserError, match=words):
            look(tmp_path, interactions=f"{name}.parquet")
