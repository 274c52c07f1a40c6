"""What is known of users: their features, and the items that they took, oldest first.

In Redis a user has two keys, read in one round trip; the history is a list of its own so that Redis
itself can add to it and cut it, and nothing is read to be written back:

    <job>:features:<user>   STRING, a JSON object: feature -> value
    <job>:history:<user>    LIST, newest first, of "<seconds since 1970>:<item>"; the seconds are
                            empty where they are not known

In memory (development) users come from a JSON-lines file of `{"user", "features", "items",
"times"}`, and what is appended is forgotten at the end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from twotower.errors import UserError
from twotower.serve.gateway.config import MEMORY, GatewayConfig

PASSWORD = "TWOTOWER_REDIS_PASSWORD"
BATCH = 500


class StoreUnavailable(Exception):
    """The store gave no answer."""


class DamagedRecord(StoreUnavailable):
    """The store is there, but what it holds of this user cannot be read."""


@dataclass(frozen=True)
class Record:
    """What a store knows of one user.

    Attributes:
        features: raw values by the model's names.
        items: ids, oldest first.
        times: when each was taken, in seconds since 1970; None where it is not known.
    """

    features: dict[str, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)
    times: list[int | None] = field(default_factory=list)


class HistoryStore(Protocol):
    """Where the gateway looks users up; every method may raise `StoreUnavailable`."""

    async def get(self, user: Any) -> Record | None:
        """Return what is known of a user, None for one that is not."""
        ...

    async def append(self, user: Any, items: Sequence[Any], times: Sequence[int | None]) -> None:
        """Add what a user has just taken, oldest first; only the newest entries are kept."""
        ...

    async def ping(self) -> None:
        """Return when the store answers."""
        ...

    async def close(self) -> None:
        """Close its connections."""
        ...


class MemoryStore:
    """A store in this process, for development.

    Args:
        users: all that is known.
        length: newest items kept of a user.
    """

    def __init__(self, users: dict[Any, Record], length: int) -> None:
        self._users = {user: _newest(record, length) for user, record in users.items()}
        self._length = length

    async def get(self, user: Any) -> Record | None:
        """Return what is known of a user, None for one that is not."""
        return self._users.get(user)

    async def append(self, user: Any, items: Sequence[Any], times: Sequence[int | None]) -> None:
        """Add what a user has just taken."""
        old = self._users.get(user, Record())
        self._users[user] = _newest(
            Record(old.features, [*old.items, *items], [*old.times, *times]), self._length
        )

    async def ping(self) -> None:
        """Return at once."""

    async def close(self) -> None:
        """Nothing is open."""


class RedisStore:
    """A store in Redis; the layout is the module's.

    Args:
        url: redis://HOST:PORT/DB or rediss://.
        prefix: first part of every key.
        item_id_dtype: string or int64.
        length: newest items kept of a user.
        timeout_s: of each answer and connection.
    """

    def __init__(
        self, url: str, prefix: str, item_id_dtype: str, length: int, timeout_s: float
    ) -> None:
        from redis import asyncio as redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff

        options: dict[str, Any] = {
            "socket_timeout": timeout_s, "socket_connect_timeout": timeout_s,
            # What fails is done without: a second try would take the model's time.
            "retry": Retry(NoBackoff(), 0),
        }  # fmt: skip
        if password := os.environ.get(PASSWORD):
            options["password"] = password
        try:
            self._redis = redis.Redis.from_url(url, **options)
        except ValueError as error:
            shown = url.rpartition("@")[2]  # without a password
            raise UserError(f"gateway.store: '{shown}' is no Redis URL ({error})") from None
        self._prefix, self._length = prefix, length
        self._item = str if item_id_dtype == "string" else int

    def _keys(self, user: Any) -> tuple[str, str]:
        return f"{self._prefix}:features:{user}", f"{self._prefix}:history:{user}"

    async def get(self, user: Any) -> Record | None:
        """Return what is known of a user, None for one that is not."""
        features, history = self._keys(user)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.get(features)
            pipe.lrange(history, 0, self._length - 1)
            text, entries = await self._execute(pipe)
        if text is None and not entries:
            return None
        try:
            known = {} if text is None else json.loads(text)
            parts = [entry.decode().partition(":") for entry in reversed(entries)]
            items = [self._item(item) for _, _, item in parts]
            times = [int(seconds) if seconds else None for seconds, _, _ in parts]
            if not isinstance(known, dict):
                raise ValueError("features are no JSON object")
        except ValueError as error:  # broken JSON, UTF-8 or numbers
            raise DamagedRecord(f"user {user!r}: {error}") from None
        return Record(known, items, times)

    async def append(self, user: Any, items: Sequence[Any], times: Sequence[int | None]) -> None:
        """Add what a user has just taken."""
        _, history = self._keys(user)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.lpush(history, *_entries(items, times))
            pipe.ltrim(history, 0, self._length - 1)
            await self._execute(pipe)

    async def put(self, users: Iterable[tuple[Any, Record]]) -> int:
        """Replace what is known of users; returns their number."""
        users, count = iter(users), 0
        while batch := list(islice(users, BATCH)):
            async with self._redis.pipeline(transaction=True) as pipe:
                for user, record in batch:
                    features, history = self._keys(user)
                    pipe.set(features, json.dumps(record.features))
                    pipe.delete(history)
                    if entries := _entries(record.items, record.times)[-self._length :]:
                        pipe.lpush(history, *entries)
                await self._execute(pipe)
            count += len(batch)
        return count

    @staticmethod
    async def _execute(pipe: Any) -> list[Any]:
        from redis.exceptions import RedisError

        try:
            results = await pipe.execute(raise_on_error=False)
        except (RedisError, OSError) as error:
            raise StoreUnavailable(str(error) or type(error).__name__) from None
        for result in results:
            if isinstance(result, Exception):
                wrong = "WRONGTYPE" in str(result)
                raise (DamagedRecord if wrong else StoreUnavailable)(str(result))
        return list(results)

    async def ping(self) -> None:
        """Return when Redis answers."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.ping()
            await self._execute(pipe)

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


