"""The towers: what their vectors depend on, and what they do not."""

import numpy as np
import pytest
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.schema import Feature
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower

from ..conftest import EVENTS, ITEM


def build(data, **config) -> TwoTower:
    torch.manual_seed(0)
    rows = {n: t["rows"] for n, t in data.summary["tables"].items()}
    return TwoTower(data.config, rows, ModelConfig(dim=8, hidden=[16], **config)).eval()


def history(pooling: str) -> Feature:
    return Feature(name="history", kind="history", table="item_id", length=3, pooling=pooling)


@pytest.mark.parametrize("pooling", ["mean", "sum", "attention"])
def test_vectors_have_unit_length_for_any_history(make, pooling) -> None:
    data = make(EVENTS, query=[history(pooling)])
    builder, model = BatchBuilder(data), build(data)
    batch = builder.events(np.arange(10))
    assert 0 in batch.ids["query.history"].lengths(), "a user's first event has no history"
    query, item, temperature = model(batch)
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
    query, item, _ = model(BatchBuilder(data).events(np.arange(10)))
    weight = model.table_weight("item_id")
    for vectors in (query, item):
        (gradient,) = torch.autograd.grad(vectors.sum(), weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_mean_and_sum_pool_as_they_say(make) -> None:
    lengths = {}
    for pooling in ("mean", "sum"):
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
    assert lengths == {"mean": 2, "sum": 2}


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


def test_a_context_feature_changes_the_query_but_not_the_item(make) -> None:
    events = EVENTS | {"device": ["web", "app"] * 5}
    features = [history("mean"), Feature(name="device", kind="id")]
    data = make(events, query=features, item=[ITEM])
    model, builder = build(data), BatchBuilder(data)
    batch = builder.events(np.arange(4))
    query, item, _ = model(batch)
    values = batch.ids["query.device"].values()
    values.copy_(values.flip(0) + 0)
    other_query, other_item, _ = model(batch)
    assert not torch.allclose(query, other_query)
    assert torch.equal(item, other_item)
