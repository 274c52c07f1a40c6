"""Which candidates do not count for a query, as bits: what `sampled_softmax` is told of them.

    bit j of word w of query b: candidate 32 w + j is an item that b's user had taken,
    or was first there after b's time

Candidates are sorted by id, so that those of one item are neighbours.

On a GPU a first kernel writes the words, from the times or as zeros, and a second one sets the
stretch of each pair of a query and an item. Bytes: the words, B N / 8, once; B x N of bytes would
be eight times as many, and their packing as often again. Among candidates in any order a pair has
as many places as its item: setting them one by one took an H200 42 ms at B = N = 65,536, and
looking each bit up in a sorted order 95, where the whole softmax takes 16. Stretches were not
measured there yet.

On a CPU the bits are a B x N of bytes before they are packed.

Shape legend: `B` queries, `N` candidates, `S` pairs of a query and an item that its user had taken,
`W` words of a query, at least N / 32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.launch import check_together, runs_triton

# Of a tile of words; pairs a program, and words that it sets at a time. Reasoned: 4 or 8 numbers a
# thread, and most stretches are of a word or two.
QUERIES, WORDS = 16, 64
PAIRS, STRETCH = 32, 8
LONG_AGO = -(2**63)


def packed(bits_BN: Tensor) -> Tensor:
    """Return bits as words (B, N / 32 rounded up), int32: bit j of word w is column 32 w + j."""
    b, n = bits_BN.shape
    bits_BW32 = F.pad(bits_BN, (0, -n % 32)).view(b, -1, 32)
    words_BW = bits_BW32.new_zeros(bits_BW32.shape[:2], dtype=torch.int32)
    for place in range(32):
        words_BW |= bits_BW32[:, :, place].int() << place
    return words_BW


def unpacked(words_BW: Tensor, n: int) -> Tensor:
    """Return the first `n` bits of words, bool (B, N)."""
    place = torch.arange(32, device=words_BW.device, dtype=torch.int32)
    return (words_BW[:, :, None] >> place & 1).bool().flatten(1)[:, :n]


@triton.jit
def _time_kernel(first, time, out, B, W, BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr):
    """Write a tile of words: which candidates were not there yet; their times lie as (32, W)."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    now = tl.load(time + row, mask=row < B, other=0)
    words = tl.zeros([BLOCK_B, BLOCK_W], tl.int32)
    for bit in range(32):
        there = tl.load(first + bit * W + word, mask=word < W, other=0)
        words |= (there[None, :] > now[:, None]).to(tl.int32) << bit
    place = row.to(tl.int64)[:, None] * W + word[None, :]
    tl.store(out + place, words, mask=(row < B)[:, None] & (word < W)[None, :])


@triton.jit
def _taken_kernel(
    query, low, high, out, S, W, BLOCK_S: tl.constexpr, STRETCH: tl.constexpr
):  # fmt: skip
    """Set the bits of a block of pairs, each from its lowest candidate up to its highest."""
    pair = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    owner = tl.load(query + pair, mask=pair < S, other=0)[:, None]
    begin = tl.load(low + pair, mask=pair < S, other=0)[:, None]
    end = tl.load(high + pair, mask=pair < S, other=0)[:, None]
    for step in range(0, tl.max((end + 31) // 32 - begin // 32), STRETCH):
        word = begin // 32 + step + tl.arange(0, STRETCH)[None, :]
        # Bits from the first to before the last; of 32 there are 33 borders.
        first = tl.maximum(begin - 32 * word, 0)
        last = tl.minimum(end - 32 * word, 32)
        one = tl.full([BLOCK_S, STRETCH], 1, tl.int64)
        bits = (one << tl.maximum(last, first)) - (one << first)
        tl.atomic_or(out + owner * W + word, bits.to(tl.int32), mask=first < last)


def exclusion_words(
    candidate_id_N: Tensor,
    queries: int,
    *,
    taken_query_S: Tensor | None = None,
    taken_id_S: Tensor | None = None,
    first_N: Tensor | None = None,
    time_B: Tensor | None = None,
) -> Tensor:
    """Return words (B, N / 32 rounded up), int32, of the candidates that do not count; see above.

    Nothing waits for a GPU. The same on any device, to the bit.

    Args:
        candidate_id_N: int64 ids of the candidates, sorted; of a GPU's, nothing checks it.
        queries: B.
        taken_query_S: int64 place of each pair's query, below B.
        taken_id_S: int64 id of each pair's item, which need not be among the candidates.
        first_N: int64 time at which each candidate first was there.
        time_B: int64 time of each query.

    Raises:
        ValueError: of either two that belong together, one is missing, or they differ in length;
            ids are not sorted.
    """
    n = len(candidate_id_N)
    check_together("taken_query", taken_query_S, "taken_id", taken_id_S)
    check_together("first", first_N, "time", time_B)
    for name, value, length in (
        ("taken_id", taken_id_S, 0 if taken_query_S is None else len(taken_query_S)),
        ("first", first_N, n), ("time", time_B, queries),
    ):  # fmt: skip
        if value is not None and len(value) != length:
            raise ValueError(f"{name} must have {length} values, got {len(value)}")
    if not candidate_id_N.is_cuda and (candidate_id_N.diff() < 0).any():
        raise ValueError("candidate_id must be sorted")
    taken_S = () if taken_id_S is None else tuple(
        torch.searchsorted(candidate_id_N, taken_id_S, right=right) for right in (False, True)
    )  # fmt: skip
    if not runs_triton(candidate_id_N.device):
        return packed(_bits(candidate_id_N, queries, taken_query_S, taken_S, first_N, time_B))
    words = -(-n // 32)
    shape, device = (queries, words), candidate_id_N.device
    if first_N is None:
        out_BW = torch.zeros(shape, dtype=torch.int32, device=device)
    else:
        out_BW = torch.empty(shape, dtype=torch.int32, device=device)
        first = F.pad(first_N, (0, -n % 32), value=LONG_AGO).view(-1, 32).T.contiguous()
        _time_kernel[(triton.cdiv(queries, QUERIES), triton.cdiv(words, WORDS))](
            first, time_B, out_BW, queries, words, BLOCK_B=QUERIES, BLOCK_W=WORDS
        )
    if taken_id_S is not None and len(taken_id_S):
        _taken_kernel[(triton.cdiv(len(taken_id_S), PAIRS),)](
            taken_query_S, *taken_S, out_BW, len(taken_id_S), words, BLOCK_S=PAIRS,
            STRETCH=STRETCH,
        )  # fmt: skip
    return out_BW


def _bits(
    candidate_id_N: Tensor, queries: int, query_S: Tensor | None, stretch_S: tuple[Tensor, ...],
    first_N: Tensor | None, time_B: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the bits (B, N) by times and by pairs, whose candidates lie between two places."""
    n = len(candidate_id_N)
    bits_BN = torch.zeros(queries, n + 1, dtype=torch.bool)
    if query_S is not None:
        low_S, high_S = stretch_S
        # A column more takes what is no candidate; others of an item share that of the first.
        bits_BN[query_S, low_S.where(high_S > low_S, n)] = True
        bits_BN = bits_BN[:, torch.searchsorted(candidate_id_N, candidate_id_N)]
    if first_N is not None and time_B is not None:
        bits_BN = bits_BN[:, :n] | (first_N > time_B[:, None])
    return bits_BN[:, :n]
