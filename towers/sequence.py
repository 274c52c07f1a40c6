"""Encoders of a history, in which each entry's state knows what came before it.

`transformer` follows SASRec (Kang and McAuley 2018), with the norms before the blocks; `hstu`
follows Zhai et al. 2024: SiLU of the scores in place of their softmax, so that how much of
something there is counts too, gated by a projection of the entry itself.

Shape legend: `B` batch, `L` entries of a list, `T` entries that there are (or B x L), `D` embedding
width, `W` some width, `H` heads, `K` width of a head, `G` buckets of time gaps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.towers.config import EncoderConfig

# The first bucket is of gaps that are not known, the next below a second, each other to twice the
# one before: the last begins at 4 years.
GAP_BOUNDS = [2.0**i for i in range(28)]
# A step of Adam moves a parameter by its learning rate, whatever the gradient. As terms of scores,
# whose weights are powers of e, a thousand steps of 0.001 would make a difference hardly show: what
# is learned of places and of times is counted in units of this.
BIAS_UNIT = 30.0


class Lists:
    """A batch's lists, whose entries are computed side by side and meet in padded rows.

    On a CPU, the layers of an entry are computed only where there is one: of lists that fill a
    sixth of the window, a step takes two fifths of the time (benchmarks/encoders_cpu.py). A GPU
    would wait for the number of entries, and a graph cannot depend on it: they compute every place.

    Args:
        mask_BL: which entries there are; the others lie before, behind or between.
    """

    def __init__(self, mask_BL: Tensor) -> None:
        self.shape = mask_BL.shape
        self.index_T: Tensor | None = None
        if mask_BL.device.type == "cpu" and not torch.compiler.is_compiling():
            self.index_T = mask_BL.reshape(-1).nonzero().squeeze(1)
        place_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        # Who has nothing to see sees itself, since a softmax over nothing is NaN.
        itself_LL = place_L[:, None] == place_L[None, :]
        earlier_LL = place_L[:, None] >= place_L[None, :]
        self.sees_BLL = (mask_BL.unsqueeze(1) & earlier_LL) | itself_LL
        self.distance_LL = (place_L[:, None] - place_L[None, :]).clamp_min(0)

    def take(self, padded_BLW: Tensor) -> Tensor:
        """Return the entries (T, W)."""
        flat = padded_BLW.flatten(0, 1)
        return flat if self.index_T is None else flat.index_select(0, self.index_T)

    def place(self, entry_TW: Tensor) -> Tensor:
        """Return the entries in rows (B, L, W), zeros where there is none."""
        if self.index_T is not None:
            rows = entry_TW.new_zeros(self.shape.numel(), entry_TW.shape[1])
            entry_TW = rows.index_copy(0, self.index_T, entry_TW)
        return entry_TW.view(*self.shape, entry_TW.shape[1])

    def parts(self, entry_TW: Tensor, count: int, heads: int) -> list[Tensor]:
        """Split a projection into `count` parts of heads (B, H, L, K)."""
        b, length = self.shape
        split = self.place(entry_TW).view(b, length, count, heads, -1)
        return list(split.permute(2, 0, 3, 1, 4).unbind(0))


class TransformerBlock(nn.Module):
    """Softmax attention, then two layers at each entry, each added to what came in.

    Attention weights are not dropped, as no fused CPU attention can.

    Args:
        dim: of an entry.
        config: of the encoder.
    """

    def __init__(self, dim: int, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(dim)
        # The softmax takes a bias of the keys away, whose gradient would be rounding alone.
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.joined = nn.Linear(dim, dim)
        self.layers_norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(
            nn.Linear(dim, config.ffn_multiple * dim),
            nn.ReLU(),
            nn.Linear(config.ffn_multiple * dim, dim),
        )
        self.dropout = Dropout(config.dropout)

    def forward(self, x_TD: Tensor, lists: Lists, gap_BHLL: Tensor | None) -> Tensor:
        """Return the entries' next states (T, D)."""
        projected = self.query_key_value(self.attention_norm(x_TD))
        q_BHLK, k_BHLK, v_BHLK = lists.parts(projected, 3, self.heads)
        sees_BHLL = lists.sees_BLL.unsqueeze(1)
        if gap_BHLL is not None:
            sees_BHLL = gap_BHLL.masked_fill(~sees_BHLL, -torch.inf).to(q_BHLK.dtype)
        mixed_BHLK = _attend(q_BHLK, k_BHLK, v_BHLK, sees_BHLL)
        mixed_TD = lists.take(mixed_BHLK.transpose(1, 2).flatten(2))
        x_TD = x_TD + self.dropout(self.joined(mixed_TD))
        next_TD: Tensor = x_TD + self.dropout(self.layers(self.layers_norm(x_TD)))
        return next_TD


