"""Which ids are numbers and which are words, decided over all files of a log.

Ids that must agree form a domain: the user ids of all tables; the item ids, histories included; and
whatever features share an embedding table. A Parquet or JSON column says its type. A text file
does not: its ids are numbers when every id of the domain is a whole number, words otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from twotower.data.schema import ID_KINDS, DataConfig
from twotower.errors import UserError


@dataclass
class _Column:
    domain: str
    kind: str
    where: str
    word: str | None = None


@dataclass
class IdTypes:
    """What the columns of ids hold.

    Attributes:
        parent: domain -> a domain that it must agree with (a forest).
        columns: `<table>.<column>` -> what it holds.
        decided: domain -> string or int64, known before, from what is appended to.
    """

    parent: dict[str, str] = field(default_factory=dict)
    columns: dict[str, _Column] = field(default_factory=dict)
    decided: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: DataConfig, decided: dict[str, str] | None = None) -> IdTypes:
        """Return the domains of a schema; `decided` holds the types of an earlier preparation."""
        types = cls(decided=dict(decided or {}))
        c = config.columns
        for tower, f in config.features():
            if f.kind not in ID_KINDS:
                continue
            table = f"table {f.table_name}"
            if f.kind == "history" or (tower == "item" and f.source_column == c.item):
                types._join("item", table)
            elif tower == "query" and f.source_column == c.user:
                types._join("user", table)
        return types

    def _join(self, a: str, b: str) -> None:
        a, b = self.root(a), self.root(b)
        if a != b:
            self.parent[max(a, b)] = min(a, b)

    def root(self, domain: str) -> str:
        """Return the domain that stands for all that must agree with this one."""
        while domain in self.parent:
            domain = self.parent[domain]
        return domain

    def kept(self, column: str) -> pa.DataType | None:
        """Return the type in which a column's ids are kept until all are read."""
        known = self.columns.get(column)
        return None if known is None else pa.int64() if known.kind == "int64" else pa.string()

    def may_be_whole(self, domain: str) -> bool:
        """Whether text ids of a domain may still turn out to be numbers."""
        root = self.root(domain)
        return all(c.word is None for c in self.columns.values() if self.root(c.domain) == root)

    def note(self, domain: str, column: str, kind: str, where: str, word: str | None) -> None:
        """Say what a column of one more file holds.

        Args:
            domain: that the ids belong to.
            column: of the engine.
            kind: string, int64, or text of a text file.
            where: file and column.
            word: a text id that is no whole number, with its place.

        Raises:
            UserError: when another file holds another type.
        """
        known = self.columns.setdefault(column, _Column(domain, kind, where, word))
        known.word = known.word or word
        if known.kind != kind:
            raise UserError(
                f"{where}: holds {_said(kind)} ids, but {known.where} {_said(known.kind)}: "
                "cast one of them"
            )

    def resolve(self) -> None:
        """Decide every domain.

        Raises:
            UserError: when two columns of one domain cannot agree.
        """
        for domain in {self.root(c.domain) for c in self.columns.values()}:
            members = [c for c in self.columns.values() if self.root(c.domain) == domain]
            hard = [c for c in members if c.kind != "text"]
            if domain in self.decided:
                hard.insert(0, _Column(domain, self.decided[domain], "the prepared dataset"))
            for c in hard[1:]:
                if c.kind != hard[0].kind:
                    raise self._disagree(domain, hard[0], c)
            word = next((c.word for c in members if c.word is not None), None)
            if hard and hard[0].kind == "int64" and word is not None:
                raise UserError(
                    f"{word} is no whole number, but {hard[0].where} holds int64 ids: "
                    "correct the id, or cast the others to strings"
                )
            if hard:
                self.decided[domain] = hard[0].kind
            else:
                self.decided[domain] = "string" if word is not None else "int64"

    def _disagree(self, domain: str, a: _Column, b: _Column) -> UserError:
        names = {d for c in (a, b) for d in (c.domain, *self.parent) if self.root(d) == domain}
        tables = sorted(n.removeprefix("table ") for n in names if n.startswith("table "))
        prefix = f"embedding table '{tables[0]}': " if tables else ""
        return UserError(
            f"{prefix}{a.where} holds {_said(a.kind)} ids, but {b.where} {_said(b.kind)}: cast one "
            "of them" + (", or give the features different tables" if tables else "")
        )

    def dtype(self, domain: str) -> str:
        """Return string or int64; string for a domain without any id."""
        return self.decided.get(self.root(domain), "string")

    def sql(self, domain: str, *, is_list: bool = False) -> str:
        """Return the SQL type of a domain's ids."""
        kind = "BIGINT" if self.dtype(domain) == "int64" else "VARCHAR"
        return kind + ("[]" if is_list else "")


def _said(kind: str) -> str:
    return {"text": "text", "string": "string", "int64": "int64"}[kind]
