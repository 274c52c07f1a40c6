"""What a positive is compared with: the corrected softmax learns what the full one would."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from twotower.data.batches import Batch, Seen
from twotower.data.listed import Listed, Lists, listed
from twotower.errors import UserError
from twotower.kernels.exclusions import unpacked
from twotower.train.config import TrainConfig
from twotower.train.losses import retrieval_loss
from twotower.train.negatives import (
    FILLER_LOG_Q,
    CandidateMemory,
    Candidates,
    PositiveRates,
    catalogue_sum,
    excluded,
    expected,
    log_q,
    log_q_of,
    push_of,
)
from twotower.train.negatives_config import LISTED, MiningConfig, NegativesConfig

ITEMS, WIDTH, BATCH, TEMPERATURE = 30, 8, 256, torch.tensor(0.5)
MIXTURES = {
    "in_batch": NegativesConfig(),
    "mixed": NegativesConfig(in_batch=0.5, uniform=0.5),
    "memory": NegativesConfig(in_batch=0.25, uniform=0.25, memory=0.5),
    "uniform": NegativesConfig(in_batch=0, uniform=1, candidates=300),
    "catalogue": NegativesConfig(catalogue=True),
}


def world() -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, the items' vectors, and their training counts, which span a factor of 40."""
    generator = torch.Generator().manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(1, WIDTH, generator=generator), dim=1)
    item = torch.nn.functional.normalize(torch.randn(ITEMS, WIDTH, generator=generator), dim=1)
    return query, item, torch.arange(1, ITEMS + 1).flip(0).pow(1.1).round().long()


def rates(count: Tensor) -> Tensor:
    """Return the positives of a step of each item."""
    return BATCH * count / count.sum().double()


def gradient(query: Tensor, item: Tensor, positive: int, config: TrainConfig, draw) -> Tensor:
    """Return the slope of one query's loss by all items, with candidates drawn for it."""
    leaf = item.clone().requires_grad_()
    id_N, positive_B = draw(positive)
    corrections = log_q(rates(world()[2]), config, BATCH)[id_N]
    own = int(positive_B)
    if config.negatives.in_batch == 0 and not config.negatives.catalogue:
        corrections[own] = FILLER_LOG_Q
    vector_ND, push_N = leaf[id_N], None
    if memory := config.negatives.sizes(BATCH)["memory"]:
        vector_ND = torch.cat([vector_ND[:-memory], item[id_N[-memory:]]])
        push_N = push_of(rates(world()[2])[id_N], config, BATCH, ITEMS)
    candidates = Candidates(vector_ND, id_N, corrections, push_N)
    retrieval_loss(
        config, query, candidates, TEMPERATURE, positive_B, torch.ones(1), ITEMS
    ).backward()
    assert leaf.grad is not None
    return leaf.grad


def drawing(config: TrainConfig, rng: np.random.Generator):
    """Return what draws candidates as training does: a positive first, then the sources."""
    sizes, frequency = config.negatives.sizes(BATCH), world()[2].double()
    frequency /= frequency.sum()

    def draw(positive: int) -> tuple[Tensor, Tensor]:
        if config.negatives.catalogue:
            return torch.arange(ITEMS), torch.tensor([positive])
        popular = frequency.numpy()
        drawn = [
            [positive],
            rng.choice(ITEMS, max(0, sizes["in_batch"] - 1), p=popular),
            rng.integers(0, ITEMS, sizes["uniform"]),
            rng.choice(ITEMS, sizes["memory"], p=popular),  # which has no gradient
        ]
        return torch.from_numpy(np.concatenate(drawn)), torch.tensor([0])

    return draw


