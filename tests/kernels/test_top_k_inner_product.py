"""Exact search against a full sort in fp64, with every filter, type and tie."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twotower.kernels import top_k_inner_product as module
from twotower.kernels.launch import INTERPRET
from twotower.kernels.top_k_inner_product import (
    merge_top_k,
    top_k_inner_product,
    top_k_inner_product_reference,
)

from .conftest import not_interpreted, within

MANY = settings(
    deadline=None, max_examples=15 if INTERPRET else 60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(autouse=True)
def usual_choice(monkeypatch) -> None:
    """Undo what a test chose."""
    monkeypatch.setattr(module, "CPU_DIRECT", module.CPU_DIRECT)


@st.composite
def searches(draw):
    """Arguments with whole numbers, whose scores are exact, so that ties abound."""
    b, n = draw(st.integers(1, 9)), draw(st.integers(1, 60))
    d = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    spread = draw(st.sampled_from([1, 3, 100]))
    options = {}
    query = torch.randint(-spread, spread + 1, (b, d), generator=generator).float()
    item = torch.randint(-spread, spread + 1, (n, d), generator=generator).float()
    kind = draw(st.sampled_from(["float32", "bfloat16", "int8"]))
    if kind == "int8":
        item = item.to(torch.int8)
        options["item_scale_N"] = 2.0 ** torch.randint(-3, 4, (n,), generator=generator)
    elif kind == "bfloat16":
        query, item = query.bfloat16(), item.bfloat16()
    if draw(st.booleans()):
        options["item_bits_N"] = torch.randint(-8, 8, (n,), generator=generator)
        options["required_bits_B"] = torch.randint(0, 4, (b,), generator=generator)
    if draw(st.booleans()):
        excluded = [draw(st.lists(st.integers(0, n - 1), max_size=n)) for _ in range(b)]
        lengths = torch.tensor([0, *map(len, excluded)])
        options["exclude_row_X"] = torch.tensor([r for e in excluded for r in e], dtype=torch.int64)
        options["exclude_offset_B1"] = lengths.cumsum(0)
    return query, item, draw(st.integers(1, n)), options


@pytest.mark.parametrize("direct", [0, module.CPU_DIRECT])
@MANY
@given(search=searches())
def test_it_is_the_full_sort(device, direct, search) -> None:
    module.CPU_DIRECT = direct
    query, item, k, options = search
    there = {name: value.to(device) for name, value in options.items()}
    scores, rows = top_k_inner_product(
        within(query.to(device), (2, 3)), within(item.to(device), (1, 4))
        if item.is_floating_point() else item.to(device), k, **there,
    )  # fmt: skip
    expected_scores, expected_rows = top_k_inner_product_reference(
        query.double(), item.double(), k,
        **{n: v.double() if n == "item_scale_N" else v for n, v in options.items()},
    )  # fmt: skip
    assert rows.cpu().tolist() == expected_rows.tolist(), "ties go to the lower row"
    assert scores.cpu().tolist() == expected_scores.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 8, 1), (3, 200, 33, 200), (65, 257, 24, 30),
                                   (17, 130, 512, 9)])  # fmt: skip
def test_no_worse_than_eager_against_fp64(device, shape, dtype) -> None:
    b, n, d, k = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(b, d, generator=generator)).to(dtype)
    item = torch.nn.functional.normalize(torch.randn(n, d, generator=generator)).to(dtype)
    scores, rows = top_k_inner_product(query.to(device), item.to(device), k)
    exact = query.double() @ item.double().T
    assert all(len(set(r)) == k for r in rows.tolist())
    at_rows = exact.gather(1, rows.cpu())
    # Unit vectors: a dot product in fp32 errs by about sqrt(D) eps.
    tolerance = 4 * d**0.5 * torch.finfo(torch.float32).eps
    assert (scores.cpu().double() - at_rows).abs().max() <= tolerance
    best = exact.topk(k).values
    assert (at_rows - best).abs().max() <= tolerance, "no better row was missed"


@pytest.mark.parametrize("k", [1, 3])
def test_of_many_groups_none_is_missed(device, k) -> None:
    generator = torch.Generator().manual_seed(0)
    item = torch.randint(-9, 10, (500 * module.LARGEST_GROUP + 5, 5), generator=generator).float()
    query = torch.randint(-9, 10, (6, 5), generator=generator).float()
    best = (query @ item.T).sort(dim=1, descending=True, stable=True).indices
    options = {
        "exclude_row_X": best[:, :4].flatten(),  # ties of the best are left, and others' best
        "exclude_offset_B1": torch.arange(0, 25, 4),
        "item_bits_N": torch.randint(0, 4, (len(item),), generator=generator),
        "required_bits_B": torch.tensor([0, 1, 2, 3, 0, 1]),
    }
    there = {name: value.to(device) for name, value in options.items()}
    scores, rows = top_k_inner_product(query.to(device), item.to(device), k, **there)
    expected = top_k_inner_product_reference(query, item, k, **options)
    assert rows.cpu().tolist() == expected[1].tolist()
    assert scores.cpu().tolist() == expected[0].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 3, 100, 256, 257])
@pytest.mark.parametrize("shape", [(1, 300), (3, 4096), (2, 4097), (5, 70_001)])
def test_the_selection_of_keys_is_a_sort(shape, k) -> None:
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(-(2**62), 2**62, shape, generator=generator)
    key[:, : shape[1] // 2] = module.LEAST_KEY
    selected = module._select(key.cuda(), k).cpu()
    assert torch.equal(selected, key.sort(1, descending=True).values[:, :k])


@pytest.mark.parametrize("direct", [0, module.CPU_DIRECT])
def test_numbers_that_are_none_come_last(device, direct) -> None:
    module.CPU_DIRECT = direct
    item = torch.tensor([[float("nan")], [1.0], [float("inf")], [-float("inf")], [-0.0], [0.0]])
    scores, rows = top_k_inner_product(torch.ones(1, 1, device=device), item.to(device), 6)
    assert rows.tolist() == [[2, 1, 4, 5, -1, -1]]
    assert scores.tolist()[0][:4] == [float("inf"), 1.0, 0.0, 0.0]


def test_all_rows_excluded(device) -> None:
    scores, rows = top_k_inner_product(
        torch.ones(2, 3, device=device), torch.ones(5, 3, device=device), 2,
        exclude_row_X=torch.tensor([4, 3, 2, 1, 0, 0], device=device),
        exclude_offset_B1=torch.tensor([0, 5, 6], device=device),
    )  # fmt: skip
    assert rows.tolist() == [[-1, -1], [1, 2]]
    assert scores[0].tolist() == [-float("inf")] * 2


@not_interpreted
def test_blocks_make_no_difference(monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randint(-3, 4, (7, 4), generator=generator).float()
    item = torch.randint(-3, 4, (9000, 4), generator=generator).float()
    # Later items score higher, which is the worst order for what is kept block by block.
    item = item[(query @ item.T)[0].argsort()]
    monkeypatch.setattr(module, "CPU_BLOCK_BYTES", 1)
    monkeypatch.setattr(module, "CPU_DIRECT", 0)
    _, rows = top_k_inner_product(query, item, 50)
    assert torch.equal(rows, top_k_inner_product_reference(query, item, 50)[1])


def test_rounds_of_queries_make_no_difference(device, monkeypatch) -> None:
    if not (INTERPRET or device.type == "cuda"):
        pytest.skip("is about the Triton implementation")
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(11, 8, generator=generator).to(device)
    item = torch.randn(70, 8, generator=generator).to(device)
    offset = torch.arange(12, device=device)
    options = {"exclude_row_X": offset[:11], "exclude_offset_B1": offset}
    whole = top_k_inner_product(query, item, 5, **options)
    monkeypatch.setattr(module, "GPU_BLOCK_BYTES", 4 * 8 * 5 * 16)
    parts = top_k_inner_product(query, item, 5, **options)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


@MANY
@given(search=searches(), data=st.data())
def test_shards_merge_into_the_whole(device, search, data) -> None:
    query, item, k, options = search
    options = {n: v for n, v in options.items() if n == "item_scale_N"}
    cuts = sorted(data.draw(st.sets(st.integers(0, len(item)), max_size=3)) | {0, len(item)})
    parts = []
    for low, high in pairwise(cuts):
        shard = {n: v[low:high].clone() for n, v in options.items()}
        scores, rows = top_k_inner_product(query, item[low:high], min(k, high - low), **shard)
        parts.append((scores, rows + low))
    merged = merge_top_k(*(torch.cat(p, 1).to(device) for p in zip(*parts, strict=True)), k)
    whole = top_k_inner_product(query, item, k, **options)
    for a, b in zip(merged, whole, strict=True):
        assert a.cpu().tolist() == b.tolist()


def test_the_operator_obeys_its_contract(device) -> None:
    query, item = torch.randn(3, 8, device=device), torch.randn(40, 8, device=device)
    bits = torch.ones(40, dtype=torch.int64, device=device)
    offset = torch.tensor([0, 1, 1, 2], device=device)
    for filters in ((None,) * 5, (None, bits, bits[:3].clone(), offset[1:3].clone(), offset)):
        arguments = (query, item, 4, *filters)
        torch.library.opcheck(torch.ops.twotower.top_k_inner_product.default, arguments)


def test_it_compiles_without_a_break_and_writes_no_input(device) -> None:
    query, item = torch.randn(3, 8, device=device), torch.randn(40, 8, device=device)
    before = query.clone(), item.clone()
    search = torch.compile(
        lambda q, i: top_k_inner_product(q * 2, i, 4), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(search(query, item)[1], top_k_inner_product(query * 2, item, 4)[1])
    assert torch.equal(query, before[0])
    assert torch.equal(item, before[1])


INT = torch.int64
BAD = {
    "k": ({"k": 11}, r"k must be in 1\.\.10 \(items\), got 11"),
    "no k": ({"k": 0}, r"k must be in 1\.\.10"),
    "width": ({"item_ND": torch.randn(10, 5)}, "one width"),
    "dtype": ({"item_ND": torch.randn(10, 4).double()}, "item must be torch.float32"),
    "query": ({"query_BD": torch.randn(2, 4).half()}, "query must be float32 or bfloat16"),
    "scale": ({"item_scale_N": torch.ones(9)}, r"item_scale must be .* of shape \(10,\)"),
    "bits": ({"item_bits_N": torch.ones(10, dtype=INT)}, "item_bits and required_bits belong"),
    "offset": (
        {"exclude_row_X": torch.ones(3, dtype=INT), "exclude_offset_B1": torch.ones(2, dtype=INT)},
        r"exclude_offset must be contiguous torch.int64 of shape \(3,\)",
    ),
    "strides": (
        {"item_scale_N": torch.ones(20)[::2]}, "item_scale must be contiguous",
    ),
    "device": ({"item_ND": torch.randn(10, 4, device="meta")}, "item must be on cpu"),
    "nothing": ({"item_ND": torch.randn(0, 4)}, "item must be a matrix with rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name) -> None:
    change, words = BAD[name]
    arguments = {"query_BD": torch.randn(2, 4), "item_ND": torch.randn(10, 4), "k": 3}
    with pytest.raises(ValueError, match=words):
        top_k_inner_product(**(arguments | change))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((torch.ones(2, 3), torch.ones(2, 4, dtype=INT), 1), "one shape"),
     ((torch.ones(2, 3), torch.ones(2, 3, dtype=INT), 4), r"k must be in 1\.\.3")],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused(arguments, words) -> None:
    with pytest.raises(ValueError, match=words):
        merge_top_k(*arguments)