def _newest(record: Record, length: int) -> Record:
    return Record(record.features, record.items[-length:], record.times[-length:])


def _entries(items: Sequence[Any], times: Sequence[int | None]) -> list[str]:
    return [
        f"{'' if seconds is None else seconds}:{item}"
        for item, seconds in zip(items, times, strict=True)
    ]


def write_users(path: Path, users: Iterable[tuple[Any, Record]]) -> int:
    """Write the file that the store in memory begins with, atomically; returns their number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count = path.with_name(path.name + ".partial"), 0
    with partial.open("w") as handle:
        for user, record in users:
            handle.write(json.dumps({"user": user, **vars(record)}) + "\n")
            count += 1
    partial.replace(path)
    return count


def read_users(path: Path) -> dict[Any, Record]:
    """Read a file of `write_users`.

    Raises:
        UserError: when it is not there, or a line is no user.
    """
    users = {}
    try:
        handle = path.open()
    except FileNotFoundError:
        raise UserError(
            f"{path}: not there, the store in memory has no users: run `twotower load-store` with "
            "this job, or name a Redis in gateway.store"
        ) from None
    with handle:
        lines = list(handle)
    for number, line in enumerate(lines, start=1):
        try:
            raw = json.loads(line)
            items = list(raw.get("items", []))
            times = list(raw.get("times") or [None] * len(items))
            if len(times) != len(items):
                raise ValueError(f"{len(items)} items, but {len(times)} times")
            users[raw["user"]] = Record(dict(raw.get("features", {})), items, times)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}, line {number}: is no user ({error}): expected a JSON object of user, "
                "features, items and times, as `twotower load-store` writes it"
            ) from None
    return users


def open_store(config: GatewayConfig, name: str, folder: Path, item_id_dtype: str) -> HistoryStore:
    """Return the store that the configuration names.

    Args:
        config: of the gateway.
        name: of the job, with which keys begin.
        folder: holds the file of users.
        item_id_dtype: string or int64.
    """
    if config.store == MEMORY:
        return MemoryStore(read_users(folder / "users.jsonl"), config.history_length)
    return RedisStore(
        config.store, name, item_id_dtype, config.history_length, config.deadline_ms / 1000
    )