@pytest.mark.parametrize("name", MIXTURES)
def test_the_mean_gradient_is_that_of_the_full_softmax(name) -> None:
    query, item, _ = world()
    config = TrainConfig(batch_size=BATCH, negatives=MIXTURES[name], correct_positive=False)
    draw = drawing(config, np.random.default_rng(0))
    full = item.clone().requires_grad_()
    positive = 20
    torch.nn.functional.cross_entropy(
        query @ full.T / TEMPERATURE, torch.tensor([positive])
    ).backward()
    assert full.grad is not None
    negative = torch.arange(ITEMS) != positive

    def off(config: TrainConfig, rounds: int) -> float:
        """Return how far the mean slopes are from the truth, relatively, of what is furthest."""
        slopes = [gradient(query, item, positive, config, draw) for _ in range(rounds)]
        error = torch.stack(slopes).mean(0) - full.grad
        return max(
            float(error[part].norm() / full.grad[part].norm()) for part in (negative, ~negative)
        )

    if name == "catalogue":
        assert off(config, 1) < 1e-6
        return
    # A ratio of sums over some hundred draws is off by about one over their number.
    assert off(config, 2000) < 0.015
    # Without the correction, or with another source's, it would be far off.
    config = TrainConfig(
        batch_size=BATCH, negatives=MIXTURES[name], correct_positive=False, log_q=0.0
    )
    assert off(config, 300) > 0.04


@pytest.mark.parametrize("shares", [{"mined": 0.5}, {"mined": 0.2, "skipped": 0.2, "memory": 0.1}])
def test_lists_that_follow_from_the_queries_bias_nothing(shares) -> None:
    """Every query lists what it scores highest, which is what it would learn wrong things from."""
    _, item, count = world()
    config = TrainConfig(
        batch_size=BATCH, negatives=NegativesConfig(in_batch=0.5, **shares), correct_positive=False
    )
    sizes = config.negatives.sizes(BATCH)
    rng, positive = np.random.default_rng(0), 20
    user = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(60, WIDTH))), dim=1)
    user = user.float()
    score = (user @ item.T).numpy()
    taste = count.numpy() * np.exp(2 * score)
    taste /= taste.sum(1, keepdims=True)
    ranked = np.argsort(-score, 1)
    rate = torch.from_numpy(taste.mean(0)) * BATCH

    def step() -> tuple[Tensor, Listed]:
        who = rng.integers(0, len(user), BATCH)
        who[0] = 0
        own = np.array([rng.choice(ITEMS, p=taste[i]) for i in who])
        own[0] = positive
        lists = []
        for first in (0, 6):
            band = ranked[who][:, first : first + 6]
            there = band != own[:, None]
            lists.append(Lists(band[there], there.sum(1)))
        parts = [(some, sizes[name]) for some, name in zip(lists, LISTED, strict=True)]
        drawn = [own, *(some.draw(number, rng) for some, number in parts)]
        drawn.append(rng.choice(ITEMS, sizes["memory"], p=taste.mean(0)))
        return torch.from_numpy(np.concatenate(drawn)), listed(parts)

    full = item.clone().requires_grad_()
    torch.nn.functional.cross_entropy(
        user[:1] @ full.T / TEMPERATURE, torch.tensor([positive])
    ).backward()
    assert full.grad is not None
    negative, leaf = torch.arange(ITEMS) != positive, item.clone().requires_grad_()
    steps = [step() for _ in range(1000)]

    def off(known: bool) -> float:
        leaf.grad = None
        for id_N, listing in steps:
            more = listing.of(id_N) if known else 0
            told, vector_ND, push_N = (rate[id_N], config, BATCH, ITEMS, more), leaf[id_N], None
            if memory := sizes["memory"]:
                vector_ND = torch.cat([vector_ND[:-memory], item[id_N[-memory:]]])
                push_N = push_of(*told)
            candidates = Candidates(vector_ND, id_N, log_q_of(*told), push_N)
            retrieval_loss(
                config, user[:1], candidates, TEMPERATURE, torch.tensor([0]), torch.ones(1), ITEMS
            ).backward()
        assert leaf.grad is not None
        assert full.grad is not None
        error = (leaf.grad / len(steps) - full.grad)[negative]
        return float(error.norm() / full.grad[negative].norm())

    # As of the other mixtures; without the lists' own expectation it is far off.
    assert off(known=True) < 0.015
    assert off(known=False) > 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_a_sum_over_the_catalogue_is_told_by_the_items_of_steps(name) -> None:
    count = world()[2]
    config = TrainConfig(batch_size=BATCH, negatives=MIXTURES[name], correct_positive=False)
    rng = np.random.default_rng(0)
    draw, now_N = drawing(config, rng), expected(rates(count), config, BATCH, ITEMS, 0.0)[0]
    value = torch.rand(ITEMS, generator=torch.Generator().manual_seed(1)) + torch.arange(ITEMS)
    positives = rng.choice(ITEMS, 2000, p=(count / count.sum()).numpy())
    found = []
    for positive in positives:
        id_N, _ = draw(int(positive))
        if memory := config.negatives.sizes(BATCH)["memory"]:
            id_N = id_N[:-memory]
        if name == "uniform":
            id_N = id_N[1:]
        found.append(catalogue_sum(value[id_N], now_N[id_N]))
    # The query's own positive is one candidate more than is expected of negatives.
    torch.testing.assert_close(torch.stack(found).mean(), value.sum(), rtol=0.01, atol=0)


