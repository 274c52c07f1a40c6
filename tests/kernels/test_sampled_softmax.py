"""The loss against its formula in fp64, and every gradient."""

import math

import pytest
import torch

from twotower.kernels.sampled_softmax import sampled_softmax


def truth(query, candidate, temperature, log_q, ids, weight, offset) -> float:
    """The docstring's formula, pair by pair, in fp64."""
    total, mass = 0.0, 0.0
    for i in range(len(query)):
        positive = offset + i

        def logit(j, i=i):
            return float(query[i] @ candidate[j]) / temperature - float(log_q[j])

        kept = [logit(j) for j in range(len(candidate)) if j == positive or ids[j] != ids[positive]]
        highest = max(kept)
        loss = highest + math.log(sum(math.exp(x - highest) for x in kept)) - logit(positive)
        total, mass = total + float(weight[i]) * loss, mass + float(weight[i])
    return total / mass


def case(queries: int, extra: int, width: int, offset: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    n = offset + queries + extra
    query = torch.nn.functional.normalize(torch.randn(queries, width, generator=generator), dim=1)
    candidate = torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)
    ids = torch.randint(0, max(2, n // 2), (n,), generator=generator)
    log_q = torch.randn(n, generator=generator)
    weight = torch.rand(queries, generator=generator) + 0.1
    return query, candidate, log_q, ids, weight


@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("shape", [(1, 0, 8, 0), (7, 0, 5, 0), (16, 9, 64, 0), (5, 4, 33, 6)])
def test_the_loss_is_the_formula(shape, temperature) -> None:
    query, candidate, log_q, ids, weight = case(*shape)
    offset = shape[3]
    loss = sampled_softmax(
        query, candidate, torch.tensor(temperature), log_q_N=log_q, candidate_id_N=ids,
        weight_B=weight, positive_offset=offset,
    )  # fmt: skip
    expected = truth(query.double(), candidate.double(), temperature, log_q.double(), ids,
                     weight.double(), offset)  # fmt: skip
    # fp32 dot products err by about D eps, and the temperature multiplies them.
    tolerance = 4 * shape[2] ** 0.5 * 1.2e-7 / temperature + 1e-6 * abs(expected)
    assert float(loss) == pytest.approx(expected, abs=tolerance)


def test_a_query_whose_only_negatives_are_hits_has_no_loss() -> None:
    query, candidate, log_q, _, _ = case(4, 0, 8, 0)
    same = torch.full((4,), 7)
    loss = sampled_softmax(query, candidate, torch.tensor(0.1), log_q_N=log_q, candidate_id_N=same)
    assert float(loss) == 0.0


def test_gradients_of_queries_candidates_and_temperature() -> None:
    query, candidate, log_q, ids, weight = case(5, 3, 6, 2)
    inputs = (
        query.double().requires_grad_(), candidate.double().requires_grad_(),
        torch.tensor(0.5, dtype=torch.float64, requires_grad=True),
    )  # fmt: skip
    query, candidate, temperature = inputs
    loss = sampled_softmax(
        query, candidate, temperature, log_q_N=log_q, candidate_id_N=ids, weight_B=weight,
        positive_offset=2,
    )  # fmt: skip
    loss.backward()
    for x in inputs:
        numeric = torch.zeros_like(x)
        flat, out = x.detach().reshape(-1), numeric.reshape(-1)
        for i in range(len(flat)):
            value = [0.0, 0.0]
            for side, step in enumerate((1e-5, -1e-5)):
                keep = float(flat[i])
                flat[i] = keep + step
                value[side] = truth(
                    query.detach(), candidate.detach(), float(temperature.detach()),
                    log_q.double(), ids, weight.double(), 2,
                )  # fmt: skip
                flat[i] = keep
            out[i] = (value[0] - value[1]) / 2e-5
        # The loss itself is computed in fp32.
        torch.testing.assert_close(x.grad, numeric, atol=2e-5, rtol=1e-4)


def test_log_q_makes_popular_candidates_cheaper_negatives() -> None:
    query = torch.eye(3)
    candidate = torch.ones(3, 3) / 3**0.5
    common = torch.tensor([0.9, 0.05, 0.05]).log()
    corrected = [
        float(sampled_softmax(query[i : i + 1], candidate, torch.tensor(1.0), log_q_N=common,
                              positive_offset=i)) for i in range(3)
    ]  # fmt: skip
    assert corrected[0] > corrected[1] == corrected[2]


def test_inputs_are_not_written() -> None:
    tensors = case(6, 2, 8, 0)
    before = [t.clone() for t in tensors]
    query, candidate, log_q, ids, weight = tensors
    sampled_softmax(query, candidate, torch.tensor(0.1), log_q_N=log_q, candidate_id_N=ids,
                    weight_B=weight)  # fmt: skip
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positive_offset": 3}, "positive_offset"),
        ({"log_q_N": torch.zeros(2)}, "log_q must have shape"),
        ({"weight_B": torch.zeros(9)}, "weight must have shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, words) -> None:
    query, candidate, *_ = case(4, 0, 8, 0)
    with pytest.raises(ValueError, match=words):
        sampled_softmax(query, candidate, torch.tensor(1.0), **change)
