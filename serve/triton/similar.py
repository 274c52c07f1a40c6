"""The Triton model `similar`: an item's id in, the ids of the items nearest to it out.

Scores are cosines: the items' bias, which says how popular one is, takes no part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from answers import Answers
from features import Columns, Refused


class TritonPythonModel(Answers):
    """Searches by the vectors of items."""

    def open(self, folder: Path, target: str, threads: int) -> None:
        """Map the item vectors, on any target."""
        self.item_ND = np.load(folder / "item_vectors.npy", mmap_mode="r", allow_pickle=False)

    def asked(self, tensors: Columns) -> tuple[np.ndarray[Any, Any], int]:
        """Return the catalogue rows of a request's items."""
        ids = tensors.get("item")
        if ids is None:
            raise Refused("item is missing: send an id of the catalogue")
        found = [self.rows_of(row) for row in ids]
        for row, place in zip(ids, found, strict=True):
            if len(place) != 1:
                shown = row[0].decode(errors="replace") if self.text_ids else int(row[0])
                raise Refused(f"item {shown!r:.80} is not in the catalogue")
        return np.concatenate(found), len(ids)

    def parse(self, request: Any) -> dict[str, Any]:
        """Leave out each row's own item."""
        parsed: dict[str, Any] = super().parse(request)
        pairs = zip(parsed["exclude"], parsed["asked"], strict=True)
        return parsed | {"exclude": [np.union1d(rows, own) for rows, own in pairs]}

    def vectors(self, asked: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Return the vectors (B, D) of items, the bias 0."""
        vectors: np.ndarray[Any, Any] = self.item_ND[np.concatenate(asked)]
        if self.schema["bias"]:
            vectors[:, -1] = 0
        return vectors

    def fits(self, vectors: np.ndarray[Any, Any]) -> bool:
        """Return True: what the export has checked is of use."""
        return True
