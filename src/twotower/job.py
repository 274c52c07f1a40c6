"""A job: everything that one YAML says, from the log to the server.

It spans all rooms, so it stands above them, and it needs no torch: a serving host reads it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from twotower.data.inspect.config import InspectConfig
from twotower.data.schema import DataConfig, is_own_id
from twotower.errors import UserError, did_you_mean
from twotower.export.config import ExportConfig
from twotower.files import partial_path
from twotower.serve.config import ServeConfig
from twotower.serve.gateway.config import GatewayConfig
from twotower.sweep.config import SweepConfig
from twotower.sweep.space import check_space
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
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    """How callers without a Triton client are answered."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where runs are tracked."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """How the best settings are searched."""

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
            self.data, self.inspect, self.model, self.train, self.evaluate, self.serve,
            self.gateway, self.tracking, self.sweep,
        ):  # fmt: skip
            section.validate()
        for name, head in self.train.heads.items():
            if head.column not in (known := self.data.columns.outcomes):
                raise UserError(
                    f"train.heads.{name}.column: '{head.column}' is none of data.columns.outcomes, "
                    f"which are kept with the events{did_you_mean(head.column, known)}: name it "
                    "there too"
                )
        own = any(is_own_id(self.data, "item", f) for f in self.data.item)
        if self.train.item_l2 and not own:
            raise UserError(
                "train.item_l2: no feature of data.item is the item's own id: set it to 0"
            )
        self.export.validate([*self.model.widths, self.model.dim])
        check_space(self)

    def path(self, name: str) -> Path:
        """Return a path below `run_dir`."""
        return Path(self.run_dir) / name


def write_job(job: Job, path: Path, keys: Iterable[str], header: str) -> None:
    """Write a job as YAML, atomically: what differs from the defaults, and some keys in any case.

    Args:
        job: the job.
        path: of the YAML.
        keys: dotted, that are written though they have their default.
        header: text of the comment above.
    """
    content = _differing(job)
    for key in keys:
        inner, value, (*sections, name) = content, job, key.split(".")
        for section in sections:
            inner, value = inner.setdefault(section, {}), getattr(value, section)
        inner[name] = getattr(value, name)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in header.splitlines())
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    partial = partial_path(path)
    partial.write_text(comment + text)
    partial.replace(path)


def _differing(value: Any) -> Any:
    """Return a configuration as JSON-like values, without fields that have their default."""
    if isinstance(value, list):
        return [_differing(each) for each in value]
    if isinstance(value, dict):
        return {key: _differing(each) for key, each in value.items()}
    if not is_dataclass(value):
        return value
    out = {}
    for f in fields(value):
        own = getattr(value, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if own != default:
            out[f.name] = _differing(own)
    return out