def test_a_corrected_positive_of_a_rare_item_pushes_its_negatives_less() -> None:
    query, item, count = world()
    rare = int(count.argmin())
    slopes = {}
    for correct in (True, False):
        config = TrainConfig(batch_size=BATCH, correct_positive=correct)
        draw = drawing(config, np.random.default_rng(0))
        drawn = [gradient(query, item, rare, config, draw) for _ in range(300)]
        slopes[correct] = torch.stack(drawn).mean(0)[rare].norm()
    assert slopes[True] < slopes[False]


def batch_of(queries: int, **more: Any) -> Batch:
    """Return a batch of which nothing is there but its length and what is given."""
    none = torch.empty(0, dtype=torch.int64)
    ids = KeyedJaggedTensor(keys=[], values=none, lengths=none)
    return Batch(ids, {}, none, none, torch.ones(queries), **more)


@given(
    st.lists(st.integers(-1, 9), min_size=1, max_size=70),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), max_size=40),
)
@settings(deadline=None)
def test_what_users_had_taken_is_left_out_of_their_candidates(candidates, pairs) -> None:
    query, item = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    seen = Seen(torch.from_numpy(query.copy()), torch.from_numpy(item.copy()))
    id_N, number_N = torch.tensor(candidates), torch.arange(len(candidates))
    by_id, place_N = Candidates(number_N[:, None], id_N, number_N).by_id(number_N)
    assert by_id.id_N.tolist() == sorted(candidates)
    assert by_id.id_N[place_N].equal(id_N)
    assert by_id.vector_ND[place_N, 0].equal(number_N)
    assert by_id.log_q_N[place_N].equal(number_N)
    words = excluded(batch_of(5, seen=seen), by_id.id_N, None)
    expected = [[(q, c) in pairs for c in candidates] for q in range(5)]
    assert unpacked(words, len(candidates))[:, place_N].tolist() == expected

    # What came later is left out beside it; fillers are no matter.
    first = torch.arange(11) * 10
    words = excluded(batch_of(5, seen=seen, time_B=torch.arange(5) * 20), by_id.id_N, first)
    expected = [
        [(q, c) in pairs or c * 10 > q * 20 for c in candidates if c >= 0] for q in range(5)
    ]
    bits = unpacked(words, len(candidates))[:, place_N]
    assert bits[:, id_N >= 0].tolist() == expected


def test_without_anything_to_leave_out_there_are_no_words() -> None:
    assert excluded(batch_of(5), torch.arange(3), None) is None


def test_expectations_add_up_over_the_sources() -> None:
    count = torch.tensor([6, 3, 1, 0])
    config = TrainConfig(
        batch_size=101, negatives=NegativesConfig(in_batch=0.5, uniform=0.2, memory=0.3)
    )
    frequency = np.array([0.6, 0.3, 0.1, 0.1])  # an item without an event counts as one with one
    expected = np.log(frequency * (100 + 61) + 40 / 4)
    found = log_q(count.double().clamp_min(1) * 10.1, config, 101)
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-6)
    assert found[-1] == FILLER_LOG_Q, "of the filler, item -1"
    some = torch.tensor([2, 0, 2])
    rate = count.double().clamp_min(1) * 10.1
    assert torch.equal(log_q_of(rate[some], config, 101, 4), found[some])
    half = TrainConfig(batch_size=101, negatives=config.negatives, log_q=0.5)
    np.testing.assert_allclose(
        log_q(count.double().clamp_min(1) * 10.1, half, 101)[:-1], expected / 2, rtol=1e-6
    )


