"""What is known of a user: by the store, and by the feature store beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from twotower.serve.gateway.config import GatewayConfig
from twotower.serve.gateway.feast import FeastFeatures
from twotower.serve.gateway.guard import Guard
from twotower.serve.gateway.observe import Metrics
from twotower.serve.gateway.schemas import Bodies
from twotower.serve.gateway.store import DamagedRecord, HistoryStore, Record, StoreUnavailable


class Users:
    """Looks users up.

    Args:
        store: what knows them.
        feast: what knows features of theirs that go before the store's; None for no such.
        bodies: by whose types what they hold is checked.
        config: of the gateway.
        metrics: to count in.
    """

    def __init__(
        self, store: HistoryStore, feast: FeastFeatures | None, bodies: Bodies,
        config: GatewayConfig, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._store, self._feast, self._config, self._metrics = store, feast, config, metrics
        self._to_store = Guard("store", config, metrics)
        self._to_feast = Guard("features", config, metrics)
        self.take(bodies)

    def take(self, bodies: Bodies) -> None:
        """Check by other types from now on."""
        self._record = bodies.record
        self._names = {field.alias for field in bodies.features.model_fields.values()}

    async def look_up(self, user: Any, left_s: float) -> tuple[Record | None, str | None]:
        """Return what is known of a user, and the store that was silent: store, features.

        The first is None for a user whom nobody knows, the second where all have answered.
        """
        if user is None:
            return None, None
        timeout_ms = self._config.store_timeout_ms
        asked = self._known(self._to_store, self._store, user, timeout_ms, left_s)
        if self._feast is None:
            return await asked
        timeout_ms = self._config.feast.timeout_ms
        (record, silent), (own, no_features) = await asyncio.gather(
            asked, self._known(self._to_feast, self._feast, user, timeout_ms, left_s)
        )
        if own is not None:
            record = record or Record()
            record = replace(record, features=record.features | own.features)
        return record, silent or no_features

    async def append(self, user: Any, items: Sequence[Any], times: Sequence[int | None]) -> None:
        """Add events to a user's history.

        Raises:
            StoreUnavailable: when the store has not taken them.
        """
        # Nobody waits for an answer that the model must still give.
        timeout_s = self._config.deadline_ms / 1000
        await self._to_store.ask(self._store.append(user, items, times), timeout_s)

    async def answer(self) -> bool:
        """Return whether the stores answer a ping within the deadline."""
        timeout_s = self._config.deadline_ms / 1000
        try:
            await self._to_store.ask(self._store.ping(), timeout_s)
            if self._feast is not None:
                await self._to_feast.ask(self._feast.ping(), timeout_s)
        except StoreUnavailable:
            return False
        return True

    async def _known(
        self, guard: Guard, store: HistoryStore | FeastFeatures, user: Any, timeout_ms: float,
        left_s: float,
    ) -> tuple[Record | None, str | None]:  # fmt: skip
        """Return what one store knows of a user, or its name where it does not say."""
        started = time.monotonic()
        try:
            record = await guard.ask(self._checked(store, user), timeout_ms / 1000, left_s)
        except StoreUnavailable:
            return None, guard.name
        self._metrics.store_seconds.labels(guard.name).observe(time.monotonic() - started)
        return record, None

    async def _checked(self, store: HistoryStore | FeastFeatures, user: Any) -> Record | None:
        record = await store.get(user)
        if record is None:
            return None
        # What another job or a mistake has left there is no fault of the caller's.
        known = {n: v for n, v in record.features.items() if n in self._names}
        record = replace(record, features=known)
        try:
            self._record.model_validate(vars(record))
        except ValidationError as error:
            raise DamagedRecord(f"user {user!r}: {error.errors()[0]['msg']}") from None
        return record
