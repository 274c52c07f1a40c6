"""The loss against its formula in fp64, and every gradient."""

import math

import pytest
import torch

from twotower.kernels.exclusions import packed
from twotower.kernels.sampled_softmax import (
    POSITIVES,
    sampled_softmax,
    sampled_softmax_reference,
)

from .conftest import error, not_interpreted, within


def truth(query, candidate, temperature, log_q, ids, weight, positive, kind, left_out) -> float:
    """The docstring's formula, pair by pair, in fp64."""
    total, mass = 0.0, 0.0
    for i, own in enumerate(positive.tolist()):

        def logit(j, i=i, own=own):
            corrected = j != own or kind == "corrected"
            return float(query[i] @ candidate[j]) / temperature - corrected * float(log_q[j])

        kept = [
            logit(j) for j in range(len(candidate)) if ids[j] != ids[own] and not left_out[i, j]
        ]
        if kind != "outside":
            kept.append(logit(own))
        highest = max(kept, default=0)
        lse = highest + math.log(sum(math.exp(x - highest) for x in kept)) if kept else 0
        loss = lse - logit(own)
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


def exclusions(queries: int, extra: int, width: int, offset: int) -> torch.Tensor:
    """Which candidates a query excludes: a third of them, its positive perhaps too."""
    generator = torch.Generator().manual_seed(queries + 1)
    return torch.rand(queries, offset + queries + extra, generator=generator) < 1 / 3


def positives(queries: int, extra: int, width: int, offset: int) -> torch.Tensor:
    """Any candidates, some of them of several queries."""
    generator = torch.Generator().manual_seed(queries)
    return torch.randint(0, offset + queries + extra, (queries,), generator=generator)


@pytest.mark.parametrize("kind", POSITIVES)
@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("shape", [(1, 0, 8, 0), (7, 0, 5, 0), (16, 9, 64, 0), (5, 4, 33, 6)])
def test_the_loss_is_the_formula(shape, temperature, kind) -> None:
    query, candidate, log_q, ids, weight = case(*shape)
    at, left_out = positives(*shape), exclusions(*shape)
    loss = sampled_softmax(
        query, candidate, torch.tensor(temperature), log_q_N=log_q, candidate_id_N=ids,
        weight_B=weight, positive_B=at, positive=kind, exclude_BW=packed(left_out),
    )  # fmt: skip
    expected = truth(query.double(), candidate.double(), temperature, log_q.double(), ids,
                     weight.double(), at, kind, left_out)  # fmt: skip
    # fp32 dot products err by about D eps, and the temperature multiplies them.
    tolerance = 4 * shape[2] ** 0.5 * 1.2e-7 / temperature + 1e-6 * abs(expected)
    assert float(loss) == pytest.approx(expected, abs=tolerance)


def test_a_query_whose_only_negatives_are_hits_has_no_loss() -> None:
    query, candidate, log_q, _, _ = case(4, 0, 8, 0)
    same = torch.full((4,), 7)
    loss = sampled_softmax(query, candidate, torch.tensor(0.1), log_q_N=log_q, candidate_id_N=same)
    assert float(loss) == 0.0


def test_what_a_query_excludes_counts_for_it_alone(device) -> None:
    query = torch.eye(2, 8, device=device)
    candidate = torch.eye(3, 8, device=device)
    exclude = packed(torch.tensor([[True, False, True], [False, False, False]])).to(device)
    scale = torch.tensor(1.0, device=device)
    losses = [
        float(sampled_softmax(query, candidate, scale, weight_B=torch.eye(2, device=device)[i],
                              exclude_BW=exclude)) for i in range(2)
    ]  # fmt: skip
    assert losses[0] == pytest.approx(math.log(math.e + 1) - 1, rel=1e-6)  # its positive, and one
    assert losses[1] == pytest.approx(math.log(math.e + 2) - 1, rel=1e-6)


SHAPES = [  # queries, candidates behind the positives, width, candidates before them
    (1, 0, 8, 0), (1, 5, 16, 3), (7, 0, 5, 0), (16, 9, 64, 0), (5, 4, 33, 6), (130, 0, 100, 0),
    (70, 129, 24, 65), (33, 1, 512, 2),
]  # fmt: skip


