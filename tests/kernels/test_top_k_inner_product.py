"""Exact search against a full sort, with rows left out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.kernels import top_k_inner_product as module
from twotower.kernels.top_k_inner_product import top_k_inner_product


@settings(deadline=None, max_examples=50)
@given(
    queries=st.integers(1, 9), items=st.integers(1, 40), width=st.integers(1, 9),
    seed=st.integers(0, 999), data=st.data(),
)  # fmt: skip
def test_the_best_that_are_not_excluded(queries, items, width, seed, data) -> None:
    k = data.draw(st.integers(1, items))
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(queries, width, generator=generator)
    item = torch.randn(items, width, generator=generator)
    excluded = [
        sorted(data.draw(st.sets(st.integers(0, items - 1), max_size=items)))
        for _ in range(queries)
    ]
    offset = torch.tensor([0, *torch.tensor([len(e) for e in excluded]).cumsum(0).tolist()])
    rows = torch.tensor([r for e in excluded for r in e], dtype=torch.int64)
    scores, found = top_k_inner_product(
        query, item, k, exclude_row_X=rows, exclude_offset_B1=offset
    )
    for i in range(queries):
        exact = (item.double() @ query[i].double()).tolist()
        allowed = [r for r in range(items) if r not in excluded[i]]
        best = sorted(allowed, key=lambda r: -exact[r])[:k]
        got = [r for r in found[i].tolist() if r >= 0]
        assert len(got) == len(best)
        assert not set(got) & set(excluded[i])
        assert [exact[r] for r in got] == pytest.approx([exact[r] for r in best], abs=1e-5)
        assert scores[i][: len(got)].tolist() == pytest.approx([exact[r] for r in got], abs=1e-5)


def test_blocks_make_no_difference(monkeypatch) -> None:
    query, item = torch.randn(23, 8), torch.randn(50, 8)
    whole = top_k_inner_product(query, item, 5)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 50 * 3)
    blocks = top_k_inner_product(query, item, 5)
    assert torch.equal(whole[1], blocks[1])


@pytest.mark.parametrize("k", [0, 11])
def test_k_beyond_the_catalogue_is_refused(k) -> None:
    with pytest.raises(ValueError, match=r"k must be in 1\.\.10"):
        top_k_inner_product(torch.randn(2, 4), torch.randn(10, 4), k)
