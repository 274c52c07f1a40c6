"""Writing a safetensors file as a stream: a header of JSON, then the tensors' bytes.

The library writes what is whole in memory. Here a tensor may come in blocks of rows, so that a
table larger than memory can be written, and the SHA-256 is computed on the way. Reading is the
library's (`safetensors.safe_open`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from twotower.train.checkpoint.manifest import StoredFile, as_bytes, naming

# Names of the format for torch's types.
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        key: its name in the file.
        dtype: of its elements.
        shape: of the whole.
        blocks: its elements in order, as CPU tensors.
    """

    key: str
    dtype: torch.dtype
    shape: Sequence[int]
    blocks: Iterable[Tensor]


def write_safe_file(
    path: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
) -> StoredFile:
    """Write a safetensors file, to the disk itself.

    Raises:
        OSError: naming the file, for instance when the disk is full.
        TypeError: for a type of element that the format does not know.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in entries:
        if entry.dtype not in TYPES:
            raise TypeError(f"a checkpoint cannot hold {entry.key}, of {entry.dtype}")
        start, end = end, end + torch.Size(entry.shape).numel() * entry.dtype.itemsize
        header[entry.key] = {
            "dtype": TYPES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    digest, size = hashlib.sha256(), 0
    with naming(path), path.open("wb") as file:
        for piece in _pieces(text, entries):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        # Here: on a shared file system another host cannot do it for this one.
        file.flush()
        os.fsync(file.fileno())
    if size != 8 + len(text) + end:
        raise ValueError(f"{path}: {size} bytes were written, {8 + len(text) + end} were announced")
    return StoredFile(bytes=size, sha256=digest.hexdigest())


def _pieces(text: bytes, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    yield len(text).to_bytes(8, "little")
    yield text
    for entry in entries:
        for block in entry.blocks:
            if block.numel():
                yield as_bytes(block.to(entry.dtype).contiguous())
