"""How a tower's features meet before its layers: DLRM's pairwise dots, DCN-v2's crosses.

Both call a fused operator. An exported graph may hold none, so while a tower is exported the
operator's reference, plain tensor functions, stands for it; `tests/export` compares the two.

Shape legend: `B` batch, `F` features, `D` embedding width, `W` width of the concatenated inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from twotower.data.schema import ID_KINDS, Feature
from twotower.kernels.dot_interaction import (
    dot_interaction,
    dot_interaction_reference,
    output_width,
)
from twotower.kernels.low_rank_cross import low_rank_cross, low_rank_cross_reference


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of what meets a weight in a product: autocast's, where it is on."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class DotInteraction(nn.Module):
    """Dots of all pairs of a tower's embeddings, its numbers being projected to one of them.

    Numbers and vectors make the dense vector through one linear layer; where a tower has none, a
    learned vector takes its place (Naumov et al. 2019).

    Args:
        features: of the tower.
        dim: width of the embeddings.
        dense_width: numbers that the features which are no embeddings hold.
    """

    def __init__(self, features: Sequence[Feature], dim: int, dense_width: int) -> None:
        super().__init__()
        self.embedded = [f.name for f in features if f.kind in ID_KINDS]
        self.dense = [f.name for f in features if f.kind not in ID_KINDS]
        if self.dense:
            self.projection = nn.Linear(dense_width, dim)
        else:
            # Of unit length, as the tables' rows are.
            self.vector = nn.Parameter(torch.empty(dim).uniform_(-1, 1) * (3 / dim) ** 0.5)
        self.width = output_width(1 + len(self.embedded), dim)

    def forward(self, inputs: Mapping[str, Tensor], concatenated_BW: Tensor) -> Tensor:
        """Return the inputs, the dense vector and the dots, side by side.

        Args:
            inputs: feature name -> (B, D) pooled embedding, or numbers.
            concatenated_BW: the same, side by side.
        """
        if self.dense:
            dense_BD = self.projection(torch.cat([inputs[name] for name in self.dense], dim=-1))
        else:
            dense_BD = self.vector.expand(concatenated_BW.shape[0], -1)
        feature_BFD = torch.stack([dense_BD, *(inputs[name] for name in self.embedded)], dim=1)
        feature_BFD = feature_BFD.to(
            _product_dtype(self.projection.weight if self.dense else self.vector)
        )
        dot = dot_interaction_reference if torch.compiler.is_exporting() else dot_interaction
        return torch.cat([concatenated_BW, dot(feature_BFD)], dim=-1)


class CrossInteraction(nn.Module):
    """Low-rank cross layers over the concatenated inputs (Wang et al. 2021).

    Args:
        width: of the inputs.
        layers: that follow each other.
        rank: of their matrices; a narrower input makes it its width.
    """

    def __init__(self, width: int, layers: int, rank: int) -> None:
        super().__init__()
        rank = min(rank, width)
        self.width = width
        # As in DCN-v2: a layer begins near the identity. Glorot and Bengio 2010, a matrix a layer.
        deviation = (2 / (width + rank)) ** 0.5
        self.u = nn.Parameter(torch.randn(layers, width, rank) * deviation)
        self.v = nn.Parameter(torch.randn(layers, rank, width) * deviation)
        self.bias = nn.Parameter(torch.zeros(layers, width))

    def forward(self, inputs: Mapping[str, Tensor], concatenated_BW: Tensor) -> Tensor:
        """Return the crossed inputs (B, W); see `DotInteraction.forward`."""
        cross = low_rank_cross_reference if torch.compiler.is_exporting() else low_rank_cross
        dtype = _product_dtype(self.u)
        return cross(*(t.to(dtype) for t in (concatenated_BW, self.u, self.v, self.bias)))
