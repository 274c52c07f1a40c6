"""One tower: embedded features in, a vector of unit length out.

The query and the item tower are this class with other features. It sees embeddings, not ids, so
training (TorchRec lookups) and the exported graph (plain gathers) run the same code.

Shape legend: `B` batch, `L` entries of a list, `D` embedding width, `W` width of a dense feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower.data.encode import SPANS
from twotower.data.schema import ENCODERS, ID_KINDS, Feature
from twotower.towers.config import ModelConfig
from twotower.towers.interaction import CrossInteraction, DotInteraction
from twotower.towers.sequence import BIAS_UNIT, SequenceEncoder, newer_entries

# As `BIAS_UNIT`, which would make the weights of spans too restless.
SPAN_UNIT = 10.0


class AttentionPool(nn.Module):
    """Weighted mean of a list, by content and by place from its newest entry."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.zeros(dim))
        self.recency = nn.Parameter(torch.zeros(length))

    def forward(self, entry_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return (B, D); an empty list gives zeros."""
        keep_BL = mask_BL.to(entry_BLD.dtype)
        logits_BL = entry_BLD @ self.content + BIAS_UNIT * self.recency[newer_entries(mask_BL)]
        logits_BL = logits_BL + (keep_BL - 1) * 1e4
        weight_BL = torch.softmax(logits_BL, dim=1) * keep_BL
        return (entry_BLD * weight_BL.unsqueeze(-1)).sum(1)

    def encode(self, entry_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """Return of each entry (B, L, D) what `forward` gives for it and those before it.

        Args:
            entry_BLD: embeddings, oldest first.
            mask_BL: which of them there are: those of a list lie side by side. What is returned of
                the others means nothing.
        """
        place_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        newer_LL = place_L[:, None] - place_L
        recency_LL = BIAS_UNIT * self.recency[newer_LL.clamp_min(0)]
        logits_BLL = (entry_BLD @ self.content).unsqueeze(1) + recency_LL
        read_BLL = mask_BL.unsqueeze(1) & (newer_LL >= 0)
        weight_BLL = torch.softmax(logits_BLL.masked_fill(~read_BLL, -1e4), dim=2)
        return weight_BLL @ entry_BLD


class TimedSum(nn.Module):
    """Sum of a history whose entries count by when they were taken.

    What was taken long ago may no longer tell what a user likes, and a plain sum cannot see when it
    was. Here each span of the training period (`twotower.data.encode.find_span_starts`) has a
    weight, after the time bins of timeSVD++ (Koren 2009, "Collaborative filtering with temporal
    dynamics"), and so has each place from the newest entry; an entry counts by their product.
    All begin at 1, as a plain sum.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.of_span = nn.Parameter(torch.zeros(SPANS))
        self.recency = nn.Parameter(torch.zeros(length))

    def forward(self, entry_BLD: Tensor, mask_BL: Tensor, span_BL: Tensor) -> Tensor:
        """Return (B, D); an empty list gives zeros.

        Args:
            entry_BLD: embeddings, oldest first.
            mask_BL: which of them there are.
            span_BL: of each entry, see `twotower.data.encode.entry_spans`; any of padding.
        """
        recency_BL = BIAS_UNIT * self.recency[newer_entries(mask_BL)]
        weight_BL = torch.exp(recency_BL) * self._of_span(mask_BL, span_BL)
        return (entry_BLD * weight_BL.unsqueeze(-1)).sum(1)

    def encode(self, entry_BLD: Tensor, mask_BL: Tensor, span_BL: Tensor) -> Tensor:
        """Return of each entry (B, L, D) what `forward` gives for it and those before it.

        Args:
            entry_BLD: embeddings, oldest first.
            mask_BL: which of them there are: those of a list lie side by side. What is returned of
                the others means nothing.
            span_BL: of each entry.
        """
        place_L = torch.arange(mask_BL.shape[1], device=mask_BL.device)
        newer_LL = place_L[:, None] - place_L
        weight_LL = torch.exp(BIAS_UNIT * self.recency[newer_LL.clamp_min(0)]) * (newer_LL >= 0)
        return weight_LL @ (entry_BLD * self._of_span(mask_BL, span_BL).unsqueeze(-1))

    def _of_span(self, mask_BL: Tensor, span_BL: Tensor) -> Tensor:
        """Return what each entry counts by its span, nothing where there is none."""
        place_BL = span_BL.to(torch.int64).clamp_min(0)
        return torch.exp(SPAN_UNIT * self.of_span[place_BL]) * mask_BL


class EntryFeatures(nn.Module):
    """What the catalogue knows of a history's entries, as one vector each.

    The embeddings that the item tower pools are joined and mapped to the width of an entry, which
    the vector is added to (the fusion of side features before attention that is common since Hidasi
    et al. 2016, "Parallel recurrent neural network architectures"). Without a bias: of an item that
    is not known, or has no features, nothing is added.

    Args:
        features: of the item tower, in order.
        dim: width of an embedding, and of the vectors.
    """

    def __init__(self, features: Sequence[Feature], dim: int) -> None:
        super().__init__()
        self.features = list(features)
        self.joined = nn.Linear(sum(input_width(f, dim) for f in features), dim, bias=False)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the vectors (N, D) of items whose inputs of the item tower they are."""
        vector_ND: Tensor = self.joined(torch.cat([inputs[f.name] for f in self.features], dim=-1))
        return vector_ND


def input_width(feature: Feature, dim: int) -> int:
    """Return how wide a feature is where it enters a tower."""
    if feature.kind in ID_KINDS:
        return dim
    return 1 if feature.kind == "number" else feature.width or 0


def cut(vector_BD: Tensor, width: int, item_bias: bool) -> Tensor:
    """Return vectors of fewer coordinates (B, width), as valid as the whole ones.

    Args:
        vector_BD: of a tower, whose `model.widths` has the width.
        width: coordinates that are kept; the last of them is that of the item's bias, if any.
        item_bias: whether the vectors have it.
    """
    if width == vector_BD.shape[1]:
        return vector_BD
    if not item_bias:
        return F.normalize(vector_BD[:, :width], dim=-1)
    direction = F.normalize(vector_BD[:, : width - 1], dim=-1)
    return torch.cat([direction, vector_BD[:, -1:]], dim=-1)


class Tower(nn.Module):
    """Pools one side's features, lets them meet and transforms them.

    Args:
        features: of this tower.
        config: of the model.
        is_item: whether its vectors are those of items.
    """

    def __init__(
        self, features: Sequence[Feature], config: ModelConfig, *, is_item: bool = False
    ) -> None:
        super().__init__()
        self.features = list(features)
        self.is_item, self.item_bias = is_item, config.item_bias
        self.residual = config.residual
        self.pools = nn.ModuleDict()
        for f in features:
            if f.pooling in ENCODERS:
                pool: nn.Module = SequenceEncoder(
                    f.pooling, config.dim, f.length, config.encoder, time_gaps=f.time_gaps
                )
            elif f.pooling == "timed_sum":
                pool = TimedSum(f.length)
            elif f.pooling == "attention" and f.kind != "id":
                pool = AttentionPool(config.dim, f.length)
            else:
                continue
            # torch refuses modules named like its own attributes, hence the prefix.
            self.pools[f"pool_{f.name}"] = pool
        dense_width = sum(input_width(f, config.dim) for f in features if f.kind not in ID_KINDS)
        width = sum(input_width(f, config.dim) for f in features)
        self.interaction: DotInteraction | CrossInteraction | None = None
        if config.interaction == "dot":
            self.interaction = DotInteraction(features, config.dim, dense_width)
            width += self.interaction.width
        elif config.interaction == "cross":
            self.interaction = CrossInteraction(width, config.cross_layers, config.cross_rank)
        layers: list[nn.Module] = []
        for hidden in config.hidden:
            layers.append(nn.Linear(width, hidden))
            if config.layer_norm:
                layers.append(nn.LayerNorm(hidden))
            layers.append(nn.SiLU())
            width = hidden
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.Sequential(*layers, nn.Linear(width, config.dim))

    def pool(
        self, feature: Feature, entry_BLD: Tensor, mask_BL: Tensor, time_BL: Tensor | None = None
    ) -> Tensor:
        """Pool padded entries; see `pool_sum` for entries that are summed already.

        Args:
            feature: whose entries they are.
            entry_BLD: embeddings, of a history oldest first.
            mask_BL: which of them there are.
            time_BL: of a history that has times, see `twotower.data.encode.Encoder.entry_times`.
        """
        if (name := f"pool_{feature.name}") in self.pools:
            times = [time_BL] if feature.has_times else []
            pooled: Tensor = self.pools[name](entry_BLD, mask_BL, *times)
            return pooled
        sum_BD = (entry_BLD * mask_BL.unsqueeze(-1)).sum(1)
        return self.pool_sum(feature, sum_BD, mask_BL.sum(1))

    def states(
        self, feature: Feature, entry_BLD: Tensor, mask_BL: Tensor, time_BL: Tensor | None
    ) -> Tensor:
        """Return the state of every entry (B, L, D) of a history, from it and those before."""
        encoder: Any = self.pools[f"pool_{feature.name}"]
        times = [time_BL] if feature.has_times else []
        state_BLD: Tensor = encoder.encode(entry_BLD, mask_BL, *times)
        return state_BLD

    @staticmethod
    def pool_sum(feature: Feature, sum_BD: Tensor, length_B: Tensor) -> Tensor:
        """Finish the pooling of a feature whose entries were summed."""
        if feature.kind == "id" or feature.pooling == "sum":
            return sum_BD
        return sum_BD / length_B.clamp_min(1).unsqueeze(-1).to(sum_BD.dtype)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return (B, D) vectors of unit length, but for the coordinate of the item's bias.

        Args:
            inputs: feature name -> (B, D) pooled embedding, or (B, W) numbers.
        """
        x = torch.cat([inputs[f.name] for f in self.features], dim=-1)
        if self.interaction is not None:
            x = self.interaction(inputs, x)
        vector_BD = self.layers(self.dropout(x))
        if self.residual:
            for f in self.features:
                if f.kind in ID_KINDS:
                    vector_BD = vector_BD + inputs[f.name]
        if not self.item_bias:
            return F.normalize(vector_BD, dim=-1)
        bias_B1 = vector_BD[:, -1:]
        if not self.is_item:
            bias_B1 = torch.ones_like(bias_B1)
        return torch.cat([F.normalize(vector_BD[:, :-1], dim=-1), bias_B1], dim=-1)
