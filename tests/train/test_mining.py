"""Mined lists: a band of what the towers answer, without what the user takes in training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from twotower.data.batches import BatchBuilder
from twotower.data.prepared import PreparedDataset
from twotower.errors import UserError
from twotower.towers.catalogue import catalogue_vectors
from twotower.towers.config import ModelConfig
from twotower.towers.two_tower import TwoTower
from twotower.train.mining import HardNegatives
from twotower.train.negatives_config import MiningConfig

CPU = torch.device("cpu")


class Wrapped(nn.Module):
    """Towers as a training holds them."""

    def __init__(self, towers: TwoTower) -> None:
        super().__init__()
        self.module = towers


@pytest.fixture
def data(make) -> PreparedDataset:
    rng = np.random.default_rng(0)
    return make({
        "user_id": rng.integers(0, 12, 500).tolist(), "item_id": rng.integers(0, 60, 500).tolist(),
        "timestamp": list(range(500)),
    })  # fmt: skip


def miner(data: PreparedDataset, batch_size: int, **band: int) -> tuple[HardNegatives, TwoTower]:
    torch.manual_seed(0)
    rows = {table: info["rows"] for table, info in data.summary["tables"].items()}
    towers = TwoTower(data.config, rows, ModelConfig(dim=8, hidden=[8], dropout=0.5))
    module = SimpleNamespace(pipeline=None, model=Wrapped(towers).train(), device=CPU)
    return HardNegatives(data, MiningConfig(every=3, **band), module, 99, batch_size), towers


@pytest.mark.parametrize("batch_size", [7, 64])
def test_a_list_is_the_band_without_what_the_user_takes_in_training(data, batch_size) -> None:
    mine, towers = miner(data, batch_size, skip=4, depth=6)
    rows = np.random.default_rng(1).permutation(data.section(0).stop)[:99]
    found = mine(0, 0, rows)
    assert towers.training, "as it was"
    towers.eval()
    builder = BatchBuilder(data)
    with torch.no_grad():
        item_ND = catalogue_vectors(towers.item_vectors, builder, CPU, 64)
        score = (towers.query_vectors(builder.queries(rows)) @ item_ND.T).numpy()
    c, stop = data.event_columns, data.section(0).stop
    for row, items, scores in zip(rows, found, score, strict=True):
        taken = c["item"][:stop][c["user"][:stop] == c["user"][row]]
        scores[taken] = -np.inf
        band = np.argsort(-scores)[4:10]
        band = sorted(i for i in band if scores[i] > -np.inf)
        assert [i for i in items if i >= 0] == band
        assert c["item"][row] not in items


def test_steps_that_were_mined_for_are_not_mined_again(data) -> None:
    mine, towers = miner(data, 64, skip=0, depth=5)
    first = mine(0, 0, np.arange(50)).copy()
    with torch.no_grad():
        for weight in towers.parameters():
            weight.normal_()
    resumed, _ = miner(data, 64, skip=0, depth=5)
    for name, tensor in resumed.state_dict().items():
        tensor.copy_(mine.state_dict()[name])
    resumed.module = mine.module
    np.testing.assert_array_equal(resumed(0, 0, np.arange(50)), first)
    assert (resumed(0, 50, np.arange(50)) != first).any(), "the towers have moved"
    assert (resumed(1, 0, np.arange(50)) != first).any()


def test_a_band_deeper_than_the_catalogue_is_refused(data) -> None:
    message = r"skip 10 and depth 51 need 61 items, the catalogue of .* has 60: lower them"
    with pytest.raises(UserError, match=message):
        miner(data, 64, skip=10, depth=51)
    miner(data, 64, skip=10, depth=50)
