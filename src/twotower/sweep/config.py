"""Settings of a sweep; free of Optuna, so that any host can read a job."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from twotower.errors import UserError, one_of

SAMPLERS = ("tpe", "random")
PRUNERS = ("median", "none")


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """What one key is tried with: a range, or choices."""

    low: int | float | None = None
    """Lowest value of a range."""
    high: int | float | None = None
    """Highest value of a range, itself tried too; whole numbers alone where the key is one."""
    log: bool = False
    """Draw the logarithm evenly: of learning rates, for instance."""
    choices: list[Any] | None = None
    """Values without an order, instead of a range."""

    def validate(self, key: str) -> None:
        """Refuse what is no range and no choice.

        Args:
            key: of the job that it is for.

        Raises:
            UserError: naming the key.
        """
        here = f"sweep.space.{key}"
        if self.choices is not None:
            if (self.low, self.high, self.log) != (None, None, False):
                raise UserError(f"{here}: give choices, or low and high, not both")
            if len({json.dumps(value) for value in self.choices}) != len(self.choices):
                raise UserError(f"{here}.choices names a value twice: {self.choices}")
            if len(self.choices) < 2:
                raise UserError(f"{here}.choices must be at least two values, got {self.choices}")
            return
        if self.low is None or self.high is None:
            raise UserError(f"{here} must have low and high, or choices: {{low: 1, high: 8}}")
        if not self.low < self.high:
            raise UserError(f"{here}.low must be < high ({self.high}), got {self.low}")
        if self.log and self.low <= 0:
            raise UserError(f"{here}.low must be > 0 where log is true, got {self.low}")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """How `twotower sweep` searches the settings that validate best, by evaluate.monitor."""

    space: dict[str, Dimension] = field(default_factory=dict)
    """Dotted key of model or train -> {low, high, log}, or {choices: [...]}."""
    trials: int = 20
    """Trainings, at most; a finished sweep goes on when it is raised."""
    seed: int = 0
    """Of what the sampler draws; every trial trains with the job's own seed."""
    sampler: str = "tpe"
    """tpe (Bayesian, by what earlier trials reached) or random."""
    pruner: str = "median"
    """median (end a trial below the median of the earlier ones at the same epoch) or none."""
    timeout_s: float | None = None
    """Seconds after which no further trial begins, a command; no limit by default."""

    def validate(self) -> None:
        """Refuse what no sweep can do; what a job can be set to, `check_space` says.

        Raises:
            UserError: naming the key.
        """
        if self.trials < 1:
            raise UserError(f"sweep.trials must be >= 1, got {self.trials}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"sweep.seed must be from 0 to {2**32 - 1}, got {self.seed}")
        one_of("sweep.sampler", self.sampler, SAMPLERS)
        one_of("sweep.pruner", self.pruner, PRUNERS)
        if self.timeout_s is not None and self.timeout_s <= 0:
            raise UserError(f"sweep.timeout_s must be > 0, got {self.timeout_s}")
        for key, dimension in self.space.items():
            dimension.validate(key)
