"""The losses against their formulas, and what they are not given for."""

import math

import pytest
import torch
from torch import Tensor

from twotower.errors import UserError
from twotower.kernels.exclusions import packed
from twotower.towers.config import ModelConfig
from twotower.towers.tower import cut
from twotower.train.config import TrainConfig
from twotower.train.loss_config import LossConfig
from twotower.train.losses import retrieval_loss
from twotower.train.negatives import FILLER_LOG_Q, Candidates

ITEMS, TEMPERATURE = 50, 0.3


def case() -> tuple[Tensor, Candidates, Tensor, Tensor]:
    """Return queries, candidates with hits and a filler, positives and weights."""
    generator = torch.Generator().manual_seed(0)
    query, vector = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (7, 12))
    id_N = torch.tensor([3, 4, 5, 3, 6, 7, 8, 9, 4, 10, 11, -1])
    log_q = torch.randn(12, generator=generator, dtype=torch.float64)
    log_q[-1] = FILLER_LOG_Q
    positive = torch.tensor([0, 1, 2, 3, 0, 5, 9])
    weight = torch.rand(7, generator=generator)
    unit = torch.nn.functional.normalize
    return unit(query), Candidates(unit(vector), id_N, log_q), positive, weight


def left_out() -> Tensor:
    """Which candidates do not count for a query."""
    return torch.rand(len(case()[0]), 12, generator=torch.manual_seed(1)) < 0.3


def by_formula(kind: str, **options: float) -> float:
    query, found, positive, weight = case()
    losses = []
    for q, p, out in zip(query, positive.tolist(), left_out(), strict=True):
        own = float(q @ found.vector_ND[p])
        others = [j for j in range(12) if found.id_N[j] != found.id_N[p] and not out[j]]
        score = {j: float(q @ found.vector_ND[j]) / TEMPERATURE for j in others}
        if kind == "bilateral":
            mass = sum(math.exp(score[j] - float(found.log_q_N[j])) for j in others)
            losses.append(math.log(mass) - own / options["positive_temperature"])
            continue
        value = {j: math.exp(-float(found.log_q_N[j])) for j in range(12)}
        number = sum(v > 0 for v in value.values())
        mean = sum(value.values()) / number
        power = 1 - options["calibration"] * (1 - number / (ITEMS - 1))
        losses.append(
            (power * math.log1p(math.exp(-own / TEMPERATURE))
             + sum(value[j] / mean * math.log1p(math.exp(score[j])) for j in others))
            / (number + 1)
        )  # fmt: skip
    total = sum(loss * float(w) for loss, w in zip(losses, weight, strict=True))
    return total / float(weight.sum())


