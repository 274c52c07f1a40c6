"""Settings of what a query's positive is compared with; free of torch, as the job's others."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.errors import UserError

SOURCES = ("in_batch", "uniform", "memory")


@dataclass(frozen=True, kw_only=True)
class NegativesConfig:
    """What a query's positive is compared with: shares of a step's candidates, which add up to 1.

    Every candidate is corrected for how often its item is expected among all of them, whatever
    source it came from (`train.log_q`).
    """

    in_batch: float = 1.0
    """Share that are the other queries' positives."""
    uniform: float = 0.0
    """Share drawn evenly from the catalogue, items without an event included."""
    memory: float = 0.0
    """Share that are positives of the steps before, as they were then (cross-batch memory)."""
    candidates: int | None = None
    """Candidates a step, over all ranks, where in_batch is 0; else batch_size decides."""
    catalogue: bool = False
    """Compare with the whole catalogue instead, exactly: for some 100,000 items at most."""

    def validate(self) -> None:
        """Refuse what is no mixture.

        Raises:
            UserError: naming the key.
        """
        key, shares = "train.negatives", {name: getattr(self, name) for name in SOURCES}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"{key}.{name} must be a share from 0 to 1, got {share:g}")
        if self.catalogue:
            if shares != {"in_batch": 1, "uniform": 0, "memory": 0} or self.candidates is not None:
                raise UserError(
                    f"{key}.catalogue compares with every item: leave {', '.join(SOURCES)} and "
                    "candidates as they are"
                )
            return
        if abs(sum(shares.values()) - 1) > 1e-6:
            found = " + ".join(f"{name} {share:g}" for name, share in shares.items() if share)
            raise UserError(
                f"{key}: shares must add up to 1, got {found or 'none'} = {sum(shares.values()):g}"
            )
        if self.in_batch == 0 and self.candidates is None:
            raise UserError(
                f"{key}.candidates must be given where in_batch is 0: it says how many are drawn"
            )
        if self.in_batch > 0 and self.candidates is not None:
            raise UserError(
                f"{key}.candidates follows from train.batch_size where in_batch is above 0: remove "
                "it, or set in_batch to 0"
            )

    def sizes(self, queries: float) -> dict[str, int]:
        """Return how many candidates of a step come from each source, over all ranks.

        Args:
            queries: of a step, over all ranks.
        """
        total = queries / self.in_batch if self.in_batch else float(self.candidates or 0)
        return {name: round(getattr(self, name) * total) for name in SOURCES}
