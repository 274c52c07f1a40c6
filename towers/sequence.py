"""Encoders of a history, in which each entry's state knows what came before it.

`transformer` follows SASRec (Kang and McAuley 2018), with the norms before the blocks; `hstu`
follows Zhai et al. 2024: SiLU of the scores in place of their softmax, so that how much of
something there is counts too, gated by a projection of the entry itself.

Shape legend: `B` batch, `L` entries of a list, `D` embedding width, `H` heads, `K` width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.towers.config import EncoderConfig


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
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.joined = nn.Linear(dim, dim)
        self.layers_norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(
            nn.Linear(dim, config.ffn_multiple * dim),
            nn.ReLU(),
            nn.Linear(config.ffn_multiple * dim, dim),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, sees_BLL: Tensor) -> Tensor:
        """Return the entries' next states (B, L, D); see `SequenceEncoder.encode`."""
        parts = self.query_key_value(self.attention_norm(x_BLD)).chunk(3, dim=-1)
        q_BHLK, k_BHLK, v_BHLK = (_heads(part, self.heads) for part in parts)
        mixed_BHLK = F.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLK, attn_mask=sees_BLL.unsqueeze(1)
        )
        x_BLD = x_BLD + self.dropout(self.joined(mixed_BHLK.transpose(1, 2).flatten(2)))
        next_BLD: Tensor = x_BLD + self.dropout(self.layers(self.layers_norm(x_BLD)))
        return next_BLD


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
        self.gate_query_key_value = nn.Linear(dim, 4 * dim)
        self.distance_bias = nn.Parameter(torch.zeros(config.heads, length))
        # What is mixed is small, so that the default eps of 1e-5 would weigh against it.
        self.mixed_norm = nn.LayerNorm(dim, eps=1e-6)
        self.joined = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor, sees_BLL: Tensor) -> Tensor:
        """Return the entries' next states (B, L, D); see `SequenceEncoder.encode`."""
        parts = F.silu(self.gate_query_key_value(self.entry_norm(x_BLD))).chunk(4, dim=-1)
        q_BHLK, k_BHLK, v_BHLK = (_heads(part, self.heads) for part in parts[1:])
        place_L = torch.arange(x_BLD.shape[1], device=x_BLD.device)
        distance_LL = (place_L[:, None] - place_L[None, :]).clamp_min(0)
        score_BHLL = q_BHLK @ k_BHLK.transpose(-1, -2) + self.distance_bias[:, distance_LL]
        # Divided by the window, not by how many there are: whether they are many counts.
        weight_BHLL = F.silu(score_BHLL) * (sees_BLL.unsqueeze(1) / self.length)
        mixed_BLD = (weight_BHLL @ v_BHLK).transpose(1, 2).flatten(2)
        gated_BLD = self.mixed_norm(mixed_BLD) * parts[0]
        next_BLD: Tensor = x_BLD + self.joined(self.dropout(gated_BLD))
        return next_BLD


class SequenceEncoder(nn.Module):
    """States of a history's entries, and the newest one's as the history's vector.

    Args:
        kind: transformer or hstu.
        dim: of an entry.
        length: most entries of a list.
        config: of the encoder.
    """

    def __init__(self, kind: str, dim: int, length: int, config: EncoderConfig) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.recency: nn.Parameter | None = None
        if kind == "transformer":
            self.recency = nn.Parameter(0.02 * torch.randn(length, dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, config) if kind == "transformer"
            else HstuBlock(dim, length, config)
            for _ in range(config.layers)
        )  # fmt: skip
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(dim)
        # States begin as long as embeddings, which the towers add them to.
        nn.init.constant_(self.norm.weight, 1 / self.scale)

    def encode(self, entry_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the state of each entry (B, L, D), to which later entries contribute nothing.

        The Transformer counts places from the list's newest entry, as SASRec's padding does, so
        that the newest is always at the same one; HSTU knows distances alone.

        Args:
            entry_BLD: embeddings, oldest first; about of unit length.
            mask_BL: which of them there are; the others lie before, behind or between, and their
                states mean nothing.
        """
        x_BLD = entry_BLD * self.scale
        if self.recency is not None:
            x_BLD = x_BLD + self.recency[newer_entries(mask_BL)]
        place_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        # Who has nothing to see sees itself, since a softmax over nothing is NaN.
        itself_LL = place_L[:, None] == place_L[None, :]
        earlier_LL = place_L[:, None] >= place_L[None, :]
        sees_BLL = (mask_BL.unsqueeze(1) & earlier_LL) | itself_LL
        x_BLD = self.dropout(x_BLD)
        for block in self.blocks:
            x_BLD = block(x_BLD, sees_BLL)
        state_BLD: Tensor = self.norm(x_BLD)
        return state_BLD

    def forward(self, entry_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the newest entry's state (B, D), zeros for an empty list; see `encode`."""
        newest_BL = mask_BL & (newer_entries(mask_BL) == 0)
        newest_BD: Tensor = (self.encode(entry_BLD, mask_BL) * newest_BL.unsqueeze(-1)).sum(1)
        return newest_BD


def newer_entries(mask_BL: Tensor) -> Tensor:
    """Return how many entries are newer than each (B, L), int64; 0 where there is none."""
    newer_BL = mask_BL.to(torch.int64).flip(1).cumsum(1).flip(1) - 1
    return newer_BL.clamp_min(0)


def _heads(x_BLD: Tensor, heads: int) -> Tensor:
    b, length, dim = x_BLD.shape
    return x_BLD.view(b, length, heads, dim // heads).transpose(1, 2)
