"""Reading a prepared dataset: memory-mapped Arrow columns as numpy views.

Events are numbered through training, validation and test: `section` says which are whose.

Shape legend: `E` events, `U` users, `N` items.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from numpy.lib.stride_tricks import sliding_window_view

from twotower.data.encode import Encoder, Normaliser
from twotower.data.log.scan import SPLIT_NAMES
from twotower.data.prepare.plan import FORMAT
from twotower.data.prepare.spool import read_arrow
from twotower.data.schema import PAD_INT64, Columns, DataConfig, Earlier, Feature, Split
from twotower.data.table import Table
from twotower.data.vocabulary import DynamicIds, Vocabulary
from twotower.errors import UserError

Array = npt.NDArray[Any]


class Column(Protocol):
    """An encoded `id` or `ids` column."""

    def take(self, rows: Array) -> tuple[Array, Array]:
        """Return the values of `rows` one after another, and the length of each."""
        ...


@dataclass(frozen=True)
class Single:
    """At most one value a row, -1 for none."""

    values: Array

    def take(self, rows: Array) -> tuple[Array, Array]:
        """Return the values of `rows` one after another, and the length of each."""
        values = self.values[rows]
        there = values >= 0
        if not there.all():
            values = values[there]
        return values, there.astype(np.int64)


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: list i is `values[offsets[i]:offsets[i + 1]]`.

    The offsets are Arrow's own, so nothing is copied until rows are taken.
    """

    values: Array
    offsets: Array

    def take(self, rows: Array) -> tuple[Array, Array]:
        """Return the values of `rows` one after another, and the length of each."""
        return gather(self.values, self.offsets[rows], self.offsets[rows + 1])


def gather(values: Array, starts: Array, ends: Array) -> tuple[Array, Array]:
    """Return `values[starts[i]:ends[i]]` for all i in one array, and their lengths."""
    lengths = (ends - starts).astype(np.int64)
    total, width = int(lengths.sum()), int(lengths.max(initial=0))
    if total * 3 > width * len(lengths):
        # Mostly full: whole windows are copied, which is three times as fast as entry by entry.
        first = np.maximum(ends.astype(np.int64) - width, 0)
        place = np.arange(width, dtype=np.int32)
        keep = place >= (starts - first).astype(np.int32)[:, None]
        keep &= place < (ends - first).astype(np.int32)[:, None]
        return sliding_window_view(values, width)[first][keep], lengths
    before = np.cumsum(lengths) - lengths
    index = np.arange(total) + np.repeat(starts - before, lengths)
    return values.take(index), lengths


