"""What all operators have in common."""

import pytest
import torch

from twotower.kernels.dot_interaction import dot_interaction
from twotower.kernels.low_rank_cross import low_rank_cross
from twotower.kernels.sampled_softmax import sampled_softmax

WORKS = {
    "sampled_softmax": (lambda q, c: sampled_softmax(q, c, torch.tensor(0.5, device=q.device)),
                        [(4, 3), (5, 3)]),
    "dot_interaction": (lambda x: dot_interaction(x).sin().sum(), [(4, 3, 8)]),
    "low_rank_cross": (lambda *a: low_rank_cross(*a).sin().sum(),
                       [(4, 8), (2, 8, 3), (2, 3, 8), (2, 8)]),
}  # fmt: skip


@pytest.mark.parametrize("name", WORKS)
def test_a_second_derivative_is_refused(device, name) -> None:
    work, shapes = WORKS[name]
    inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    first = torch.autograd.grad(work(*inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
