"""The bundle: one immutable version of everything that must agree.

    bundle/
      manifest.json      `Manifest`: tensors, versions, metrics, SHA-256 of every other file
      query.onnx         raw query features -> `vector` (B, D), unit length; vocabularies inside
      item.onnx          raw item features -> `vector` (B, D)
      query.weights      optional: large weights of `query.onnx`, as its external data
      item.weights       optional: those of `item.onnx` that are not in query.weights
      index.onnx         `vector` (B, D), `k` (1) -> `scores` (B, K), `rows` (B, K); or, of some
                         kinds, index.faiss: see `twotower.export.index`
      scan.onnx          optional: `vector` -> all products in 8 bits, of item_scan*.npy
      item_vectors.npy   (N, D) float32; `index.onnx` reads it as its external data
      item_ids.npy       (N,) int64, or UTF-8 bytes; ascending, so a row is found by bisection
      items.parquet      the display columns and the training count of each item, in row order
      filters.npz        optional: attributes to filter items by, `twotower.export.filters`
      golden.json        `Golden` queries with the answers that eager PyTorch gave
      job.json           the job that made it
      *_tower.*          optional, for TensorRT, with what is beside them: `twotower.export.halves`
      manifest.sig       optional: `twotower.export.signature`

The same checkpoint and settings give the same bytes. The reader needs neither torch nor onnx, and a
bundle holds no pickle: a serving host reads it with numpy.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from twotower.errors import UserError
from twotower.export.manifest import MANIFEST, REMEDY, Manifest, digest, read_manifest, render
from twotower.export.signature import SIGNATURE, check_signature, read_private_key, sign
from twotower.files import atomic_directory, only_writer, sha256_file


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A raw query and its answer."""

    features: dict[str, Any]
    """Feature name -> scalar or list, as a client would send it."""
    exclude: list[Any]
    """Item ids that may not be answered."""
    item_ids: list[Any]
    """The answer, best first."""
    scores: list[float]
    """Inner products, one an item."""


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose files are all there."""

    path: Path
    manifest: Manifest

    def golden(self) -> list[Golden]:
        """Read the golden queries."""
        return [Golden(**g) for g in json.loads((self.path / "golden.json").read_text())]

    def job(self) -> dict[str, Any]:
        """Read the job that made the bundle."""
        job: dict[str, Any] = json.loads((self.path / "job.json").read_text())
        return job

    def tensorrt(self) -> dict[str, Any] | None:
        """Read what the bundle has for TensorRT, if anything; see `twotower.export.halves`."""
        path = self.path / "tensorrt.json"
        return json.loads(path.read_text()) if path.exists() else None


@contextmanager
def next_bundle(bundles: Path) -> Iterator[tuple[int, Path]]:
    """Yield the next version's number and a directory that becomes it when the block ends.

    Raises:
        UserError: while another process makes one here.
        OSError: naming the bundle, for instance when the disk is full; nothing of it is left.
    """
    with only_writer(bundles):
        number = max(bundle_versions(bundles), default=0) + 1
        final = bundles / str(number)
        try:
            with atomic_directory(final) as partial:
                yield number, partial
        except OSError as error:
            if error.filename is not None:
                raise
            # What writes may name no file, as NumPy does.
            reason = error.strerror or str(error)
            raise OSError(error.errno or errno.EIO, reason, str(final)) from None


def seal(directory: Path, manifest: Manifest, sign_with: str | None = None) -> None:
    """Hash every file under `directory`, write the manifest last, and sign it.

    Raises:
        UserError: for a key that is none.
    """
    files = {
        p.relative_to(directory).as_posix(): sha256_file(p)
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    raw = asdict(manifest) | {"files": files}
    content = render(raw | {"sha256": digest(raw)})
    if sign_with is not None:
        (directory / SIGNATURE).write_bytes(sign(content, read_private_key(sign_with)))
    (directory / MANIFEST).write_bytes(content)


def read_bundle(path: Path, *, verify: bool = True, signed_by: str | None = None) -> Bundle:
    """Open a bundle, refusing one that is damaged, incomplete, misnamed or of a newer format.

    Args:
        path: the bundle's directory.
        verify: also compare every file with its SHA-256.
        signed_by: PEM file of the ed25519 public key by which it must be signed; None asks none.

    Raises:
        UserError: naming the file and the remedy.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no bundle here: run `twotower export` first")
    try:
        content = _own_file(path, MANIFEST).read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{path}: {MANIFEST} is missing, so this is no whole bundle: {REMEDY}"
        ) from None
    try:
        if signed_by is not None:
            has = (path / SIGNATURE).is_file()
            signature = _own_file(path, SIGNATURE).read_bytes() if has else None
            check_signature(content, signature, signed_by)
        manifest = read_manifest(content)
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: {error}") from None
    if path.resolve().name != str(manifest.version):
        raise UserError(
            f"{path}: holds version {manifest.version}, but a bundle's directory is named by its "
            f"version: rename it to {manifest.version}"
        )
    for name, expected in manifest.files.items():
        file = _own_file(path, name)
        if not file.is_file():
            raise UserError(f"{file}: missing from the bundle: {REMEDY}")
        if verify and sha256_file(file) != expected:
            raise UserError(
                f"{file}: its bytes do not match the manifest's SHA-256 (truncated or changed): "
                f"{REMEDY}"
            )
    return Bundle(path, manifest)


