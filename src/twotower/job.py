"""A job: everything that one YAML says, from the log to the server.

It spans all rooms, so it stands above them, and it needs no torch: a serving host reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from twotower.data.inspect.config import InspectConfig
from twotower.data.schema import DataConfig
from twotower.errors import UserError
from twotower.export.config import ExportConfig
from twotower.serve.config import ServeConfig
from twotower.towers.config import ModelConfig
from twotower.train.config import EvaluateConfig, TrackingConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Job:
    """One retrieval model, from the log to the server."""

    name: str
    """Name of the model, also of its tracked runs."""
    run_dir: str
    """Folder that every step writes below."""
    data: DataConfig
    """The log and its features."""
    seed: int = 0
    """Of everything drawn at random."""
    inspect: InspectConfig = field(default_factory=InspectConfig)
    """What an inspection of the log remarks on."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the towers."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How the towers are trained."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """How the towers are judged."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """How a checkpoint becomes a bundle."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """How Triton serves the bundle."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where runs are tracked."""

    def validate(self) -> None:
        """Refuse settings that no run could satisfy.

        Raises:
            UserError: naming the key and the remedy.
        """
        for key, value in (("name", self.name), ("run_dir", self.run_dir)):
            if not value.strip():
                raise UserError(f"{key} must not be empty")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        for section in (
            self.data, self.inspect, self.model, self.train, self.evaluate, self.export,
            self.serve, self.tracking,
        ):  # fmt: skip
            section.validate()

    def path(self, name: str) -> Path:
        """Return a path below `run_dir`."""
        return Path(self.run_dir) / name
