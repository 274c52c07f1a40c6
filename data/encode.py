"""Encoding raw features into what a tower reads; the exported graph does the same in ONNX.

`Encoder` is what preparation learnt from the training period: vocabularies, normalisers and spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from twotower.data.schema import ID_KINDS, PAD_INT64, DataConfig, Feature, TensorSpec
from twotower.data.vocabulary import DynamicIds, Vocabulary

# Most spans of the training period that a `timed_sum` tells apart.
SPANS = 32


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Mean and deviation of a number in the training period."""

    mean: float = 0.0
    std: float = 1.0

    def apply(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return numbers as a tower reads them, in float32 throughout like the exported graph."""
        mean, raw = np.float32(self.mean), values.astype(np.float32)
        filled = np.where(np.isnan(raw), mean, raw)
        return np.asarray((filled - mean) / np.float32(self.std), np.float32)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Raw features to rows and floats; where a table's ids are dynamic, keys stand for rows.

    Attributes:
        vocabularies: by embedding table, a vocabulary or dynamic ids.
        normalisers: by `<tower>.<feature>`.
        span_starts: when each span of the training period but the first begins, in seconds since
            1970, ascending; see `find_span_starts`. Empty where no history has times.
    """

    vocabularies: Mapping[str, Vocabulary | DynamicIds]
    normalisers: Mapping[str, Normaliser]
    span_starts: Sequence[int] = ()

    def encode(self, tower: str, feature: Feature, raw: pa.Array) -> pa.Array:
        """Encode one raw column (see `twotower.data.log.features.raw_feature`).

        Returns:
            `id`: int64 rows, -1 for a missing one; `ids` and `history`: lists of rows; `number`:
            float32, 0 for a missing one; `vector`: fixed lists of float32.
        """
        if feature.kind == "id":
            return pa.array(self.vocabularies[feature.table_name].lookup(raw))
        if feature.kind in ID_KINDS:
            rows = self.vocabularies[feature.table_name].lookup(raw.flatten())
            return pa.ListArray.from_arrays(raw.offsets, pa.array(rows))
        if feature.kind == "number":
            norm = self.normalisers[f"{tower}.{feature.name}"]
            filled = pc.fill_null(raw, norm.mean).to_numpy(zero_copy_only=False)
            return pa.array(norm.apply(filled))
        return raw

    def specs(self, config: DataConfig, tower: str) -> list[TensorSpec]:
        """Return the raw tensors of a tower's request."""
        specs = []
        for f in config.query if tower == "query" else config.item:
            length = _length(f)
            specs.append(
                TensorSpec(name=f.name, kind=f.kind, dtype=self._dtype(f), length=length)
            )  # fmt: skip
            if f.has_times:
                specs.append(
                    TensorSpec(
                        name=f.times_name, kind="times", dtype="int64", length=length, of=f.name
                    )
                )
        return specs

    def _dtype(self, feature: Feature) -> str:
        if feature.kind in ID_KINDS:
            return self.vocabularies[feature.table_name].dtype
        return "float32"

    def encode_rows(
        self, config: DataConfig, tower: str, rows: list[dict[str, Any]]
    ) -> dict[str, pa.Array]:
        """Encode requests given as plain Python values, one dictionary a row."""
        features = {f.name: f for t, f in config.features() if t == tower}
        out = {}
        for spec in self.specs(config, tower):
            raw = pa.array([row[spec.name] for row in rows], arrow_type(spec))
            if spec.kind == "times":
                seconds = pc.fill_null(raw.flatten(), PAD_INT64).to_numpy(zero_copy_only=False)
                lengths = np.diff(raw.offsets.to_numpy())
                times = self.entry_times(features[spec.of], seconds, lengths)
                out[spec.name] = pa.FixedSizeListArray.from_arrays(times.reshape(-1), spec.length)
            else:
                out[spec.name] = self.encode(tower, features[spec.name], raw)
        return out

    def entry_times(
        self, history: Feature, seconds: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return what a tower reads of the times of a history's entries (B, `history.length`).

        They are the entries' spans for a `timed_sum`, and their ages for an encoder.

        Args:
            history: one that `has_times`.
            seconds: times of the entries, list after list; `PAD_INT64` where it is not known.
            lengths: of the lists (B,), at most `history.length`.
        """
        time = np.full((len(lengths), history.length), PAD_INT64)
        time[np.arange(history.length) < lengths[:, None]] = seconds
        if history.pooling == "timed_sum":
            return entry_spans(time, self.span_starts)
        return entry_ages(time)


def entry_ages(time: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return how long before the latest of its list each entry happened (B, L), in seconds.

    Args:
        time: of the entries (B, L), in seconds since 1970; what is `PAD_INT64`, padding or not
            known, has the age -1.
    """
    with np.errstate(over="ignore"):
        age = (time.max(axis=1, keepdims=True) - time).astype(np.float32)
    return np.where(time == PAD_INT64, np.float32(-1), age)


def entry_spans(time: npt.NDArray[np.int64], span_starts: Sequence[int]) -> npt.NDArray[np.float32]:
    """Return the span of the training period that each entry is of (B, L), from 0.

    Args:
        time: of the entries (B, L), in seconds since 1970. What is after the training period, is
            `PAD_INT64`, padding or not known, is of the newest span.
        span_starts: of an `Encoder`.
    """
    span = np.searchsorted(np.asarray(span_starts, np.int64), time, side="right")
    return np.where(time == PAD_INT64, len(span_starts), span).astype(np.float32)


def find_span_starts(micros: npt.NDArray[np.int64]) -> list[int]:
    """Return when each of up to `SPANS` spans begins but the first, in seconds since 1970.

    Each has about as many events as every other; where events are at few moments, there are fewer.

    Args:
        micros: times of the training events (E,), in microseconds since 1970.
    """
    # What a million of them say is near enough, whatever the log's size.
    some = np.sort(micros[:: -(-len(micros) // 1_000_000)] // 1_000_000)
    starts = np.unique(some[np.arange(1, SPANS) * len(some) // SPANS])
    return [int(start) for start in starts if start > some[0]]


def _length(feature: Feature) -> int:
    if feature.kind == "vector":
        return feature.width or 0
    return feature.length if feature.kind in ("ids", "history") else 1


def arrow_type(spec: TensorSpec) -> pa.DataType:
    """Return the Arrow type of a raw feature."""
    scalar = {"string": pa.string(), "int64": pa.int64(), "float32": pa.float32()}[spec.dtype]
    if spec.kind == "vector":
        return pa.list_(scalar, spec.length)
    if spec.kind == "number":
        return pa.float64()
    return pa.list_(scalar) if spec.is_list else scalar
