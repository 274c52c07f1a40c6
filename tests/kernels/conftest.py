"""What the kernels' tests share: devices, exactness, and memory that shows what was not written."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from twotower.kernels.launch import INTERPRET


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """CPU tensors, which the interpreter's run sends through the Triton kernels, and CUDA's."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fill every new buffer with NaN, so that a place which nothing wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


not_interpreted = pytest.mark.skipif(INTERPRET, reason="is about the CPU implementation")


def within(value: Tensor, at: tuple[int, int]) -> Tensor:
    """Return the rows in the middle of a larger buffer of NaN: a read beyond them shows."""
    before, after = at
    fill = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).min
    buffer = torch.full((before + len(value) + after, *value.shape[1:]), fill, dtype=value.dtype,
                        device=value.device)  # fmt: skip
    buffer[before : before + len(value)] = value
    return buffer[before : before + len(value)]


def error(got: Tensor, truth: Tensor) -> float:
    """Return the largest error, as a share of the largest true value."""
    assert got.isfinite().all()
    worst = (got.double().cpu() - truth.double().cpu()).abs().max()
    return float(worst / truth.double().abs().max().clamp_min(1e-30).cpu())
