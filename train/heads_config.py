"""Settings of a head; free of torch, so that any host can read a job."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import UserError, one_of

HEADS = ("binary", "regression")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head predicts of an event, from the vectors of its query and its item."""

    column: str
    """One of data.columns.outcomes; events for which it is null do not count."""
    kind: str = "binary"
    """binary (0 or 1: cross entropy), or regression (a number >= 0, such as watch time: Huber loss
    of log(1 + x), in standard deviations of the training events)."""
    weight: float = 0.1
    """Factor of its loss, which is added to that of retrieval."""

    def validate(self, key: str) -> None:
        """Refuse what no head can be.

        Args:
            key: of this head in the YAML.

        Raises:
            UserError: naming the key.
        """
        one_of(f"{key}.kind", self.kind, HEADS)
        if not self.weight >= 0:
            raise UserError(f"{key}.weight must be >= 0, got {self.weight:g}")
