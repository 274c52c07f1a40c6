"""The Triton model `recommend`: raw features in, item ids and scores out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from answers import Answers
from features import Columns, Features
from tower import open_tower


class TritonPythonModel(Answers):
    """Searches by the vectors of queries."""

    def open(self, folder: Path, target: str, threads: int) -> None:
        """Open the query tower."""
        self.features = Features(self.schema["features"], self.schema["bias"])
        self.tower = open_tower(folder, "query", target, threads)

    def asked(self, tensors: Columns) -> tuple[Columns, int]:
        """Return a request's features."""
        parsed: tuple[Columns, int] = self.features.parse(tensors)
        return parsed

    def vectors(self, asked: list[Columns]) -> np.ndarray[Any, Any]:
        """Return the vectors (B, D) of queries."""
        found: np.ndarray[Any, Any] = self.tower.vectors(self.features.join(asked))
        return found

    def fits(self, vectors: np.ndarray[Any, Any]) -> bool:
        """Return whether the tower could compute with every number."""
        return not self.features.unfit(vectors).any()

    def wrong(self, asked: Columns, vectors: np.ndarray[Any, Any]) -> str | None:
        """Return which number the tower could not compute with."""
        text: str | None = self.features.overflow(asked, vectors)
        return text
