"""Settings of the loss; free of torch, so that any host can read a job."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import UserError, one_of

LOSSES = ("softmax", "bilateral", "bce")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What training lowers; every kind divides inner products by `model.temperature`."""

    kind: str = "softmax"
    """softmax; bilateral (a temperature of its own for positives); or bce (calibrated, gSASRec)."""
    label_smoothing: float = 0.0
    """softmax: share of the target spread over all candidates."""
    positive_temperature: float | None = None
    """bilateral: divides the positives' inner products; model.temperature by default."""
    calibration: float = 0.75
    """bce: 0 trusts scores as they are sampled, 1 makes them probabilities of the catalogue."""

    def validate(self) -> None:
        """Refuse what no loss of the kind has.

        Raises:
            UserError: naming the key.
        """
        one_of("train.loss.kind", self.kind, LOSSES)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"train.loss.label_smoothing must be in [0, 1), got {self.label_smoothing:g}"
            )
        if not 0 <= self.calibration <= 1:
            raise UserError(f"train.loss.calibration must be in [0, 1], got {self.calibration:g}")
        if self.positive_temperature is not None and self.positive_temperature <= 0:
            raise UserError(
                f"train.loss.positive_temperature must be > 0, got {self.positive_temperature:g}"
            )
        for name, kind in (
            ("label_smoothing", "softmax"), ("positive_temperature", "bilateral"),
            ("calibration", "bce"),
        ):  # fmt: skip
            if self.kind != kind and getattr(self, name) != getattr(LossConfig(), name):
                raise UserError(
                    f"train.loss.{name} is of the loss {kind}, and train.loss.kind is {self.kind}: "
                    "remove it, or change the kind"
                )
