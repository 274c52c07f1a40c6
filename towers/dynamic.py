"""Tables with dynamic ids: which key has which slot, as it changes in training.

TorchRec's managed collision with a mapping of our own. Its stock one (MCHManagedCollisionModule)
splits slots and ids by the number of ranks, so that it cannot be loaded on more of them, and keeps
the ids that wait for admission, and when that is due, out of its state. Here slots are cut into
parts (`Table.parts`) that do not depend on the ranks: a part owns a range of keys and of slots,
and a rank holds whole parts. Whatever the number of ranks, the same batches give every id the same
slot, and all state is one row a slot, which reshards with the table's weights.

A key (`twotower.data.vocabulary.hashed_keys`) is even. Within a part's keys, sorted, an odd one
marks what no id has: the free slots, and the part's last slot, which all ids without a slot share.
A part is chosen by a key's first bits, so the keys of all parts together are sorted too.

In training, every look-up counts; every `admit_every` steps, ids that have no slot get one: free
ones first, then those of ids that score less. A row that changes its id begins anew, with weights
that the key alone decides, so that they too are the same on any number of ranks. In evaluation
mode nothing changes.

Shape legend: `S` slots of this rank, `V` looked-up values, `C` ids that may get a slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchrec.modules.mc_modules import ManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from twotower.data.table import Table

KEY_RANGE = 2**63


class DynamicSlots(ManagedCollisionModule):
    """Gives keys slots, and takes them back.

    The state, each (S,) int64, in the order of the keys: `keys`; `slots`, which each has; `counts`,
    how often training saw it; `seen`, the last step that did. Between admissions, `waiting_*` hold
    the same of the ids without a slot, as many as there are slots.

    Args:
        table: with `slots`.
        device: of the state.
        rows: first slot and the one after the last that this rank holds, of whole parts; all by
            default.
    """

    def __init__(
        self, table: Table, device: torch.device, rows: tuple[int, int] | None = None
    ) -> None:
        assert table.slots is not None
        self.table = table
        self.rows = rows or (0, table.slots)
        self.part_slots = table.slots // table.parts
        super().__init__(
            device=device, output_segments=list(range(0, table.slots + 1, self.part_slots))
        )
        assert all(row % self.part_slots == 0 for row in self.rows)
        # As TorchRec does when it sends a key to the rank that holds its part.
        self.part_keys = -(-(KEY_RANGE - 1) // table.parts)
        self.first_part = self.rows[0] // self.part_slots
        self.parts = (self.rows[1] - self.rows[0]) // self.part_slots
        size = self.parts * self.part_slots
        part_S = torch.arange(size, device=device) // self.part_slots + self.first_part
        # The last number of each part, which is odd; of one part alone, all there are of int64.
        last = KEY_RANGE // table.parts - 1
        self.register_buffer("keys", part_S * self.part_keys + last)
        self.register_buffer("slots", torch.arange(*self.rows, device=device))
        names = ["counts", "seen"]
        if table.admit_every > 1:
            names += ["waiting_keys", "waiting_counts", "waiting_seen"]
        for name in names:
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64, device=device))
        if table.admit_every > 1:
            self.waiting_keys -= 1
        # The host's copy of the step, so that it need not wait for the device to tell it.
        self._step: int | None = None
        self._evicted: Tensor | None = None
        self.admitted_keys = torch.empty(0, dtype=torch.int64, device=device)

    def preprocess(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Return the features: their values are keys already."""
        return features

    @torch.no_grad()
    def profile(self, features: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        """Count what training looks up, and admit ids when it is time; return the features."""
        if self.training:
            values = [feature.values() for feature in features.values()]
            self._observe(torch.cat(values))
        return features

    def remap(
        self,
        features: dict[str, JaggedTensor],
        mutate_miss_lengths: bool = True,
        write_weights: Tensor | None = None,
    ) -> dict[str, JaggedTensor]:
        """Return the features with slots, counted over all ranks, for keys."""
        return {
            name: JaggedTensor(
                values=self.slots_of(feature.values()),
                lengths=feature.lengths(),
                offsets=feature.offsets(),
                weights=feature.weights_or_none(),
            )
            for name, feature in features.items()
        }

    def forward(
        self, features: dict[str, JaggedTensor], mutate_miss_lengths: bool = True
    ) -> dict[str, JaggedTensor]:
        """Return the features with slots for keys; in training, after counting them."""
        return self.remap(self.profile(self.preprocess(features)))

    def slots_of(self, key_V: Tensor) -> Tensor:
        """Return the slot (V,) of each key: its own, or the one shared by those without."""
        place_V, known_V = self._find(key_V)
        shared_V = (key_V // self.part_keys + 1) * self.part_slots - 1
        slot_V: Tensor = torch.where(known_V, self.slots[place_V], shared_V)
        return slot_V

    def assigned(self) -> tuple[Tensor, Tensor]:
        """Return the keys that have a slot, ascending, and their slots."""
        has_S = self.keys % 2 == 0
        return self.keys[has_S], self.slots[has_S]

    def _find(self, key_V: Tensor) -> tuple[Tensor, Tensor]:
        place_V = torch.searchsorted(self.keys, key_V).clamp_max(len(self.keys) - 1)
        return place_V, self.keys[place_V] == key_V

    def _observe(self, key_V: Tensor) -> None:
        self._current_iter_tensor += 1
        self._step = int(self._current_iter_tensor) if self._step is None else self._step + 1
        place_V, known_V = self._find(key_V)
        known_V = known_V.to(torch.int64)
        self.counts.scatter_add_(0, place_V, known_V)
        self.seen.scatter_reduce_(0, place_V, known_V * self._step, "amax")
        key_C, count_C = torch.unique(key_V[known_V == 0], return_counts=True)
        seen_C = torch.full_like(count_C, self._step)
        if self._step % self.table.admit_every:
            self._wait(key_C, count_C, seen_C)
            return
        if self.table.admit_every > 1:
            key_C, count_C, seen_C = self._end_waiting(key_C, count_C, seen_C)
        if len(key_C):
            self._admit(key_C, count_C, seen_C)

    def _wait(self, key_C: Tensor, count_C: Tensor, seen_C: Tensor) -> None:
        """Note ids without a slot, the most frequent first where there is no room for all."""
        part_C = key_C // self.part_keys - self.first_part
        order_C, rank_C = _rank_in_part(part_C, count_C, self.parts)
        filled_P = (self.waiting_keys.view(self.parts, -1) >= 0).sum(1)
        part_C = part_C[order_C]
        rank_C = rank_C + filled_P[part_C]
        fits_C = rank_C < self.part_slots
        place = (part_C * self.part_slots + rank_C)[fits_C]
        for name, value_C in (("keys", key_C), ("counts", count_C), ("seen", seen_C)):
            getattr(self, f"waiting_{name}")[place] = value_C[order_C][fits_C]

    def _end_waiting(
        self, key_C: Tensor, count_C: Tensor, seen_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ids of this step and all that wait, each once; none waits from now on."""
        waits_S = self.waiting_keys >= 0
        keys, inverse = torch.unique(
            torch.cat([self.waiting_keys[waits_S], key_C]), return_inverse=True
        )
        counts, seen = torch.zeros_like(keys), torch.zeros_like(keys)
        counts.scatter_add_(0, inverse, torch.cat([self.waiting_counts[waits_S], count_C]))
        seen.scatter_reduce_(0, inverse, torch.cat([self.waiting_seen[waits_S], seen_C]), "amax")
        self.waiting_keys.fill_(-1)
        return keys, counts, seen

    def _admit(self, key_C: Tensor, count_C: Tensor, seen_C: Tensor) -> None:
        """Give slots to those ids that score more than others which have one."""
        part_C = key_C // self.part_keys - self.first_part
        score_C = self._score(count_C, seen_C)
        place_E, score_E = self._least_useful(torch.bincount(part_C, minlength=self.parts))
        part_E = place_E // self.part_slots
        # Stable: of those with the same score, ids stay that have a slot.
        part = torch.cat([part_E, part_C])
        order, rank = _rank_in_part(part, torch.cat([score_E, score_C]), self.parts)
        stays = rank < torch.bincount(part_E, minlength=self.parts)[part[order]]
        had = order < len(place_E)
        # In both, part follows part, and of a part they hold the same number.
        place, chosen = place_E[order[~stays & had]], order[stays & ~had] - len(place_E)
        assert self._evicted is None, "the rows of the last admission were not reset"
        self._evicted, self.admitted_keys = self.slots[place], key_C[chosen]
        self.counts[place], self.seen[place] = count_C[chosen], seen_C[chosen]
        self._replace(place, key_C[chosen])

    def _least_useful(self, number_P: Tensor) -> tuple[Tensor, Tensor]:
        """Return the places, and their scores, that `number_P` ids of each part could get.

        They are those with the lowest scores, and all others with the highest score among them, so
        that which of those an id gets does not depend on the ranks.
        """
        score_S = self._score(self.counts, self.seen)
        score_S[self.keys % 2 == 1] = -torch.inf
        score_PL = score_S.view(self.parts, -1)
        score_PL[self.slots.view(self.parts, -1) % self.part_slots == self.part_slots - 1] = (
            torch.inf
        )
        number_P = number_P.clamp_max(self.part_slots)
        lowest = score_PL.topk(max(1, int(number_P.max())), largest=False).values
        limit_P1 = lowest.gather(1, (number_P - 1).clamp_min(0)[:, None])
        (place_E,) = torch.nonzero((score_PL <= limit_P1).view(-1), as_tuple=True)
        return place_E, score_S[place_E]

    def _replace(self, place: Tensor, keys: Tensor) -> None:
        """Let places have other keys, and sort all by key again: a merge of two sorted lists."""
        gone_S = torch.zeros(len(self.keys), dtype=torch.bool, device=place.device)
        gone_S[place] = True
        (kept,) = torch.nonzero(~gone_S, as_tuple=True)
        keys, order = keys.sort()
        target = torch.searchsorted(self.keys[kept], keys)
        target += torch.arange(len(keys), device=place.device)
        is_new_S = gone_S.fill_(False)
        is_new_S[target] = True
        from_S = torch.empty_like(self.keys)
        from_S[is_new_S], from_S[~is_new_S] = place[order], kept
        self.keys.copy_(self.keys[from_S])
        self.keys[target] = keys
        for buffer in (self.slots, self.counts, self.seen):
            buffer.copy_(buffer[from_S])

    def _score(self, counts: Tensor, seen: Tensor) -> Tensor:
        assert self._step is not None
        score = seen.double() if self.table.eviction == "lru" else counts.double()
        if self.table.eviction == "distance_lfu":
            score /= self._step - seen + 1
        return score

    def evict(self) -> Tensor | None:
        """Return the slots, counted over all ranks, that have other ids than before, if any.

        `admitted_keys` are the keys that they have now.
        """
        evicted, self._evicted = self._evicted, None
        return evicted if evicted is not None and len(evicted) else None

    def open_slots(self) -> Tensor:
        """Return the number of free slots (1,)."""
        count: Tensor = (self.keys % 2).sum(0, keepdim=True) - self.parts
        return count

    def output_size(self) -> int:
        """Return the number of this rank's slots."""
        return self.rows[1] - self.rows[0]

    def input_size(self) -> int:
        """Return the bound of keys."""
        return KEY_RANGE - 1

    def buckets(self) -> int:
        """Return the number of parts of all ranks."""
        return self.table.parts

    def validate_state(self) -> None:
        """Forget what the loaded state replaces."""
        self._step = None

    def rebuild_with_output_id_range(
        self,
        output_id_range: tuple[int, int],
        output_segments: list[int],
        device: torch.device | None = None,
    ) -> DynamicSlots:
        """Return a rank's share, empty."""
        return DynamicSlots(self.table, device or self.device, output_id_range)


def _rank_in_part(part: Tensor, score: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Return an order by part and falling score, and each one's rank in its part, in that order."""
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(part[order], stable=True)]
    sizes = torch.bincount(part, minlength=parts)
    start = sizes.cumsum(0) - sizes
    return order, torch.arange(len(part), device=part.device) - start[part[order]]


def first_weights(keys: Tensor, weight: Tensor) -> Tensor:
    """Return the first weights of rows, uniform around 0, of a mean length of 1.

    Args:
        keys: (R,) which alone decide them.
        weight: (rows, D) of the table, for the width, element type and device.

    Returns:
        (R, D), from a hash of key and column (SplitMix64; Steele, Lea and Flood 2014).
    """
    width = weight.shape[1]
    column_D = torch.arange(1, width + 1, device=keys.device)
    x = keys[:, None] + column_D * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shift(x, shift)) * _signed(factor)
    x = x ^ _shift(x, 31)
    unit_RD = _shift(x, 11).double() / 2**53
    weight_RD: Tensor = ((2 * unit_RD - 1) * (3 / width) ** 0.5).to(weight.dtype)
    return weight_RD


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift to the right without copies of the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted


@torch.no_grad()
def reset_rows(weight: Tensor, states: Any, rows: Tensor, keys: Tensor) -> None:
    """Let rows of a table begin anew.

    Args:
        weight: (rows, D), changed in place.
        states: of the optimizer, each (rows, ...), changed in place.
        rows: that changed their ids.
        keys: that they have now.
    """
    weight[rows] = first_weights(keys, weight)
    for state in states:
        state[rows] = 0
