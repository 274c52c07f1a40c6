"""Errors that answer: what, where, what was expected, what to do.

Every floor raises `UserError` for a mistake that a user can mend; the command prints it alone and
exits with code 2. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class UserError(ValueError):
    """A mistake in the input, with its place and its remedy in the message."""


def gigabytes(size: int) -> str:
    """Return bytes as text, in GB or MB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def one_of(key: str, value: str, known: Collection[str]) -> None:
    """Refuse a value that is none of `known`.

    Raises:
        UserError: naming the key.
    """
    if value not in known:
        raise UserError(
            f"{key} must be one of {', '.join(known)}, got '{value}'{did_you_mean(value, known)}"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest of `known`, or the list of them.

    Args:
        name: what the user wrote.
        known: what could have been meant.
    """
    options = sorted(set(known))
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(options)}" if options else ""
