"""A circuit breaker: what keeps failing is left alone for a while, then tried with one request.

After M. Nygard, Release It! (2007), chapter 5.
"""

from __future__ import annotations

import time


class Breaker:
    """Lets requests through until some have failed in a row.

    Args:
        failures: so many in a row open the circuit.
        retry_s: seconds after which one request tries whether it can be closed.
    """

    def __init__(self, failures: int, retry_s: float) -> None:
        self._limit, self._retry_s = failures, retry_s
        self._failed, self._next_try = 0, 0.0

    @property
    def is_open(self) -> bool:
        """Whether requests are held back."""
        return self._failed >= self._limit

    def allows(self) -> bool:
        """Whether a request may go; whoever asks and may, does send it."""
        if not self.is_open:
            return True
        now = time.monotonic()
        if now < self._next_try:
            return False
        # The others wait for the outcome of this one.
        self._next_try = now + self._retry_s
        return True

    def succeeded(self) -> None:
        """Note an answer."""
        self._failed = 0

    def failed(self) -> None:
        """Note that none came."""
        self._failed += 1
        if self.is_open:
            self._next_try = time.monotonic() + self._retry_s
