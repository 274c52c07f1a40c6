"""`twotower index`: other items by the same towers, and what each kind of index costs."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from twotower.errors import UserError
from twotower.export.bundle import read_bundle
from twotower.export.new_items import check_vectors
from twotower.export.update import update_bundle


@pytest.fixture
def bundles(finished_run, tmp_path):
    """A folder with a copy of the finished run's bundle."""
    shutil.copytree(finished_run.bundle, tmp_path / "bundles" / "1")
    return tmp_path / "bundles"


@pytest.fixture
def items(demo_log):
    return pq.read_table(demo_log / "items.parquet")


def ids_of(bundle) -> list[str]:
    return [i.decode() for i in np.load(bundle / "item_ids.npy")]


def changed(table: pa.Table, **columns) -> pa.Table:
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, pa.array(values, table.schema.field(name).type))
    return table


def test_items_are_added_changed_and_removed(bundles, items, twotower, tmp_path) -> None:
    rows = items.slice(0, 4)
    dearer = [None if p is None else p + 40 for p in rows["price"].to_pylist()]
    table = changed(rows, item_id=["item-000000", "a-first", "item-000001", "zz"], price=dearer)
    pq.write_table(table, tmp_path / "items.parquet")
    before = {p.name: p.read_bytes() for p in (bundles / "1").iterdir()}
    done = twotower(
        "index", "bundles", "--update", "items.parquet", "--remove=item-000005,item-000299",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {p.name: p.read_bytes() for p in (bundles / "1").iterdir()} == before
    old, new = read_bundle(bundles / "1"), read_bundle(bundles / "2")
    assert (new.manifest.version, new.manifest.base, new.manifest.num_items) == (2, 1, 300)
    assert new.manifest.fingerprint == old.manifest.fingerprint
    ids = ids_of(new.path)
    assert ids == sorted({*ids_of(old.path), "a-first", "zz"} - {"item-000005", "item-000299"})
    was = dict(zip(ids_of(old.path), np.load(old.path / "item_vectors.npy"), strict=True))
    now = dict(zip(ids, np.load(new.path / "item_vectors.npy"), strict=True))
    moved = {i for i in ids if i not in was or not np.array_equal(was[i], now[i])}
    assert moved == {"item-000000", "a-first", "item-000001", "zz"}
    # The last coordinate is the item bias.
    added = np.stack([now["zz"], now["a-first"]])[:, :-1]
    np.testing.assert_allclose(np.linalg.norm(added, axis=1), 1, atol=1e-6)
    shown = pq.read_table(new.path / "items.parquet").to_pylist()
    assert [r["id"] for r in shown] == ids
    assert shown[0] == {"id": "a-first", "train_count": 0} | {
        name: rows[name][1].as_py() for name in ("title", "genre")
    }
    counts = {
        r["id"]: r["train_count"] for r in pq.read_table(old.path / "items.parquet").to_pylist()
    }
    assert all(r["train_count"] == counts.get(r["id"], 0) for r in shown)
    for g in new.golden():
        assert len(g.item_ids) == 10
        assert not {"item-000005", "item-000299"} & set(g.item_ids)
    # What nothing changed is made once more, from the newest.
    done = twotower("index", "bundles/2", "--remove=zz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_bundle(bundles / "3").manifest.num_items == 299


def test_the_log_s_own_items_get_the_vectors_that_the_export_gave(bundles, demo_log) -> None:
    """Text, lists, numbers and missing values are read as `prepare` reads them."""
    source = read_bundle(bundles / "1")
    made = update_bundle(source, demo_log / "items.parquet", [], None, lambda *_: None)
    assert ids_of(made.path) == ids_of(source.path)
    was, now = (np.load(b.path / "item_vectors.npy") for b in (source, made))
    # ONNX Runtime against eager PyTorch, as in the export's own check.
    np.testing.assert_allclose(now, was, atol=1e-5)
    for a, b in zip(source.golden(), made.golden(), strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)


def test_the_same_update_gives_the_same_bytes(bundles, items, tmp_path) -> None:
    pq.write_table(changed(items.slice(0, 2), item_id=["x", "y"]), tmp_path / "items.parquet")
    shutil.copytree(bundles, tmp_path / "again")
    for folder in (bundles, tmp_path / "again"):
        update_bundle(
            read_bundle(folder / "1"), tmp_path / "items.parquet", [], None, lambda *_: None
        )
    for file in (bundles / "2").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / "2" / file.name).read_bytes(), file.name


BAD = {
    "duplicated id": (
        lambda t: changed(t, item_id=["a", "b", "a"]), [],
        "column 'item_id': item 'a' stands in 2 rows",
    ),
    "missing column": (
        lambda t: t.drop_columns("price"), [],
        "no column 'price', which the towers were trained with",
    ),
    "misspelt column": (
        lambda t: t.rename_columns([n if n != "price" else "pricee" for n in t.column_names]), [],
        "no column 'price'.*did you mean 'pricee'",
    ),
    "NaN": (
        lambda t: changed(t, price=[1.0, float("nan"), 2.0]), [],
        "column 'price': row 2: not a finite number",
    ),
    "null id": (
        lambda t: changed(t, item_id=["a", None, "b"]), [],
        "column 'item_id': row 2: the id is null",
    ),
    "no row": (lambda t: t.slice(0, 0), [], "holds no row"),
    "unknown": (lambda t: t, ["nobody"], "item 'nobody' is not in the catalogue"),
    "both": (
        lambda t: t, ["item-000001"], "'item-000001' stands in --update and in --remove"
    ),
    "list of another width": (
        lambda t: t.set_column(
            t.schema.get_field_index("text"), "text", pa.array([[1.0, 2.0]] * 3)
        ), [],
        "column 'text': row 1: expected a vector of width 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_items_that_do_not_fit_are_refused(name, bundles, items, tmp_path) -> None:
    change, remove, words = BAD[name]
    pq.write_table(change(items.slice(0, 3)), tmp_path / "items.parquet")
    with pytest.raises(UserError, match=words):
        update_bundle(
            read_bundle(bundles / "1"), tmp_path / "items.parquet", remove, None, lambda *_: None
        )
    assert [p.name for p in bundles.iterdir()] == ["1"]


@pytest.mark.parametrize("kind", ["exact", "hnsw"])
def test_a_disk_that_fills_leaves_the_bundle_as_it_was(kind, bundles, items, tmp_path) -> None:
    before = {p.name: p.read_bytes() for p in (bundles / "1").iterdir()}
    pq.write_table(changed(items.slice(0, 1), item_id=["x"]), tmp_path / "items.parquet")
    # Less than the vectors of 301 items; or room for them, and less for index and golden queries.
    script = (
        "import resource, dataclasses\n"
        "from pathlib import Path\n"
        "from twotower.export.bundle import read_bundle\n"
        "from twotower.export.update import update_bundle\n"
        "bundle = read_bundle(Path('bundles/1'))\n"
        f"index = dataclasses.replace(bundle.manifest.index, kind='{kind}')\n"
        "manifest = dataclasses.replace(bundle.manifest, index=index)\n"
        "bundle = dataclasses.replace(bundle, manifest=manifest)\n"
        f"size = {80_000 if kind == 'hnsw' else 30_000}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try:\n"
        "    update_bundle(bundle, Path('items.parquet'), [], None, lambda *_: None)\n"
        "except OSError as error:\n"
        "    print('refused:', error.filename)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "refused: " in done.stdout, done.stdout + done.stderr
    assert [p.name for p in bundles.iterdir()] == ["1"]
    assert {p.name: p.read_bytes() for p in (bundles / "1").iterdir()} == before


def refused(done, words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert re.search(words, done.stderr), done.stderr


def test_what_cannot_be_asked_is_refused(bundles, twotower, tmp_path) -> None:
    (tmp_path / "text.parquet").write_text("item_id\na\n")
    everything = ",".join(ids_of(bundles / "1"))
    for arguments, words in (
        (["bundles"], "say either --compare, or"),
        (["nowhere", "--compare"], "nowhere: no bundle here"),
        (["bundles", "--update=none.parquet"], "none.parquet: no such file"),
        (["bundles", "--update=text.parquet"], "text.parquet: cannot be read as Parquet"),
        (["bundles", "--compare", "--k=301"], r"--k must be in 1\.\.300"),
        (["bundles", f"--remove={everything}"], "nothing would be left"),
    ):
        refused(twotower("index", *arguments, cwd=tmp_path), words)
    assert [p.name for p in bundles.iterdir()] == ["1"]


def test_vectors_that_are_none_are_refused_with_their_items() -> None:
    vectors = np.ones((4, 3), np.float32)
    vectors[1, 2], vectors[3] = np.nan, 0
    with pytest.raises(UserError, match=r"2 of 4 item vectors .* items 'b', 'd'"):
        check_vectors(vectors, pa.array(list("abcd")))


def test_all_kinds_are_compared_in_one_table_of_80_columns(finished_run, twotower) -> None:
    done = twotower("index", "run", "--compare", "--k=20", cwd=finished_run.cwd)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("│", "┃", "┏"))]
    assert max(map(len, lines)) <= 80
    assert "recall@20" in done.stdout
    done = twotower("index", "run", "--compare", "--k=20", "--json", cwd=finished_run.cwd)
    costs = {c["kind"]: c for c in json.loads(done.stdout)}
    assert list(costs) == ["exact", "int8", "pq", "ivf", "hnsw"]
    assert costs["exact"]["recall"] == 1
    assert all(c["recall"] > 0.9 for c in costs.values())
    assert costs["int8"]["bytes_an_item"] < costs["exact"]["bytes_an_item"] / 3
    assert all(c["latency_ms"]["64"] > 0 for c in costs.values())
