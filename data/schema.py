"""What a log is made of: columns, features, embedding tables and the split.

The schema is the `data:` section of a job. It needs no torch, so that a serving host can read it.

A feature's `kind` says how its column becomes input of a tower:

=========  ==========================================================================
`id`       one category: string or int64, looked up in an embedding table
`ids`      a bag of categories
`history`  the user's last `length` items strictly before the event; derived, so it
           cannot leak; `column` may name a list of still earlier items
`number`   a float, normalised with the mean and deviation of the training period
`vector`   a list of `width` floats, for instance a text embedding
=========  ==========================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timezone

from twotower.data.table import Table
from twotower.errors import UserError, did_you_mean, one_of

KINDS = ("id", "ids", "history", "number", "vector")
ID_KINDS = ("id", "ids", "history")
# A history's encoders read it entry by entry, in order.
ENCODERS = ("transformer", "hstu")
# What reads a history alone.
OF_HISTORIES = ("timed_sum", *ENCODERS)
# What of a history is known at each of its entries from that and earlier ones.
CAUSAL = ("attention", *OF_HISTORIES)
POOLINGS = ("mean", "sum", *CAUSAL)
# Tables beside the log, one row a user or an item.
ENTITIES = ("users", "items")
SPLITS = ("temporal", "leave_last_out", "given")
# Formats without column names and times: a row's place in the log is its time.
LINE_FORMATS = ("user_lines", "pair_lines")
TIME_UNITS = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0}

# Tensors of every model, beside its features.
RESERVED = ("k", "exclude", "vector", "item_ids", "scores", "version")

# What stands for "nothing here" in a raw tensor: padding of a list, or a missing id.
PAD_STRING = ""
PAD_INT64 = -(2**63)


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One input of a tower."""

    name: str
    """Name of the feature, unique in its tower; also the tensor's name in a request."""
    kind: str
    """id, ids, history, number or vector."""
    column: str | None = None
    """Column that it is read from; the feature's name by default."""
    source: str | None = None
    """users, items or interactions; found by itself unless the column is in two of them."""
    table: str | None = None
    """Embedding table of an id kind; features that name the same table share its rows."""
    length: int = 50
    """Most entries kept of ids and history: the newest of a history, the first of a bag."""
    width: int | None = None
    """Number of floats of a vector."""
    pooling: str = "mean"
    """How a list becomes one vector: mean, sum, attention (learned, knows the order) or, for a
    history, timed_sum (knows when each entry was taken; a request sends `<name>_times`, the seconds
    since 1970 of each entry, None where it is not known), transformer or hstu (shaped by
    model.encoder)."""
    time_gaps: bool = False
    """transformer or hstu: know the time between entries; a request sends `<name>_times`."""
    item_features: list[str] = field(default_factory=list)
    """history: features of data.item that are added to each entry's embedding, from the catalogue,
    so that a request carries ids alone; for an item that is not in it, nothing is added."""
    separator: str | None = None
    """Splits a string column into ids, for instance '|' in CSV files."""
    pattern: str | None = None
    """Regular expression whose one group is taken from a string column."""

    @property
    def source_column(self) -> str:
        """The column's name in the log."""
        return self.column or self.name

    @property
    def is_causal(self) -> bool:
        """Whether each entry of it is known from that and earlier ones: a history of `CAUSAL`."""
        return self.kind == "history" and self.pooling in CAUSAL

    @property
    def has_times(self) -> bool:
        """Whether it is read with the times of its entries."""
        return self.time_gaps or self.pooling == "timed_sum"

    @property
    def times_name(self) -> str:
        """Name of the tensor of a history's times, where it `has_times`."""
        return f"{self.name}_times"

    @property
    def table_name(self) -> str:
        """The embedding table's name."""
        return self.table or self.name


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the interaction log's columns."""

    user: str = "user_id"
    """User id, string or integer."""
    item: str = "item_id"
    """Item id, string or integer."""
    timestamp: str = "timestamp"
    """Time of the event: an integer, or a timestamp type."""
    timestamp_unit: str = "s"
    """Unit of an integer timestamp since 1970: s, ms, us or ns."""
    weight: str | None = None
    """Optional sample weight, not negative."""
    label: str | None = None
    """Optional outcome, for instance a rating; see `positive_from`."""
    positive_from: float | None = None
    """Events whose label is below are no events, but kept as skipped (`train.negatives.skipped`);
    see `train_on`."""
    train_on: str = "positives"
    """positives, or all: events below are trained on and stand in histories too; of validation and
    test, those alone that reach `positive_from` are relevant."""
    outcomes: list[str] = field(default_factory=list)
    """Columns of numbers kept with the events, for train.heads to predict: what followed an event,
    for instance a like; null where that is not known."""

    @property
    def keeps_skipped(self) -> bool:
        """Whether events below `positive_from` are kept as skipped."""
        return (
            self.label is not None
            and self.positive_from is not None
            and self.train_on == "positives"
        )


