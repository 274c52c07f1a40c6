"""Settings of the two towers; free of torch, so that any host can read a job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from twotower.errors import UserError

INTERACTIONS = ("concat", "dot", "cross")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of what reads a history whose pooling is transformer or hstu."""

    layers: int = 2
    """Blocks that follow each other."""
    heads: int = 1
    """Parts of an embedding that attend separately; they divide model.dim."""
    ffn_multiple: int = 2
    """transformer: width of the hidden layer of a block, in widths of the embedding."""
    dropout: float = 0.2
    """Share of the entries' values, and of what each block adds, dropped in training."""

    def validate(self, dim: int) -> None:
        """Refuse shapes that no encoder of entries of width `dim` can have.

        Raises:
            UserError: naming the key.
        """
        for name in ("layers", "heads", "ffn_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"model.encoder.{name} must be >= 1, got {getattr(self, name)}")
        if dim % self.heads:
            raise UserError(
                f"model.encoder.heads must divide model.dim ({dim}), got {self.heads}: change one"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.encoder.dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of the two towers."""

    dim: int = 64
    """Width of the embeddings and of the vectors that the towers give."""
    hidden: list[int] = field(default_factory=lambda: [128])
    """Widths of the hidden layers of each tower."""
    interaction: str = "concat"
    """How features meet: concat, dot (DLRM's pairwise dots) or cross (DCN-v2's cross layers)."""
    cross_layers: int = 2
    """Cross layers before the hidden ones, where interaction is cross."""
    cross_rank: int = 32
    """Rank of their matrices; at most a tower's input width is used."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """What reads a history whose pooling is transformer or hstu."""
    dropout: float = 0.0
    """Share of the inputs of each tower's layers dropped in training."""
    layer_norm: bool = False
    """Normalise each hidden layer's values (Ba et al. 2016), which deeper towers may need."""
    residual: bool = True
    """Add the pooled embeddings to the last layer, which helps where the log is small."""
    widths: list[int] = field(default_factory=list)
    """Fewer coordinates that vectors may be cut to, each trained too (Kusupati et al. 2022)."""
    item_bias: bool = False
    """Leave the last coordinate of an item's vector to its popularity; a query's is 1 there."""
    temperature: float = 0.1
    """The softmax divides inner products by it."""
    learn_temperature: bool = False
    """Train the temperature too."""

    @property
    def direction_dim(self) -> int:
        """Width of the towers' vectors without the coordinate of an item bias."""
        return self.dim - int(self.item_bias)

    def validate(self) -> None:
        """Refuse sizes that no tower can have.

        Raises:
            UserError: naming the key.
        """
        for name, width in (("dim", self.dim), *(("hidden", h) for h in self.hidden)):
            if width < 1:
                raise UserError(f"model.{name} must be >= 1, got {width}")
        least = 1 + self.item_bias
        for name, width in (("dim", self.dim), *(("widths", w) for w in self.widths)):
            if width < least:
                raise UserError(
                    f"model.{name} must be >= {least} where model.item_bias takes a coordinate of "
                    f"it, got {width}"
                )
        if self.dim % 4:
            raise UserError(
                f"model.dim must be a multiple of 4, as FBGEMM's tables need, got {self.dim}"
            )
        if sorted({*self.widths, self.dim}) != [*self.widths, self.dim]:
            raise UserError(
                f"model.widths must rise and stay below model.dim ({self.dim}), got {self.widths}"
            )
        if self.interaction not in INTERACTIONS:
            raise UserError(
                f"model.interaction must be one of {', '.join(INTERACTIONS)}, got "
                f"'{self.interaction}'"
            )
        for name in ("cross_layers", "cross_rank"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} must be >= 1, got {getattr(self, name)}")
        self.encoder.validate(self.dim)
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout must be in [0, 1), got {self.dropout}")
        if self.temperature <= 0:
            raise UserError(f"model.temperature must be > 0, got {self.temperature}")


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """Rebuild a `ModelConfig` from its JSON form."""
    return ModelConfig(**(raw | {"encoder": EncoderConfig(**raw.get("encoder", {}))}))
