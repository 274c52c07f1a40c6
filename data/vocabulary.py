"""Raw ids to rows of an embedding table, or to the keys of a table with dynamic ids.

In a vocabulary, rows 0 to `oov_rows - 1` belong to ids that training never saw, chosen by
MurmurHash3 (x86, 32 bit, seed 0; Appleby 2011). ONNX Runtime has the same function as an operator,
so the exported graph sends an unseen id to the row that training would have used. The order of the
other rows is that of `twotower.data.prepare.vocabularies`.

A table with `slots` has no vocabulary: its ids are 62 bits of the same hash, which find their rows
in `twotower.towers.dynamic`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

# Seeds of the two halves of a key, not 0: that one chooses rows of vocabularies.
KEY_SEEDS = (1, 2)
HALF = 2**31
# Bytes hashed at once, padding included.
HASHED_BYTES = 1 << 22


@dataclass(frozen=True)
class Vocabulary:
    """The ids that training knows, in row order.

    Attributes:
        keys: string or int64 array; key i has row `oov_rows + i`.
        counts: int64 training count of each key.
        oov_rows: rows before the first key.
    """

    keys: pa.Array
    counts: pa.Array
    oov_rows: int

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        return self.oov_rows + len(self.keys)

    @property
    def dtype(self) -> str:
        """String or int64."""
        return "int64" if pa.types.is_int64(self.keys.type) else "string"

    def lookup(self, ids: pa.Array) -> I64:
        """Return each id's row, -1 for null."""
        if ids.type != self.keys.type:
            ids = ids.cast(self.keys.type)
        rows = self._find(ids)
        rows = np.where(rows >= 0, rows + self.oov_rows, rows)
        unseen = (rows < 0) & ids.is_valid().to_numpy(zero_copy_only=False)
        if unseen.any():
            rows[unseen] = murmur3(ids.filter(pa.array(unseen))) % self.oov_rows
        return np.where(ids.is_null().to_numpy(zero_copy_only=False), -1, rows)

    def _find(self, ids: pa.Array) -> I64:
        """Return each id's place among the keys, -1 where it has none."""
        if len(ids) >= len(self.keys):
            found = pc.index_in(ids, value_set=self.keys)
            return np.asarray(pc.fill_null(found, -1).to_numpy(zero_copy_only=False), np.int64)
        # A few ids among millions of mapped keys: hash the ids and walk through the keys.
        few = ids.dictionary_encode()
        place = pc.index_in(self.keys, value_set=few.dictionary.drop_null())
        keys = np.flatnonzero(place.is_valid().to_numpy(zero_copy_only=False))
        of = np.full(len(few.dictionary) + 1, -1, np.int64)
        of[place.drop_null().to_numpy()] = keys
        index = pc.fill_null(few.indices, len(few.dictionary)).to_numpy(zero_copy_only=False)
        return np.asarray(of[index], np.int64)


@dataclass(frozen=True)
class DynamicIds:
    """The ids of a table with dynamic ids: any.

    Attributes:
        dtype: string or int64.
        slots: rows of the embedding table.
    """

    dtype: str
    slots: int

    @property
    def rows(self) -> int:
        """Rows of the embedding table."""
        return self.slots

    def lookup(self, ids: pa.Array) -> I64:
        """Return each id's key, -1 for null."""
        kind = pa.int64() if self.dtype == "int64" else pa.string()
        ids = ids if ids.type == kind else ids.cast(kind)
        keys = np.full(len(ids), -1, np.int64)
        there = ids.is_valid().to_numpy(zero_copy_only=False)
        keys[there] = hashed_keys(ids.drop_null())
        return keys


def hashed_keys(ids: pa.Array) -> I64:
    """Return the keys of int64 or UTF-8 ids: 31 bits by either of two hashes, and a zero.

    Keys are even and not negative, so that an odd number can mark a row that no id has. Of 100
    million ids, two share a key with a probability of 0.1%.
    """
    high, low = (murmur3(ids, seed) % HALF for seed in KEY_SEEDS)
    return np.asarray(high * (2 * HALF) + low * 2, np.int64)


def murmur3(ids: pa.Array, seed: int = 0) -> I64:
    """Return MurmurHash3_x86_32 of int64 (8 bytes, little endian) or UTF-8 ids."""
    if pa.types.is_int64(ids.type):
        data = ids.to_numpy(zero_copy_only=False).astype("<i8").view(np.uint8).reshape(-1, 8)
        return _murmur3(data, np.full(len(ids), 8, dtype=np.int64), seed).astype(np.int64)
    ids = ids.cast(pa.large_binary())
    _, offsets, content = ids.buffers()
    start = np.frombuffer(offsets, np.int64, len(ids) + 1, 8 * ids.offset)
    lengths = np.diff(start)
    raw = np.frombuffer(content, np.uint8) if content is not None else np.empty(0, np.uint8)
    out = np.empty(len(ids), np.int64)
    # Short ones first, so that a long id makes few others wide.
    order, done = np.argsort(lengths, kind="stable"), 0
    while done < len(ids):
        count = min(len(ids) - done, 1 << 16)
        while count > 1 and count * lengths[order[done + count - 1]] > HASHED_BYTES:
            count //= 2
        rows = order[done : done + count]
        width = -(-int(lengths[rows].max()) // 4) * 4
        place = np.arange(width)
        inside = place < lengths[rows, None]
        index = np.where(inside, start[rows, None] + place, 0)
        data = np.where(inside, raw[index] if len(raw) else 0, 0).astype(np.uint8)
        out[rows] = _murmur3(np.ascontiguousarray(data), lengths[rows], seed)
        done += count
    return out


def _rotate(x: U32, bits: int) -> U32:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))


def _murmur3(data: npt.NDArray[np.uint8], lengths: I64, seed: int) -> U32:
    blocks = data.view("<u4").astype(np.uint32)
    h = np.full(len(data), seed, dtype=np.uint32)
    for i in range(blocks.shape[1]):
        k = _rotate(blocks[:, i] * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
        body = _rotate(h ^ k, 13) * np.uint32(5) + np.uint32(0xE6546B64)
        # The last one to three bytes are mixed in without the body's rotation; zero bytes of
        # padding contribute nothing to them.
        whole, tail = lengths >= 4 * (i + 1), (lengths > 4 * i) & (lengths < 4 * (i + 1))
        h = np.where(whole, body, np.where(tail, h ^ k, h))
    h ^= lengths.astype(np.uint32)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return np.asarray(h ^ (h >> np.uint32(16)), dtype=np.uint32)