def _own_file(bundle: Path, name: str) -> Path:
    """Return a file of a bundle, refusing links: what they lead to is no part of it."""
    file = bundle
    for part in PurePosixPath(name).parts:
        file = file / part
        if file.is_symlink():
            raise UserError(f"{file}: is a symbolic link, which no bundle holds: {REMEDY}")
    return file


def bundle_versions(directory: Path) -> list[int]:
    """Return the version numbers of the complete bundles in `directory`, ascending."""
    if not directory.is_dir():
        return []
    return sorted(
        int(p.name) for p in directory.iterdir()
        if p.name.isdigit() and (p / MANIFEST).is_file()
    )  # fmt: skip


def latest_bundle(directory: Path) -> Path:
    """Return the newest bundle in `directory`.

    Raises:
        UserError: when there is none.
    """
    versions = bundle_versions(directory)
    if not versions:
        raise UserError(f"{directory}: no bundle here yet: run `twotower export` first")
    return directory / str(versions[-1])


def find_bundle(path: Path) -> Path:
    """Return the bundle at `path`: itself, or the newest of a `bundles` folder or a run_dir.

    Raises:
        UserError: when there is none.
    """
    if (path / MANIFEST).exists():
        return path
    for directory in (path, path / "bundles"):
        if bundle_versions(directory):
            return latest_bundle(directory)
    raise UserError(
        f"{path}: no bundle here: name one, a folder `bundles`, or the run_dir that holds it"
    )


def answer_difference(
    expected_ids: list[Any],
    expected_scores: npt.ArrayLike,
    ids: list[Any],
    scores: npt.ArrayLike,
    tolerance: float,
) -> float:
    """Return the largest score difference, or infinity when the answers differ beyond ties.

    Two answers are the same when they hold the same ids in the same order, except that ids whose
    expected scores lie within `tolerance` of each other may change places, and an id may replace
    another at the end of the list for the same reason.
    """
    want = np.asarray(expected_scores, dtype=np.float64)
    got = np.asarray(scores, dtype=np.float64)
    if want.shape != got.shape or len(ids) != len(expected_ids):
        return float("inf")
    if want.size == 0:
        return 0.0
    score_of = dict(zip(expected_ids, want, strict=True))
    for position, item in enumerate(ids):
        # An unknown id can only be a tie with the last one that made the list.
        if abs(score_of.get(item, want[-1]) - got[position]) > tolerance:
            return float("inf")
    if len(set(ids)) != len(ids):
        return float("inf")
    return float(np.abs(want - got).max())
