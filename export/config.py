"""Settings of the export; free of torch, so that any host can read a job."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """How a checkpoint becomes a bundle."""

    tolerance: float = 1e-4
    """Largest difference of a score between eager PyTorch and ONNX Runtime; beyond, no bundle."""
    golden_queries: int = 200
    """Most queries kept in the bundle with their answers; every server must answer them."""
    golden_k: int = 10
    """Answers a golden query."""

    def validate(self) -> None:
        """Refuse a gate that cannot close.

        Raises:
            UserError: naming the key.
        """
        if self.tolerance <= 0:
            raise UserError(f"export.tolerance must be > 0, got {self.tolerance}")
        for name in ("golden_queries", "golden_k"):
            if getattr(self, name) < 1:
                raise UserError(f"export.{name} must be >= 1, got {getattr(self, name)}")
