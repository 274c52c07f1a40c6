"""Which ids an embedding table has rows for; free of torch, so that any host can read a job."""

from __future__ import annotations

from dataclasses import dataclass, field

from twotower.errors import UserError, one_of

EVICTIONS = ("lru", "lfu", "distance_lfu")
OF_A_VOCABULARY = ("min_count", "max_size", "oov_rows", "pinned")
OF_SLOTS = ("eviction", "admit_every")
# Slots are cut into parts, which ranks share without cutting one: as many as a power of two gives
# within these bounds. More parts allow more ranks; smaller ones fill less evenly.
MOST_PARTS, LEAST_PART = 64, 100


@dataclass(frozen=True, kw_only=True)
class Table:
    """Which ids get a row of an embedding table: those of a vocabulary, or, with `slots`, any.

    With `slots` ids come and go: training gives a row to ids as they come, and takes it from the
    least useful one when none is left. Ids without a row share some.
    """

    min_count: int = 1
    """Ids seen fewer times in training go to the out-of-vocabulary rows."""
    max_size: int | None = None
    """Most ids kept, the most frequent first; no limit by default."""
    oov_rows: int = 4
    """Rows that unseen ids are hashed to."""
    pinned: list[int | str] = field(default_factory=list)
    """Ids that get a row of their own, the first ones, however rare they are."""
    slots: int | None = None
    """Rows of a table without a vocabulary; its size stays the same however many ids come."""
    eviction: str = "distance_lfu"
    """Whose row is taken first: lru (longest not seen), lfu (least often seen) or distance_lfu."""
    admit_every: int = 1
    """Steps between the moments at which ids get rows; in between, they are counted."""

    @property
    def parts(self) -> int:
        """Parts that the slots are cut into; the number of ranks must divide it."""
        slots, parts = self.slots or 0, 1
        while slots % (2 * parts) == 0 and slots // (2 * parts) >= LEAST_PART:
            parts *= 2
        return min(parts, MOST_PARTS)

    def validate(self, key: str) -> None:
        """Refuse a table that cannot be.

        Args:
            key: of this table in the YAML.

        Raises:
            UserError: naming the key.
        """
        for name, least in (("oov_rows", 1), ("min_count", 1), ("slots", 2), ("admit_every", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{key}.{name} must be >= {least}, got {value}")
        one_of(f"{key}.eviction", self.eviction, EVICTIONS)
        dynamic = self.slots is not None
        for name in OF_A_VOCABULARY if dynamic else OF_SLOTS:
            if getattr(self, name) != getattr(Table(), name):
                reason = f"needs slots, and this table has a vocabulary: set {key}.slots, or "
                if dynamic:
                    reason = "is of a vocabulary, and with slots any id may get a row: "
                raise UserError(f"{key}.{name} {reason}remove it")
        if self.max_size is not None and self.max_size < max(1, len(self.pinned)):
            raise UserError(
                f"{key}.max_size must be >= 1 and hold the pinned ids, got {self.max_size}"
            )
        for pinned in self.pinned:
            if self.pinned.count(pinned) > 1 or pinned == "":
                raise UserError(f"{key}.pinned: '{pinned}' is empty or stands twice: remove it")