def with_gradients(function, dtype, device, tensors, temperature, at=None, **options):
    """Return the loss and the gradients of queries, candidates and temperature."""
    query, candidate, log_q, ids, weight = (t.to(device) for t in tensors)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = [within(t.to(dtype), (3, 2)).detach().requires_grad_() for t in (query, candidate)] + [
        torch.tensor(temperature, dtype=wide, device=device, requires_grad=True)
    ]
    loss = function(
        *leaves, log_q_N=within(log_q.to(wide), (1, 5)), candidate_id_N=within(ids, (2, 2)),
        weight_B=within(weight, (1, 1)), positive_B=None if at is None else at.to(device),
        **{k: v.to(device) if torch.is_tensor(v) else v for k, v in options.items()},
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize(
    ("kind", "smoothing", "diagonal", "excludes"),
    [("corrected", 0.0, False, False), ("corrected", 0.1, True, True),
     ("uncorrected", 0.0, True, False), ("outside", 0.0, False, True)],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [1.0, 0.05, 0.01])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_eager_against_fp64(
    device, shape, dtype, temperature, kind, smoothing, diagonal, excludes
) -> None:
    tensors = list(case(*shape))
    # What bf16 cannot say is no error of the kernel.
    tensors[:2] = [t.to(dtype).float() for t in tensors[:2]]
    if diagonal:
        tensors[3] = tensors[3].int()
    arguments = (tensors, temperature, None if diagonal else positives(*shape))
    options = {"label_smoothing": smoothing, "positive": kind}
    if excludes:
        options["exclude_BW"] = within(packed(exclusions(*shape)), (1, 3))
    got = with_gradients(sampled_softmax, dtype, device, *arguments, **options)
    eager = with_gradients(sampled_softmax_reference, dtype, device, *arguments, **options)
    truth = with_gradients(
        sampled_softmax_reference, torch.float64, torch.device("cpu"), *arguments, **options
    )
    # fp32 logits, up to 1 / temperature large, err by their own eps; so does what follows
    # them. In bf16 the result is rounded, and so are the slopes before their product.
    logits = 4 * torch.finfo(torch.float32).eps * (1 + 2 / temperature)
    slack = logits + 2 * torch.finfo(dtype).eps
    power = {"loss": 0, "query": 1, "candidate": 1, "temperature": 2}
    for name, a, b, c in zip(power, got, eager, truth, strict=True):
        if float(c.abs().max()) < 1e-6:  # one candidate: the loss is zero, and so are its slopes
            assert float(a.abs().max()) <= logits / temperature ** power[name]
            continue
        # The temperature's is a sum of terms up to 1 / temperature that cancel.
        room = slack / temperature / float(c.abs()) if name == "temperature" else slack
        # So is the loss of one query whose own candidate is by far the best.
        if name == "loss" and diagonal and shape[0] == 1:
            room = slack / min(1.0, float(c.abs()))
        assert error(a, c) <= error(b, c) + room, name


@not_interpreted
@pytest.mark.parametrize(
    ("kind", "smoothing"),
    [("corrected", 0.0), ("corrected", 0.2), ("uncorrected", 0.2), ("outside", 0.0)],
)
def test_every_gradient_of_the_cpu_implementation(kind, smoothing, monkeypatch) -> None:
    from twotower.kernels import sampled_softmax as module

    query, candidate, log_q, ids, weight = case(21, 3, 6, 2)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)  # blocks of 16 rows, and a rest
    leaves = [query.double(), candidate.double(), torch.tensor(0.5, dtype=torch.float64)]

    def loss(*inputs):
        return sampled_softmax(
            *inputs, log_q_N=log_q, candidate_id_N=ids, weight_B=weight,
            positive_B=positives(21, 3, 6, 2), positive=kind, label_smoothing=smoothing,
            exclude_BW=packed(exclusions(21, 3, 6, 2)),
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, [t.requires_grad_() for t in leaves])


@not_interpreted
def test_blocks_make_no_difference(monkeypatch) -> None:
    from twotower.kernels import sampled_softmax as module

    tensors = case(50, 7, 16, 3)
    device = torch.device("cpu")
    whole = with_gradients(sampled_softmax, torch.float32, device, tensors, 0.1)
    monkeypatch.setattr(module, "BLOCK_BYTES", 1)
    blocks = with_gradients(sampled_softmax, torch.float32, device, tensors, 0.1)
    for a, b in zip(whole, blocks, strict=True):
        assert error(a, b) < 1e-6


def test_the_operator_obeys_its_contract(device) -> None:
    query, candidate, log_q, ids, weight = (t.to(device) for t in case(9, 4, 8, 1))
    scale = torch.tensor(10.0, device=device)
    for with_log_q, with_ids, gradients in ((True, True, True), (False, False, True),
                                            (True, True, False)):  # fmt: skip
        leaves = [t.clone().requires_grad_(gradients) for t in (query, candidate, scale)]
        torch.library.opcheck(
            torch.ops.twotower.sampled_softmax.default,
            (*leaves, log_q if with_log_q else None, ids if with_ids else None, weight,
             positives(9, 4, 8, 1).to(device),
             packed(exclusions(9, 4, 8, 1)).to(device) if with_ids else None, 1, 0.1, gradients),
        )  # fmt: skip


