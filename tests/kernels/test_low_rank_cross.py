"""Cross layers against their formula in fp64, and every gradient."""

import pytest
import torch

from twotower.kernels import low_rank_cross as module
from twotower.kernels.low_rank_cross import low_rank_cross, low_rank_cross_reference

from .conftest import error, not_interpreted, within

SHAPES = [  # rows, width, layers, rank
    (1, 8, 1, 1), (1, 1, 2, 3), (5, 9, 2, 1), (17, 33, 3, 4), (65, 64, 1, 16), (70, 100, 2, 20),
    (130, 31, 3, 8), (9, 129, 2, 65), (3, 512, 3, 32), (2, 511, 1, 256), (40, 80, 6, 7),
    (100, 144, 4, 64),
    # More than the kernels hold.
    (5, 12, 2, 257), (20, 16, 7, 100),
]  # fmt: skip
NAMES = ("result", "x", "u", "v", "bias")


def case(b: int, d: int, layers: int, rank: int, dtype=torch.float32, seed: int = 0) -> tuple:
    """Return x, u, v, bias and the gradient that comes back; layers add about x's size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, d), (layers, d, rank), (layers, rank, d), (layers, d), (b, d))
    scales = (1.0, rank**-0.5, d**-0.5, 0.3, 1.0)
    return tuple(
        (torch.randn(shape, generator=generator) * scale).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )


def with_gradients(function, tensors, device, dtype):
    """Return the result and the gradients of x, u, v and bias."""
    *inputs, grad = (within(t.to(device, dtype), (2, 3)) for t in tensors)
    leaves = [t.detach().requires_grad_() for t in inputs]
    result = function(*leaves)
    assert result.dtype == dtype
    return result.detach(), *torch.autograd.grad(result, leaves, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager_against_fp64(device, shape, dtype) -> None:
    tensors = case(*shape, dtype)
    got = with_gradients(low_rank_cross, tensors, device, dtype)
    eager = with_gradients(low_rank_cross_reference, tensors, device, dtype)
    truth = with_gradients(low_rank_cross_reference, tensors, torch.device("cpu"), torch.float64)
    # What is saved and multiplied is rounded to the type, h, dh, x and dy, as in eager, but in
    # other places: an eps a layer. fp32 sums in another order differ by a few eps of fp32.
    room = shape[2] * torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps
    for name, a, b, c in zip(NAMES, got, eager, truth, strict=True):
        assert a.shape == c.shape
        assert error(a, c) <= error(b, c) + room, name


def test_the_layers_are_the_formula(device) -> None:
    x, u, v, bias, _ = case(4, 3, 2, 2)
    result = low_rank_cross(*(t.to(device) for t in (x, u, v, bias))).cpu()
    for row in range(4):
        x_l = x[row].double()
        for layer in range(2):
            y = u[layer].double() @ (v[layer].double() @ x_l) + bias[layer].double()
            x_l = x[row].double() * y + x_l
        # A dozen roundings of fp32, none of which cancels more than tenfold.
        torch.testing.assert_close(result[row].double(), x_l, rtol=1e-5, atol=1e-6)


def test_zero_weights_change_nothing(device) -> None:
    x, u, v, bias, _ = (t.to(device) for t in case(5, 20, 3, 4))
    assert torch.equal(low_rank_cross(x, u * 0, v, bias * 0), x)


def test_a_row_depends_on_itself_alone(device) -> None:
    x, u, v, bias, _ = (t.to(device) for t in case(9, 20, 2, 4))
    together = low_rank_cross(x, u, v, bias)
    spoilt = x.clone()
    spoilt[4] = float("nan")
    beside = low_rank_cross(spoilt, u, v, bias)
    others = torch.arange(9, device=device) != 4
    assert torch.equal(together[others], beside[others])
    assert beside[4].isnan().all()


def test_saving_for_gradients_does_not_change_the_result(device) -> None:
    x, u, v, bias, _ = (t.to(device) for t in case(70, 33, 3, 5))
    with torch.no_grad():
        plain = low_rank_cross(x, u, v, bias)
    assert torch.equal(plain, low_rank_cross(x.requires_grad_(), u, v, bias).detach())


@not_interpreted
@pytest.mark.parametrize("shape", [(3, 4, 1, 1), (4, 3, 2, 2), (3, 5, 3, 2)])
def test_every_gradient_is_the_slope(shape) -> None:
    leaves = [t.requires_grad_() for t in case(*shape, torch.float64)[:4]]
    assert torch.autograd.gradcheck(low_rank_cross, leaves)


@not_interpreted
def test_blocks_make_no_difference(monkeypatch) -> None:
    tensors = case(200, 7, 2, 3)
    cpu = torch.device("cpu")
    whole = with_gradients(low_rank_cross, tensors, cpu, torch.float32)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    parts = with_gradients(low_rank_cross, tensors, cpu, torch.float32)
    for a, b in zip(whole, parts, strict=True):
        # The weights' sums over 200 rows are made of four parts: a few eps of sums of that size.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)


def test_the_operator_obeys_its_contract(device) -> None:
    for layers, gradients in ((1, True), (3, True), (2, False)):
        # As the public function pads its arguments.
        leaves = [t.to(device).requires_grad_(gradients) for t in case(5, 32, layers, 16)[:4]]
        torch.library.opcheck(torch.ops.twotower.low_rank_cross.default, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_gradients_are_laid_out_as_compilers_are_told(device, dtype) -> None:
    *tensors, grad = (t.to(device) for t in case(5, 32, 2, 16, dtype))
    _, hidden = torch.ops.twotower.low_rank_cross(*tensors)
    arguments = (*tensors, hidden, grad)
    torch.library.opcheck(
        torch.ops.twotower.low_rank_cross_backward.default, arguments, test_utils="test_faketensor"
    )
    got = torch.ops.twotower.low_rank_cross_backward(*arguments)
    for gradient, tensor in zip(got, tensors, strict=True):
        assert gradient.stride() == tensor.stride()
    assert len({gradient.untyped_storage().data_ptr() for gradient in got}) == 4


def test_it_compiles_without_a_break(device) -> None:
    *tensors, grad = (t.to(device) for t in case(6, 10, 2, 3))

    def step(x, u, v, bias):
        return low_rank_cross(x * 2, u, v, bias) * 3

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in tensors]
        result = function(*leaves)
        results.append([result.detach(), *torch.autograd.grad(result, leaves, grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_results_repeat_to_the_bit_and_autocast_changes_nothing(device) -> None:
    arguments = (case(90, 24, 2, 8), device, torch.float32)
    first, second = (with_gradients(low_rank_cross, *arguments) for _ in range(2))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        third = with_gradients(low_rank_cross, *arguments)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_inputs_are_not_written_and_strides_are_read_right(device) -> None:
    *tensors, grad = (t.to(device) for t in case(6, 10, 2, 3))
    turned = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    before = [t.clone() for t in (*tensors, grad)]
    results = []
    for inputs, g in ((tensors, grad), (turned, grad.T.contiguous().T)):
        leaves = [t.detach().requires_grad_() for t in inputs]
        result = low_rank_cross(*leaves)
        results.append([result.detach(), *torch.autograd.grad(result, leaves, g)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for old, new in zip(before, (*tensors, grad), strict=True):
        assert torch.equal(old, new)
    for old, new in zip(before[:4], turned, strict=True):
        assert torch.equal(old, new)


BAD = {
    "x": ({"x_BD": torch.zeros(8)}, r"x must be a matrix .* got shape \(8,\)"),
    "nothing": ({"x_BD": torch.zeros(0, 8)}, r"x must be a matrix with rows"),
    "dtype": ({"x_BD": torch.zeros(3, 8).half()}, "x must be one of .* got torch.float16"),
    "width": ({"u_LDR": torch.zeros(2, 9, 4)}, r"u must have shape \(layers, 8 .* \(2, 9, 4\)"),
    "no rank": ({"u_LDR": torch.zeros(2, 8, 0)}, r"u must have shape \(layers, 8 .* \(2, 8, 0\)"),
    "rank": ({"v_LRD": torch.zeros(2, 5, 8)}, r"v must have shape \(2, 4, 8\), got \(2, 5, 8\)"),
    "layers": ({"bias_LD": torch.zeros(1, 8)}, r"bias must have shape \(2, 8\), got \(1, 8\)"),
    "types": ({"bias_LD": torch.zeros(2, 8).bfloat16()}, "bias must be torch.float32 as x is, got"),
    "device": ({"v_LRD": torch.zeros(2, 4, 8, device="meta")}, "v must be on x's device cpu, got"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name) -> None:
    change, words = BAD[name]
    names = ("x_BD", "u_LDR", "v_LRD", "bias_LD")
    arguments = dict(zip(names, case(3, 8, 2, 4)[:4], strict=True))
    with pytest.raises(ValueError, match=words):
        low_rank_cross(**(arguments | change))