@dataclass(frozen=True, kw_only=True)
class Earlier:
    """What users took before the log begins, as lists: training events before its first."""

    location: str
    """Table with one row a user, Parquet, CSV or JSON lines."""
    column: str
    """Its column of lists of item ids, oldest first."""
    separator: str | None = None
    """Splits a string column into ids, for instance '|' in CSV files."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How events are divided into training, validation and test."""

    kind: str = "temporal"
    """temporal (by time), leave_last_out (a user's last two events) or given."""
    validation: float = 0.1
    """temporal: share of the events, the second newest. given: see `held_out`."""
    test: float = 0.1
    """temporal: share of the events, the newest."""
    validation_from: str | None = None
    """temporal: ISO date at which validation begins, instead of a share."""
    test_from: str | None = None
    """temporal: ISO date at which test begins, instead of a share."""
    column: str | None = None
    """given: the log's column that says train, validation or test."""
    validation_files: str | None = None
    """given: log of the validation events, when `interactions` holds training alone."""
    test_files: str | None = None
    """given: log of the test events, when `interactions` holds training alone."""
    held_out: str = "none"
    """given, with test_files alone: which of each user's training events, a share `validation`, are
    held out for validation, as one query a user: none, random or last."""
    seed: int = 0
    """Of a random held_out."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The log and the features taken from it."""

    interactions: str
    """Log of events: a file, folder, glob or fsspec URL."""
    format: str = "table"
    """Of the events' files: table (Parquet, CSV or JSON lines, by their names), user_lines (`user
    item item ...`, oldest first) or pair_lines (`user item`, oldest first), blanks between ids."""
    users: str | None = None
    """Optional table with one row a user."""
    items: str | None = None
    """Optional table with one row an item; items never interacted with are candidates too."""
    earlier: Earlier | None = None
    """Optional table of lists of what each user took before the log begins."""
    root: str = ""
    """Folder or URL that all locations are relative to."""
    columns: Columns = field(default_factory=Columns)
    """Names of the log's columns."""
    query: list[Feature] = field(default_factory=list)
    """Features of the query tower: from users, interactions (context) and the history."""
    item: list[Feature] = field(default_factory=list)
    """Features of the item tower: from items."""
    tables: dict[str, Table] = field(default_factory=dict)
    """Which ids an embedding table has rows for, where the defaults do not fit."""
    display: list[str] = field(default_factory=list)
    """Columns of items shown beside an answer, for instance a title."""
    ordered: bool = True
    """Whether a user's events have an order; without one (as where a random share was held out) a
    training event's history holds the user's other training events, earlier or not."""
    split: Split = field(default_factory=Split)
    """How events are divided."""
    memory_gb: float = 4.0
    """Memory that preparing may use, in GB; what does not fit goes to disk, below run_dir."""
    on_bad_rows: str = "error"
    """error, or skip: go on without rows that cannot be used, and count them."""

    def features(self) -> list[tuple[str, Feature]]:
        """Return every (tower, feature), query first."""
        return [("query", f) for f in self.query] + [("item", f) for f in self.item]

    def histories(self) -> list[Feature]:
        """Return the query features of kind history."""
        return [f for f in self.query if f.kind == "history"]

    def timed_histories(self) -> list[Feature]:
        """Return the histories that are read with the times of their entries."""
        return [f for f in self.histories() if f.has_times]

    def entry_features(self, history: Feature) -> list[Feature]:
        """Return the item features that a history's entries bring, as it names them."""
        features = {f.name: f for f in self.item}
        return [features[name] for name in history.item_features]

    def table(self, name: str) -> Table:
        """Return the settings of embedding table `name`."""
        return self.tables.get(name, Table())

    def validate(self) -> None:
        """Refuse what no log could satisfy.

        Raises:
            UserError: with the key, what was expected and the remedy.
        """
        if not self.query or not self.item:
            raise UserError(
                "data.query and data.item must each name at least one feature: "
                "add for instance '- {name: item_id, kind: id}' to data.item"
            )
        for tower in ("query", "item"):
            names = [f.name for t, f in self.features() if t == tower]
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"data.{tower}: feature '{name}' stands twice: rename one")
        for tower, feature in self.features():
            _validate_feature(tower, feature)
        one_of("data.format", self.format, ("table", *LINE_FORMATS))
        for history in self.timed_histories():
            if history.times_name in {f.name for f in self.query}:
                raise UserError(
                    f"data.query: '{history.times_name}' is the name of the times of the history "
                    f"'{history.name}': rename the feature"
                )
        for _, f in self.features():
            self._validate_entry_features(f)
        one_of("data.split.kind", self.split.kind, SPLITS)
        one_of("data.split.held_out", self.split.held_out, ("none", "random", "last"))
        one_of("data.columns.timestamp_unit", self.columns.timestamp_unit, TIME_UNITS)
        one_of("data.on_bad_rows", self.on_bad_rows, ("error", "skip"))
        if self.memory_gb < 0.5:
            raise UserError(f"data.memory_gb must be >= 0.5, got {self.memory_gb:g}")
        used = {f.table_name for _, f in self.features() if f.kind in ID_KINDS}
        for name, table in self.tables.items():
            if name not in used:
                raise UserError(
                    f"data.tables.{name}: no feature uses this table{did_you_mean(name, used)}"
                )
            table.validate(f"data.tables.{name}")
        self._validate_split()
        if self.format in LINE_FORMATS:
            self._validate_lines()
        if len([f for f in self.histories() if f.column]) > 1:
            raise UserError("data.query: only one history may name a `column` of earlier items")
        self._validate_outcomes()
        for name in set(self.display) & {"id", "train_count"}:
            raise UserError(f"data.display: '{name}' is a column of the bundle's own: rename it")
        if self.display and self.items is None:
            raise UserError("data.display names columns of data.items, which is not set")

    def _validate_entry_features(self, f: Feature) -> None:
        key = f"data.query, feature '{f.name}': item_features"
        known = {g.name: g for g in self.item}
        for name in f.item_features:
            if name not in known:
                raise UserError(
                    f"{key}: data.item has no feature '{name}'{did_you_mean(name, known)}"
                )
            if f.item_features.count(name) > 1:
                raise UserError(f"{key}: '{name}' stands twice: remove one")
            if known[name].kind == "id" and known[name].table_name == f.table_name:
                raise UserError(
                    f"{key}: '{name}' shares table '{f.table_name}' with the history, whose "
                    "entries are looked up in it already: remove it"
                )

    def _validate_split(self) -> None:
        split = self.split
        if split.kind == "given" and not (split.column or split.test_files):
            raise UserError(
                "data.split.kind is given: set data.split.column, or data.split.test_files"
            )
        if split.held_out != "none":
            if split.kind != "given" or split.column or split.validation_files:
                raise UserError(
                    "data.split.held_out takes validation from the training events, which needs "
                    "data.split.kind: given with test_files alone, without column and "
                    "validation_files: set it to none"
                )
            if not 0 < split.validation < 1:
                raise UserError(
                    "data.split.validation is the share of each user's training events that is "
                    f"held out, above 0 and below 1; got {split.validation:g}"
                )
        if not self.ordered and self.timed_histories():
            raise UserError(
                "data.ordered is false, so that histories have no times: remove time_gaps, or "
                f"pooling timed_sum, from '{self.timed_histories()[0].name}', or set data.ordered "
                "to true"
            )
        if not self.ordered and split.kind != "given":
            raise UserError(
                f"data.ordered is false, but data.split.kind: {split.kind} divides by the order of "
                "events: set data.ordered to true, or the split to given"
            )
        if not 0 <= split.seed < 2**32:
            raise UserError(f"data.split.seed must be from 0 to {2**32 - 1}, got {split.seed}")
        if split.kind != "temporal":
            return
        for name, date in (
            ("validation_from", split.validation_from), ("test_from", split.test_from)
        ):  # fmt: skip
            if date is not None:
                parse_date(f"data.split.{name}", date)
        if not (0 <= split.validation < 1 and 0 < split.test < 1) or (
            split.validation + split.test >= 1
        ):
            raise UserError(
                "data.split.validation and data.split.test are shares of the events, "
                f"together below 1, test above 0; got {split.validation} and {split.test}"
            )

    def _validate_outcomes(self) -> None:
        columns, split = self.columns, self.split
        if columns.positive_from is not None and columns.label is None:
            raise UserError(
                "data.columns.positive_from needs data.columns.label: name the label's column"
            )
        one_of("data.columns.train_on", columns.train_on, ("positives", "all"))
        for name in columns.outcomes:
            if columns.outcomes.count(name) > 1:
                raise UserError(f"data.columns.outcomes: '{name}' stands twice: remove one")
        if columns.train_on == "all" and columns.positive_from is None:
            raise UserError(
                "data.columns.train_on is all, which says what becomes of events below "
                "data.columns.positive_from: set that, or leave train_on out"
            )
        if columns.train_on == "all" and (
            split.kind == "leave_last_out" or split.held_out != "none"
        ):
            raise UserError(
                "data.columns.train_on: all needs validation and test of their own, not events "
                "taken from each user's: use a temporal split, or a given one without held_out"
            )
        if self.earlier is not None and any(f.column for f in self.histories()):
            raise UserError(
                "data.earlier and a history's `column` both say what came before the log: keep one"
            )
        by_time = next((f for f in self.histories() if f.pooling == "timed_sum"), None)
        if by_time and any(f.column for f in self.histories()):
            raise UserError(
                f"data.query, feature '{by_time.name}': pooling timed_sum weighs each entry by its "
                "time, and the items of a history's `column` have none: choose another pooling, or "
                "name a table of them in data.earlier"
            )

    def _validate_lines(self) -> None:
        """Refuse what needs a column, or a time, that lines of ids do not have."""
        if self.split.kind == "temporal":
            raise UserError(
                f"data.split.kind is temporal, but data.format: {self.format} has no times: set it "
                "to leave_last_out, or to given with test_files"
            )
        for key, name in (
            ("columns.weight", self.columns.weight), ("columns.label", self.columns.label),
            ("split.column", self.split.column),
            ("columns.outcomes", next(iter(self.columns.outcomes), None)),
        ):  # fmt: skip
            if name is not None:
                raise UserError(
                    f"data.{key} names a column, but data.format: {self.format} has users and "
                    "items alone: leave it out"
                )
        if self.timed_histories():
            raise UserError(
                f"data.query, feature '{self.timed_histories()[0].name}': knows the times of its "
                f"entries, and data.format: {self.format} has none: remove time_gaps, or choose "
                "another pooling than timed_sum"
            )
        if self.earlier is not None:
            raise UserError(
                f"data.earlier comes before a log's times, and data.format: {self.format} has "
                "none: put the earlier items first in each user's line"
            )


