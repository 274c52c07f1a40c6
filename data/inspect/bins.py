"""How far one feature has moved: its distribution over events, bin by bin.

An id: its 20 most frequent training values, the rest of the vocabulary, unseen and missing; a bag
likewise, over its values; a number: the deciles of training and missing; a vector: the deciles of
each dimension on a sample of events, of which the dimension that moved most counts.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from twotower.data.inspect.psi import Array, explained_by_chance, stability_terms
from twotower.data.inspect.sides import F32, Sides, double
from twotower.data.schema import Feature, is_own_id
from twotower.data.vocabulary import Vocabulary

TOP = 20
DECILES = 10


def compare_feature(sides: Sides, tower: str, feature: Feature) -> dict[str, Any]:
    """Return how far a feature has moved.

    Returns:
        `kind`; `psi`; `chance`: the index that chance alone passes once in 1,000 times; `largest`:
        the bin that moved most, with its share `was` and `now`; of ids `unseen`, `was` and `now`:
        the share of values that their table's vocabulary, or without one training, lacks. The
        user's and the item's own id have `unseen` alone.
    """
    out: dict[str, Any] = {"kind": feature.kind}
    if feature.kind == "vector":
        return out | _compare_vectors(sides, tower, feature)
    sides.count_values(tower, feature)
    users = sides.users["was"], sides.users["now"]
    if feature.kind == "number":
        return out | _moved(*_number_bins(sides.connection), *users)
    names, was, now, unseen = _id_bins(sides, feature)
    if is_own_id(sides.config, tower, feature):
        return out | {"unseen": unseen}
    return out | {"unseen": unseen} | _moved(names, was, now, *users)


def _moved(
    names: list[str], was: Array, now: Array, n: float, m: float, comparisons: int = 1
) -> dict[str, Any]:
    """Return `psi`, `chance` and `largest` of two sides' counts in bins (B,) of these names."""
    terms = stability_terms(was, now)
    used = int(((was > 0) | (now > 0)).sum())
    at = int(terms.argmax())
    return {
        "psi": float(terms.sum()),
        "chance": explained_by_chance(used, n, m, comparisons),
        "largest": {
            "bin": names[at], "was": float(was[at] / was.sum()), "now": float(now[at] / now.sum())
        },
    }  # fmt: skip


def _id_bins(sides: Sides, f: Feature) -> tuple[list[str], Array, Array, dict[str, float]]:
    """Return the bins' names, both sides' counts, and the unseen shares."""
    connection = sides.connection
    vocabulary = sides.data.encoder.vocabularies[f.table_name]
    if isinstance(vocabulary, Vocabulary):
        keys = vocabulary.keys
    else:  # any id may have a row; what training saw is known
        known = connection.sql("SELECT v FROM was WHERE v IS NOT NULL")
        keys = known.fetch_arrow_table()["v"]
    connection.register("vocabulary", pa.table({"key": keys}))
    connection.execute(
        "CREATE OR REPLACE TABLE top AS SELECT v, row_number() OVER (ORDER BY n DESC, v) - 1 AS "
        "place FROM was SEMI JOIN vocabulary k ON k.key = v "
        f"ORDER BY n DESC, v LIMIT {TOP}"
    )
    names = [str(v) for (v,) in connection.execute("SELECT v FROM top ORDER BY place").fetchall()]
    rest = len(names)
    counts = []
    for side in ("was", "now"):
        rows = connection.execute(
            f"SELECT CASE WHEN s.v IS NULL THEN {rest + 2} WHEN t.place IS NOT NULL THEN t.place "
            f"WHEN k.key IS NULL THEN {rest + 1} ELSE {rest} END AS bin, sum(s.n) FROM {side} s "
            "LEFT JOIN top t ON t.v = s.v LEFT JOIN vocabulary k ON k.key = s.v GROUP BY bin"
        ).fetchall()
        counts.append(np.zeros(rest + 3))
        for place, n in rows:
            counts[-1][place] = n
    connection.unregister("vocabulary")
    was, now = counts
    unseen = {
        side: float(c[rest + 1] / max(1, c[: rest + 2].sum()))
        for side, c in (("was", was), ("now", now))
    }
    return [*names, "the other known ones", "unseen ones", "missing"], was, now, unseen


def _number_bins(connection: Any) -> tuple[list[str], Array, Array]:
    """Return the bins' names and both sides' counts, in the deciles of training."""
    cuts = ", ".join(
        f"min(v) FILTER (c * {DECILES} >= {k} * total)" for k in range(1, DECILES)
    )  # fmt: skip
    found = connection.execute(
        f"SELECT {cuts} FROM (SELECT v, sum(n) OVER (ORDER BY v) AS c, sum(n) OVER () AS total "
        "FROM was WHERE v IS NOT NULL)"
    ).fetchall()[0]
    edges = sorted({float(v) for v in found if v is not None})
    place = " + ".join(["0", *(f"(v > {double(e)})::INT" for e in edges)])
    counts = []
    for side in ("was", "now"):
        rows = connection.execute(
            f"SELECT coalesce({place}, {len(edges) + 1}) AS bin, sum(n) FROM {side} GROUP BY bin"
        ).fetchall()
        counts.append(np.zeros(len(edges) + 2))
        for at, n in rows:
            counts[-1][at] = n
    return [*_ranges(edges), "missing"], counts[0], counts[1]


def _ranges(edges: list[float]) -> list[str]:
    if not edges:
        return ["any"]
    between = [f"{a:.4g} to {b:.4g}" for a, b in pairwise(edges)]
    return [f"up to {edges[0]:.4g}", *between, f"above {edges[-1]:.4g}"]


def _compare_vectors(sides: Sides, tower: str, feature: Feature) -> dict[str, Any]:
    """Compare each dimension, and return the one that moved most as `dimension`."""
    was, now = sides.sample(tower, feature)
    worst: dict[str, Any] = {"psi": -1.0}
    width = was.shape[1]
    n, m = min(sides.users["was"], len(was)), min(sides.users["now"], len(now))
    for dimension in range(width):
        old, new = was[:, dimension], now[:, dimension]
        known = old[~np.isnan(old)]
        share = np.arange(1, DECILES) / DECILES
        edges = np.unique(np.quantile(known, share, method="inverted_cdf")) if len(known) else known
        names = [*_ranges(edges.tolist()), "missing"]
        moved = _moved(names, _binned(old, edges), _binned(new, edges), n, m, comparisons=width)
        if moved["psi"] > worst["psi"]:
            worst = moved | {"dimension": dimension}
    return worst


def _binned(values: F32, edges: F32) -> Array:
    # A NaN sorts after every edge, and would count as large.
    place = np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values))
    return np.bincount(place, minlength=len(edges) + 2).astype(float)
