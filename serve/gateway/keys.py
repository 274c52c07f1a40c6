"""API keys: who may ask, and how often. Only their SHA-256 is kept."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from twotower.errors import UserError
from twotower.serve.gateway.config import GatewayConfig

VARIABLE = "TWOTOWER_GATEWAY_KEYS"
EXPECTED = "expected NAME, the key's SHA-256 in hex and, if need be, its requests a second"


class Bucket:
    """A token bucket that holds one second's worth.

    Args:
        rate: requests a second.
    """

    def __init__(self, rate: float) -> None:
        self._rate, self._size = rate, max(1.0, rate)
        self._tokens, self._at = self._size, time.monotonic()

    def take(self) -> float:
        """Take a token; returns 0, or the seconds after which there is one."""
        now = time.monotonic()
        self._tokens = min(self._size, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


@dataclass(frozen=True)
class ApiKey:
    """A key that may ask.

    Attributes:
        name: as logs and metrics have it.
        digest: SHA-256 of the key.
        bucket: of its requests.
    """

    name: str
    digest: bytes
    bucket: Bucket


class Keys:
    """All keys."""

    def __init__(self, keys: list[ApiKey]) -> None:
        self._keys = keys

    def find(self, token: bytes) -> ApiKey | None:
        """Return the key that a caller sent, None where it is none.

        Every key is compared, each in constant time, so that how long it takes tells nothing.
        """
        digest, found = hashlib.sha256(token).digest(), None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(config: GatewayConfig) -> Keys | None:
    """Return the keys of the file, or of the environment; None where none is needed.

    Raises:
        UserError: for a line that is no key, or where others could ask without one.
    """
    if config.keys is not None:
        where, text = config.keys, Path(config.keys).read_text()
    else:
        where, text = VARIABLE, os.environ.get(VARIABLE, "")
    keys = parse_keys(text, where, config.key_rate)
    if keys:
        return Keys(keys)
    if config.keys is not None:
        raise UserError(f"{where}: holds no key: {EXPECTED}, a line each")
    if not config.is_local:
        raise UserError(
            f"gateway.host is {config.host}, which other machines reach, but there are no API "
            f"keys: name a file in gateway.keys, set {VARIABLE}, or bind it to 127.0.0.1"
        )
    return None


def parse_keys(text: str, where: str, rate: float) -> list[ApiKey]:
    """Read lines of keys; empty ones and those that begin with # are none.

    Raises:
        UserError: naming the line, without what it holds.
    """
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if not 2 <= len(parts) <= 3 or not re.fullmatch(r"[0-9a-fA-F]{64}", parts[1]):
            raise UserError(f"{where}, line {number}: is no key: {EXPECTED}")
        own = parts[2] if len(parts) == 3 else str(rate)
        if not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", own) or not 0 < float(own) < 1e9:
            raise UserError(
                f"{where}, line {number}: requests a second must be a number above 0, got '{own}'"
            )
        if parts[0] in keys:
            raise UserError(f"{where}, line {number}: the name {parts[0]} stands twice: rename one")
        keys[parts[0]] = ApiKey(parts[0], bytes.fromhex(parts[1]), Bucket(float(own)))
    return list(keys.values())
