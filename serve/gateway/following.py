"""Following what is served: a rollout may bring other features while the gateway runs.

Bodies, their checks and the OpenAPI document are made for one schema. When a server is heard to
serve another, the defaults are read again (`twotower load-store` has written them for the new one)
and all of it is made anew. Where they do not fit its features, or the item ids have become of
another type, what was made stays, and that server counts as one that does not answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.serve.client import ServerUnavailable
from twotower.serve.gateway.defaults import Defaults, read_defaults
from twotower.serve.gateway.observe import LOG
from twotower.serve.request import Schema

Remake = Callable[[Schema, list[TensorSpec], Defaults], None]


class Following:
    """Has the API made anew for a schema that requests depend on.

    Args:
        schema: that the API was made for.
        items: and the features of embed_items; empty without such.
        defaults_file: what `load-store` wrote.
        remake: makes the API anew.
    """

    def __init__(
        self, schema: Schema, items: list[TensorSpec], defaults_file: Path, remake: Remake
    ) -> None:
        self._schema, self._items = schema, items
        self._file, self._remake = defaults_file, remake
        self._refused: str | None = None
        self._lock = asyncio.Lock()

    @property
    def embeds_items(self) -> bool:
        """Whether features of items matter."""
        return bool(self._items)

    async def follow(self, schema: Schema, items: list[TensorSpec] | None) -> None:
        """Take note of what a server serves.

        Args:
            schema: of `recommend`.
            items: features of embed_items; None where they are not known, and stay.

        Raises:
            ServerUnavailable: where that cannot be followed.
        """
        async with self._lock:
            items = self._items if items is None else items
            if (_shape(schema), items) == (_shape(self._schema), self._items):
                self._refused = None
                return
            try:
                self._take(schema, items)
            except UserError as error:
                if str(error) != self._refused:  # said once, however often it is tried
                    self._refused = str(error)
                    fields = {"version": schema.version, "reason": self._refused}
                    LOG.warning("schema not followed", extra={"fields": fields})
                raise ServerUnavailable(f"version {schema.version}: {error}") from None
            self._schema, self._items, self._refused = schema, items, None
            LOG.info("schema followed", extra={"fields": {"version": schema.version}})

    def _take(self, schema: Schema, items: list[TensorSpec]) -> None:
        if schema.item_id_dtype != self._schema.item_id_dtype:
            raise UserError(
                f"item ids are of type {schema.item_id_dtype}, not {self._schema.item_id_dtype}: "
                "run `twotower load-store` and start the gateway again"
            )
        defaults = read_defaults(self._file)
        defaults.check(schema.features, self._file)
        self._remake(schema, items, defaults)


def _shape(schema: Schema) -> Schema:
    """Return the part of a schema that requests depend on."""
    return replace(schema, version=0, num_items=0, dim=0, bias=False)
