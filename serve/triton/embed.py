"""The Triton models `embed_query` and `embed_items`: raw features in, the tower's vectors out.

Runs in Triton's Python backend, as its `model.py`, with NumPy and ONNX Runtime and without
twotower.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from features import (
    Features,
    keep_what_is_loaded,
    parse_each,
    refusal,
    tensors_of,
    use_fast_strings,
)
from tower import open_tower


class TritonPythonModel:
    """Embeds batches of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the tower of this version's directory."""
        use_fast_strings()
        folder = Path(args["model_repository"]) / args["model_version"]
        parameters = json.loads(args["model_config"])["parameters"]
        self.schema = json.loads(parameters["schema"]["string_value"])
        self.features = Features(self.schema["features"], self.schema["bias"])
        self.tower = open_tower(
            folder, self.schema["side"], parameters["target"]["string_value"],
            int(parameters["threads"]["string_value"]),
        )  # fmt: skip
        keep_what_is_loaded()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request, or say by itself why not."""
        responses: list[Any]
        responses, parsed = parse_each(requests, lambda r: self.features.parse(tensors_of(r)))
        if parsed:
            feed = self.features.join([columns for _, (columns, _) in parsed])
            vectors, start = self.tower.vectors(feed), 0
            fits = not self.features.unfit(vectors).any()
            for number, (columns, count) in parsed:
                own = vectors[start : start + count]
                wrong = None if fits else self.features.overflow(columns, own)
                responses[number] = refusal(wrong) if wrong else self.response(own)
                start += count
        return responses

    def response(self, vectors: np.ndarray[Any, Any]) -> Any:
        """Return one request's tensors."""
        version = np.full((len(vectors), 1), self.schema["version"], dtype=np.int64)
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("vector", np.ascontiguousarray(vectors)),
            pb_utils.Tensor("version", version),
        ])  # fmt: skip
