"""A bundle with other items, from the same towers: `twotower index BUNDLE --update ITEMS.parquet`.

Only the new items go through the item graph; every other vector stays as it is. The index and the
golden answers are made again, and the old bundle is left whole.

Shape legend: `M` new items, `N` items after, `D` width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from twotower.data.prepared import data_config
from twotower.data.schema import DataConfig
from twotower.errors import UserError
from twotower.export.bundle import Bundle, next_bundle, read_bundle, seal
from twotower.export.config import IndexConfig
from twotower.export.filters import write_filters
from twotower.export.golden import (
    TOGETHER,
    answered,
    catalogue_ids,
    index_recall,
    onnx_answers,
)
from twotower.export.index import VECTORS, blocks, build_index, created
from twotower.export.manifest import HALVES
from twotower.export.new_items import NewItems, id_array, item_vectors, read_items
from twotower.export.search import FAISS_FILE, exact_top_k, open_search
from twotower.export.signature import SIGNATURE
from twotower.files import link_or_copy, write_json

SAME = (
    "query.onnx", "query.weights", "item.onnx", "item.weights", "job.json", *HALVES,
)  # fmt: skip
SAME_SHARE = 0.8
Report = Callable[[str, float], None]


def update_bundle(
    source: Bundle, items: Path | None, remove: Sequence[Any], sign_with: str | None,
    report: Report,
) -> Bundle:  # fmt: skip
    """Write the next version beside a bundle, with items added, updated and removed.

    Args:
        source: checked already.
        items: Parquet table of items to add, or whose features have changed; see `read_items`.
        remove: ids, of the catalogue's type.
        sign_with: as `ExportConfig.sign_with`.
        report: is told the stage and the share done.

    Raises:
        UserError: naming the item or the column; no bundle is left then.
    """
    m, job = source.manifest, source.job()
    if (source.path / SIGNATURE).exists() and sign_with is None:
        raise UserError(
            f"{source.path} is signed: give the key that signs the new version (--sign-with)"
        )
    new = None
    if items is not None:
        new = read_items(items, _data(source, job), m.item, m.item_id_dtype)
    old_ids = np.load(source.path / "item_ids.npy", mmap_mode="r", allow_pickle=False)
    new_ids = id_array([] if new is None else new.ids.to_pylist(), m.item_id_dtype)
    keep = _kept(old_ids, new_ids, remove, m.item_id_dtype)
    if not len(keep) + len(new_ids):
        raise UserError(f"{source.path}: nothing would be left of the catalogue: remove fewer")
    parent = source.path.resolve().parent
    with next_bundle(parent) as (number, partial):
        for name in SAME:
            if name in m.files:
                link_or_copy(source.path / name, partial / name)
        new_MD = np.empty((0, m.dim), np.float32)
        if new is not None:
            new_MD = item_vectors(
                source.path, m.item, new, lambda share: report("item vectors", 0.4 * share)
            )
        ids = np.concatenate([old_ids[keep], new_ids])
        order = np.argsort(ids, kind="stable")
        np.save(partial / "item_ids.npy", ids[order], allow_pickle=False)
        report("catalogue", 0.4)
        _write_vectors(source.path / VECTORS, keep, new_MD, order, partial / VECTORS)
        _write_items(source.path / "items.parquet", keep, new, order, partial / "items.parquet")
        filters = write_filters(partial, list(m.filters))
        report(f"{m.index.kind} index", 0.5)
        config = index_settings(source)
        # Centroids of items that are mostly the same still fit.
        same = m.index.kind in ("pq", "ivf") and len(keep) >= SAME_SHARE * len(ids)
        build_index(partial, m.index, config, source.path / FAISS_FILE if same else None)
        report("golden queries", 0.9)
        recall = _write_golden(source, partial)
        seal(partial, replace(
            m, version=number, base=m.version, num_items=len(ids),
            index=replace(m.index, recall=recall), filters=filters, files={}, sha256="",
        ), sign_with)  # fmt: skip
    return read_bundle(parent / str(number), verify=False)


def index_settings(bundle: Bundle) -> IndexConfig:
    """Return the settings of a bundle's index; the defaults, where its job has none."""
    return IndexConfig(**bundle.job().get("export", {}).get("index", {}))


