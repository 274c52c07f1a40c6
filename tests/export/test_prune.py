"""`export.prune_vocab`: fewer rows, the same answers."""

import re
import shutil

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from twotower.data.encode import Encoder
from twotower.data.schema import Feature
from twotower.data.table import Table
from twotower.data.vocabulary import Vocabulary
from twotower.export.golden import raw_tensors, session
from twotower.export.prune import Kept

from .bundles import dynamic_bundle, export_again, exported
from .test_weights import put_outside


def vectors(bundle, requests):
    tensors = raw_tensors(bundle.manifest.query, requests)
    return session(bundle.path / "query.onnx").run(["vector"], tensors)[0]


def files_but_graphs(bundle) -> dict[str, bytes]:
    """Return what a client of a bundle gets to see."""
    names = ("item_vectors.npy", "item_ids.npy", "items.parquet", "golden.json", "index.onnx")
    return {name: (bundle.path / name).read_bytes() for name in names}


def test_only_ids_that_cannot_occur_are_pruned(make, tmp_path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    events = {
        "user_id": rng.integers(0, 20, 200).tolist(),
        "item_id": [f"item {i}" for i in rng.integers(0, 15, 200)],
        "timestamp": list(range(200)),
    }
    users = {"user_id": list(range(20)), "city": [["x", "y"][i % 2] for i in range(20)]}
    items = {
        "item_id": [*(f"item {i}" for i in range(15)), "shelved"],
        "tags": [*([f"tag {i % 4}"] for i in range(15)), ["rare"]],
    }
    data = make(
        events, users=users, items=items,
        query=[
            Feature(name="user_id", kind="id"), Feature(name="city", kind="id"),
            Feature(name="history", kind="history", table="item_id", length=5),
        ],
        item=[Feature(name="item_id", kind="id"), Feature(name="tags", kind="ids", length=2)],
        tables={  # no event has what is pinned
            "item_id": Table(pinned=["shelved", "ghost"]), "tags": Table(pinned=["old", "rare"]),
            "city": Table(pinned=["nowhere"], oov_rows=1),
        },
    )  # fmt: skip
    _, model, whole = exported(data, tmp_path)
    pruned = export_again(data, tmp_path, prune_vocab=True)
    assert whole.manifest.pruned == {}
    assert pruned.manifest.pruned == {"item_id": 1, "tags": 1, "city": 1}
    assert pruned.manifest.pruned_bytes == 3 * model.dim * 4
    assert files_but_graphs(pruned) == files_but_graphs(whole)
    assert pruned.manifest.parity == whole.manifest.parity
    requests = [
        {"user_id": user, "city": city, "history": history}
        for user in (3, 999) for city in ("x", "elsewhere", None)
        for history in ([], ["item 3", "shelved"], ["never heard of", "item 14"])
    ]  # fmt: skip
    np.testing.assert_array_equal(vectors(pruned, requests), vectors(whole, requests))
    # What is left out is answered as what was never seen: "city" has one row for that.
    gone, unseen = ({"user_id": 3, "city": c, "history": []} for c in ("nowhere", "elsewhere"))
    assert np.abs(vectors(whole, [gone]) - vectors(whole, [unseen])).max() > 1e-4
    np.testing.assert_array_equal(vectors(pruned, [gone]), vectors(pruned, [unseen]))
    # The same beside the graphs, and of the same bytes when made again.
    put_outside(monkeypatch)
    first, second = (export_again(data, tmp_path, prune_vocab=True) for _ in range(2))
    assert first.manifest.files["query.weights"] == second.manifest.files["query.weights"]
    assert first.manifest.files == second.manifest.files
    assert first.manifest.pruned == pruned.manifest.pruned
    np.testing.assert_array_equal(vectors(first, requests), vectors(whole, requests))


def test_slots_that_no_id_has_are_pruned(make, tmp_path) -> None:
    data, model, whole = dynamic_bundle(make, tmp_path)
    pruned = export_again(data, tmp_path, prune_vocab=True)
    for name in ("user_id", "item_id", "tags"):
        slots = model.dynamic_slots(name)
        assigned = len(slots.assigned()[0])
        rows = len(model.table_weight(name))
        assert pruned.manifest.pruned.get(name, 0) == rows - assigned - slots.parts
    assert pruned.manifest.pruned["user_id"] > 100
    assert files_but_graphs(pruned) == files_but_graphs(whole)
    requests = [g.features for g in whole.golden()]
    requests += [r | {"user_id": 10_000 + i} for i, r in enumerate(requests)]
    np.testing.assert_array_equal(vectors(pruned, requests), vectors(whole, requests))
    saved = (whole.path / "query.onnx").stat().st_size - (pruned.path / "query.onnx").stat().st_size
    assert saved > pruned.manifest.pruned["user_id"] * model.dim * 4


def test_the_command_says_what_was_pruned(finished_run, twotower, tmp_path) -> None:
    skip = shutil.ignore_patterns("server*")  # what a killed one leaves is not for copying
    shutil.copytree(finished_run.run_dir, tmp_path / "run", ignore=skip)
    done = twotower("export", *finished_run.arguments, "--export.prune_vocab=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"pruned\W+nothing", done.stdout), "a log that was never appended to"
    made = tmp_path / "run" / "bundles" / "2"
    assert (made / "golden.json").read_bytes() == (finished_run.bundle / "golden.json").read_bytes()


@given(
    keys=st.lists(st.integers(0, 10**6), unique=True, max_size=40),
    oov=st.integers(1, 4), seed=st.integers(0, 100),
)  # fmt: skip
def test_a_pruned_encoder_finds_every_id_that_stays_where_its_row_went(keys, oov, seed) -> None:
    vocabulary = Vocabulary(pa.array(keys, pa.int64()), pa.array(np.ones(len(keys), np.int64)), oov)
    stays = np.random.default_rng(seed).random(len(keys)) < 0.5
    rows = np.flatnonzero([*[True] * oov, *stays])
    encoder = Encoder(vocabularies={"t": vocabulary}, normalisers={})
    pruned = Kept({"t": rows}, {}, 0).encoder(encoder).vocabularies["t"]
    assert pruned.rows == len(rows)
    ids = pa.array([*keys, -1, None], pa.int64())
    found, was = pruned.lookup(ids), vocabulary.lookup(ids)
    for place, key in enumerate([*keys, -1, None]):
        if key is None:
            assert found[place] == -1
        elif key == -1 or stays[place]:
            assert rows[found[place]] == was[place]
        else:
            assert found[place] < oov
