"""Features of users in Feast, asked of its feature server (`feast serve`) over HTTP.

The SDK in this process would hold the event loop up while it reads, and would bring pandas and Dask
to every gateway; the server's protocol is one request of JSON:

    POST /get-online-features    {"feature_service": "recommend", "entities": {"user_id": [7]}}
    {"metadata": {"feature_names": ["user_id", "age"]},
     "results": [{"values": [7], "statuses": ["PRESENT"]}, {"values": [31.0], …}]}

Source: https://docs.feast.dev/reference/feature-servers/python-feature-server
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Collection
from typing import Any

import aiohttp

from twotower.errors import UserError
from twotower.serve.gateway.config import FeastConfig
from twotower.serve.gateway.observe import LOG
from twotower.serve.gateway.store import DamagedRecord, Record, StoreUnavailable

TOKEN = "TWOTOWER_FEAST_TOKEN"
# Of an error's text, which may be a whole traceback.
SHOWN = 200
# At the start nobody waits for an answer, and a first one takes longer.
CHECK_S = 5.0
# Of the answers 4xx, those that may be others a moment later.
BUSY = (408, 429)


class FeastFeatures:
    """What Feast knows of users; to be made where the event loop runs.

    Args:
        config: of it.
        user_id_dtype: string or int64.
        timeout_s: of each answer and connection.
    """

    def __init__(self, config: FeastConfig, user_id_dtype: str, timeout_s: float) -> None:
        assert config.url is not None
        self._config, self._timeout_s = config, timeout_s
        self._url = f"{config.url.rstrip('/')}/get-online-features"
        self._anybody: Any = 0 if user_id_dtype == "int64" else "0"
        token = os.environ.get(TOKEN)
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            # Those under way are limited already.
            connector=aiohttp.TCPConnector(limit=0),
        )

    async def get(self, user: Any) -> Record | None:
        """Return a user's features, None for one of whom there are none.

        Raises:
            StoreUnavailable: when Feast does not answer, or with an error.
            DamagedRecord: when its answer is none.
        """
        status, text = await self._ask(user, self._timeout_s)
        if status != 200:
            raise StoreUnavailable(_error(status, text))
        features = {n: v for n, v in parse_features(text).items() if v is not None}
        features.pop(self._config.entity, None)  # comes back as it was sent
        return Record(features) if features else None

    async def ping(self) -> None:
        """Return when Feast answers for a user, who need not be there."""
        await self.get(self._anybody)

    async def check(self, names: Collection[str]) -> None:
        """Refuse settings with which no request could be answered; a silent Feast may yet answer.

        Args:
            names: of the features that the model takes.

        Raises:
            UserError: for a feature service that is not there, or has nothing for the model.
        """
        service = f"gateway.feast.service: '{self._config.service}' at {self._config.url}"
        try:
            status, text = await self._ask(self._anybody, CHECK_S)
        except StoreUnavailable as error:
            status, text = 503, str(error).encode()
        if 400 <= status < 500 and status not in BUSY:
            raise UserError(
                f"{service} is refused ({_error(status, text)}): name a service that `feast "
                f"feature-services list` shows; {TOKEN} holds the token where Feast wants one"
            )
        if status != 200:
            fields = {"of": "features", "reason": _error(status, text)}
            LOG.warning("feature store silent", extra={"fields": fields})
            return
        try:
            known = set(parse_features(text)) - {self._config.entity}
        except DamagedRecord as error:
            raise UserError(
                f"gateway.feast.url: {self._config.url} answers, but not as a feature server of "
                f"Feast ({error}): name the address at which `feast serve` listens"
            ) from None
        if not known & set(names):
            raise UserError(
                f"{service} has the features {', '.join(sorted(known))}, of which the model takes "
                f"none: it takes {', '.join(names)}; name a service whose features are called so"
            )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _ask(self, user: Any, timeout_s: float) -> tuple[int, bytes]:
        body = {"feature_service": self._config.service, "entities": {self._config.entity: [user]}}
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.post(self._url, json=body, timeout=timeout) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
            raise StoreUnavailable(str(error) or type(error).__name__) from None


def parse_features(text: bytes) -> dict[str, Any]:
    """Return the features of one user in Feast's answer; None for those that are not known.

    Raises:
        DamagedRecord: where it is no such answer.
    """
    try:
        answer = json.loads(text)
        found = {}
        for name, column in zip(
            answer["metadata"]["feature_names"], answer["results"], strict=True
        ):  # fmt: skip
            (value,), (status,) = column["values"], column["statuses"]
            # Others are NOT_FOUND, and OUTSIDE_MAX_AGE, whose value Feast holds to be too old.
            found[str(name)] = value if status == "PRESENT" else None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedRecord(f"no features of a user: {error!r:.{SHOWN}}") from None
    return found


def _error(status: int, text: bytes) -> str:
    shown = " ".join(text[:SHOWN].decode(errors="replace").split())
    return f"HTTP {status}: {shown}"
