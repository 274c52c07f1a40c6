"""Asking again: within the request's deadline, at random pauses, and never as a storm.

A pause doubles from try to try, and half of it is drawn at random, so that clients that failed
together do not come back together. A client whose requests mostly fail stops asking again until
they succeed: every failure takes a token and every answer gives a tenth back, and there is no new
try below half of the tokens (as gRPC throttles retries, gRFC A6).
"""

from __future__ import annotations

import random

from twotower.errors import UserError

FIRST_PAUSE_S = 0.05
MOST_PAUSE_S = 1.0
TOKENS = 10.0
RETURNED = 0.1


class Retries:
    """Says whether and when a client asks again.

    Args:
        most: further tries of one request after the first.
    """

    def __init__(self, most: int) -> None:
        if most < 0:
            raise UserError(f"retries must be >= 0, got {most}: 0 asks once")
        self.most, self._tokens = most, TOKENS

    def succeeded(self) -> None:
        """Note an answer."""
        self._tokens = min(TOKENS, self._tokens + RETURNED)

    def pause_s(self, tries: int, left_s: float) -> float | None:
        """Note a failure, and return the seconds to wait before the next try.

        Args:
            tries: of this request so far.
            left_s: until its deadline.

        Returns:
            None when there is no next try.
        """
        self._tokens = max(0.0, self._tokens - 1)
        pause = min(MOST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (tries - 1)) * random.uniform(0.5, 1)
        if tries > self.most or self._tokens < TOKENS / 2 or pause >= left_s:
            return None
        return pause
