"""Events in the order of users and time, and the timelines that histories are slices of.

New events come sorted out of the engine; those of the dataset appended to lie sorted in its files.
Both are merged a few hundred thousand rows at a time, always whole users, and written to spools:
no step holds more than that, or than the events of the one user who has most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.engine import BATCH_ROWS, arrow_batches, quoted
from twotower.data.log.scan import Report
from twotower.data.prepare.columns import with_values
from twotower.data.prepare.entities import context_ids, count_rows, row_map
from twotower.data.prepare.split import Cuts, hold_out, leave_last_out
from twotower.data.prepare.spool import Spool
from twotower.data.prepared import PreparedDataset, array, one_chunk
from twotower.data.schema import PAD_INT64, DataConfig

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]


@dataclass
class Written:
    """What was written: counts of each split, the first and the last time, and dropped events."""

    counts: list[int] = field(default_factory=lambda: [0, 0, 0])
    first: list[int] = field(default_factory=lambda: [0, 0, 0])
    last: list[int] = field(default_factory=lambda: [0, 0, 0])
    dropped: int = 0

    def add(self, split: int, time: I64) -> None:
        """Count the events of one split."""
        first, last = int(time.min()), int(time.max())
        known = self.counts[split] > 0
        self.first[split] = min(self.first[split], first) if known else first
        self.last[split] = max(self.last[split], last) if known else last
        self.counts[split] += len(time)


class EventWriter:
    """Writes events.arrow, timeline.arrow and, of users.arrow, the starts.

    Args:
        connection: the engine, after `make_entities`.
        config: the schema, resolved.
        cuts: of a temporal split.
        scratch: folder for spools.
        previous: the dataset appended to.
        users: spool of users.arrow, which gets where each one's timeline starts.
    """

    def __init__(
        self, connection: Any, config: DataConfig, cuts: Cuts, scratch: Path, users: Spool,
        previous: PreparedDataset | None,
    ) -> None:  # fmt: skip
        self.connection, self.config, self.cuts = connection, config, cuts
        self.previous = previous
        self.num_users = count_rows(connection, "users")
        self.sections = [Spool(scratch / f"events{i}") for i in range(3)]
        self.timeline = Spool(scratch / "timeline")
        self.users = users
        self.length = 0
        self.written = Written()
        self.values: dict[str, pa.ChunkedArray] = {}
        self.priors = _Priors(connection, config)
        if previous is not None:
            self.user_map = row_map(connection, "users")
            self.item_map = row_map(connection, "items")
            # A missing value's code is -1, which indexes the last entry.
            self.value_maps = {
                f.name: np.append(row_map(connection, f"values_{f.name}"), -1).astype(np.int32)
                for f in context_ids(config)
            }
            self.first_event = [
                previous.section(s).start for s in range(3)
            ]  # fmt: skip
            self.position = list(self.first_event)

    def write(self, report: Report) -> Written:
        """Merge and write everything."""
        low = 0
        for chunk, high in self._new_events():
            for part, upper in self._merged(chunk, low, high):
                self._emit(part, low, upper)
                low = upper
                report("sorting events", low / self.num_users)
        return self.written

    def _new_events(self) -> Iterator[tuple[pa.Table | None, int]]:
        """Yield the new events of whole users, each with the first user after them."""
        rest: pa.Table | None = None
        # A connection of its own: others ask meanwhile.
        for batch in arrow_batches(self.connection.cursor(), self._query()):
            table = pa.Table.from_batches([batch])
            if rest is not None:
                table = pa.concat_tables([rest, table]).combine_chunks()
            user = array(table, "user")
            cut = int(np.searchsorted(user, user[-1]))
            if cut < BATCH_ROWS and len(user) < 4 * BATCH_ROWS:
                rest = table
                continue
            if cut:
                yield table.slice(0, cut), int(user[-1])
            rest = table.slice(cut)
        yield rest, self.num_users

    def _query(self) -> str:
        columns = ["u.rowid::INT AS user", "i.rowid::INT AS item", "e.time"]
        joins = ["JOIN users u ON u.id = e.user", "JOIN items i ON i.id = e.item"]
        order = ["u.rowid", "e.time", "e.seq"]
        if self.config.columns.weight is not None:
            columns.append("e.weight")
        if self.config.split.kind == "given":
            columns.append("e.split")
            order.insert(1, "e.split")
        if self.config.columns.train_on == "all":
            columns.append("e.positive")
        for name in self.config.columns.outcomes:
            raw, kept = quoted(f"o.{name}"), quoted(f"outcome.{name}")
            columns.append(f"coalesce(e.{raw}, 'nan'::FLOAT) AS {kept}")
        for f in self.config.query:
            if f.source != "interactions" or f.kind == "history":
                continue
            raw, name = quoted(f"f.{f.name}"), quoted(f"context.{f.name}")
            if f.kind == "id":
                table = quoted(f"values_{f.name}")
                joins.append(f"LEFT JOIN {table} ON {table}.id = e.{raw}")
                columns.append(f"coalesce({table}.rowid, -1)::INT AS {name}")
            elif f.kind == "number":
                columns.append(f"coalesce(e.{raw}, 'nan'::FLOAT) AS {name}")
            else:
                columns.append(f"e.{raw} AS {name}")
        return (
            f"SELECT {', '.join(columns)} FROM events e {' '.join(joins)} "
            f"ORDER BY {', '.join(order)}"
        )

    def _merged(
        self, new: pa.Table | None, low: int, high: int
    ) -> Iterator[tuple[pa.Table | None, int]]:
        """Yield all events of the users up to `high`, in parts of bounded size."""
        if new is not None:
            new = self._coded(new)
        if self.previous is None:
            yield self._ordered([new]), high
            return
        new_user = array(new, "user") if new is not None else np.empty(0, np.int32)
        done = 0
        while low < high:
            upper = self._bound(high)
            end = int(np.searchsorted(new_user, upper))
            parts = [self._old(section, upper) for section in range(3)]
            if new is not None and end > done:
                parts.append(new.slice(done, end - done))
            yield self._ordered(parts), upper
            low, done = upper, end

    def _bound(self, high: int) -> int:
        """Return the first user after the next part: enough old events, whole users."""
        assert self.previous is not None
        users = self.previous.event_columns["user"]
        upper = high
        for section in range(3):
            place = self.position[section] + BATCH_ROWS
            if place < self.previous.section(section).stop:
                upper = min(upper, int(self.user_map[users[place]]) + 1)
        return upper

    def _old(self, section: int, upper: int) -> pa.Table:
        """Return the next events of a section of the old dataset, of users before `upper`."""
        assert self.previous is not None
        users = self.previous.event_columns["user"]
        begin, stop = self.position[section], self.previous.section(section).stop
        bound = int(np.searchsorted(self.user_map, upper))
        end = begin + int(np.searchsorted(users[begin:stop], bound))
        self.position[section] = end
        table = self.previous.events.slice(begin, end - begin).drop_columns(["history_to"])
        changed = {
            "user": self.user_map[array(table, "user")],
            "item": self.item_map[array(table, "item")],
        }
        for f in context_ids(self.config):
            name, to = f"context.{f.name}", self.value_maps[f.name]
            if f.kind == "id":
                changed[name] = to[array(table, name)]
            else:
                lists = one_chunk(table[name])
                changed[name] = with_values(lists, to[lists.flatten().to_numpy()])
        for name, values in changed.items():
            table = table.set_column(table.column_names.index(name), name, pa.array(values))
        if self.config.split.kind == "given":
            table = table.append_column("split", pa.array(np.full(len(table), section, np.int8)))
        return table

    def _coded(self, table: pa.Table) -> pa.Table:
        """Replace the ids of bags by their codes."""
        for f in context_ids(self.config):
            if f.kind != "ids":
                continue
            name = f"context.{f.name}"
            if f.name not in self.values:
                query = f'SELECT id FROM "values_{f.name}" ORDER BY rowid'
                self.values[f.name] = self.connection.sql(query).fetch_arrow_table()["id"]
            lists = one_chunk(table[name])
            codes = pc.index_in(lists.flatten(), value_set=self.values[f.name])
            coded = with_values(lists, codes.to_numpy(zero_copy_only=False).astype(np.int32))
            table = table.set_column(table.column_names.index(name), name, coded)
        return table

    def _ordered(self, parts: list[pa.Table | None]) -> pa.Table | None:
        """Join parts, each in order and later than the one before, by (user, split, time)."""
        some = [p for p in parts if p is not None and len(p)]
        if not some:
            return None
        first = some[0].column_names
        table = pa.concat_tables([p.select(first) for p in some]).combine_chunks()
        user, split = array(table, "user").astype(np.int64), self._split(table)
        moved = self.config.split.held_out != "none"
        if moved:
            time = array(table, "time")
            split, time = hold_out(array(table, "user"), split, time, self.config.split)
            table = _put(table, "time", time)
        table = _put(table, "split", split)
        if len(some) > 1 or moved:
            order = np.argsort(user * 3 + split, kind="stable")
            table = table.take(pa.array(order))
        return table

    def _split(self, table: pa.Table) -> npt.NDArray[np.int8]:
        kind = self.config.split.kind
        if kind == "temporal":
            return self.cuts.split(array(table, "time"))
        if kind == "leave_last_out":
            return leave_last_out(array(table, "user"))
        return np.asarray(array(table, "split"), np.int8)

    def _emit(self, table: pa.Table | None, low: int, high: int) -> None:
        """Write the events of the users from `low` to before `high`."""
        empty = np.empty(0, np.int64)
        user = array(table, "user").astype(np.int64) - low if table is not None else empty
        item = array(table, "item").astype(np.int64) if table is not None else empty
        split = array(table, "split") if table is not None else empty.astype(np.int8)
        time = array(table, "time") if table is not None else empty
        lengths, prior = self.priors.take(low, high)
        start, history_to, line = timeline(user, item, split, time, lengths, prior)
        self.users.append({"history_from": start + self.length})
        lines: dict[str, npt.NDArray[Any]] = {"item": line.astype(np.int32)}
        if self.config.timed_histories():
            unknown = np.full(len(prior), PAD_INT64)
            lines["seconds"] = timeline(user, time // 1_000_000, split, time, lengths, unknown)[2]
        self.timeline.append(lines)
        if table is not None:
            table = _put(table.drop_columns(["split"]), "history_to", history_to + self.length)
            judged = np.ones(len(split), bool)
            if self.config.columns.train_on == "all":
                # In histories, but nothing to be judged by.
                judged = (split == 0) | np.asarray(table["positive"])
                self.written.dropped += int((~judged).sum())
                table = table.drop_columns(["positive"])
            for number in range(3):
                mask = (split == number) & judged
                if not mask.any():
                    continue
                self.written.add(number, time[mask])
                part = table if mask.all() else table.filter(pa.array(mask))
                self.sections[number].append(
                    {n: one_chunk(part[n]) for n in part.column_names}
                )  # fmt: skip
        self.length += len(line)

    def finish(self, directory: Path) -> None:
        """Write events.arrow (training, validation, test) and timeline.arrow."""
        train, validation, test = self.sections
        train.extend(validation)
        train.extend(test)
        train.finish(directory / "events.arrow")
        self.timeline.finish(directory / "timeline.arrow")


class _Priors:
    """The items from before the log, taken in the order of users."""

    def __init__(self, connection: Any, config: DataConfig) -> None:
        self.batches: Iterator[pa.RecordBatch] = iter(())
        if any(f.column for f in config.histories()):
            query = "SELECT user, item FROM priors ORDER BY rowid"
            self.batches = arrow_batches(connection.cursor(), query)
        self.user = np.empty(0, np.int32)
        self.item = np.empty(0, np.int32)

    def take(self, low: int, high: int) -> tuple[I64, I64]:
        """Return how many each user from `low` to before `high` has, and the items."""
        while not len(self.user) or self.user[-1] < high:
            batch = next(self.batches, None)
            if batch is None:
                break
            self.user = np.concatenate([self.user, batch.column("user").to_numpy()])
            self.item = np.concatenate([self.item, batch.column("item").to_numpy()])
        end = int(np.searchsorted(self.user, high))
        lengths = np.bincount(self.user[:end].astype(np.int64) - low, minlength=high - low)
        items = self.item[:end].astype(np.int64)
        self.user, self.item = self.user[end:], self.item[end:]
        return lengths.astype(np.int64), items


def timeline(
    user: I64, item: I64, split: npt.NDArray[np.int8], time: I64, priors_of: I64, prior: I64
) -> tuple[I64, I64, I64]:
    """Return each user's start, each event's history end, and the items they point into.

    Events come sorted by (user, split, time). A user's part of the timeline holds the items from
    before the log and then the events' own; a history ends before the first event of its moment,
    so events of the same moment do not see each other.

    Args:
        user: from 0 (E,).
        item: rows (E,).
        split: (E,).
        time: (E,).
        priors_of: number of items from before the log of each user (U,).
        prior: those items, user after user.
    """
    num_users = len(priors_of)
    events_of = np.bincount(user, minlength=num_users)
    total = events_of + priors_of
    start = np.cumsum(total) - total
    line = np.empty(int(total.sum()), np.int64)
    place = np.arange(len(user)) - (np.cumsum(events_of) - events_of)[user]
    position = start[user] + priors_of[user] + place
    line[position] = item
    owner = np.repeat(np.arange(num_users), priors_of)
    within = np.arange(len(owner)) - (np.cumsum(priors_of) - priors_of)[owner]
    line[start[owner] + within] = prior
    new_moment = np.ones(len(user), bool)
    new_moment[1:] = (np.diff(user) != 0) | (np.diff(split) != 0) | (np.diff(time) != 0)
    moment = np.maximum.accumulate(np.where(new_moment, np.arange(len(user)), 0))
    return start, position[moment], line


def _put(table: pa.Table, name: str, values: npt.NDArray[Any]) -> pa.Table:
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, pa.array(values))
    return table.append_column(name, pa.array(values))