def _attend(q_BHLK: Tensor, k_BHLK: Tensor, v_BHLK: Tensor, mask_BHLL: Tensor) -> Tensor:
    """Return softmax attention (B, H, L, K) under a mask, or with terms added to its scores."""
    if not torch.compiler.is_exporting():
        return F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask_BHLL)
    # Of several heads with time gaps, torch 2.13 cannot decompose its operator for ONNX.
    score_BHLL = q_BHLK @ k_BHLK.transpose(-1, -2) * q_BHLK.shape[-1] ** -0.5
    if mask_BHLL.dtype == torch.bool:
        score_BHLL = score_BHLL.masked_fill(~mask_BHLL, -torch.inf)
    else:
        score_BHLL = score_BHLL + mask_BHLL
    return torch.softmax(score_BHLL, dim=-1) @ v_BHLK


class HstuBlock(nn.Module):
    """Attention by content and distance without a softmax, gated, added to what came in.

    Args:
        dim: of an entry.
        length: most entries of a list.
        config: of the encoder.
    """

    def __init__(self, dim: int, length: int, config: EncoderConfig) -> None:
        super().__init__()
        self.heads, self.length = config.heads, length
        self.entry_norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.distance_bias = nn.Parameter(torch.zeros(config.heads, length))
        # What is mixed is small, so that the default eps of 1e-5 would weigh against it.
        self.mixed_norm = nn.LayerNorm(dim, eps=1e-6)
        self.joined = nn.Linear(dim, dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_TD: Tensor, lists: Lists, gap_BHLL: Tensor | None) -> Tensor:
        """Return the entries' next states (T, D)."""
        normed_TD = self.entry_norm(x_TD)
        projected = F.silu(self.query_key_value(normed_TD))
        q_BHLK, k_BHLK, v_BHLK = lists.parts(projected, 3, self.heads)
        by_distance_HLL = BIAS_UNIT * self.distance_bias[:, lists.distance_LL]
        score_BHLL = q_BHLK @ k_BHLK.transpose(-1, -2) + by_distance_HLL
        if gap_BHLL is not None:
            score_BHLL = score_BHLL + gap_BHLL
        # Divided by the window, not by how many there are: whether they are many counts.
        weight_BHLL = F.silu(score_BHLL) * (lists.sees_BLL.unsqueeze(1) / self.length)
        mixed_TD = lists.take((weight_BHLL @ v_BHLK).transpose(1, 2).flatten(2))
        gated_TD = self.mixed_norm(mixed_TD) * F.silu(self.gate(normed_TD))
        next_TD: Tensor = x_TD + self.joined(self.dropout(gated_TD))
        return next_TD


