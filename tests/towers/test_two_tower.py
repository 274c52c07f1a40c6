"""The towers: what their vectors depend on, and what they do not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twotower.data.batches import BatchBuilder
from twotower.data.encode import SPANS
from twotower.data.schema import Feature
from twotower.errors import UserError
from twotower.kernels.sampled_softmax import sampled_softmax
from twotower.towers.config import INTERACTIONS, ModelConfig
from twotower.towers.sequence import BIAS_UNIT
from twotower.towers.tower import AttentionPool, TimedSum
from twotower.towers.two_tower import TwoTower

from ..conftest import EVENTS, ITEM


def build(data, **config) -> TwoTower:
    torch.manual_seed(0)
    rows = {n: t["rows"] for n, t in data.summary["tables"].items()}
    return TwoTower(data.config, rows, ModelConfig(dim=8, hidden=[16], **config)).eval()


def history(pooling: str) -> Feature:
    return Feature(name="history", kind="history", table="item_id", length=3, pooling=pooling)


@pytest.mark.parametrize("pooling", ["mean", "sum", "attention", "timed_sum"])
def test_vectors_have_unit_length_for_any_history(make, pooling) -> None:
    data = make(EVENTS, query=[history(pooling)])
    builder, model = BatchBuilder(data), build(data)
    batch = builder.events(np.arange(10))
    assert 0 in batch.ids["query.history"].lengths(), "a user's first event has no history"
    query, item, temperature, _ = model(batch)
    for vectors in (query, item):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(10))
    assert float(temperature.detach()) == pytest.approx(0.1)


def test_a_query_depends_on_its_own_row_alone(make) -> None:
    data = make(EVENTS, query=[history("attention")])
    builder, model = BatchBuilder(data), build(data)
    rows = np.arange(10)
    together = model.query_vectors(builder.queries(rows))
    for row in rows:
        alone = model.query_vectors(builder.queries(np.array([row])))
        torch.testing.assert_close(alone[0], together[row], atol=1e-6, rtol=0)


def test_towers_share_the_table_that_they_name(make) -> None:
    data = make(EVENTS, query=[history("mean")])
    model = build(data)
    assert model.table_names() == ["table_item_id"]
    query, item, *_ = model(BatchBuilder(data).events(np.arange(10)))
    weight = model.table_weight("item_id")
    for vectors in (query, item):
        (gradient,) = torch.autograd.grad(vectors.sum(), weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_mean_and_sums_pool_as_they_say(make) -> None:
    lengths = {}
    for pooling in ("mean", "sum", "timed_sum"):
        data = make(EVENTS, query=[history(pooling)])
        model = build(data)
        batch = BatchBuilder(data).queries(np.array([2]))  # user 1's third event
        rows = batch.ids["query.history"].values()
        table = model.table_weight("item_id")[rows]
        seen = {}
        model.query.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(args[0]))
        model.query_vectors(batch)
        expected = table.mean(0) if pooling == "mean" else table.sum(0)
        torch.testing.assert_close(seen["history"][0], expected)
        lengths[pooling] = len(rows)
    assert lengths == {"mean": 2, "sum": 2, "timed_sum": 2}


def test_attention_can_prefer_the_newest(make) -> None:
    data = make(EVENTS, query=[history("attention")])
    model = build(data)
    with torch.no_grad():
        model.query.pools["pool_history"].recency[0] = 50.0
    seen = {}
    model.query.register_forward_pre_hook(lambda _, args: seen.update(args[0]))
    batch = BatchBuilder(data).queries(np.array([2]))
    model.query_vectors(batch)
    newest = model.table_weight("item_id")[batch.ids["query.history"].values()[-1]]
    torch.testing.assert_close(seen["history"][0], newest)


def test_attention_learns_which_place_counts_in_a_few_hundred_steps_of_adam() -> None:
    torch.manual_seed(0)
    pool = AttentionPool(8, 6)
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.001)
    mask = torch.ones(64, 6, dtype=torch.bool)
    for _ in range(300):
        entries = torch.randn(64, 6, 8)
        loss = (pool(entries, mask) - entries[:, -2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, "of a variance of 1, the mean's 0.83"


def test_a_timed_sum_learns_from_when_on_entries_count() -> None:
    torch.manual_seed(0)
    pool = TimedSum(6)
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.001)
    mask = torch.ones(64, 6, dtype=torch.bool)
    for _ in range(400):
        entries, span = torch.randn(64, 6, 8), torch.randint(SPANS, (64, 6)).sort(1).values
        since = (span >= SPANS // 2).unsqueeze(-1)
        loss = (pool(entries, mask, span.float()) - (entries * since).sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, "of a plain sum 3"


@pytest.mark.parametrize("kind", [AttentionPool, TimedSum])
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), shift=st.integers(0, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_the_state_of_each_entry_is_of_it_and_those_before(kind, lengths, shift, seed) -> None:
    torch.manual_seed(seed)
    pool = (AttentionPool(8, 9) if kind is AttentionPool else TimedSum(9)).double()
    with torch.no_grad():
        for name, parameter in pool.named_parameters():
            parameter.normal_(std=1.0 if name == "content" else 1 / BIAS_UNIT)
    place = torch.arange(9) - shift
    mask = (place >= 0) & (place < torch.tensor(lengths)[:, None])
    entries = torch.randn(len(lengths), 9, 8, dtype=torch.float64)
    spans = torch.randint(SPANS, (len(lengths), 9))
    times = [spans.float()] if kind is TimedSum else []
    state = pool.encode(entries, mask, *times)
    for row, last in mask.nonzero().tolist():
        until = mask[row : row + 1] & (torch.arange(9) <= last)
        expected = pool(entries[row : row + 1], until, *(t[row : row + 1] for t in times))[0]
        torch.testing.assert_close(state[row, last], expected, atol=1e-6, rtol=1e-5)


def test_a_context_feature_changes_the_query_but_not_the_item(make) -> None:
    events = EVENTS | {"device": ["web", "app"] * 5}
    features = [history("mean"), Feature(name="device", kind="id")]
    data = make(events, query=features, item=[ITEM])
    model, builder = build(data), BatchBuilder(data)
    batch = builder.events(np.arange(4))
    query, item, *_ = model(batch)
    values = batch.ids["query.device"].values()
    values.copy_(values.flip(0) + 0)
    other_query, other_item, *_ = model(batch)
    assert not torch.allclose(query, other_query)
    assert torch.equal(item, other_item)


USERS = {"user_id": [1, 2, 3], "age": [20.0, 30.0, 50.0], "taste": [[0.0, 1], [1, 0], [2, 2]]}
USER = [
    Feature(name="user_id", kind="id"),
    Feature(name="age", kind="number"),
    Feature(name="taste", kind="vector", width=2),
]


def test_an_items_bias_is_the_last_coordinate_and_is_added_to_every_score(make) -> None:
    data = make(EVENTS, query=[history("mean")])
    builder, model = BatchBuilder(data), build(data, item_bias=True)
    with torch.no_grad():
        query, item, *_ = model(builder.events(np.arange(10), extra=np.array([1, 0])))
    for vectors in (query, item):
        torch.testing.assert_close(vectors[:, :-1].norm(dim=1), torch.ones(len(vectors)))
    assert query[:, -1].tolist() == [1.0] * 10
    assert len(item[:, -1].unique()) == len(data.items)
    torch.testing.assert_close(
        query @ item.T, query[:, :-1] @ item[:, :-1].T + item[:, -1], atol=1e-6, rtol=0
    )
    assert len(item) == 12, "further items stand behind the events' own"
    torch.testing.assert_close(item[10:], model.item_vectors(builder.items(np.array([1, 0]))))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_a_few_steps_lower_the_loss(interaction, make) -> None:
    data = make(EVENTS, users=USERS, query=[history("attention"), *USER])
    model = build(data, interaction=interaction).train()
    batch = BatchBuilder(data).events(np.arange(10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = sampled_softmax(*model(batch)[:3], candidate_id_N=batch.item_N)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} takes no part"
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("features", [[history("mean")], USER[1:], USER[1:2], USER[:1], USER])
def test_any_mix_of_features_meets(features, interaction, make) -> None:
    data = make(EVENTS, users=USERS, query=features)
    builder, model = BatchBuilder(data), build(data, interaction=interaction)
    together = model.query_vectors(builder.queries(np.arange(10)))
    torch.testing.assert_close(together.norm(dim=1), torch.ones(10))
    alone = model.query_vectors(builder.queries(np.array([7])))
    torch.testing.assert_close(alone[0], together[7], atol=1e-6, rtol=0)


def test_the_layers_see_the_inputs_the_dense_vector_and_the_dots(make) -> None:
    data = make(EVENTS, users=USERS, query=[history("mean"), *USER])
    model = build(data, interaction="dot")
    inputs, seen = {}, []
    model.query.register_forward_pre_hook(lambda _, args: inputs.update(args[0]))
    model.query.layers.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.query_vectors(BatchBuilder(data).queries(np.array([2, 5])))
    numbers = torch.cat([inputs["age"], inputs["taste"]], dim=1)
    dense = model.query.interaction.projection(numbers)
    past, user = inputs["history"], inputs["user_id"]
    dots = [(past * dense).sum(1), (user * dense).sum(1), (user * past).sum(1)]
    expected = torch.cat([past, user, numbers, dense, torch.stack(dots, dim=1)], dim=1)
    # Sums of 8 products, in another order.
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=1e-6)


def test_cross_layers_begin_with_small_weights_and_no_bias(make) -> None:
    data = make(EVENTS, users=USERS, query=[history("mean"), *USER])
    cross = build(data, interaction="cross", cross_layers=3, cross_rank=5).query.interaction
    width = 8 + 8 + 1 + 2
    assert cross.u.shape == (3, width, 5)
    assert cross.v.shape == (3, 5, width)
    assert not cross.bias.any()
    assert float(cross.u.detach().std()) == pytest.approx((2 / (width + 5)) ** 0.5, rel=0.3)
    narrow = build(data, interaction="cross", cross_rank=64).query.interaction
    assert narrow.v.shape == (2, width, width), "a rank above the width adds nothing"


@pytest.mark.parametrize("interaction", ["dot", "cross"])
@pytest.mark.parametrize("features", [USER[:1], USER])
def test_under_autocast_features_are_multiplied_in_bf16(features, interaction, make) -> None:
    data = make(EVENTS, users=USERS, query=[history("mean"), *features])
    model = build(data, interaction=interaction)
    queries = BatchBuilder(data).queries(np.arange(10))
    seen: list[torch.Tensor] = []
    model.query.interaction.register_forward_hook(lambda *args: seen.append(args[2]))
    vectors = model.query_vectors(queries)
    with torch.autocast("cpu", torch.bfloat16):
        near = model.query_vectors(queries)
    # A step of bf16 for each of a value's few roundings, twice as much as the layers' own.
    torch.testing.assert_close(near.float(), vectors, atol=2**-5, rtol=0)
    if interaction == "cross":
        assert seen[1].dtype == torch.bfloat16
    else:
        dots = seen[1][:, -3:]
        assert torch.equal(dots, dots.bfloat16().float()), "sums rounded to bf16"
    seen[1].float().square().sum().backward()
    for name, parameter in model.query.interaction.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32


def test_concatenation_is_the_default_and_has_no_further_parameters(make) -> None:
    data = make(EVENTS, users=USERS, query=[history("mean"), *USER])
    names = build(data).state_dict().keys()
    assert names == build(data, interaction="concat").state_dict().keys()
    assert not [name for name in names if "interaction" in name]


@pytest.mark.parametrize(
    ("change", "words"),
    [({"interaction": "fm"}, "model.interaction must be one of concat, dot, cross, got 'fm'"),
     ({"cross_layers": 0}, "model.cross_layers must be >= 1, got 0"),
     ({"dim": 1, "item_bias": True}, "model.dim must be >= 2 where model.item_bias takes"),
     ({"dim": 30}, "model.dim must be a multiple of 4, as FBGEMM's tables need, got 30"),
     ({"cross_rank": 0}, "model.cross_rank must be >= 1, got 0")],
)  # fmt: skip
def test_an_interaction_that_there_is_not_is_refused(change, words) -> None:
    with pytest.raises(UserError, match=words):
        ModelConfig(**change).validate()
