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

from twotower.errors import UserError
from twotower.serve.client import ServerUnavailable
from twotower.serve.gateway.defaults import Defaults, read_defaults
from twotower.serve.gateway.observe import LOG
from twotower.serve.request import Schema


class Following:
    """Has the API made anew for a schema that requests depend on.

    Args:
        schema: that the API was made for.
        defaults_file: what `load-store` wrote.
        remake: makes the API anew.
    """

    def __init__(
        self, schema: Schema, defaults_file: Path, remake: Callable[[Schema, Defaults], None]
    ) -> None:
        self._schema, self._file, self._remake = schema, defaults_file, remake
        self._refused: str | None = None
        self._lock = asyncio.Lock()

    async def follow(self, schema: Schema) -> None:
        """Take note of what a server serves.

        Raises:
            ServerUnavailable: where that cannot be followed.
        """
        async with self._lock:
            if _shape(schema) == _shape(self._schema):
                self._refused = None
                return
            try:
                self._take(schema)
            except UserError as error:
                if str(error) != self._refused:  # said once, however often it is tried
                    self._refused = str(error)
                    fields = {"version": schema.version, "reason": self._refused}
                    LOG.warning("schema not followed", extra={"fields": fields})
                raise ServerUnavailable(f"version {schema.version}: {error}") from None
            self._schema, self._refused = schema, None
            LOG.info("schema followed", extra={"fields": {"version": schema.version}})

    def _take(self, schema: Schema) -> None:
        if schema.item_id_dtype != self._schema.item_id_dtype:
            raise UserError(
                f"item ids are of type {schema.item_id_dtype}, not {self._schema.item_id_dtype}: "
                "run `twotower load-store` and start the gateway again"
            )
        defaults = read_defaults(self._file)
        defaults.check(schema.features, self._file)
        self._remake(schema, defaults)


def _shape(schema: Schema) -> Schema:
    """Return the part of a schema that requests depend on."""
    return replace(schema, version=0, num_items=0, dim=0, bias=False)
