"""Dynamic ids: who gets a slot, who gives way, what becomes of its row, what a state holds."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from twotower.data.table import EVICTIONS, Table
from twotower.towers.dynamic import KEY_RANGE, DynamicSlots, first_weights
from twotower.towers.dynamic_tables import DynamicBags

CPU = torch.device("cpu")
# Of 400 slots and four parts; in each part a few keys that tests take turns with.
FOUR = 400


def look_up(slots: DynamicSlots, keys: list[int]) -> list[int]:
    values = torch.tensor(keys, dtype=torch.int64)
    found = slots({"t": JaggedTensor(values=values, lengths=torch.ones_like(values))})
    slots.evict()
    return found["t"].values().tolist()


def made(slots: int, **settings: Any) -> DynamicSlots:
    return DynamicSlots(Table(slots=slots, **settings), CPU)


def state_of(slots: DynamicSlots) -> dict[str, list[int]]:
    return {name: value.tolist() for name, value in slots.state_dict().items()}


def test_ids_get_slots_of_their_own_until_none_is_left() -> None:
    slots = made(5, eviction="lfu")
    assert look_up(slots.eval(), [2, 4, 6]) == [4, 4, 4], "in evaluation nobody is admitted"
    slots.train()
    first = look_up(slots, [2, 4])
    assert len({*first, 4}) == 3
    assert slots.open_slots().tolist() == [2]
    both = look_up(slots, [2, 6, 4, 8])
    assert sorted(both) == [0, 1, 2, 3]
    assert [both[0], both[2]] == first, "an id keeps its slot"
    assert look_up(slots, [2, 10])[1] == 4, "the last slot is that of all others"


@pytest.mark.parametrize(
    ("eviction", "gone"),
    # 2 was seen most often, but long ago; 4 and 6 less often, 6 last.
    [("lru", 2), ("lfu", 6), ("distance_lfu", 4)],
)
def test_the_least_useful_gives_way(eviction, gone) -> None:
    slots = made(4, eviction=eviction)
    look_up(slots, [2] * 9)
    look_up(slots, [4] * 3)
    for _ in range(9):
        look_up(slots, [])
    look_up(slots, [6] * 2)
    newest = look_up(slots, [8] * 3)
    assert set(newest) != {3}
    assert set(slots.assigned()[0].tolist()) == {2, 4, 6, 8} - {gone}


def test_an_id_seen_once_does_not_displace_frequent_ones() -> None:
    slots = made(3, eviction="lfu")
    before = look_up(slots, [2, 2, 4, 4])
    assert look_up(slots, [6, 2, 4]) == [2, before[0], before[2]]


def test_evaluation_neither_admits_nor_evicts_nor_counts() -> None:
    slots = made(3)
    look_up(slots, [2, 4])
    before = state_of(slots)
    slots.eval()
    for _ in range(3):
        look_up(slots, [6, 6, 8, 2])
    assert state_of(slots) == before


def test_ids_wait_for_the_step_of_admission() -> None:
    slots = made(4, admit_every=3)
    assert look_up(slots, [2, 2]) == [3, 3]
    assert look_up(slots, [4, 4, 4, 6]) == [3, 3, 3, 3]
    assert slots.open_slots().tolist() == [3]
    found = look_up(slots, [8, 8, 6, 2])
    # Over the steps since each was last seen: 2 has 3, 6 and 8 have 2, 4 has 3 / 2.
    assert slots.assigned()[0].tolist() == [2, 6, 8]
    assert sorted(found[1:]) == [0, 1, 2]
    assert slots.waiting_keys.tolist() == [-1] * 4


def test_where_too_many_wait_the_most_frequent_do() -> None:
    slots = made(3, admit_every=2, eviction="lfu")
    look_up(slots, [2, 4, 4, 6, 6, 8, 10, 10])
    assert slots.waiting_keys.tolist() == [4, 6, 10]
    look_up(slots, [8, 8, 8, 12, 12, 6])
    # 8 did not wait, but comes at the very step of admission; 6 waited, and came again.
    assert slots.assigned()[0].tolist() == [6, 8]


class Reference:
    """The same rules, with dictionaries: key -> [count, step last seen]."""

    def __init__(self, table: Table) -> None:
        self.table, self.step = table, 0
        self.kept: dict[int, list[int]] = {}
        self.waiting: dict[int, list[int]] = {}

    def part(self, key: int) -> int:
        return key * self.table.parts // KEY_RANGE

    def score(self, count: int, seen: int) -> float:
        kind = self.table.eviction
        if kind == "distance_lfu":
            return count / (self.step - seen + 1)
        return seen if kind == "lru" else count

    def observe(self, keys: list[int]) -> None:
        self.step += 1
        for key, count in Counter(keys).items():
            group = self.kept if key in self.kept else self.waiting
            group[key] = [group.get(key, [0])[0] + count, self.step]
        if self.step % self.table.admit_every:
            return
        room = self.table.slots // self.table.parts - 1
        everyone = [(k, v, 0) for k, v in self.kept.items()]
        everyone += [(k, v, 1) for k, v in self.waiting.items()]
        # Of equals, those with a slot stay; then the lower key goes first.
        everyone.sort(key=lambda e: (-self.score(*e[1]), e[2], e[0]))
        self.kept, self.waiting = {}, {}
        used: Counter[int] = Counter()
        for key, value, _ in everyone:
            used[self.part(key)] += 1
            if used[self.part(key)] <= room:
                self.kept[key] = value


def spread(number: int) -> int:
    """Return a key; 0 to 3 are of one part each, and so on."""
    return (number % 4) * (KEY_RANGE // 4) + 2 * (number // 4)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(), eviction=st.sampled_from(EVICTIONS), admit_every=st.integers(1, 4),
    slots=st.sampled_from([3, 6, FOUR]),
)  # fmt: skip
def test_slots_follow_the_rules(data, eviction, admit_every, slots) -> None:
    # Of four parts, each has 99 slots for ids: some steps bring more than that.
    table = Table(slots=slots, eviction=eviction, admit_every=admit_every)
    module, reference = DynamicSlots(table, CPU), Reference(table)
    # No more ids wait in a part than it has slots.
    most = 12 if slots == FOUR else slots // admit_every
    crowds = [[spread(n) for n in range(c, c + 4 * 60)] for c in (0, 4 * 50, 4 * 120)]
    for _ in range(data.draw(st.integers(1, 12))):
        few = st.lists(st.integers(0, 40).map(spread), max_size=most)
        keys = data.draw(few)
        if slots == FOUR and admit_every == 1:
            keys = keys + data.draw(st.sampled_from([[], *crowds]))
        had = dict(zip(*(t.tolist() for t in module.assigned()), strict=True))
        found = look_up(module, keys)
        reference.observe(keys)
        now = dict(zip(*(t.tolist() for t in module.assigned()), strict=True))
        assert set(now) == set(reference.kept)
        assert all(now[key] == slot for key, slot in had.items() if key in now)
        size = slots // table.parts
        shared = {part * size + size - 1 for part in range(table.parts)}
        assert len(set(now.values()) | shared) == len(now) + table.parts
        assert found == [
            now.get(key, (reference.part(key) + 1) * size - 1) for key in keys
        ]  # fmt: skip
        places = {k: i for i, k in enumerate(module.keys.tolist())}
        for key, (count, seen) in reference.kept.items():
            assert (module.counts[places[key]], module.seen[places[key]]) == (count, seen)


@pytest.mark.parametrize("admit_every", [1, 3])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_parts_hold_what_one_would(ranks, admit_every) -> None:
    table = Table(slots=FOUR, admit_every=admit_every)
    whole, size = DynamicSlots(table, CPU), FOUR // ranks
    shares = [
        whole.rebuild_with_output_id_range((r * size, (r + 1) * size), []) for r in range(ranks)
    ]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        numbers = torch.randint(0, 700, (300,), generator=generator).tolist()
        keys = [spread(n) for n in numbers]
        found = dict(zip(keys, look_up(whole, keys), strict=True))
        for rank, share in enumerate(shares):
            own = [k for k in keys if k * ranks // KEY_RANGE == rank]
            assert look_up(share, own) == [found[k] for k in own]
    joined = [state_of(share) for share in shares]
    for name, value in state_of(whole).items():
        if name in ("_current_iter_tensor", "_output_segments_tensor"):
            assert all(state[name] == value for state in joined)
        else:
            assert [entry for state in joined for entry in state[name]] == value


@pytest.mark.parametrize("admit_every", [1, 3])
@pytest.mark.parametrize("eviction", EVICTIONS)
def test_a_state_loaded_goes_on_as_if_nothing_had_happened(eviction, admit_every) -> None:
    unbroken = made(FOUR, eviction=eviction, admit_every=admit_every)
    generator = torch.Generator().manual_seed(1)
    steps = [
        [spread(n) for n in torch.randint(0, 900, (200,), generator=generator).tolist()]
        for _ in range(12)
    ]
    for keys in steps[:5]:
        look_up(unbroken, keys)
    resumed = made(FOUR, eviction=eviction, admit_every=admit_every)
    look_up(resumed, steps[9])  # what it held before is replaced, with its step
    resumed.load_state_dict(unbroken.state_dict())
    for keys in steps[5:]:
        assert look_up(resumed, keys) == look_up(unbroken, keys)
    assert state_of(resumed) == state_of(unbroken)


def bags(slots: int, **settings: Any) -> DynamicBags:
    config = EmbeddingBagConfig(
        name="table", embedding_dim=8, num_embeddings=slots, feature_names=["f"]
    )
    return DynamicBags([config], {"table": Table(slots=slots, **settings)}, CPU)


def batch(keys: list[int]) -> KeyedJaggedTensor:
    values = torch.tensor(keys, dtype=torch.int64)
    return KeyedJaggedTensor(keys=["f"], values=values, lengths=torch.ones_like(values))


def test_a_row_that_changes_its_id_begins_anew_and_no_other_does() -> None:
    module = bags(4, eviction="lru")
    module(batch([2, 4, 6]))
    with torch.no_grad():
        module.weight("table").fill_(7)
    found, nothing = module(batch([4, 6, 8, 4]))
    assert nothing is None
    expected = torch.full((4, 8), 7.0)
    expected[2] = first_weights(torch.tensor([8]), module.weight("table"))[0]
    torch.testing.assert_close(found["f"], expected, atol=0, rtol=0)
    assert (module.weight("table") == 7).all(1).sum() == 3


def test_first_weights_are_the_keys_own_and_of_length_one_on_average() -> None:
    weight = torch.empty(1, 64)
    keys = 2 * torch.arange(20_000)
    rows = first_weights(keys, weight)
    torch.testing.assert_close(rows[[7, 3]], first_weights(keys[[7, 3]], weight), atol=0, rtol=0)
    assert len(rows.unique(dim=0)) == len(rows)
    bound = (3 / 64) ** 0.5
    assert rows.abs().max() <= bound
    # A uniform number's square has mean bound²/3 and deviation bound²·√(4/45): six of those, over
    # the root of how many there are, come by chance once in a thousand million.
    count = rows.numel()
    square = rows.double().square().mean()
    assert abs(square - bound**2 / 3) < 6 * bound**2 * (4 / 45) ** 0.5 / count**0.5
    assert abs(rows.double().mean()) < 6 * bound / 3**0.5 / count**0.5
    # Neither neighbouring keys nor neighbouring columns go together.
    unit = rows.double() / (bound / 3**0.5)
    for a, b in ((unit[1:], unit[:-1]), (unit[:, 1:], unit[:, :-1])):
        assert abs((a * b).mean()) < 6 / count**0.5
