"""A scan in 8 bits misses none of the best, and is used where it pays alone."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower.export.index as index_module
import twotower.export.search as search_module
from twotower.export.config import IndexConfig
from twotower.export.index import SCAN_CODES, VECTORS, build_index, index_spec, write_scan
from twotower.export.search import SCAN_FILE, Scan, exact_top_k, open_search

N, K = 20_000, 50


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def scan_of(folder: Path, items) -> Scan:
    write_scan(folder, items)
    return Scan(folder, items, 1)


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    centre = rng.standard_normal((100, 96))
    return unit(centre[rng.integers(0, 100, N)] + rng.standard_normal((N, 96)))


@pytest.fixture(scope="module")
def folder(items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    np.save(folder / VECTORS, items)
    build_index(folder, index_spec(IndexConfig(), 96, False), IndexConfig())
    return folder


@pytest.fixture(scope="module")
def asked(items):
    rng = np.random.default_rng(1)
    return unit(items[rng.integers(0, N, 40)] + 0.05 * rng.standard_normal((40, 96)))


def opened(folder: Path):
    return open_search(folder, asdict(index_spec(IndexConfig(), 96, False)))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(32, 700), width=st.integers(1, 200), size=st.sampled_from([1e-3, 1.0, 1e3]),
    bias=st.sampled_from([0.0, 1.0, 30.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_products_in_8_bits_are_within_their_bound(
    n, width, size, bias, seed, tmp_path_factory
) -> None:
    rng = np.random.default_rng(seed)
    items = (size * rng.standard_normal((n, width))).astype(np.float32)
    items[:, -1] *= bias
    items[rng.integers(n)] = 0
    scan = scan_of(tmp_path_factory.mktemp("scan"), items)
    for vector in rng.standard_normal((3, width)).astype(np.float32):
        rough, best = scan.products(vector[None])
        truth = items.astype(np.float64) @ vector.astype(np.float64)
        assert np.abs(rough[0] - truth).max() <= scan.bound(vector)
        groups = rough[0, : n // 32 * 32].reshape(-1, 32).max(axis=1)
        np.testing.assert_array_equal(best[0], groups)


@settings(max_examples=40, deadline=None)
@given(extra=st.integers(0, 40), spread=st.integers(1, 4), k=st.integers(1, 60))
def test_the_best_are_found_and_of_equal_scores_the_lower_row_comes_first(
    extra, spread, k, tmp_path_factory
) -> None:
    rng = np.random.default_rng(extra)
    items = rng.integers(-spread, spread + 1, (2040 + extra, 6)).astype(np.float32)
    asked = rng.integers(-spread, spread + 1, (2, 6)).astype(np.float32)
    scan = scan_of(tmp_path_factory.mktemp("ties"), items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "SCANNED_SHARE", 1)
        scores, rows = scan.search(asked, k)
    truth = asked @ items.T
    expected = np.argsort(-truth, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(truth, expected, 1))


@pytest.mark.parametrize("vectors", [1, 2])
def test_few_vectors_are_answered_as_many_are(folder, items, asked, vectors, monkeypatch) -> None:
    # Whatever takes less time on this machine now.
    monkeypatch.setattr(Scan, "pays", lambda scan, otherwise: True)
    index = opened(folder)
    _, expected = exact_top_k(items, asked, K)
    together = index.search(asked, K)
    np.testing.assert_array_equal(together[1], expected)
    used = 0
    for start in range(0, len(asked), vectors):
        some = slice(start, start + vectors)
        used += index.scan.search(asked[some], K) is not None
        scores, rows = index.search(asked[some], K)
        np.testing.assert_array_equal(rows, expected[some])
        np.testing.assert_allclose(scores, together[0][some], atol=1e-6)
    assert used > 0.9 * len(asked) / vectors


def test_what_a_scan_cannot_answer_the_index_does(folder, items, asked, monkeypatch) -> None:
    monkeypatch.setattr(Scan, "pays", lambda scan, otherwise: True)
    index = opened(folder)
    nothing = np.zeros((1, 96), np.float32)  # all items are equally good
    for vector, k in ((asked[:1], N), (asked[:1], 1000), (nothing, K)):
        assert index.scan.search(vector, k) is None
        scores, rows = index.search(vector, k)
        assert len(set(rows[0].tolist())) == k
        np.testing.assert_allclose(scores, exact_top_k(items, vector, k)[0], atol=1e-6)
        np.testing.assert_allclose(scores[0], items[rows[0]] @ vector[0], atol=1e-6)


def test_no_scan_is_used_whose_products_break_their_bound(folder, items, asked, tmp_path) -> None:
    for name in ("index.onnx", VECTORS, SCAN_FILE, SCAN_CODES, index_module.SCAN_SCALES):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    # As from a processor whose sums overflow.
    codes = np.load(tmp_path / SCAN_CODES)
    np.save(tmp_path / SCAN_CODES, codes ^ 16)
    assert opened(tmp_path).scan is None
    _, rows = opened(tmp_path).search(asked[:1], K)
    np.testing.assert_array_equal(rows, exact_top_k(items, asked[:1], K)[1])


def test_few_items_have_no_scan(items, tmp_path) -> None:
    np.save(tmp_path / VECTORS, items[:1000])
    build_index(tmp_path, index_spec(IndexConfig(), 96, False), IndexConfig())
    assert not (tmp_path / SCAN_FILE).exists()
    assert opened(tmp_path).scan is None


def test_the_same_vectors_give_the_same_bytes(folder, items, tmp_path) -> None:
    write_scan(tmp_path, items)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes(), file.name