def test_counted_rates_are_those_of_an_epoch() -> None:
    found = PositiveRates(torch.tensor([6, 3, 1, 0]), 5, learned=False)
    torch.testing.assert_close(found.rate_N, torch.tensor([1.2, 0.6, 0.2, 0.2]).double())
    assert found.state_dict() == {}, "they follow from the log"


def test_learned_rates_follow_the_steps() -> None:
    truth = torch.tensor([40.0, 8.0, 2.0, 0.5, 0.1])
    rng = np.random.default_rng(0)
    found = PositiveRates(torch.ones(6, dtype=torch.int64), 100, learned=True)

    def steps(number: int, rate: Tensor) -> None:
        for _ in range(number):
            drawn = np.repeat(np.arange(5), rng.poisson(rate.numpy()))
            found.observe(torch.from_numpy(np.append(rng.permutation(drawn), -1)))

    steps(3000, truth)
    ratio = found.rate_N[:5] / truth
    # Averages of some 20 gaps, whose deviation is their mean where occurrences are rare.
    assert ((ratio > 0.5) & (ratio < 2)).all(), ratio
    assert found.rate_N[5] == 0.01, "never seen: as one an epoch"
    steps(300, truth.flip(0))
    assert found.rate_N[4] > 10 * found.rate_N[0], "the log has drifted"


def test_the_memory_keeps_the_newest() -> None:
    memory = CandidateMemory(5, 2)
    assert memory.id_M.tolist() == [-1] * 5
    for first in (0, 3, 6):
        ids = torch.arange(first, first + 3)
        memory.push(ids[:, None].float().expand(3, 2), ids)
    assert memory.id_M.tolist() == [4, 5, 6, 7, 8]
    assert memory.vector_MD[:, 0].tolist() == [4, 5, 6, 7, 8]
    memory.push(torch.zeros(9, 2), torch.arange(20, 29))
    assert memory.id_M.tolist() == [24, 25, 26, 27, 28]


@pytest.mark.parametrize(
    ("negatives", "more", "message"),
    [
        (
            {"uniform": 0.5},
            {},
            r"negatives: shares must add up to 1, got in_batch 1 \+ uniform 0.5",
        ),
        ({"in_batch": 0}, {}, r"shares must add up to 1, got none = 0"),
        ({"in_batch": 1.5}, {}, r"negatives.in_batch must be a share from 0 to 1, got 1.5"),
        ({"in_batch": 0, "uniform": 1}, {}, "negatives.candidates must be given where in_batch"),
        ({"candidates": 9}, {}, "negatives.candidates follows from train.batch_size"),
        ({"catalogue": True, "in_batch": 0.5, "uniform": 0.5}, {}, "catalogue compares with every"),
        ({"in_batch": 0.5, "mined": 0.6}, {}, r"add up to 1, got in_batch 0.5 \+ mined 0.6 = 1.1"),
        (
            {"catalogue": True, "mined": 0.5},
            {},
            "every item: leave in_batch, .*mined",
        ),
        (
            {"in_batch": 0.5, "mined": 0.5, "mining": MiningConfig(depth=0)},
            {},
            "negatives.mining.depth must be >= 1, got 0",
        ),
        (
            {"in_batch": 0.5, "skipped": 0.5},
            {"every_position": True},
            "mined and skipped bring a list a training event",
        ),
        ({"in_batch": 0, "uniform": 1, "candidates": 9}, {}, "correct_positive must be false wh"),
        ({"catalogue": True}, {"log_q_from": "stream"}, "log_q_from: stream learns from the event"),
        ({}, {"log_q_from": "streams"}, "log_q_from must be one of counts, stream, got 'streams'"),
        ({}, {"log_q": -1.0}, "log_q must be an exponent from 0 to 2, got -1"),
    ],
)
def test_what_is_no_mixture_is_refused(negatives, more, message) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(negatives=NegativesConfig(**negatives), **more).validate()