def id_column(column: pa.Array) -> Column:
    """Return an encoded `id` or `ids` column; a missing id is an empty list."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return Ragged(column.values.to_numpy(), column.offsets.to_numpy())
    return Single(column.to_numpy())


def dense(column: pa.Array) -> Array:
    """Return an encoded `number` (R, 1) or `vector` (R, W) column."""
    if pa.types.is_fixed_size_list(column.type):
        return np.asarray(column.flatten().to_numpy()).reshape(len(column), -1)
    return np.asarray(column.to_numpy()).reshape(-1, 1)


class PreparedDataset:
    """A prepared dataset on disk; opening it reads the JSON alone.

    Raises:
        UserError: when nothing is prepared at `path`, or a file is not of the size it was written
            with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._history_rows: dict[str, Array] = {}
        try:
            self.summary: dict[str, Any] = json.loads((path / "prepared.json").read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: no prepared dataset: run `twotower prepare` first") from None
        except ValueError as error:
            raise UserError(
                f"{path / 'prepared.json'}: damaged ({error}): remove {path} and run "
                "`twotower prepare` again"
            ) from None
        if not isinstance(self.summary, dict) or self.summary.get("format") != FORMAT:
            raise UserError(
                f"{path}: is in the format of another version of twotower: remove it, and run "
                "`twotower prepare` again"
            )
        self.config = data_config(self.summary["config"])
        self.fingerprint: str = self.summary["fingerprint"]
        for name, size in self.summary.get("files", {}).items():
            file = path / name
            found = file.stat().st_size if file.exists() else 0
            if found != size:
                raise UserError(
                    f"{file}: damaged, it has {found:,} bytes of {size:,}: run `twotower prepare` "
                    "again"
                )

    def _read(self, name: str) -> pa.Table:
        try:
            return read_arrow(self.path / name)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.path / name}: damaged ({str(error).splitlines()[0]}): remove {self.path} "
                "and run `twotower prepare` again"
            ) from None

    @cached_property
    def events(self) -> pa.Table:
        """One row an event (E): training, validation, test, each sorted by (user, time)."""
        return self._read("events.arrow")

    def section(self, split: int) -> range:
        """Return the rows of the events of training (0), validation (1) or test (2)."""
        counts = [self.summary["counts"][f"{name}_events"] for name in SPLIT_NAMES]
        start = sum(counts[:split])
        return range(start, start + counts[split])

    def context(self, feature: str) -> pa.Table:
        """Return a context feature's values: value, train_count and embedding row or key."""
        return self._read(f"contexts/{feature}.arrow")

    @cached_property
    def users(self) -> pa.Table:
        """One row a user (U)."""
        return self._read("users.arrow")

    @cached_property
    def items(self) -> pa.Table:
        """The catalogue (N), ascending by raw id."""
        return self._read("items.arrow")

    @cached_property
    def timeline(self) -> Array:
        """Item rows of all users' histories, oldest first."""
        return array(self._read("timeline.arrow"), "item")

    @cached_property
    def timeline_seconds(self) -> Array:
        """When each of the timeline happened, where a history has times.

        Seconds since 1970; `PAD_INT64` where it is not known.
        """
        return array(self._read("timeline.arrow"), "seconds")

    def history_rows(self, table: str) -> Array:
        """Return the timeline as rows, or keys, of an embedding table that a history uses."""
        if table not in self._history_rows:
            self._history_rows[table] = array(self._read(f"histories/{table}.arrow"), "row")
        return self._history_rows[table]

    @cached_property
    def event_columns(self) -> dict[str, Array]:
        """`user`, `item`, `time`, `history_to` and, where the log has it, `weight`, each (E,)."""
        names = ("user", "item", "time", "history_to", "weight")
        have = self.events.schema.names
        return {name: array(self.events, name) for name in names if name in have}

    def outcome(self, column: str) -> Array:
        """Return a column of `data.columns.outcomes` (E,), float32, NaN where it is not known."""
        return array(self.events, f"outcome.{column}")

    @property
    def keeps_skipped(self) -> bool:
        """Whether it holds what users were shown and did not take."""
        return self.config.columns.keeps_skipped

    @cached_property
    def skipped_columns(self) -> dict[str, Array]:
        """`user`, `item` and `time` of the skipped events, sorted by (user, time); rows."""
        table = self._read("skipped.arrow")
        return {name: array(table, name) for name in table.column_names}

    @property
    def skipped_waiting(self) -> pa.Table:
        """Skipped events of users or items that the dataset does not have: raw ids, and time."""
        return self._read("skipped_waiting.arrow")

    @cached_property
    def history_from(self) -> Array:
        """Where each user's part of the timeline starts (U,)."""
        return array(self.users, "history_from")

    @cached_property
    def events_of(self) -> Array:
        """Events of each user (U,)."""
        return np.bincount(self.event_columns["user"], minlength=len(self.users))

    @cached_property
    def prior_lengths(self) -> Array:
        """How many items from before the log each user's timeline begins with (U,)."""
        return np.diff(np.append(self.history_from, len(self.timeline))) - self.events_of

    @cached_property
    def train_end(self) -> Array:
        """Where the training part of each user's timeline ends (U,), if that comes first in it."""
        users = self.event_columns["user"][: self.section(0).stop]
        trained = np.bincount(users, minlength=len(self.users))
        return self.history_from + self.prior_lengths + trained

    @cached_property
    def late_training(self) -> Array:
        """Users (rows) with training events after held-out ones."""
        c, stop = self.event_columns, self.section(0).stop
        last = np.full(len(self.users), np.iinfo(np.int64).min)
        np.maximum.at(last, c["user"][:stop], c["time"][:stop])
        return np.unique(c["user"][stop:][c["time"][stop:] < last[c["user"][stop:]]])

    @cached_property
    def train_count(self) -> Array:
        """Training events of each item (N,)."""
        return array(self.items, "train_count")

    @cached_property
    def encoder(self) -> Encoder:
        """Vocabularies, normalisers and spans."""
        vocabularies: dict[str, Vocabulary | DynamicIds] = {}
        for name, info in self.summary["tables"].items():
            if info.get("slots"):
                vocabularies[name] = DynamicIds(info["dtype"], info["slots"])
                continue
            table = self._read(f"tables/{name}.arrow")
            key, count = one_chunk(table["key"]), one_chunk(table["count"])
            vocabularies[name] = Vocabulary(key, count, info["oov_rows"])
        normalisers = {k: Normaliser(**v) for k, v in self.summary["normalisers"].items()}
        return Encoder(
            vocabularies=vocabularies, normalisers=normalisers,
            span_starts=self.summary.get("span_starts", ()),
        )  # fmt: skip

    def timeline_slice(self, user: int) -> slice:
        """Return where a user's part of the timeline is."""
        ends = np.append(self.history_from[1:], len(self.timeline))
        return slice(self.history_from[user], ends[user])

    def timeline_of(self, user: int) -> Array:
        """Return all item rows of a user, oldest first."""
        return self.timeline[self.timeline_slice(user)]

    def user_row(self, user: Any) -> int | None:
        """Return the row of a raw user id, None for one that the log does not know."""
        row = pc.index(self.users["id"], pa.scalar(user, self.users["id"].type)).as_py()
        return None if row < 0 else int(row)

    def raw_query(
        self, user: int | None, event: int | None, history: Array, seconds: Array | None = None
    ) -> dict[str, Any]:
        """Return the request that asks for a user.

        Args:
            user: row of the user, or None for one that the log does not know: a request of
                missing ids and average numbers.
            event: row of the event whose context is sent; without one, context is as unknown.
            history: item rows, oldest first; cut to each feature's length.
            seconds: when each of them happened, as in `timeline_seconds`; None for not known.
        """
        out: dict[str, Any] = {}
        for f in self.config.query:
            context = f.source == "interactions"
            if f.kind == "history":
                window = slice(max(0, len(history) - f.length), None)
                newest = history[window]
                out[f.name] = self.items["id"].take(pa.array(newest)).to_pylist()
                if f.has_times:
                    known = [None] * len(newest) if seconds is None else seconds[window].tolist()
                    out[f.times_name] = [None if t == PAD_INT64 else t for t in known]
            elif context and event is not None:
                out[f.name] = self._raw_context(f, event)
            elif not context and user is not None:
                out[f.name] = self.users[f"raw.{f.name}"][user].as_py()
            elif f.kind == "number":
                out[f.name] = self.encoder.normalisers[f"query.{f.name}"].mean
            elif f.kind == "vector":
                out[f.name] = [0.0] * (f.width or 0)
            else:
                out[f.name] = [] if f.kind == "ids" else None
        return out

    def last_event_of(self, user: int) -> int | None:
        """Return the row of a user's newest event."""
        for split in (2, 1, 0):
            rows = self.section(split)
            users = self.event_columns["user"][rows.start : rows.stop]
            first, end = np.searchsorted(users, [user, user + 1])
            if end > first:
                return rows.start + int(end) - 1
        return None

    def _raw_context(self, feature: Feature, event: int) -> Any:
        """Return the value of a context feature at an event."""
        value = self.events[f"context.{feature.name}"][event].as_py()
        if feature.kind in ("id", "ids"):
            values = self.context(feature.name)["value"]
            codes = value if feature.kind == "ids" else [value]
            raw = [values[code].as_py() if code >= 0 else None for code in codes]
            return raw if feature.kind == "ids" else raw[0]
        if feature.kind == "number" and np.isnan(value):
            return self.encoder.normalisers[f"query.{feature.name}"].mean
        return value


def find_prepared(path: Path) -> PreparedDataset | None:
    """Return the prepared dataset at `path`, None where there is none that can be read."""
    try:
        return PreparedDataset(path)
    except (UserError, ValueError, KeyError, TypeError):
        return None


def one_chunk(values: pa.ChunkedArray) -> pa.Array:
    """Return a column as one array; the files hold one chunk, so this copies nothing."""
    if values.num_chunks == 1:
        return values.chunk(0)
    return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)


def array(table: pa.Table, name: str) -> Array:
    """Return a primitive column as a numpy view of the file."""
    return np.asarray(one_chunk(table[name]).to_numpy(zero_copy_only=False))


def data_config(raw: dict[str, Any]) -> DataConfig:
    """Rebuild a `DataConfig` from its JSON form."""
    nested = {
        "columns": Columns(**raw["columns"]),
        "split": Split(**raw["split"]),
        "earlier": Earlier(**raw["earlier"]) if raw.get("earlier") else None,
        "query": [Feature(**f) for f in raw["query"]],
        "item": [Feature(**f) for f in raw["item"]],
        "tables": {name: Table(**t) for name, t in raw["tables"].items()},
    }
    return DataConfig(**(raw | nested))