@pytest.mark.parametrize(
    "options",
    [{"kind": "bilateral", "positive_temperature": 0.2}, {"kind": "bce", "calibration": 0.0},
     {"kind": "bce", "calibration": 0.9}],
)  # fmt: skip
def test_losses_are_their_formulas_and_their_gradients_too(options, monkeypatch) -> None:
    from twotower.train import losses

    monkeypatch.setattr(losses, "BLOCK", 3)  # blocks, and a rest
    config = TrainConfig(loss=LossConfig(**options), correct_positive=False)
    query, found, positive, weight = case()

    def loss(query: Tensor, vector: Tensor, temperature: Tensor) -> Tensor:
        candidates = Candidates(vector, found.id_N, found.log_q_N)
        return retrieval_loss(
            config, query, candidates, temperature, positive, weight.double(), ITEMS,
            packed(left_out()),
        )  # fmt: skip

    leaves = [query, found.vector_ND, torch.tensor(TEMPERATURE, dtype=torch.float64)]
    got = float(loss(*leaves))
    # Scores are summed in fp32 by these two.
    assert got == pytest.approx(by_formula(**options), rel=2e-6)
    inputs = [leaf.clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-3, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"kind": "softmax"}, {"kind": "softmax", "label_smoothing": 0.1}, {"kind": "bilateral"},
     {"kind": "bilateral", "positive_temperature": 0.2}, {"kind": "bce", "calibration": 0.9}],
)  # fmt: skip
def test_what_pushes_for_the_memory_moves_positives_as_before(options, corrected) -> None:
    config = TrainConfig(loss=LossConfig(**options), correct_positive=corrected)
    query, found, positive, weight = case()

    def slope(push: float) -> tuple[float, Tensor]:
        vector = found.vector_ND.clone().requires_grad_()
        push_N = torch.full((12,), push, dtype=torch.float64)
        loss = retrieval_loss(
            config, query, Candidates(vector, found.id_N, found.log_q_N, push_N),
            torch.tensor(TEMPERATURE, dtype=torch.float64), positive, weight.double(), ITEMS,
        )  # fmt: skip
        loss.backward()
        assert vector.grad is not None
        return float(loss.detach()), vector.grad

    (value, once), (same, thrice), (_, own) = slope(1), slope(3), slope(0)
    assert same == pytest.approx(value, rel=1e-6)
    # Of what moves candidates, what pushes them as others' negatives alone is multiplied.
    torch.testing.assert_close(thrice, own + 3 * (once - own), rtol=1e-5, atol=1e-6)
    others = torch.ones(12, dtype=torch.bool)
    others[positive] = False
    if "label_smoothing" in options:
        return
    assert not own[others].any()
    if options["kind"] == "bce":
        return
    row = torch.arange(7)
    logits = query @ found.vector_ND.T / TEMPERATURE - found.log_q_N
    logits[row, positive] += found.log_q_N[positive] * (not corrected)
    hit = found.id_N[positive, None] == found.id_N
    hit[row, positive] = False
    share = logits.masked_fill(hit, -torch.inf).softmax(1)[row, positive]
    share = share if options["kind"] == "softmax" else torch.zeros(7)
    slope_B = (share - 1) * weight / weight.sum() / options.get("positive_temperature", TEMPERATURE)
    expected = torch.zeros_like(own).index_add(0, positive, query * slope_B[:, None])
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-6)


def test_vectors_that_are_cut_are_vectors_of_their_own() -> None:
    whole = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.manual_seed(0)))
    torch.testing.assert_close(cut(whole, 3, False).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(cut(whole, 3, False), torch.nn.functional.normalize(whole[:, :3]))
    biased = cut(whole, 3, True)
    assert biased.shape == (5, 3)
    torch.testing.assert_close(biased[:, :2].norm(dim=1), torch.ones(5))
    assert torch.equal(biased[:, 2], whole[:, 7]), "the bias stays"
    assert cut(whole, 8, True) is whole


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(loss=LossConfig(kind="hinge")), "train.loss.kind must be one of softmax, bi"),
        (TrainConfig(loss=LossConfig(calibration=0.5)), "calibration is of the loss bce, and trai"),
        (TrainConfig(loss=LossConfig(kind="bce", label_smoothing=0.1)), "label_smoothing is of th"),
        (TrainConfig(loss=LossConfig(kind="bce", calibration=2)), r"calibration must be in \[0, 1"),
        (TrainConfig(loss=LossConfig(kind="bilateral", positive_temperature=0)), "must be > 0"),
        (TrainConfig(id_dropout=1), r"train.id_dropout must be in \[0, 1\), got 1"),
        (TrainConfig(item_l2=-1), "train.item_l2 must be >= 0, got -1"),
        (TrainConfig(half_life_days=0), "train.half_life_days must be > 0, got 0"),
        (ModelConfig(widths=[32, 16]), r"model.widths must rise and stay below model.dim \(64\)"),
        (ModelConfig(widths=[64]), r"model.widths must rise and stay below model.dim \(64\)"),
        (ModelConfig(widths=[1, 8], item_bias=True), "model.widths must be >= 2 where model.item"),
    ],
)
def test_what_no_loss_has_is_refused(config, message) -> None:
    with pytest.raises(UserError, match=message):
        config.validate()
