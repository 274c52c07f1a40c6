"""Rewriting checkpoints: for another number of ranks, or as one file of plain tensors.

Both go through tables in blocks of rows: what is in memory is a block, not a table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from twotower.errors import UserError
from twotower.files import atomic_directory, partial_path
from twotower.train.checkpoint.manifest import (
    MODEL,
    NAME,
    Chunk,
    Manifest,
    StoredFile,
    StoredTensor,
    check,
    chunk_in,
    versions,
    write_manifest,
)
from twotower.train.checkpoint.safe_file import Entry, write_safe_file
from twotower.train.checkpoint.storage import rank_file
from twotower.train.checkpoint.towers import MODEL_SPEC

BLOCK_BYTES = 32 << 20


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or that of a training directory.

    Raises:
        UserError: when there is none.
    """
    for candidate in (path, path / "checkpoint", path / "train" / "checkpoint"):
        if (candidate / NAME).is_file():
            return candidate
    raise UserError(
        f"{path}: holds no checkpoint: expected a directory with {NAME}, a training directory or "
        "a run_dir"
    )


def read_rows(directory: Path, tensor: StoredTensor, start: int, stop: int) -> Tensor:
    """Return rows [start, stop) of a stored tensor, whatever its chunks; all of a number."""
    if not tensor.shape:
        with safe_open(directory / tensor.chunks[0].file, framework="pt") as file:
            number: Tensor = file.get_tensor(tensor.chunks[0].key)
            return number
    out = torch.empty((stop - start, *tensor.shape[1:]), dtype=tensor.dtype)
    for chunk in tensor.chunks:
        first = max(start, chunk.offset[0])
        last = min(stop, chunk.offset[0] + chunk.shape[0])
        if first >= last:
            continue
        beside = tuple(
            slice(low, low + length)
            for low, length in zip(chunk.offset[1:], chunk.shape[1:], strict=True)
        )
        with safe_open(directory / chunk.file, framework="pt") as file:
            rows = file.get_slice(chunk.key)[first - chunk.offset[0] : last - chunk.offset[0]]
        out[(slice(first - start, last - start), *beside)] = rows
    return out


def row_blocks(directory: Path, tensor: StoredTensor, start: int, stop: int) -> Iterator[Tensor]:
    """Yield rows [start, stop) in blocks of some megabytes."""
    if not tensor.shape:
        yield read_rows(directory, tensor, 0, 1)
        return
    row_bytes = max(1, tensor.bytes // max(1, tensor.shape[0]))
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(start, stop, step):
        yield read_rows(directory, tensor, first, min(first + step, stop))


def reshard(source: Path, target: Path, ranks: int) -> Manifest:
    """Write a checkpoint again as `ranks` ranks would that share every tensor's rows.

    A checkpoint loads on any number of ranks as it is; of one that was written for as many, each
    reads one file.

    Raises:
        UserError: when the source is damaged, or the target exists.
        OSError: naming the file, for instance when the disk is full.
    """
    if ranks < 1:
        raise UserError(f"--ranks must be >= 1, got {ranks}")
    _refuse_existing(target)
    manifest = check(source)
    chunks: dict[str, list[Chunk]] = {name: [] for name in manifest.tensors}
    files: dict[str, StoredFile] = {}
    with atomic_directory(target) as partial:
        for rank in range(ranks):
            entries = []
            for name, tensor in manifest.tensors.items():
                start, stop = _share(tensor, rank, ranks)
                if start == stop:
                    continue
                shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
                offset = (start, *(0 for _ in tensor.shape[1:])) if tensor.shape else ()
                chunk = chunk_in(rank_file(rank), name, offset, shape)
                blocks = row_blocks(source, tensor, start, stop)
                entries.append(Entry(chunk.key, tensor.dtype, shape, blocks))
                chunks[name].append(chunk)
            if entries:
                files[rank_file(rank)] = write_safe_file(partial / rank_file(rank), entries)
        tensors = {
            name: StoredTensor(shape=t.shape, type=t.type, chunks=tuple(chunks[name]))
            for name, t in manifest.tensors.items()
        }
        written = Manifest(
            ranks=ranks, tensors=tensors, files=files, state=manifest.state, versions=versions()
        )
        write_manifest(partial, written)
    return written


def _share(tensor: StoredTensor, rank: int, ranks: int) -> tuple[int, int]:
    """Return the rows of a rank; what is too small to share is rank 0's."""
    rows = tensor.shape[0] if tensor.shape else 1
    if rows < ranks:
        return (0, rows) if rank == 0 else (0, 0)
    return rows * rank // ranks, rows * (rank + 1) // ranks


def consolidate(source: Path, target: Path) -> StoredFile:
    """Write the towers' tensors, whole, into one safetensors file.

    `safetensors.torch.load_file` gives a state dict that fits an unsharded `TwoTower`; the file's
    metadata holds what that is built from, as `model`, where the source lies in a training
    directory.

    Raises:
        UserError: when the source is damaged, or the target exists.
        OSError: naming the file, for instance when the disk is full.
    """
    _refuse_existing(target)
    manifest = check(source)
    entries = [
        Entry(
            name.removeprefix(MODEL), tensor.dtype, tensor.shape,
            row_blocks(source, tensor, 0, tensor.shape[0] if tensor.shape else 1),
        )
        for name, tensor in manifest.tensors.items() if name.startswith(MODEL)
    ]  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    try:
        written = write_safe_file(partial, entries, _about(source, manifest))
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)
    return written


def _about(source: Path, manifest: Manifest) -> dict[str, str]:
    """Return a consolidated file's metadata."""
    about = {"versions": json.dumps(manifest.versions)}
    # `checkpoint/`, or one of `checkpoints/`.
    for folder in (source.parent, source.parent.parent):
        if (folder / MODEL_SPEC).is_file():
            return {**about, "model": (folder / MODEL_SPEC).read_text()}
    return about


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: is there already: remove it, or give another path")
