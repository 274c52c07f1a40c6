"""Pairwise dots of a sample's feature vectors beside its dense vector, as DLRM has them.

    out_b = [f_0, <f_1, f_0>, <f_2, f_0>, <f_2, f_1>, <f_3, f_0>, ...]

Feature 0, the dense vector, is carried through; the lower triangle follows row by row (Naumov et
al. 2019, "Deep Learning Recommendation Model for Personalization and Recommendation Systems").

On a GPU a program takes as many whole samples as fit a tile of rows, which lie side by side in
memory, and multiplies the tile by itself: what lies off a sample's own block of the product is not
stored. Bytes: forward (F D + D + F (F - 1) / 2) a sample, each once; backward the same and the
gradient's F D. Operations: 2 BLOCK_F D a row of the tile, forward and backward alike: bound by
memory. Neither the F x F products nor a symmetric gradient ever reach it.

The gradient's triangle, mirrored, is a symmetric matrix G with a zero diagonal: dX = G X, and the
carried gradient is added to row 0.

On a CPU, blocks of samples go through batched products, so that the F x F products of one block
are all that is ever held.

Shape legend: `B` samples, `F` features, `D` width, `W` = D + F (F - 1) / 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.launch import Blocks, operator, power_of_two, runs_triton, upcast

# The tile of more features than these holds too few columns to be worth it.
MOST_FEATURES = 64
# Samples' inputs and products that one round may hold: on 2 busy cores, at B = 8,192, F = 27 and
# D = 64, rounds of 32 MB and more were equally fast and those of 1 MB half as fast.
BLOCK_BYTES = 64 << 20


def dot_interaction_reference(feature_BFD: Tensor) -> Tensor:
    """Return the same by the whole product, in the inputs' precision."""
    f = feature_BFD.shape[1]
    place = torch.tensor(triangle(f), dtype=torch.int64, device=feature_BFD.device)
    dots_BFF = feature_BFD @ feature_BFD.transpose(1, 2)
    return torch.cat([feature_BFD[:, 0], dots_BFF.flatten(1)[:, place]], dim=1)


def triangle(features: int) -> list[int]:
    """Return where the lower triangle of a square matrix lies in it, row by row."""
    return [i * features + j for i in range(features) for j in range(i)]


def output_width(features: int, width: int) -> int:
    """Return W, the width of the result."""
    return width + features * (features - 1) // 2


@triton.jit
def _rows(B, F: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_F: tl.constexpr):
    """Return the first sample, and the sample, the feature and the existence of each tile row."""
    first = tl.program_id(0).to(tl.int64) * SAMPLES
    row = tl.arange(0, BLOCK_F)
    sample = row // F
    exists = (sample < SAMPLES) & (first + sample < B)
    return first, sample, row % F, exists


