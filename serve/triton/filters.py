"""Attribute filters of requests: which rows of the catalogue they leave.

    {"genre": ["drama", "comedy"], "available": true, "language": {"not": ["fr"]}}

Every attribute must hold; a list asks for one of its values, `not` for none. An item without a
value is none of a list's, and passes a `not`. `filters.npz` holds, of each attribute, its values
and the rows that have each.

Imports nothing of twotower's: the file is copied beside the models, into Triton.
"""

from __future__ import annotations

import difflib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from features import Refused

KINDS = {"string": str, "int64": int, "bool": bool}
MOST_CACHED = 64
Rows = npt.NDArray[np.int64]


class Filters:
    """The attributes of a catalogue.

    Args:
        folder: with the bundle's files.
        kinds: attribute -> string, int64 or bool; none, of a bundle without filters.
        items: N, rows of the catalogue.
    """

    def __init__(self, folder: Path, kinds: dict[str, str], items: int) -> None:
        self.kinds, self.items = kinds, items
        self._place: dict[str, dict[Any, int]] = {}
        self._offset: dict[str, Rows] = {}
        self._rows: dict[str, Rows] = {}
        self._cache: OrderedDict[str, Rows] = OrderedDict()
        if not kinds:
            return
        with np.load(folder / "filters.npz", allow_pickle=False) as file:
            for number, name in enumerate(kinds):
                values = file[f"{number}.values"].tolist()
                if kinds[name] == "string":
                    values = [value.decode() for value in values]
                self._place[name] = {value: i for i, value in enumerate(values)}
                self._offset[name] = file[f"{number}.offset"]
                self._rows[name] = file[f"{number}.rows"]

    def rows(self, text: str) -> Rows:
        """Return the rows (R,) that a filter leaves, ascending.

        Raises:
            Refused: naming the attribute, what was expected and what came.
        """
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        mask = np.ones(self.items, bool)
        for name, condition in self._conditions(text).items():
            wanted = not isinstance(condition, dict)
            values = self._values(name, condition if wanted else condition["not"])
            own = np.zeros(self.items, bool)
            for value in values:
                place = self._place[name].get(value)
                if place is not None:
                    start, end = self._offset[name][place : place + 2]
                    own[self._rows[name][start:end]] = True
            mask &= own if wanted else ~own
        found = np.flatnonzero(mask)
        self._cache[text] = found
        if len(self._cache) > MOST_CACHED:
            self._cache.popitem(last=False)
        return found

    def _conditions(self, text: str) -> dict[str, Any]:
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise Refused(f"filter is no JSON ({error}): send an object of attributes") from None
        if not isinstance(raw, dict):
            raise Refused(f"filter must be an object of attributes, got {text[:60]}")
        for name, condition in raw.items():
            if name not in self.kinds:
                near = difflib.get_close_matches(name, self.kinds, 1)
                known = ", ".join(self.kinds) or "none: export.filters names them"
                raise Refused(
                    f"filter: there is no attribute '{name[:60]}'"
                    + (f", did you mean '{near[0]}'?" if near else f" (it has {known})")
                )
            if isinstance(condition, dict) and set(condition) != {"not"}:
                raise Refused(f"filter: '{name}' must be a value, a list of them, or {{'not': …}}")
        return raw

    def _values(self, name: str, condition: Any) -> list[Any]:
        values = condition if isinstance(condition, list) else [condition]
        kind = self.kinds[name]
        for value in values:
            if type(value) is not KINDS[kind]:
                raise Refused(
                    f"filter: '{name}' holds values of type {kind}, got {json.dumps(value)[:60]}"
                )
        return values
