"""The bundle: one immutable version of everything that must agree.

    bundle/
      manifest.json      `Manifest`: tensors, versions, metrics, SHA-256 of every other file
      query.onnx         raw query features -> `vector` (B, D), unit length; vocabularies inside
      item.onnx          raw item features -> `vector` (B, D)
      index.onnx         `vector` (B, D), `k` (1) -> `scores` (B, K), `rows` (B, K)
      item_vectors.npy   (N, D) float32; `index.onnx` reads it as its external data
      item_ids.npy       (N,) int64, or UTF-8 bytes; ascending, so a row is found by bisection
      items.parquet      the display columns and the training count of each item, in row order
      golden.json        `Golden` queries with the answers that eager PyTorch gave
      job.json           the job that made it

Needs neither torch nor onnx, and holds no pickle: a serving host reads it with numpy.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.files import sha256_file

FORMAT = 1
MANIFEST = "manifest.json"
REMEDY = "make it again with `twotower export`, or copy it whole"
REQUIRED = (
    "query.onnx", "item.onnx", "index.onnx", "item_vectors.npy", "item_ids.npy", "golden.json",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself."""

    version: int
    """The bundle's number, also its Triton version; grows with every export."""
    name: str
    """The job's name."""
    created: str
    """ISO time, UTC."""
    fingerprint: str
    """Of the inputs that it was made from."""
    query: list[TensorSpec]
    """Raw tensors of a query, in the order of `query.onnx`."""
    item: list[TensorSpec]
    """Raw tensors of an item, in the order of `item.onnx`."""
    item_id_dtype: str
    """string or int64."""
    num_items: int
    """N, rows of the catalogue."""
    dim: int
    """D, width of a vector."""
    versions: dict[str, str]
    """Of the libraries that made it."""
    metrics: dict[str, float]
    """Of the test split, empty when it was not evaluated."""
    parity: dict[str, float]
    """Largest difference seen between eager PyTorch and ONNX Runtime."""
    format: int = FORMAT
    """Of the bundle; a reader refuses a newer one."""
    files: dict[str, str] = field(default_factory=dict)
    """Path -> SHA-256 of every file but the manifest."""
    sha256: str = ""
    """Of the rest of the manifest, as JSON without spaces and with sorted keys."""


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


def seal(directory: Path, manifest: Manifest) -> None:
    """Hash every file under `directory` and write the manifest last."""
    files = {
        str(p.relative_to(directory)): sha256_file(p)
        for p in sorted(directory.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    raw = asdict(manifest) | {"files": files}
    (directory / MANIFEST).write_bytes(_render(raw | {"sha256": _digest(raw)}))


def _render(raw: dict[str, Any]) -> bytes:
    return (json.dumps(raw, indent=2, allow_nan=False) + "\n").encode()


def _digest(raw: dict[str, Any]) -> str:
    rest = {key: value for key, value in raw.items() if key != "sha256"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(content: bytes) -> Manifest:
    """Return the manifest whose bytes are given.

    Raises:
        UserError: unless they are, byte by byte, what `seal` wrote.
    """
    try:
        raw = json.loads(content.decode())
        if raw["format"] > FORMAT:
            raise UserError(
                f"bundle format {raw['format']} is newer than this twotower reads ({FORMAT}): "
                "upgrade twotower on this host"
            )
        # Equal values can be spelt in several ways, of which one was written.
        if raw["sha256"] != _digest(raw) or content != _render(raw):
            raise UserError(f"does not match its own SHA-256 (changed): {REMEDY}")
        specs = {side: [TensorSpec(**s) for s in raw[side]] for side in ("query", "item")}
        manifest = Manifest(**(raw | specs))
        for checked in (manifest, *manifest.query, *manifest.item):
            _check_types(checked)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no bundle's manifest, or damaged ({error}): {REMEDY}") from None
    for name in REQUIRED:
        if name not in manifest.files:
            raise UserError(f"lists no '{name}': {REMEDY}")
    return manifest


def _check_types(value: Any) -> None:
    """Refuse a field that is not of its type, which a manifest of another writer may hold."""
    for name, hint in get_type_hints(type(value)).items():
        found, inner = getattr(value, name), get_args(hint)
        fits = isinstance(found, get_origin(hint) or hint) and not isinstance(found, bool)
        if fits and isinstance(found, dict):
            kind = (int, float) if inner[1] is float else inner[1]
            fits = all(isinstance(entry, kind) for entry in found.values())
        if not fits:
            raise TypeError(f"{name} is {found!r}")


def read_bundle(path: Path, *, verify: bool = True) -> Bundle:
    """Open a bundle, refusing one that is damaged, incomplete, misnamed or of a newer format.

    Args:
        path: the bundle's directory.
        verify: also compare every file with its SHA-256.

    Raises:
        UserError: naming the file and the remedy.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no bundle here: run `twotower export` first")
    try:
        manifest = read_manifest((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: {MANIFEST} is missing, so this is no whole bundle: {REMEDY}"
        ) from None
    except UserError as error:
        raise UserError(f"{path / MANIFEST}: {error}") from None
    if path.resolve().name != str(manifest.version):
        raise UserError(
            f"{path}: holds version {manifest.version}, but a bundle's directory is named by its "
            f"version: rename it to {manifest.version}"
        )
    for name, digest in manifest.files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()) or not file.is_file():
            raise UserError(f"{file}: missing from the bundle: {REMEDY}")
        if verify and sha256_file(file) != digest:
            raise UserError(
                f"{file}: its bytes do not match the manifest's SHA-256 (truncated or changed): "
                f"{REMEDY}"
            )
    return Bundle(path, manifest)


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
