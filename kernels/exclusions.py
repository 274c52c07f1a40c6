"""Which candidates do not count for a query, as bits: what `sampled_softmax` is told of them.

    bit j of word w of query b: candidate 32 w + j is an item that b's user had taken,
    or was first there after b's time

On a GPU a first kernel marks each pair of a query and an item in words by the order of ids, where
the candidates of one item share a bit; a second one looks up the candidates' bits there, compares
times, and writes the words. Bytes: twice the words, B N / 8 each; B x N of bytes would be eight
times as many, and their packing as often again.

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

from twotower.kernels.launch import pointer, runs_triton

# Of a tile of words, and pairs a program.
QUERIES, WORDS, PAIRS = 16, 64, 256
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
def _mark_kernel(query, place, out, S, W, BLOCK_S: tl.constexpr):
    """Set the bits of a block of pairs; an item that is no candidate has place -1."""
    pair = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    owner = tl.load(query + pair, mask=pair < S, other=0)
    at = tl.load(place + pair, mask=pair < S, other=-1)
    tl.atomic_or(out + owner * W + at // 32, 1 << (at % 32).to(tl.int32), mask=at >= 0)


@triton.jit
def _words_kernel(
    marked, place, first, time, out, B, W,
    BLOCK_B: tl.constexpr, BLOCK_W: tl.constexpr, HAS_TAKEN: tl.constexpr, HAS_TIME: tl.constexpr,
):  # fmt: skip
    """Write a tile of words. Of candidates, bit j of all words lies side by side: (32, W)."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    word = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (row < B)[:, None] & (word < W)[None, :]
    words = tl.zeros([BLOCK_B, BLOCK_W], tl.int32)
    of_row = row.to(tl.int64)[:, None] * W
    now = row.to(tl.int64)
    if HAS_TIME:
        now = tl.load(time + row, mask=row < B, other=0)
    for bit in range(32):
        if HAS_TAKEN:
            at = tl.load(place + bit * W + word, mask=word < W, other=0)[None, :]
            taken = tl.load(marked + of_row + at // 32, mask=inside, other=0)
            words |= ((taken >> (at % 32)) & 1) << bit
        if HAS_TIME:
            there = tl.load(first + bit * W + word, mask=word < W, other=0)
            words |= (there[None, :] > now[:, None]).to(tl.int32) << bit
    tl.store(out + of_row + word[None, :], words, mask=inside)


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
        candidate_id_N: int64 ids of the candidates.
        queries: B.
        taken_query_S: int64 place of each pair's query, below B.
        taken_id_S: int64 id of each pair's item, which need not be among the candidates.
        first_N: int64 time at which each candidate first was there.
        time_B: int64 time of each query.

    Raises:
        ValueError: of either two that belong together, one is missing, or they differ in length.
    """
    n = len(candidate_id_N)
    for left, one, right, other in (
        ("taken_query", taken_query_S, "taken_id", taken_id_S), ("first", first_N, "time", time_B)
    ):  # fmt: skip
        if (one is None) != (other is None):
            raise ValueError(f"{left} and {right} belong together, got one of them")
    for name, value, length in (
        ("taken_id", taken_id_S, 0 if taken_query_S is None else len(taken_query_S)),
        ("first", first_N, n), ("time", time_B, queries),
    ):  # fmt: skip
        if value is not None and len(value) != length:
            raise ValueError(f"{name} must have {length} values, got {len(value)}")
    ordered_N = candidate_id_N.sort().values
    place_S = None
    if taken_id_S is not None:
        place_S = torch.searchsorted(ordered_N, taken_id_S)
        found_S = ordered_N[place_S.clamp_max(n - 1)] == taken_id_S
        place_S = place_S.where(found_S, -1)
    # Candidates of one item share the place of the first.
    place_N = torch.searchsorted(ordered_N, candidate_id_N)
    if not runs_triton(candidate_id_N.device):
        bits_BN = torch.zeros(queries, n + 1, dtype=torch.bool)
        if taken_query_S is not None and place_S is not None:
            bits_BN[taken_query_S, place_S] = True  # a column more takes what is no candidate
            bits_BN = bits_BN[:, place_N]
        if first_N is not None and time_B is not None:
            bits_BN = bits_BN[:, :n] | (first_N > time_B[:, None])
        return packed(bits_BN[:, :n])
    words = -(-n // 32)
    out_BW = torch.empty(queries, words, dtype=torch.int32, device=candidate_id_N.device)
    marked_BW = out_BW
    if taken_query_S is not None and place_S is not None:
        marked_BW = torch.zeros_like(out_BW)
        if len(place_S):
            _mark_kernel[(triton.cdiv(len(place_S), PAIRS),)](
                taken_query_S, place_S, marked_BW, len(place_S), words, BLOCK_S=PAIRS
            )
    # Beyond the last candidate lies a place that no pair marks.
    _words_kernel[(triton.cdiv(queries, QUERIES), triton.cdiv(words, WORDS))](
        marked_BW, _by_bit(place_N.int(), n), _by_bit(pointer(first_N, place_N), LONG_AGO),
        pointer(time_B, place_N), out_BW, queries, words, BLOCK_B=QUERIES, BLOCK_W=WORDS,
        HAS_TAKEN=place_S is not None, HAS_TIME=first_N is not None,
    )  # fmt: skip
    return out_BW


def _by_bit(value_N: Tensor, other: int) -> Tensor:
    """Return candidates' values as (32, W): bit j of word w is row j, column w."""
    return F.pad(value_N, (0, -len(value_N) % 32), value=other).view(-1, 32).T.contiguous()
