"""What `twotower inspect` remarks on: the `inspect:` section of a job."""

from __future__ import annotations

from dataclasses import dataclass, fields

from twotower.errors import UserError


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Limits past which something is remarked on, or, with --against, stops a pipeline."""

    max_gain: float = 0.15
    """Share of the item's bits that a query feature may tell before it is a suspected leak."""
    max_in_list: float = 0.2
    """Share of first-time events whose item may stand in the list of earlier items."""
    max_duplicates: float = 0.01
    """Share of events that may repeat user, item and time of another."""
    max_missing: float = 0.5
    """Share of a feature's rows that may have no value."""
    max_unseen_users: float = 0.5
    """Share of events (of test, or of a new log) whose user training never saw."""
    max_unseen_items: float = 0.3
    """Share of events (of test, or of a new log) whose item training never saw."""
    max_unseen_values: float = 0.1
    """Share of a feature's ids in a new log that are not in the vocabulary of its table."""
    max_psi: float = 0.25
    """Population stability index of a feature between training and a new log, if beyond chance."""
    min_volume: float = 0.6
    """Least events a day of a new log, as a multiple of the prepared log's."""
    max_volume: float = 1.7
    """Most events a day of a new log, as a multiple of the prepared log's."""

    def validate(self) -> None:
        """Refuse limits that nothing or everything passes.

        Raises:
            UserError: naming the key and what was expected.
        """
        for f in fields(self):
            value = getattr(self, f.name)
            share = f.name not in ("max_psi", "min_volume", "max_volume")
            if not 0 <= value <= (1 if share else float("inf")):
                expected = "a share from 0 to 1" if share else ">= 0"
                raise UserError(f"inspect.{f.name} must be {expected}, got {value:g}")
        if self.min_volume >= self.max_volume:
            raise UserError(
                f"inspect.min_volume ({self.min_volume:g}) must be below inspect.max_volume "
                f"({self.max_volume:g}): swap them"
            )
