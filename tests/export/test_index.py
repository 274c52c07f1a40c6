"""Every kind of index: true scores, few misses, the same bytes every time."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import twotower.export.search as search_module
from twotower.errors import UserError
from twotower.export.compare import overlap
from twotower.export.config import INDEX_KINDS, IndexConfig
from twotower.export.index import CODES, SCALES, VECTORS, build_index, index_spec, write_int8
from twotower.export.search import cut_vectors, exact_top_k, open_search

N, D, K = 4000, 32, 20


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def vectors():
    rng = np.random.default_rng(0)
    spread = np.arange(1, D + 1) ** -0.8
    centre = rng.standard_normal((40, D)) * spread
    return unit(centre[rng.integers(0, 40, N)] + 0.5 * rng.standard_normal((N, D)) * spread)


@pytest.fixture(scope="module")
def queries(vectors):
    rng = np.random.default_rng(1)
    return unit(vectors[rng.integers(0, N, 50)] + 0.1 * rng.standard_normal((50, D)))


def built(folder: Path, vectors, config: IndexConfig, bias: bool = False):
    folder.mkdir(exist_ok=True)
    np.save(folder / VECTORS, vectors)
    spec = index_spec(config, vectors.shape[1], bias)
    build_index(folder, spec, config)
    return open_search(folder, asdict(spec))


@pytest.mark.parametrize("width", [None, 16])
@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_scores_are_true_and_few_items_are_missed(kind, width, vectors, queries, tmp_path) -> None:
    search = built(tmp_path, vectors, IndexConfig(kind=kind, width=width, rescore=8))
    scores, rows = search.search(queries, K)
    assert scores.shape == rows.shape == (50, K)
    assert rows.dtype == np.int64
    truth = np.take_along_axis(queries @ vectors.T, rows, axis=1)
    np.testing.assert_allclose(scores, truth, atol=1e-6)
    assert (np.diff(scores) <= 0).all()
    assert all(len(set(row)) == K for row in rows.tolist())
    _, expected = exact_top_k(vectors, queries, K)
    # Half of the coordinates of vectors that were not trained to be cut tell less of what is near.
    assert overlap(expected, rows) >= (0.97 if width is None else 0.85)
    if kind == "exact" and width is None:
        np.testing.assert_array_equal(rows, expected)


@pytest.mark.parametrize("copied", [0, search_module.COPIED_BYTES])
@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_vectors_are_answered_alike_in_batches_of_any_size(
    kind, copied, vectors, queries, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(search_module, "COPIED_BYTES", copied)
    search = built(tmp_path, vectors, IndexConfig(kind=kind))
    scores, rows = search.search(queries, K)
    for size in (1, 2, 3, 4):
        some = search.search(queries[:size], K)
        np.testing.assert_array_equal(some[1], rows[:size])
        # Sums of 64 products in another order.
        np.testing.assert_allclose(some[0], scores[:size], atol=1e-6)


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_any_k_up_to_the_catalogue_is_answered(kind, vectors, queries, tmp_path) -> None:
    search = built(tmp_path, vectors[:500], IndexConfig(kind=kind, nprobe=1))
    for k in (1, 30, 400, 500):
        _, rows = search.search(queries, k)
        assert all(len(set(row)) == k for row in rows.tolist())
    assert overlap(exact_top_k(vectors[:500], queries, 500)[1], rows) == 1


@settings(max_examples=15, deadline=None)
@given(extra=st.integers(0, 40), spread=st.integers(1, 4), k=st.integers(1, 90))
def test_of_equal_scores_the_lower_row_comes_first(extra, spread, k, tmp_path_factory) -> None:
    rng = np.random.default_rng(extra)
    items = rng.integers(-spread, spread + 1, (2040 + extra, 4)).astype(np.float32)
    asked = rng.integers(-spread, spread + 1, (5, 4)).astype(np.float32)
    search = built(tmp_path_factory.mktemp("ties"), items, IndexConfig())
    for wanted in (k, len(items) - k, len(items)):
        expected = np.argsort(-(asked @ items.T), axis=1, kind="stable")[:, :wanted]
        scores, rows = search.search(asked, wanted)
        np.testing.assert_array_equal(rows, expected)
        np.testing.assert_array_equal(scores, np.take_along_axis(asked @ items.T, expected, 1))
        np.testing.assert_array_equal(exact_top_k(items, asked, wanted)[1], expected)
        rows = search.among(asked[0], np.arange(len(items)), wanted)[1]
        np.testing.assert_array_equal(rows, expected[0])


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_a_catalogue_of_three_items_has_an_index(kind, vectors, tmp_path) -> None:
    search = built(tmp_path, vectors[:3], IndexConfig(kind=kind))
    assert set(search.search(vectors[:1], 3)[1][0]) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["exact", "int8", "ivf"])
def test_a_cut_keeps_the_items_bias(kind, vectors, queries, tmp_path) -> None:
    rng = np.random.default_rng(2)
    items = np.hstack([vectors, rng.standard_normal((N, 1)).astype(np.float32)])
    asked = np.hstack([queries, np.ones((50, 1), np.float32)])
    config = IndexConfig(kind=kind, width=17, rescore=8)
    _, rows = built(tmp_path, items, config, bias=True).search(asked, K)
    assert overlap(exact_top_k(items, asked, K)[1], rows) > 0.9
    cut = cut_vectors(items, 17, True)
    np.testing.assert_allclose(np.linalg.norm(cut[:, :-1], axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(cut[:, -1], items[:, -1])


@pytest.mark.parametrize("kind", INDEX_KINDS)
def test_the_same_vectors_give_the_same_bytes(kind, vectors, tmp_path) -> None:
    for name in ("a", "b"):
        built(tmp_path / name, vectors, IndexConfig(kind=kind))
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@settings(max_examples=50, deadline=None)
@given(
    rows=arrays(
        np.float32, st.tuples(st.integers(1, 5), st.just(4)),
        elements=st.integers(-(10**9), 10**9).map(lambda n: np.float32(n / 1e6)),
    )
)  # fmt: skip
def test_int8_is_off_by_half_a_step_at_most(rows, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("int8")
    write_int8(folder, rows, index_spec(IndexConfig(kind="int8"), 4, False))
    codes, scales = np.load(folder / CODES), np.load(folder / SCALES)
    assert codes.shape == (4, len(rows))
    assert abs(codes.astype(int)).max() <= 127
    off = np.abs(codes.T.astype(np.float64) * scales[:, None] - rows)
    assert (off <= scales[:, None].astype(np.float64) * (0.5 + 1e-4)).all()


def test_int8_products_do_not_overflow(tmp_path) -> None:
    """Of vectors that int8 holds as they are, no candidate is lost, not even the largest ones."""
    rng = np.random.default_rng(3)
    items = rng.choice([-1, 0, 1], (2000, 64), p=[0.45, 0.1, 0.45]).astype(np.float32)
    asked = np.sign(rng.standard_normal((20, 64))).astype(np.float32)
    asked[0] = items[0] = 1
    scores, _ = built(tmp_path, items, IndexConfig(kind="int8", rescore=1)).search(asked, 10)
    np.testing.assert_array_equal(scores, exact_top_k(items, asked, 10)[0])
    assert scores[0, 0] == 64


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"kind": "hnws"}, "export.index.kind must be one of .*did you mean 'hnsw'"),
        ({"width": 24}, r"export.index.width must be one of .*\(16, 32\), got 24"),
        ({"kind": "pq", "codes": 7}, r"export.index.codes must divide .*\(32\), got 7"),
        ({"kind": "pq", "codes": 32, "width": 16}, r"must divide .*\(16\), got 32"),
        ({"rescore": 0}, "export.index.rescore must be >= 1, got 0"),
        ({"nlist": -1}, "export.index.nlist must be >= 1"),
        ({"m": 1}, "export.index.m must be from 2"),
    ],
)
def test_settings_that_no_index_can_have_are_refused(settings_, words) -> None:
    with pytest.raises(UserError, match=words):
        IndexConfig(**settings_).validate([16, 32])