def _data(bundle: Bundle, job: dict[str, Any]) -> DataConfig:
    if "data" not in job:
        raise UserError(
            f"{bundle.path / 'job.json'}: has no section 'data', which says the items' columns: "
            "make the bundle again with `twotower export`"
        )
    return data_config(job["data"])


def _kept(
    old: npt.NDArray[Any], new: npt.NDArray[Any], remove: Sequence[Any], dtype: str
) -> npt.NDArray[np.int64]:
    """Return the rows of the old catalogue that stay as they are."""
    gone = id_array(remove, dtype)
    unknown = gone[~np.isin(gone, old)]
    both = gone[np.isin(gone, new)]
    for ids, text in (
        (unknown, "is not in the catalogue: leave it out of --remove"),
        (both, "stands in --update and in --remove: leave it out of one"),
    ):
        if len(ids):
            first = ids[0].decode() if dtype == "string" else int(ids[0])
            raise UserError(f"item {first!r} {text}")
    return np.flatnonzero(~np.isin(old, new) & ~np.isin(old, gone))


def _write_vectors(
    source: Path, keep: npt.NDArray[np.int64], new_MD: npt.NDArray[np.float32],
    order: npt.NDArray[np.int64], target: Path,
) -> None:  # fmt: skip
    """Write kept and new vectors (N, D) in the order of their ids."""
    old = np.load(source, mmap_mode="r", allow_pickle=False)
    out_ND = created(target, np.float32, (len(order), old.shape[1]))
    for rows in blocks(len(order)):
        place, block = order[rows], out_ND[rows]
        is_new = place >= len(keep)
        block[~is_new] = old[keep[place[~is_new]]]
        block[is_new] = new_MD[place[is_new] - len(keep)]
    out_ND.flush()


def _write_items(
    source: Path, keep: npt.NDArray[np.int64], new: NewItems | None,
    order: npt.NDArray[np.int64], target: Path,
) -> None:  # fmt: skip
    """Write `items.parquet`; training has never counted a new item, and has an updated one."""
    old = pq.read_table(source)
    table = old.take(pa.array(keep))
    if new is not None:
        known = dict(zip(old["id"].to_pylist(), old["train_count"].to_pylist(), strict=True))
        train_count = [known.get(i, 0) for i in new.ids.to_pylist()]
        columns = {"id": new.ids, "train_count": pa.array(train_count, old["train_count"].type)}
        columns |= {name: new.display[name] for name in new.display.column_names}
        rows = pa.table({f.name: columns[f.name] for f in old.schema})
        try:
            table = pa.concat_tables([table, rows.cast(old.schema)])
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(
                f"a column of data.display has another type than before ({error}): cast it"
            ) from None
    pq.write_table(table.take(pa.array(order)), target)


def _write_golden(source: Bundle, target: Path) -> float:
    """Write the golden queries with their answers of now; returns the index's recall."""
    m, golden = source.manifest, source.golden()
    vectors = np.load(target / VECTORS, mmap_mode="r", allow_pickle=False)
    k = min(max((len(g.item_ids) for g in golden), default=1), len(vectors))
    ids = catalogue_ids(target, m.item_id_dtype)
    exact = functools.partial(exact_top_k, vectors)
    golden = answered(golden, onnx_answers(target, m.query, golden, ids, k, exact, TOGETHER))
    recall = 1.0
    if not m.index.is_exact(m.dim):
        search = open_search(target, asdict(m.index)).search
        found = onnx_answers(target, m.query, golden, ids, k, search)
        recall, golden = index_recall(golden, found), answered(golden, found)
    write_json(target / "golden.json", [vars(g) for g in golden])
    return recall
