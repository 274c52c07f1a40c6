"""Settings of embedding tables: parts of slots, and what contradicts itself."""

import pytest

from twotower.data.schema import DataConfig, Feature
from twotower.data.table import LEAST_PART, MOST_PARTS, Table
from twotower.errors import UserError


@pytest.mark.parametrize(
    ("slots", "parts"),
    [(2, 1), (100, 1), (199, 1), (200, 2), (1000, 8), (1001, 1), (100_000, 32), (10**8, 64)],
)
def test_slots_are_cut_into_parts_that_many_ranks_can_share(slots, parts) -> None:
    assert Table(slots=slots).parts == parts
    assert slots % parts == 0
    assert parts <= MOST_PARTS
    assert parts == 1 or slots // parts >= LEAST_PART


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slots": 1}, "slots must be >= 2, got 1"),
        ({"slots": 9, "admit_every": 0}, "admit_every must be >= 1, got 0"),
        ({"slots": 9, "eviction": "lfru"}, "eviction must be one of lru, lfu, distance_lfu"),
        ({"slots": 9, "min_count": 2}, "min_count is of a vocabulary, and with slots any id"),
        ({"slots": 9, "max_size": 5}, "max_size is of a vocabulary"),
        ({"slots": 9, "oov_rows": 5}, "oov_rows is of a vocabulary"),
        ({"slots": 9, "pinned": ["a"]}, "pinned is of a vocabulary"),
        ({"admit_every": 3}, "admit_every needs slots, and this table has a vocabulary"),
        ({"eviction": "lru"}, "eviction needs slots"),
    ],
)
def test_what_a_table_cannot_be_is_refused(settings, said) -> None:
    config = DataConfig(
        interactions="log", query=[Feature(name="history", kind="history", table="item_id")],
        item=[Feature(name="item_id", kind="id")], tables={"item_id": Table(**settings)},
    )  # fmt: skip
    with pytest.raises(UserError, match=f"data.tables.item_id.{said}"):
        config.validate()