class SequenceEncoder(nn.Module):
    """States of a history's entries, and the newest one's as the history's vector.

    Args:
        kind: transformer or hstu.
        dim: of an entry.
        length: most entries of a list.
        config: of the encoder.
        time_gaps: whether `encode` is given the entries' ages. How much an entry attends to an
            earlier one then has a term by the time between them, of each head of each layer: the
            bias of HSTU, and after TiSASRec (Li et al. 2020) of the Transformer.
    """

    def __init__(
        self, kind: str, dim: int, length: int, config: EncoderConfig, *, time_gaps: bool = False
    ) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gap_bias: nn.Parameter | None = None
        if time_gaps:
            terms = config.layers * config.heads
            self.gap_bias = nn.Parameter(torch.zeros(len(GAP_BOUNDS) + 2, terms))
            self.gap_bounds: Tensor
            self.register_buffer("gap_bounds", torch.tensor(GAP_BOUNDS), persistent=False)
        self.recency: nn.Parameter | None = None
        if kind == "transformer":
            self.recency = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, config) if kind == "transformer"
            else HstuBlock(dim, length, config)
            for _ in range(config.layers)
        )  # fmt: skip
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(dim)
        # States begin as long as embeddings, which the towers add them to.
        nn.init.constant_(self.norm.weight, 1 / self.scale)

    def encode(self, entry_BLD: Tensor, mask_BL: Tensor, age_BL: Tensor | None = None) -> Tensor:
        """Return the state of each entry (B, L, D), to which later entries contribute nothing.

        The Transformer counts places from the list's newest entry, as SASRec's padding does, so
        that the newest is always at the same one; HSTU knows distances alone.

        Args:
            entry_BLD: embeddings, oldest first; about of unit length.
            mask_BL: which of them there are; the others lie before, behind or between, and their
                states mean nothing.
            age_BL: seconds from each entry to the latest of its list, -1 where they are not known;
                of an encoder with time gaps.
        """
        lists = Lists(mask_BL)
        x_TD = lists.take(entry_BLD) * self.scale
        if self.recency is not None:
            newer_T = lists.take(newer_entries(mask_BL).unsqueeze(-1)).squeeze(-1)
            x_TD = x_TD + F.embedding(newer_T, self.recency)
        x_TD = self.dropout(x_TD)
        for block, gap_BHLL in zip(self.blocks, self._gap_terms(age_BL), strict=True):
            x_TD = block(x_TD, lists, gap_BHLL)
        return lists.place(self.norm(x_TD))

    def _gap_terms(self, age_BL: Tensor | None) -> list[Tensor | None]:
        """Return what each layer adds to its scores (B, H, L, L)."""
        layers = len(self.blocks)
        if self.gap_bias is None or age_BL is None:
            return [None] * layers
        terms_BLLG = F.embedding(
            gap_buckets(age_BL, self.gap_bounds), BIAS_UNIT * self.gap_bias
        )  # fmt: skip
        return list(terms_BLLG.permute(0, 3, 1, 2).chunk(layers, dim=1))

    def forward(self, entry_BLD: Tensor, mask_BL: Tensor, age_BL: Tensor | None = None) -> Tensor:
        """Return the newest entry's state (B, D), zeros for an empty list; see `encode`."""
        newest_BL = mask_BL & (newer_entries(mask_BL) == 0)
        state_BLD = self.encode(entry_BLD, mask_BL, age_BL)
        newest_BD: Tensor = (state_BLD * newest_BL.unsqueeze(-1)).sum(1)
        return newest_BD


def gap_buckets(age_BL: Tensor, bounds_G: Tensor) -> Tensor:
    """Return the bucket of the time from each entry back to each (B, L, L), int64.

    It is 0 where either time is not known, and otherwise 1 and how many bounds the time reaches.
    Comparisons alone, since two runtimes may round a logarithm to either side of a bound.

    Args:
        age_BL: seconds to the latest entry, -1 where it is not known.
        bounds_G: ascending, in seconds.
    """
    gap_BLL = age_BL.unsqueeze(1) - age_BL.unsqueeze(2)
    if torch.compiler.is_exporting():  # ONNX has no search
        reached_BLL = (gap_BLL.unsqueeze(-1) >= bounds_G).to(torch.int64).sum(-1)
    else:
        reached_BLL = torch.bucketize(gap_BLL, bounds_G, right=True)
    known_BL = age_BL >= 0
    return (reached_BLL + 1) * (known_BL.unsqueeze(1) & known_BL.unsqueeze(2))


def newer_entries(mask_BL: Tensor) -> Tensor:
    """Return how many entries are newer than each (B, L), int64; 0 where there is none."""
    newer_BL = mask_BL.to(torch.int64).flip(1).cumsum(1).flip(1) - 1
    return newer_BL.clamp_min(0)


class Dropout(nn.Dropout):
    """torch's, whose draws on a CPU take three times as long as these."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with a share `p` of its values dropped and the others grown, in training."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        keep = torch.rand(x.shape) >= self.p
        return x * (keep / (1 - self.p)).to(x.dtype)
