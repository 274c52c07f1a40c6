"""A bundle's manifest: what it says of itself, and of every other file's bytes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, get_args, get_origin, get_type_hints

from twotower.data.schema import TensorSpec
from twotower.errors import UserError

FORMAT = 3
MANIFEST = "manifest.json"
REMEDY = "make it again with `twotower export`, or copy it whole"
REQUIRED = (
    "query.onnx", "item.onnx", "item_vectors.npy", "item_ids.npy", "golden.json",
)  # fmt: skip
INDEX_FILE = {
    "exact": "index.onnx", "int8": "index.onnx", "pq": "index.faiss", "ivf": "index.faiss",
    "hnsw": "index.faiss",
}  # fmt: skip
SIDES = ("query", "item")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
# Of a bundle with export.tensorrt.precisions: see `twotower.export.halves`.
HALVES = (
    "towers.weights", "tensorrt.json", "tensorrt_check.npz", "build_engine.py",
    *(f"{side}_encoding.onnx" for side in SIDES),
    *(f"{side}_tower.{precision}.onnx" for side in SIDES for precision in PRECISIONS),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """What a search must know of a bundle's index."""

    kind: str
    """exact, int8, pq, ivf or hnsw."""
    width: int
    """First coordinates of the vectors that are searched."""
    rescore: int
    """Candidates a result, where the search is lossy."""
    nprobe: int
    """ivf: cells that a query searches."""
    ef_search: int
    """hnsw: candidates that a query follows at the least."""
    bias: int
    """1 where the last coordinate of a vector is the item's bias, which no cut removes."""
    recall: float
    """Share of the golden queries' exact answers that the index gives."""

    def is_exact(self, dim: int) -> bool:
        """Whether a search misses nothing, of vectors of `dim` coordinates."""
        return self.kind == "exact" and self.width == dim


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a bundle says of itself."""

    version: int
    """The bundle's number, also its Triton version; grows with every export."""
    name: str
    """The job's name."""
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
    """Largest difference seen between eager PyTorch and ONNX Runtime; of what ends in `_overlap`,
    the share of eager PyTorch's golden answers."""
    index: IndexSpec
    """How the item vectors are searched."""
    filters: dict[str, str] = field(default_factory=dict)
    """Attribute that requests may filter by -> the type of its values: string, int64 or bool."""
    pruned: dict[str, int] = field(default_factory=dict)
    """Table -> rows left out of the graphs; see `export.prune_vocab`."""
    pruned_bytes: int = 0
    """Of these rows, in a table's own type."""
    base: int = 0
    """Version whose towers this one took over, with other items; 0 for one of `export`."""
    format: int = FORMAT
    """Of the bundle; a reader refuses a newer one."""
    files: dict[str, str] = field(default_factory=dict)
    """Path -> SHA-256 of every file but the manifest."""
    sha256: str = ""
    """Of the rest of the manifest, as JSON without spaces and with sorted keys."""


def render(raw: dict[str, Any]) -> bytes:
    """Return the bytes of a manifest's file."""
    return (json.dumps(raw, indent=2, allow_nan=False) + "\n").encode()


def digest(raw: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own."""
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
        if raw["sha256"] != digest(raw) or content != render(raw):
            raise UserError(f"does not match its own SHA-256 (changed): {REMEDY}")
        specs = {side: [TensorSpec(**s) for s in raw[side]] for side in ("query", "item")}
        index = IndexSpec(**raw["index"]) if raw["format"] > 1 else _exact(raw)
        manifest = Manifest(**(raw | specs | {"index": index}))
        for checked in (manifest, index, *manifest.query, *manifest.item):
            _check_types(checked)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"no bundle's manifest, or damaged ({error}): {REMEDY}") from None
    if index.kind not in INDEX_FILE:
        raise UserError(
            f"no bundle's manifest, or damaged (index of kind '{index.kind}'): {REMEDY}"
        )
    for name in (*REQUIRED, INDEX_FILE[index.kind]):
        if name not in manifest.files:
            raise UserError(f"lists no '{name}': {REMEDY}")
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or str(path) != name:
            raise UserError(f"lists '{name}', which is no path inside the bundle: do not use it")
    return manifest


def _exact(raw: dict[str, Any]) -> IndexSpec:
    """Return the index of a bundle of the first format, and take out what that format had more."""
    raw.pop("created", None)
    return IndexSpec(
        kind="exact", width=raw["dim"], rescore=1, nprobe=1, ef_search=1, bias=0, recall=1.0
    )


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