def parse_date(key: str, text: str) -> int:
    """Return an ISO date's microseconds since 1970, read as UTC unless it names a zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{key} must be an ISO date such as 2025-03-31, got '{text}'") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return int(moment.timestamp() * 1_000_000)


def _validate_feature(tower: str, feature: Feature) -> None:
    key = f"data.{tower}, feature '{feature.name}'"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", feature.name):
        raise UserError(f"{key}: a name is letters, digits and '_': rename it, set `column`")
    if feature.name in RESERVED:
        raise UserError(f"{key}: every model has a tensor of this name: rename it, set `column`")
    one_of(f"{key}: kind", feature.kind, KINDS)
    one_of(f"{key}: pooling", feature.pooling, POOLINGS)
    if feature.pooling in OF_HISTORIES and feature.kind != "history":
        how = "by its times" if feature.pooling == "timed_sum" else "in its order"
        raise UserError(
            f"{key}: pooling {feature.pooling} reads a history {how}, and {feature.kind} has none: "
            "choose mean, sum or attention"
        )
    if feature.time_gaps and feature.pooling not in ENCODERS:
        raise UserError(
            f"{key}: time_gaps are for pooling {' or '.join(ENCODERS)}, got pooling "
            f"{feature.pooling}: change one of them"
        )
    if feature.item_features and feature.kind != "history":
        raise UserError(
            f"{key}: item_features are of a history's entries, and this is of kind "
            f"{feature.kind}: remove them"
        )
    if feature.kind == "history" and tower == "item":
        raise UserError(f"{key}: a history belongs to the query tower: move it to data.query")
    if feature.kind == "vector" and (feature.width is None or feature.width < 1):
        raise UserError(f"{key}: a vector needs its width, for instance width: 384")
    if feature.kind in ("ids", "history") and feature.length < 1:
        raise UserError(f"{key}: length must be >= 1, got {feature.length}")
    sources = ("users", "interactions") if tower == "query" else ("items",)
    if feature.source is not None:
        one_of(f"{key}: source", feature.source, sources)
    if feature.pattern is not None and re.compile(feature.pattern).groups != 1:
        raise UserError(f"{key}: pattern must have exactly one group, got '{feature.pattern}'")


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One raw feature as a request carries it, without the batch dimension."""

    name: str
    """The tensor's name."""
    kind: str
    """The feature's kind, or times."""
    dtype: str
    """string, int64 or float32."""
    length: int
    """Exact size of id (1), number (1) and vector; most entries of ids, history and times."""
    of: str = ""
    """times: the history whose entries they are of; a request may leave them out."""

    @property
    def is_list(self) -> bool:
        """Whether the number of entries varies from request to request."""
        return self.kind in ("ids", "history", "times")


def is_own_id(config: DataConfig, tower: str, feature: Feature) -> bool:
    """Whether a feature is the user's or the item's id itself, which needs no table."""
    own = config.columns.user if tower == "query" else config.columns.item
    return (
        feature.kind == "id" and feature.pattern is None and feature.source_column == own
        and feature.source in (None, *ENTITIES)
    )  # fmt: skip
