"""A tower as Triton's Python models run it, on a CPU and on a GPU.

Imports nothing of twotower's: the file is copied beside the models, into Triton.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils

Array = np.ndarray[Any, Any]


def open_session(path: Path, threads: int) -> ort.InferenceSession:
    """Open a graph for the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # See `search._open_graph`.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class WholeTower:
    """A tower in ONNX Runtime on the CPU, both halves in one graph.

    Args:
        folder: with the bundle's files.
        side: query or item.
        threads: of ONNX Runtime.
    """

    def __init__(self, folder: Path, side: str, threads: int) -> None:
        self.session = open_session(folder / f"{side}.onnx", threads)

    def vectors(self, feed: dict[str, Array]) -> Array:
        """Return the vectors (B, D) of raw features."""
        found: Array = self.session.run(["vector"], feed)[0]
        return found


class TowerOnGpu:
    """A tower whose ids are mapped here, and whose layers another model of the server runs.

    Args:
        folder: with the bundle's files.
        side: query or item; the other model is `<side>_tower`.
        threads: of ONNX Runtime.
    """

    def __init__(self, folder: Path, side: str, threads: int) -> None:
        self.session = open_session(folder / f"{side}_encoding.onnx", threads)
        self.names = [output.name for output in self.session.get_outputs()]
        self.model, self.version = f"{side}_tower", int(folder.name)

    def vectors(self, feed: dict[str, Array]) -> Array:
        """Return the vectors (B, D) of raw features."""
        encoded = self.session.run(self.names, feed)
        answer = pb_utils.InferenceRequest(
            model_name=self.model, model_version=self.version, requested_output_names=["vector"],
            inputs=[pb_utils.Tensor(n, a) for n, a in zip(self.names, encoded, strict=True)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        ).exec()  # fmt: skip
        if answer.has_error():
            raise RuntimeError(f"{self.model}: {answer.error().message()}")
        found: Array = pb_utils.get_output_tensor_by_name(answer, "vector").as_numpy()
        return found


def open_tower(folder: Path, side: str, target: str, threads: int) -> WholeTower | TowerOnGpu:
    """Open a tower of a version directory, for the target cpu or gpu."""
    return (TowerOnGpu if target == "gpu" else WholeTower)(folder, side, threads)
