"""Bundles of towers that are made in a few seconds."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.data.schema import ENCODERS, OF_HISTORIES, Feature
from twotower.data.table import Table
from twotower.export.bundle import Bundle
from twotower.export.config import ExportConfig
from twotower.export.export import export
from twotower.towers.config import ModelConfig
from twotower.towers.sequence import BIAS_UNIT
from twotower.towers.two_tower import TwoTower
from twotower.train.checkpoint import storage
from twotower.train.checkpoint.towers import MODEL, write_model_spec
from twotower.train.summary import write_summary

USERS, ITEMS, EVENTS = 60, 40, 600


def dynamic_bundle(make, folder: Path, **config: Any) -> tuple[PreparedDataset, TwoTower, Bundle]:
    """Export towers whose tables hold some ids of a log and lack others.

    Users are integers and items strings; user ids stand alone and in a bag, items alone, pooled by
    a sum and by attention, in tables of one part, and of two.
    """
    rng = np.random.default_rng(0)
    events = {
        "user_id": rng.integers(0, USERS, EVENTS).tolist(),
        "item_id": [f"item {i}" for i in rng.integers(0, ITEMS, EVENTS)],
        "timestamp": list(range(EVENTS)),
    }
    users = {
        "user_id": list(range(USERS)),
        "friends": [rng.integers(0, USERS, i % 4).tolist() for i in range(USERS)],
        "city": [["x", "y", None][i % 3] for i in range(USERS)],
    }
    items = {
        "item_id": [f"item {i}" for i in range(ITEMS)],
        "tags": [[f"tag {i % 7}", f"tag {i % 5}"] for i in range(ITEMS)],
    }
    history = Feature(name="history", kind="history", table="item_id", length=5)
    data = make(
        events, users=users, items=items,
        query=[
            Feature(name="user_id", kind="id"),
            Feature(name="friends", kind="ids", table="user_id", pooling="sum", length=4),
            Feature(name="city", kind="id"), history,
            Feature(name="liked", kind="history", table="item_id", length=3, pooling="attention"),
        ],
        item=[Feature(name="item_id", kind="id"), Feature(name="tags", kind="ids", length=2)],
        tables={
            "user_id": Table(slots=200), "item_id": Table(slots=30), "tags": Table(slots=6),
        },
    )  # fmt: skip
    return exported(data, folder, **config)


def timed_bundle(make, folder: Path, **config: Any) -> tuple[PreparedDataset, TwoTower, Bundle]:
    """Export towers that know the times of a history's entries, seconds to years apart."""
    rng = np.random.default_rng(0)
    events = {
        "user_id": rng.integers(0, USERS, EVENTS).tolist(),
        "item_id": rng.integers(0, ITEMS, EVENTS).tolist(),
        "timestamp": np.cumsum(np.exp(rng.uniform(0, 14, EVENTS)).astype(np.int64)).tolist(),
    }
    data = make(events, query=[
        Feature(name=pooling, kind="history", table="item_id", length=5, pooling=pooling,
                time_gaps=pooling in ENCODERS)
        for pooling in OF_HISTORIES
    ])  # fmt: skip
    return exported(data, folder, **config)


def featured_bundle(make, folder: Path, **config: Any) -> tuple[PreparedDataset, TwoTower, Bundle]:
    """Export towers whose histories' entries bring their items' features, however they are read."""
    rng = np.random.default_rng(0)
    events = {
        "user_id": rng.integers(0, USERS, EVENTS).tolist(),
        "item_id": [f"item {i}" for i in rng.integers(0, ITEMS, EVENTS)],
        "timestamp": list(range(EVENTS)),
    }
    items = {  # the last is of no event
        "item_id": [f"item {i}" for i in range(ITEMS + 1)],
        "tags": [[f"tag {i % 7}", f"tag {i % 5}"] for i in range(ITEMS + 1)],
        "price": rng.random(ITEMS + 1).tolist(),
    }
    query = [
        Feature(name=pooling, kind="history", table="item_id", length=5, pooling=pooling,
                time_gaps=pooling == "hstu", item_features=["price", "tags"])
        for pooling in ("mean", "attention", *OF_HISTORIES)
    ]  # fmt: skip
    item = [
        Feature(name="item_id", kind="id"), Feature(name="tags", kind="ids", length=2),
        Feature(name="price", kind="number"),
    ]  # fmt: skip
    return exported(make(events, items=items, query=query, item=item), folder, **config)


def exported(
    data: PreparedDataset, folder: Path, **config: Any
) -> tuple[PreparedDataset, TwoTower, Bundle]:
    """Export towers that have seen a few events and whose every parameter takes part."""
    torch.manual_seed(0)
    shape = ModelConfig(dim=8, hidden=[16])
    model = TwoTower(data.config, {n: t["rows"] for n, t in data.summary["tables"].items()}, shape)
    builder = BatchBuilder(data)
    with torch.no_grad():
        for start in range(0, 120, 40):
            model(builder.events(np.arange(start, start + 40)))
        for name, parameter in model.named_parameters():
            unit = BIAS_UNIT if name.endswith("of_span") else 1
            parameter.add_(0.1 * torch.randn_like(parameter) / unit)
    model.eval()
    train = folder / "train"
    train.mkdir()
    write_model_spec(train, data, shape)
    state = {MODEL + name: value for name, value in model.state_dict().items()}
    storage.save(train / "checkpoint", state, {})
    write_summary(train, {"fingerprint": "of a test"})
    return data, model, export_again(data, folder, **config)


def export_again(data: PreparedDataset, folder: Path, **config: Any) -> Bundle:
    """Export the towers in a folder once more, with other settings."""
    return export(
        data, folder / "train", folder / "bundles", config=ExportConfig(**config), job={},
        name="of a test", fingerprint="of a test", metrics={}, seed=0, progress=lambda *_: None,
    )  # fmt: skip
