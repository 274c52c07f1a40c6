"""Settings of what a query's positive is compared with; free of torch, as the job's others."""

from __future__ import annotations

from dataclasses import dataclass, field

from twotower.errors import UserError

SOURCES = ("in_batch", "uniform", "memory", "mined", "skipped")
# What draws from lists that queries bring.
LISTED = ("mined", "skipped")


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """Which of the model's own answers are mined, and when."""

    every: int = 200
    """Steps between two minings; each epoch begins with one."""
    skip: int = 10
    """First answers that are left alone, since many of them are false negatives."""
    depth: int = 50
    """Answers behind them that a query's list holds."""

    def validate(self) -> None:
        """Refuse an empty band.

        Raises:
            UserError: naming the key.
        """
        for name, least in (("every", 1), ("skip", 0), ("depth", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"train.negatives.mining.{name} must be >= {least}, got {getattr(self, name)}"
                )


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
    mined: float = 0.0
    """Share drawn from what the model itself answers to the step's queries; see `mining`."""
    skipped: float = 0.0
    """Share drawn from what the queries' users were shown and did not take: up to 50 events below
    data.columns.positive_from, the newest before the query's own."""
    mining: MiningConfig = field(default_factory=MiningConfig)
    """How `mined` candidates are found."""
    candidates: int | None = None
    """Candidates a step, over all ranks, where in_batch is 0; else batch_size decides."""
    catalogue: bool = False
    """Compare with the whole catalogue instead, exactly: for some 100,000 items at most."""
    exclude_seen: bool = False
    """Leave out of each query's candidates what its user had taken before: where nobody takes an
    item twice, it is no negative."""
    exclude_unreleased: bool = False
    """Leave out of each query's candidates items whose first training event came after the query:
    where new items arrive all the time, they were not there to be taken."""

    def validate(self) -> None:
        """Refuse what is no mixture.

        Raises:
            UserError: naming the key.
        """
        key, shares = "train.negatives", {name: getattr(self, name) for name in SOURCES}
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise UserError(f"{key}.{name} must be a share from 0 to 1, got {share:g}")
        self.mining.validate()
        if self.catalogue:
            alone = {name: float(name == "in_batch") for name in SOURCES}
            if shares != alone or self.candidates is not None:
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
