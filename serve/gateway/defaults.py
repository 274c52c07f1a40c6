"""What the gateway answers with where it knows nothing better.

`twotower load-store` writes it from the prepared dataset, as `<run_dir>/gateway/defaults.json`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.files import write_json
from twotower.serve.request import encode_features

REMEDY = "run `twotower load-store` with this job"


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """The features of an unknown user, and what is popular."""

    user_id_dtype: str
    """string or int64."""
    user_features: list[str]
    """Features that hold the user's own id."""
    features: dict[str, Any]
    """A user that the log does not know: missing ids, average numbers; without histories."""
    segment_by: str | None
    """Feature whose value is the segment."""
    popular: list[Any]
    """Item ids by the events of all users, most first."""
    segments: dict[str, list[Any]]
    """The same by the events of the users of each segment, named by its value as text."""

    def most_popular(
        self, segment: Any, k: int, exclude: Container[Any], only: Container[Any] | None = None
    ) -> list[Any]:
        """Return the k most popular items of a segment, filled up with those of all users."""
        items = dict.fromkeys([*self.segments.get(str(segment), ()), *self.popular])
        left = (i for i in items if i not in exclude and (only is None or i in only))
        return list(itertools.islice(left, k))

    def check(self, features: list[TensorSpec], path: Path) -> None:
        """Refuse defaults that are of another model.

        Raises:
            UserError: naming the feature that is missing, or of another kind.
        """
        user: dict[str, Any] = {}
        for spec in features:
            if spec.kind == "history":
                user[spec.name] = []
            elif spec.kind != "times" and spec.name not in self.features:
                raise UserError(
                    f"{path}: knows no feature '{spec.name}', which the served model has: {REMEDY}"
                )
            elif spec.kind != "times":
                user[spec.name] = self.features[spec.name]
        try:
            encode_features(features, user)
        except UserError as error:
            raise UserError(f"{path}: of another model ({error}): {REMEDY}") from None

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))


def read_defaults(path: Path) -> Defaults:
    """Read the file.

    Raises:
        UserError: when it is not there, or damaged.
    """
    try:
        return Defaults(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: not there, the gateway has nothing to fall back on: {REMEDY}") \
            from None  # fmt: skip
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}): {REMEDY} again") from None