@triton.jit
def _pairs(sample, f, exists, D, F: tl.constexpr):
    """Return where each pair of a tile lies among its samples' outputs, and which lie there.

    Both of (i, j) and (j, i) are given the place of the lower triangle.
    """
    high = tl.maximum(f[:, None], f[None, :])
    low = tl.minimum(f[:, None], f[None, :])
    place = sample[:, None] * (D + F * (F - 1) // 2) + D + high * (high - 1) // 2 + low
    own = (sample[:, None] == sample[None, :]) & exists[:, None] & exists[None, :]
    return place, own


@triton.jit
def _forward_kernel(
    feature, out, B, D,
    F: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the carried vectors and the triangles of SAMPLES samples."""
    first, sample, f, exists = _rows(B, F, SAMPLES, BLOCK_F)
    feature += first * F * D
    out += first * (D + F * (F - 1) // 2)
    row = tl.arange(0, BLOCK_F)
    carried = tl.arange(0, BLOCK_S)
    dots = tl.zeros([BLOCK_F, BLOCK_F], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        x = tl.load(feature + row[:, None] * D + column[None, :], mask=inside, other=0.0)
        dots = tl.dot(x, tl.trans(x), dots, input_precision="tf32x3")
        # Read again while they are in the cache: storing them out of the tile would issue a store
        # for each of its rows.
        inside = ((carried < SAMPLES) & (first + carried < B))[:, None] & (column < D)[None, :]
        dense = tl.load(feature + carried[:, None] * (F * D) + column[None, :], mask=inside)
        place = carried[:, None] * (D + F * (F - 1) // 2) + column[None, :]
        tl.store(out + place, dense, mask=inside)
    place, own = _pairs(sample, f, exists, D, F)
    tl.store(out + place, dots.to(out.dtype.element_ty), mask=own & (f[:, None] > f[None, :]))


@triton.jit
def _backward_kernel(
    feature, grad, of_feature, B, D,
    F: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradients of SAMPLES samples."""
    first, sample, f, exists = _rows(B, F, SAMPLES, BLOCK_F)
    feature += first * F * D
    of_feature += first * F * D
    grad += first * (D + F * (F - 1) // 2)
    row = tl.arange(0, BLOCK_F)
    place, own = _pairs(sample, f, exists, D, F)
    g = tl.load(grad + place, mask=own & (f[:, None] != f[None, :]), other=0.0)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = exists[:, None] & (column < D)[None, :]
        x = tl.load(feature + row[:, None] * D + column[None, :], mask=inside, other=0.0)
        of_x = tl.dot(g, x, input_precision="tf32x3")
        if SAMPLES == 1:
            # One row for the whole tile, not a load for each of its rows.
            carried = tl.load(grad + column, mask=column < D, other=0.0).to(tl.float32)
            of_x += tl.where((f == 0)[:, None], carried[None, :], 0.0)
        else:
            own_place = sample[:, None] * (D + F * (F - 1) // 2) + column[None, :]
            carried_rows = tl.load(grad + own_place, mask=inside & (f == 0)[:, None], other=0.0)
            of_x += carried_rows.to(tl.float32)
        tl.store(
            of_feature + row[:, None] * D + column[None, :],
            of_x.to(of_feature.dtype.element_ty), mask=inside,
        )  # fmt: skip


def forward_tiles(features: int, width: int) -> Blocks:
    """Return rows, columns of a step over the width, warps and stages of the forward kernel.

    Of 27 features in bf16 these and the other's were the fastest tried on an H200, of 36 with one
    tile for both (`benchmarks/gpu.py --sweep`), then of 4 each by itself. Others are reasoned: the
    smallest tile that holds a sample wastes the least of the product and of its stores, and small
    programs, of which a multiprocessor holds many, together keep the memory busy. Nothing spills in
    bf16 (tests/kernels/test_compile.py).
    """
    rows = power_of_two(features)
    return Blocks(rows, min(power_of_two(width), 128 if rows <= 32 else 64), rows // 16, 2)


def backward_tiles(features: int, width: int) -> Blocks:
    """Return the same of the backward kernel."""
    rows = power_of_two(features)
    warps, stages = (1, 3) if rows <= 32 else (rows // 16, 2)
    return Blocks(rows, min(power_of_two(width), 64), warps, stages)


def _options(features: int, blocks: Blocks) -> tuple[int, dict[str, Any]]:
    """Return the samples of a program and the kernels' compile-time values."""
    samples = blocks.rows // features
    return samples, {
        "F": features, "SAMPLES": samples, "BLOCK_F": blocks.rows, "BLOCK_D": blocks.columns,
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip


def triton_forward(feature: Tensor) -> Tensor:
    """Return (B, W); see the module's docstring."""
    if upcast(feature.dtype):
        return triton_forward(feature.float()).to(feature.dtype)
    b, f, d = feature.shape
    out = feature.new_empty(b, output_width(f, d))
    samples, options = _options(f, forward_tiles(f, d))
    block_s = int(triton.next_power_of_2(samples))
    _forward_kernel[(triton.cdiv(b, samples),)](
        feature, out, b, d, BLOCK_S=block_s, **options
    )  # fmt: skip
    return out


def triton_backward(feature: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient (B, F, D)."""
    if upcast(feature.dtype):
        return triton_backward(feature.float(), grad.float()).to(feature.dtype)
    b, f, d = feature.shape
    of_feature = torch.empty_like(feature)
    samples, options = _options(f, backward_tiles(f, d))
    _backward_kernel[(triton.cdiv(b, samples),)](feature, grad, of_feature, b, d, **options)
    return of_feature


def _samples_a_block(feature: Tensor) -> int:
    """Return how many samples a round of the eager implementation takes."""
    b, f, d = feature.shape
    return b if feature.is_cuda else max(1, BLOCK_BYTES // (4 * f * (f + d)))


def eager_forward(feature: Tensor) -> Tensor:
    """Return (B, W) by batched products of blocks of samples."""
    b, f, d = feature.shape
    wide = torch.float64 if feature.dtype == torch.float64 else torch.float32
    place = torch.tensor(triangle(f), dtype=torch.int64, device=feature.device)
    out = feature.new_empty(b, output_width(f, d))
    out[:, :d] = feature[:, 0]
    for part, out_part in zip(
        feature.split(_samples_a_block(feature)), out.split(_samples_a_block(feature)), strict=True
    ):
        x = part.to(wide)
        dots = torch.bmm(x, x.transpose(1, 2))
        out_part[:, d:] = dots.flatten(1).index_select(1, place)
    return out


def eager_backward(feature: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient (B, F, D) by batched products of blocks of samples."""
    b, f, d = feature.shape
    wide = torch.float64 if feature.dtype == torch.float64 else torch.float32
    place = torch.tensor(triangle(f), dtype=torch.int64, device=feature.device)
    # Where each place of the symmetric matrix finds its value; the diagonal finds the zero behind.
    source = torch.full((f, f), len(place), dtype=torch.int64, device=feature.device)
    source.view(-1)[place] = torch.arange(len(place), device=feature.device)
    source = torch.minimum(source, source.T).flatten()
    of_feature = torch.empty_like(feature)
    size = _samples_a_block(feature)
    for start in range(0, b, size):
        rows = slice(start, min(start + size, b))
        pairs = torch.nn.functional.pad(grad[rows, d:].to(wide), (0, 1))
        symmetric = pairs.index_select(1, source).view(-1, f, f)
        of_x = torch.bmm(symmetric, feature[rows].to(wide))
        of_x[:, 0] += grad[rows, :d]
        of_feature[rows] = of_x
    return of_feature


def _fused(feature: Tensor) -> bool:
    return runs_triton(feature.device) and feature.shape[1] <= MOST_FEATURES


def _forward_now(feature: Tensor) -> Tensor:
    """Return (B, W)."""
    with torch.autocast(feature.device.type, enabled=False):
        return (triton_forward if _fused(feature) else eager_forward)(feature)


def _forward_fake(feature: Tensor) -> Tensor:
    b, f, d = feature.shape
    return feature.new_empty(b, output_width(f, d))


_forward = operator("dot_interaction", _forward_now, _forward_fake)


def _backward_now(feature: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient (B, F, D)."""
    with torch.autocast(feature.device.type, enabled=False):
        return (triton_backward if _fused(feature) else eager_backward)(feature, grad)


def _backward_fake(feature: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(feature)


_backward = operator("dot_interaction_backward", _backward_now, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> Tensor:
    of_feature: Tensor = _backward(*ctx.saved_tensors, grad.contiguous())
    return of_feature


torch.library.register_autograd(_forward, _differentiate, setup_context=_setup_context)


def dot_interaction(feature_BFD: Tensor) -> Tensor:
    """Return (B, W): feature 0, then the dots of all pairs, row by row of the lower triangle.

    Differentiable once. fp32 and bf16 are summed in fp32, fp64 (on a CPU) in fp64; the result has
    the inputs' type. Of more than 64 features the eager implementation takes care, on a GPU too.

    Args:
        feature_BFD: fp32 or bf16; fp64 on a CPU. Feature 0 is the dense vector.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    if feature_BFD.ndim != 3 or 0 in feature_BFD.shape:
        raise ValueError(
            f"feature must have samples, features and columns, got shape {tuple(feature_BFD.shape)}"
        )
    allowed = [torch.float32, torch.bfloat16]
    if not runs_triton(feature_BFD.device):
        allowed.append(torch.float64)
    if feature_BFD.dtype not in allowed:
        raise ValueError(
            f"feature must be one of {', '.join(str(t) for t in allowed)}, got {feature_BFD.dtype}"
        )
    result: Tensor = _forward(feature_BFD.contiguous())
    return result
