"""A circuit breaker: what keeps failing is left alone for a while, then tried with one request.

After M. Nygard, Release It! (2007), chapter 5.
"""

from __future__ import annotations

import time

# A hiccup of a moment fails all requests that are under way in a row, and is over then.
LASTING_S = 0.2


class Breaker:
    """Lets requests through until some have failed in a row, and for more than a moment.

    Args:
        failures: so many in a row open the circuit.
        retry_s: seconds after which one request tries whether it can be closed.
        lasting_s: seconds from the first of them to the last.
    """

    def __init__(self, failures: int, retry_s: float, lasting_s: float = LASTING_S) -> None:
        self._limit, self._retry_s, self._lasting_s = failures, retry_s, lasting_s
        self._failed, self._since, self._next_try = 0, 0.0, 0.0
        self.is_open = False

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
        self._failed, self.is_open = 0, False

    def failed(self) -> None:
        """Note that none came."""
        now = time.monotonic()
        if self._failed == 0:
            self._since = now
        self._failed += 1
        if self._failed >= self._limit and now - self._since >= self._lasting_s:
            self.is_open, self._next_try = True, now + self._retry_s
