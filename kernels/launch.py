"""What the kernels' launchers share: operators, where Triton runs, block sizes and splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# With TRITON_INTERPRET=1 the kernels run on CPU tensors, statement by statement: for tests alone.
INTERPRET = bool(triton.knobs.runtime.interpret)
# Programs that keep an H100's 132 multiprocessors busy; also what splits are cut for.
PROGRAMS = 264


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of a launch, with warps a program and stages of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


def runs_triton(device: torch.device) -> bool:
    """Whether the Triton kernels serve tensors of a device."""
    return device.type == "cuda" or INTERPRET


def upcast(dtype: torch.dtype) -> bool:
    """Whether a kernel must widen its inputs: the interpreter's bf16 products are wrong."""
    return INTERPRET and dtype != torch.float32


def pointer(value: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor that a kernel which does not read it can be given in its place."""
    return other if value is None else value


def power_of_two(width: int) -> int:
    """Return the smallest tile side that holds a width; products want at least 16."""
    return max(16, int(triton.next_power_of_2(width)))


def splits_for(programs: int, length: int, block: int) -> int:
    """Return into how many parts a loop over `length` is cut, so that all multiprocessors work."""
    if INTERPRET:
        return min(2, -(-length // block))
    return max(1, min(-(-PROGRAMS // programs), -(-length // (4 * block))))


def operator(
    name: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> torch._ops.OpOverload:
    """Make a function of tensors an operator of PyTorch, for CPU and CUDA, and return it.

    `torch.library.custom_op` does so too, but then walks the storages of all inputs and outputs at
    every call, looking for aliases, under a guard of Dynamo's: at small batches, that takes longer
    than what it calls (`launched` in benchmarks/gpu.py).

    Args:
        name: what it is called in the namespace `twotower`; that of a gradient, which cannot be
            differentiated again, ends with `_backward`.
        function: returns new tensors alone and changes none of its inputs.
        fake: returns tensors of the shapes and types that the function would.
    """
    full = f"twotower::{name}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(full, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(full, ("cpu", "cuda"), function)
    torch.library.register_fake(full, fake)
    if name.endswith("_backward"):
        torch.library.register_autograd(full, _refuse_second)
    overload: torch._ops.OpOverload = getattr(torch.ops.twotower, name).default
    return overload


def _refuse_second(*_: Any) -> None:
    raise RuntimeError("twotower's operators can be differentiated once, not twice")


def check_together(left: str, one: Tensor | None, right: str, other: Tensor | None) -> None:
    """Refuse one of two arguments that mean nothing without each other.

    Raises:
        ValueError: naming both.
    """
    if (one is None) != (other is None):
        raise ValueError(f"{left} and {right} belong together, got one of them")


def check_matrices(name: str, a: Tensor, other: str, b: Tensor) -> None:
    """Refuse what cannot be multiplied row by row.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    for label, matrix in ((name, a), (other, b)):
        if matrix.ndim != 2 or 0 in matrix.shape:
            raise ValueError(
                f"{label} must be a matrix with rows and columns, got shape {tuple(matrix.shape)}"
            )
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name} and {other} must have one width, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