def test_it_compiles_without_a_break(device) -> None:
    query, candidate, log_q, ids, _ = (t.to(device) for t in case(9, 4, 8, 1))

    def step(query, candidate, temperature):
        loss = sampled_softmax(query * 2, candidate, temperature, log_q_N=log_q, candidate_id_N=ids)
        return loss * 3

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (query, candidate)]
        leaves.append(torch.tensor(0.1, device=device, requires_grad=True))
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_results_repeat_to_the_bit(device) -> None:
    arguments = (torch.float32, device, case(90, 40, 24, 7), 0.05)
    first, second = (with_gradients(sampled_softmax, *arguments) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing_inside(device) -> None:
    arguments = (torch.float32, device, case(20, 4, 24, 1), 0.05)
    plain = with_gradients(sampled_softmax, *arguments)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = with_gradients(sampled_softmax, *arguments)
    for a, b in zip(plain, inside, strict=True):
        assert torch.equal(a, b)


def test_log_q_makes_popular_candidates_cheaper_negatives() -> None:
    query = torch.eye(3)
    candidate = torch.ones(3, 3) / 3**0.5
    common = torch.tensor([0.9, 0.05, 0.05]).log()
    corrected = [
        float(sampled_softmax(query[i : i + 1], candidate, torch.tensor(1.0), log_q_N=common,
                              positive_B=torch.tensor([i]))) for i in range(3)
    ]  # fmt: skip
    assert corrected[0] > corrected[1] == corrected[2]


def test_candidates_that_are_all_equal_share_the_mass(device) -> None:
    query = torch.ones(6, 8, device=device) / 8**0.5
    loss = sampled_softmax(query, query, torch.tensor(0.01, device=device))
    assert float(loss) == pytest.approx(math.log(6), rel=1e-5)


def test_inputs_are_not_written(device) -> None:
    tensors = [t.to(device) for t in case(6, 2, 8, 0)]
    before = [t.clone() for t in tensors]
    query, candidate, log_q, ids, weight = tensors
    query.requires_grad_()
    sampled_softmax(query, candidate, torch.tensor(0.1, device=device), log_q_N=log_q,
                    candidate_id_N=ids, weight_B=weight).backward()  # fmt: skip
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old, new)


BAD = {
    "few": ({"candidate_ND": torch.zeros(3, 8)}, r"queries \(4\) must be <= candidates \(3\)"),
    "positives": ({"positive_B": torch.zeros(3, dtype=torch.int64)}, "positive_B must have shape"),
    "kind": ({"positive": "inside"}, "positive must be one of corrected, .* got 'inside'"),
    "both": ({"positive": "outside", "label_smoothing": 0.1}, "label_smoothing must be 0 where"),
    "log_q": ({"log_q_N": torch.zeros(2)}, r"log_q must have shape \(4,\), got \(2,\)"),
    "weight": ({"weight_B": torch.zeros(9)}, "weight must have shape"),
    "ids": (
        {"candidate_id_N": torch.zeros(4)},
        "candidate_id must be int64 or int32, got torch.float32",
    ),
    "words": (
        {"exclude_BW": torch.zeros(4, 0, dtype=torch.int32)},
        r"exclude_BW must have shape \(4, 1 or more\), got \(4, 0\)",
    ),
    "bits": ({"exclude_BW": torch.zeros(4, 1)}, "exclude_BW must be int32, got torch.float32"),
    "device": ({"log_q_N": torch.zeros(4, device="meta")}, "log_q must be on the queries' device"),
    "smoothing": ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
    "width": ({"candidate_ND": torch.zeros(4, 9)}, "one width"),
    "dtype": ({"candidate_ND": torch.zeros(4, 8).half()}, "torch.float32 and torch.float16"),
    "shape": ({"query_BD": torch.zeros(8)}, r"query must be a matrix .* got shape \(8,\)"),
    "nothing": ({"query_BD": torch.zeros(0, 8)}, "query must be a matrix with rows"),
    "temperatures": ({"temperature": torch.ones(2)}, r"temperature must be a scalar, got shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name) -> None:
    change, words = BAD[name]
    query, candidate, *_ = case(4, 0, 8, 0)
    arguments = {"query_BD": query, "candidate_ND": candidate, "temperature": torch.tensor(1.0)}
    with pytest.raises(ValueError, match=words):
        sampled_softmax(**(arguments | change))


@not_interpreted
@pytest.mark.parametrize("row", [-1, 4])
def test_a_positive_that_is_no_candidate_is_refused(row) -> None:
    query, candidate, *_ = case(4, 0, 8, 0)
    with pytest.raises(ValueError, match="positive_B must be rows < 4, got"):
        sampled_softmax(
            query, candidate, torch.tensor(1.0), positive_B=torch.tensor([0, 1, 2, row])
        )


@not_interpreted
@pytest.mark.parametrize("temperature", [float("nan"), 0.0, -1.0])
def test_a_temperature_that_is_none_is_refused(temperature) -> None:
    query, candidate, *_ = case(4, 0, 8, 0)
    with pytest.raises(ValueError, match="temperature must be > 0 and finite"):
        sampled_softmax(query, candidate, torch.tensor(temperature))


def test_columns_of_a_larger_matrix_are_read_right(device) -> None:
    query, candidate, *_ = (t.to(device) for t in case(6, 2, 8, 0))
    wide = torch.randn(6, 20, device=device)
    wide[:, 4:12] = query
    temperature = torch.tensor(0.1, device=device)
    expected = sampled_softmax(query, candidate, temperature)
    assert torch.equal(sampled_softmax(wide[:, 4:12], candidate, temperature), expected)
