"""checkpoint.json: what a checkpoint's files hold, and whether they are whole.

<checkpoint>/
checkpoint.json            tensors, their chunks, the files' SHA-256, the state that is no tensor
rank-00000.safetensors     what rank 0 wrote
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twotower.errors import UserError
from twotower.files import sha256_file
from twotower.train.checkpoint.state import decode, encode

NAME = "checkpoint.json"
FORMAT = 1
# What the paths of the towers' tensors begin with.
MODEL = "model/"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A block of a tensor.

    Attributes:
        offset: of its first element in the tensor.
        shape: of the block.
        file: that holds it.
        key: its name there.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    key: str


def chunk_in(file: str, path: str, offset: Sequence[int], shape: Sequence[int]) -> Chunk:
    """Return a block of the tensor at `path`, under a name that no other in its file has."""
    key = f"{path}@{','.join(map(str, offset))}"
    return Chunk(offset=tuple(offset), shape=tuple(shape), file=file, key=key)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint.

    Attributes:
        shape: of the whole.
        type: torch's name of its elements, for instance float32.
        chunks: that it is made of.
    """

    shape: tuple[int, ...]
    type: str
    chunks: tuple[Chunk, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Torch's type of the elements."""
        kind: torch.dtype = getattr(torch, self.type)
        return kind

    @property
    def bytes(self) -> int:
        """Size of the elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        ranks: that wrote it.
        tensors: path -> tensor.
        files: name -> file.
        state: what is no tensor.
        versions: of the software that wrote it.
    """

    ranks: int
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    state: Any
    versions: dict[str, str]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


def versions() -> dict[str, str]:
    """Return the versions that a checkpoint is written with."""
    return {"twotower": version("twotower"), "torch": str(torch.__version__)}


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write checkpoint.json, which makes a checkpoint whole.

    Raises:
        OSError: naming the file.
        TypeError: for state that JSON has no form for.
    """
    content = {"format": FORMAT, **asdict(replace(manifest, state=encode(manifest.state)))}
    text = json.dumps({"sha256": _digest(content), **content}, allow_nan=False)
    with naming(directory / NAME):
        (directory / NAME).write_text(text + "\n")


def _digest(content: dict[str, Any]) -> str:
    """Return what tells a manifest from one of which a byte has changed."""
    return hashlib.sha256(json.dumps(content, allow_nan=False).encode()).hexdigest()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError in the block name the file: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def read_manifest(directory: Path) -> Manifest:
    """Return what a checkpoint says that it holds; its files may still be missing or damaged.

    Raises:
        UserError: when there is no readable manifest, or one of a newer format.
    """
    file = directory / NAME
    try:
        content = json.loads(file.read_text())
        digest = content.pop("sha256")
        if content["format"] != FORMAT:
            raise UserError(
                f"{file}: is of format {content['format']}, this version reads {FORMAT}: use the "
                "version of twotower that wrote it"
            )
        if digest != _digest(content):
            raise ValueError
        tensors = {
            path: StoredTensor(
                shape=tuple(tensor["shape"]), type=tensor["type"],
                chunks=tuple(
                    Chunk(offset=tuple(c["offset"]), shape=tuple(c["shape"]),
                          file=_plain(c["file"]), key=c["key"])
                    for c in tensor["chunks"]
                ),
            )
            for path, tensor in content["tensors"].items()
        }  # fmt: skip
        files = {
            _plain(name): StoredFile(bytes=int(f["bytes"]), sha256=str(f["sha256"]))
            for name, f in content["files"].items()
        }
        for tensor in tensors.values():
            if not isinstance(tensor.dtype, torch.dtype):
                raise TypeError
            if any(chunk.file not in files for chunk in tensor.chunks):
                raise KeyError
            if not _is_covered(tensor):
                raise ValueError
        return Manifest(
            ranks=int(content["ranks"]),
            tensors=tensors,
            files=files,
            state=decode(content["state"]),
            versions=dict(content["versions"]),
        )
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory}: holds no checkpoint: {NAME} is missing") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: damaged, or not a checkpoint's") from None


def _is_covered(tensor: StoredTensor) -> bool:
    """Whether the chunks, which do not overlap, are within the tensor and leave nothing out."""
    within = all(
        offset >= 0 and offset + length <= whole
        for chunk in tensor.chunks
        for offset, length, whole in zip(chunk.offset, chunk.shape, tensor.shape, strict=True)
    )
    return within and sum(math.prod(c.shape) for c in tensor.chunks) == math.prod(tensor.shape)


def _plain(name: str) -> str:
    if Path(name).name != name:
        raise ValueError("a checkpoint's files lie in its directory")
    return name


def check(directory: Path, *, verify: bool = True) -> Manifest:
    """Return a checkpoint's manifest, refusing one whose files are not as they were written.

    Args:
        directory: the checkpoint.
        verify: also whether the content is, by SHA-256; sizes are compared always.

    Raises:
        UserError: naming the file.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest, manifest.files if verify else ())
    return manifest


def check_files(directory: Path, manifest: Manifest, verified: Iterable[str]) -> None:
    """Refuse files that are not as they were written: all by size, some by SHA-256 as well.

    Raises:
        UserError: naming the file.
    """
    for name, stored in manifest.files.items():
        file = directory / name
        if file.is_symlink() or not file.is_file():
            raise UserError(f"{file}: the checkpoint is damaged, this file is missing")
        if (size := file.stat().st_size) != stored.bytes:
            raise UserError(
                f"{file}: the checkpoint is damaged, this file has {size:,} bytes, not "
                f"{stored.bytes:,}"
            )
    for name in verified:
        file = directory / name
        try:
            digest = sha256_file(file)
        except OSError as error:
            raise UserError(
                f"{file}: the checkpoint is damaged, this file cannot be read: {error.strerror}"
            ) from None
        if digest != manifest.files[name].sha256:
            raise UserError(f"{file}: the checkpoint is damaged, its content is another")


def differences(manifest: Manifest, wanted: dict[str, Any]) -> list[str]:
    """Return how a checkpoint's tensors and those that it is to fill differ; none when they fit."""
    found = []
    towers = any(path.startswith(MODEL) for path in wanted)
    for path in sorted(manifest.tensors.keys() | wanted.keys()):
        if path not in manifest.tensors:
            found.append(f"{path} is not in it")
        elif path in wanted:
            there, here = manifest.tensors[path].shape, tuple(wanted[path].size())
            if there != here:
                found.append(f"{path} is {shape_text(there)} in it, {shape_text(here)} here")
        elif towers and path.startswith(MODEL):
            found.append(f"{path} is in it, not here")
    return found


def shape_text(shape: Iterable[int]) -> str:
    """Return a shape as text."""
    return " x ".join(f"{n:,}" for n in shape) or "a number"


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
