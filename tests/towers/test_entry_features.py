"""What the catalogue knows of a history's entries: added to each, and to nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from twotower.data.batches import BatchBuilder
from twotower.data.schema import Feature, Split
from twotower.errors import UserError
from twotower.export.graphs import entry_tables, raw_graph, save_graph
from twotower.export.parity import raw_tensors, session
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower

from ..conftest import EVENTS, ITEM

ITEMS = {
    "item_id": list("abcdez"),  # z is of no event
    "tags": [["p", "q"], ["q"], None, ["r", "p", "q"], ["p"], ["r"]],
    "price": [1.5, 2.0, None, 9.0, 4.0, 3.0],
}
TAGS, PRICE = Feature(name="tags", kind="ids"), Feature(name="price", kind="number")
PAST = Feature(
    name="past", kind="history", table="item_id", length=3, item_features=["price", "tags"]
)


def build(data) -> TwoTower:
    torch.manual_seed(0)
    rows = {n: t["rows"] for n, t in data.summary["tables"].items()}
    return TwoTower(data.config, rows, ModelConfig(dim=8, hidden=[16])).eval()


def read_by(model, run) -> dict[str, torch.Tensor]:
    """Return what the query tower reads."""
    seen: dict[str, torch.Tensor] = {}
    hook = model.query.register_forward_pre_hook(lambda _, given: seen.update(given[0]))
    with torch.no_grad():
        run()
    hook.remove()
    return seen


def test_entries_bring_their_items_features(make) -> None:
    data = make(EVENTS, items=ITEMS, query=[PAST], item=[ITEM, TAGS, PRICE])
    model, builder, rows = build(data), BatchBuilder(data), np.arange(10)
    read = read_by(model, lambda: model(builder.events(rows, 12, extra=np.array([3, -1, 0]))))
    ids, tags = model.table_weight("item_id"), model.table_weight("tags")
    weight = model.entry_features["of_past"].joined.weight
    table = data.items

    def entry(item: int) -> torch.Tensor:
        row = table["feature.item_id"][item].as_py()
        found = table["feature.tags"][item].as_py()
        pooled = tags[found].mean(0) if found else torch.zeros(8)
        price = torch.tensor([table["feature.price"][item].as_py()])
        return ids[row] + weight @ torch.cat([price, pooled])

    for place, event in enumerate(rows):
        user = int(data.event_columns["user"][event])
        line = slice(data.history_from[user], data.event_columns["history_to"][event])
        past = data.timeline[line][-3:].tolist()
        expected = sum((entry(item) for item in past), torch.zeros(8)) / max(1, len(past))
        torch.testing.assert_close(read["past"][place], expected, atol=1e-6, rtol=0)
    assert (read["past"][10:] == 0).all(), "of fillers"


@pytest.mark.parametrize("pooling", ["mean", "attention", "transformer", "hstu"])
def test_items_that_are_not_known_add_nothing_and_cold_ones_do(pooling, make, tmp_path) -> None:
    past = replace(PAST, pooling=pooling)
    data = make(EVENTS, items=ITEMS, query=[past], item=[ITEM, TAGS, PRICE])
    model, builder = build(data), BatchBuilder(data)
    specs = data.encoder.specs(data.config, "query")
    assert [s.name for s in specs] == ["past"], "a request carries ids alone"
    graph = raw_graph(data.encoder, model, "query", specs, entry_tables(model, data))
    save_graph(graph, tmp_path / "graph.onnx")
    requests = [{"past": list(past)} for past in ("", "nn", "az", "zan", "ban", "n")]
    (served,) = session(tmp_path / "graph.onnx").run(["vector"], raw_tensors(specs, requests))
    eager = model.query_vectors(builder.requests("query", requests)).detach().numpy()
    np.testing.assert_allclose(served, eager, atol=2e-6)
    before = served
    with torch.no_grad():
        model.entry_features["of_past"].joined.weight.mul_(2)
    after = model.query_vectors(builder.requests("query", requests)).detach().numpy()
    changed = np.abs(after - before).max(1) > 1e-5
    assert changed.tolist() == [False, False, True, True, True, False]


def test_a_history_without_an_order_leaves_out_its_own_item_with_its_features(make) -> None:
    split = [["train", "train", "test"][i % 3] for i in range(9)]
    events = {"user_id": [1] * 3 + [2] * 3 + [3] * 3, "item_id": list("abcacdbad"),
              "timestamp": [1, 2, 9] * 3, "split": split}  # fmt: skip
    data = make(
        events, items=ITEMS, query=[PAST], item=[ITEM, TAGS, PRICE], ordered=False,
        split=Split(kind="given", column="split"),
    )  # fmt: skip
    model, builder = build(data), BatchBuilder(data)
    rows = np.arange(data.section(0).stop)
    read = read_by(model, lambda: model(builder.events(rows)))["past"]
    ids, c = data.items["id"].to_pylist(), data.event_columns
    others = []
    for event in rows:
        user, item = int(c["user"][event]), int(c["item"][event])
        line = data.timeline[data.history_from[user] : data.train_end[user]]
        others.append({"past": [ids[i] for i in line if i != item]})
    asked = read_by(model, lambda: model.query_vectors(builder.requests("query", others)))
    torch.testing.assert_close(read, asked["past"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "attention", "timed_sum", "transformer", "hstu"])
def test_a_step_teaches_what_entries_bring(pooling, make) -> None:
    past = replace(PAST, pooling=pooling)
    data = make(EVENTS, items=ITEMS, query=[past], item=[ITEM, TAGS, PRICE])
    model = build(data).train()
    query, *_ = model(BatchBuilder(data).events(np.arange(10)))
    (query * torch.randn_like(query)).sum().backward()
    learned: list[nn.Parameter] = [model.entry_features["of_past"].joined.weight]
    learned += [model.table_weight("tags"), model.table_weight("item_id")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learned)


@pytest.mark.parametrize(
    ("names", "words"),
    [(["tag"], r"data\.item has no feature 'tag'; did you mean 'tags'"),
     (["tags", "tags"], "'tags' stands twice"),
     (["item_id"], "'item_id' shares table 'item_id' with the history")],
)  # fmt: skip
def test_features_that_entries_cannot_bring_are_refused(names, words, make) -> None:
    with pytest.raises(UserError, match=words):
        make(EVENTS, items=ITEMS, query=[replace(PAST, item_features=names)], item=[ITEM, TAGS])


def test_item_features_are_of_a_history(make) -> None:
    with pytest.raises(UserError, match="item_features are of a history's entries"):
        make(EVENTS, items=ITEMS, item=[ITEM, replace(TAGS, item_features=["tags"])])
