"""Pairwise dots against fp64, one by one, and their gradient."""

import pytest
import torch

from twotower.kernels import dot_interaction as module
from twotower.kernels.dot_interaction import dot_interaction, dot_interaction_reference

from .conftest import error, not_interpreted, within

SHAPES = [  # samples, features, width
    (1, 1, 8), (5, 1, 33), (3, 2, 8), (7, 2, 1), (1, 5, 24), (9, 4, 64), (33, 5, 17), (6, 16, 100),
    (5, 17, 31), (3, 27, 129), (2, 33, 65), (2, 64, 512), (1, 64, 9),
]  # fmt: skip


def case(b: int, f: int, d: int, dtype=torch.float32, seed: int = 0) -> tuple:
    """Return features and the gradient that comes back."""
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(b, f, d, generator=generator).to(dtype)
    grad = torch.randn(b, d + f * (f - 1) // 2, generator=generator).to(dtype)
    return feature, grad


def with_gradient(function, feature, grad, device, dtype):
    leaf = within(feature.to(device, dtype), (3, 2)).detach().requires_grad_()
    result = function(leaf)
    assert result.dtype == dtype
    return result.detach(), *torch.autograd.grad(
        result, leaf, within(grad.to(device, dtype), (1, 4))
    )


def test_the_order_is_row_by_row_of_the_lower_triangle(device) -> None:
    feature = torch.tensor([[[1.0, 2], [3, 4], [5, 6], [7, 8]]], device=device)
    expected = [1, 2, 11, 17, 39, 23, 53, 83]
    assert dot_interaction(feature).tolist() == [expected]
    assert dot_interaction_reference(feature).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager_against_fp64(device, shape, dtype) -> None:
    feature, grad = case(*shape, dtype)
    got = with_gradient(dot_interaction, feature, grad, device, dtype)
    eager = with_gradient(dot_interaction_reference, feature, grad, device, dtype)
    truth = with_gradient(
        dot_interaction_reference, feature, grad, torch.device("cpu"), torch.float64
    )
    # The results are rounded to their type once, half an eps of the largest; sums of D or F fp32
    # products in another order than eager's differ by a few eps of fp32.
    room = torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
    for name, a, b, c in zip(("result", "gradient"), got, eager, truth, strict=True):
        assert a.shape == c.shape
        assert error(a, c) <= error(b, c) + room, name


def test_the_dense_vector_is_carried_as_it_is(device) -> None:
    feature, _ = case(7, 3, 20)
    result = dot_interaction(feature.to(device))
    assert torch.equal(result[:, :20].cpu(), feature[:, 0])


def test_a_sample_depends_on_its_own_features_alone(device) -> None:
    feature, _ = case(9, 3, 12)
    together = dot_interaction(feature.to(device))
    spoilt = feature.clone()
    spoilt[4] = float("nan")
    others = torch.arange(9) != 4
    beside = dot_interaction(spoilt.to(device))
    assert torch.equal(together[others], beside[others])
    assert beside[4].isnan().all()


@not_interpreted
@pytest.mark.parametrize("shape", [(3, 1, 4), (2, 2, 3), (4, 5, 3)])
def test_the_gradient_is_the_slope(shape) -> None:
    feature, _ = case(*shape, torch.float64)
    assert torch.autograd.gradcheck(dot_interaction, feature.requires_grad_())


@not_interpreted
def test_blocks_make_no_difference(monkeypatch) -> None:
    feature, grad = case(23, 6, 10)
    cpu = torch.device("cpu")
    whole = with_gradient(dot_interaction, feature, grad, cpu, torch.float32)
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 6 * 16 * 4)
    parts = with_gradient(dot_interaction, feature, grad, cpu, torch.float32)
    for a, b in zip(whole, parts, strict=True):
        # Batched products of another size may take another order: a few eps of sums of 10.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_more_features_than_a_tile_holds(device) -> None:
    feature, grad = case(2, 65, 6)
    got = with_gradient(dot_interaction, feature, grad, device, torch.float32)
    truth = with_gradient(
        dot_interaction_reference, feature, grad, torch.device("cpu"), torch.float64
    )
    for a, b in zip(got, truth, strict=True):
        assert error(a, b) <= 65 * torch.finfo(torch.float32).eps  # the sums' worst case


def test_the_operator_obeys_its_contract(device) -> None:
    for shape in ((3, 4, 8), (2, 1, 5)):
        feature = case(*shape)[0].to(device).requires_grad_()
        torch.library.opcheck(torch.ops.twotower.dot_interaction.default, (feature,))


def test_it_compiles_without_a_break(device) -> None:
    feature, grad = (t.to(device) for t in case(6, 4, 10))

    def step(x):
        return dot_interaction(x * 2) * 3

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = feature.clone().requires_grad_()
        result = function(leaf)
        results.append([result.detach(), *torch.autograd.grad(result, leaf, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_results_repeat_to_the_bit_and_autocast_changes_nothing(device) -> None:
    arguments = (*case(40, 5, 24), device, torch.float32)
    first, second = (with_gradient(dot_interaction, *arguments) for _ in range(2))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        third = with_gradient(dot_interaction, *arguments)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_inputs_are_not_written_and_strides_are_read_right(device) -> None:
    feature, grad = (t.to(device) for t in case(5, 4, 6))
    turned = feature.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not turned.is_contiguous()
    before = feature.clone(), grad.clone()
    leaf = turned.detach().requires_grad_()
    result = dot_interaction(leaf)
    assert torch.equal(result, dot_interaction(feature))
    wide = torch.randn(5, 20, device=device)
    wide[:, 4:16] = grad
    strided = torch.autograd.grad(result, leaf, wide[:, 4:16], retain_graph=True)[0]
    assert torch.equal(strided, torch.autograd.grad(result, leaf, grad)[0])
    assert torch.equal(feature, before[0])
    assert torch.equal(turned, before[0])
    assert torch.equal(grad, before[1])


BAD = {
    "matrix": (torch.zeros(3, 4), r"feature must have samples, .* got shape \(3, 4\)"),
    "nothing": (torch.zeros(3, 0, 4), r"feature must have samples, .* got shape \(3, 0, 4\)"),
    "dtype": (torch.zeros(3, 2, 4).half(), "feature must be one of .* got torch.float16"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name) -> None:
    feature, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        dot_interaction(feature)
