"""Strings of BYTES tensors as KServe v2 has them on the wire: each after its length in 4 bytes.

Imports nothing of twotower's: clients import it, and it is copied beside the models, into Triton.
"""

from __future__ import annotations

import struct

LENGTH = struct.Struct("<I")


def serialize(strings: list[bytes]) -> bytes:
    """Return strings, each after its length in 4 bytes."""
    lengths = list(map(len, strings))
    prefixes = {length: LENGTH.pack(length) for length in set(lengths)}
    if len(prefixes) == 1:
        (prefix,) = prefixes.values()
        return prefix + prefix.join(strings)
    # Both in turn, without a step of Python's for each.
    parts = [b""] * (2 * len(strings))
    parts[::2] = map(prefixes.__getitem__, lengths)
    parts[1::2] = strings
    return b"".join(parts)


def deserialize(raw: bytes) -> list[bytes]:
    """Return the strings that `serialize` wrote.

    Raises:
        struct.error: where they end too early.
    """
    strings, start, end = [], 0, len(raw)
    while start < end:
        (length,) = LENGTH.unpack_from(raw, start)
        start += 4 + length
        strings.append(raw[start - length : start])
    if start > end:
        raise struct.error(f"a string of {length} bytes ends {start - end} bytes too early")
    return strings
