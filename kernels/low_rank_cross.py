"""Low-rank cross layers, a stack of them: DCN-v2's explicit feature crosses.

    x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l,   l = 0 ... L - 1

(Wang et al. 2021, "DCN V2: Improved Deep & Cross Network", section 3.1; `*` is elementwise.)

On a GPU a program takes a tile of rows through all layers: a layer's first walk over the columns
sums h = V x, its second computes y = U h + b and the next x. Between walks a row's columns rest in
the caches, not in registers, so that a tile holds 64 rows at any D: the tiles of 16 to 32 rows
whose columns fit in registers would read the weights 2 to 4 times as often, and the backward pass,
which carries two sums and an accumulator, spilled 0.5 to 8 KB a thread at D = 256 and beyond when
compiled for Hopper. Bytes of memory: forward 2 B D, and for training (L - 1) B D + L B R for what
is saved; backward (2 + L) B D + L B R in and L B (D + R) + 2 B D out. Operations: forward
4 B D R L, backward 6 B D R L and 4 B D R L for the weights: below R = 100 or so, bound by memory.

Backward, from the last layer: the gradient dx of x_{l+1} gives dy = dx * x_0, dh = dy U, and
x_l's, dx + dh V; the gradient of x_0 as a factor sums dx * y. What remains is three products over
the rows, dU = dy^T h, dV = dh^T x and db = sum dy, whose sums are fp32 in a fixed order.

On a CPU, blocks of rows go through all layers, with explicit gradients: what they hold besides the
saved tensors does not grow with B.

Shape legend: `B` rows, `D` width, `L` layers, `R` rank.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.launch import Blocks, operator, power_of_two, runs_triton, upcast

# The tiles of a higher rank do not fit Hopper's registers.
HIGHEST_RANK = 256
# Bytes of one (rows, D) block of the eager implementation: on 2 busy cores, at B = 16,384, D = 320,
# one block of 20 MB took half the time of blocks of 0.1 to 0.5 MB.
BLOCK_BYTES = 64 << 20


def low_rank_cross_reference(x_BD: Tensor, u_LDR: Tensor, v_LRD: Tensor, bias_LD: Tensor) -> Tensor:
    """Return the same by the formula, in the inputs' precision."""
    x_l = x_BD
    for layer in range(u_LDR.shape[0]):
        hidden_BR = x_l @ v_LRD[layer].T
        x_l = x_BD * (hidden_BR @ u_LDR[layer].T + bias_LD[layer]) + x_l
    return x_l


@triton.jit
def _load(pointer, row, column, ROWS, COLUMNS):
    """Load a tile of a contiguous matrix (ROWS, COLUMNS), zeros beyond its edges."""
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    return tl.load(pointer + row[:, None] * COLUMNS + column[None, :], mask=inside, other=0.0)


@triton.jit
def _store(pointer, row, column, ROWS, COLUMNS, tile):
    """Store a tile into a contiguous matrix (ROWS, COLUMNS), in its type."""
    inside = (row < ROWS)[:, None] & (column < COLUMNS)[None, :]
    place = pointer + row[:, None] * COLUMNS + column[None, :]
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _forward_kernel(
    x, u, v, bias, out, hidden, saved, B, D, R, L,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Take a tile of rows through all layers."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.minimum(B - first_row, BLOCK_B).to(tl.int32)
    row = tl.arange(0, BLOCK_B)
    rank = tl.arange(0, BLOCK_R)
    x += first_row * D
    out += first_row * D
    source = x
    for index in range(L):
        layer = tl.cast(index, tl.int64)
        weights = layer * D * R
        h = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            x_l = _load(source, row, column, rows, D)
            v_l = _load(v + weights, rank, column, R, D)
            h = tl.dot(x_l, tl.trans(v_l), h, input_precision="tf32x3")
        if SAVE:
            _store(hidden + (layer * B + first_row) * R, row, rank, rows, R, h)
        h = h.to(u.dtype.element_ty)
        target = out
        if (index + 1 < L) & SAVE:
            target = saved + (layer * B + first_row) * D
        # All warps have read x_l before its place is written, and written it before it is read.
        tl.debug_barrier()
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            u_l = _load(u + weights, column, rank, D, R)
            y = tl.dot(h, tl.trans(u_l), input_precision="tf32x3")
            y += tl.load(bias + layer * D + column, mask=column < D, other=0.0).to(tl.float32)
            x_0 = _load(x, row, column, rows, D).to(tl.float32)
            x_l = _load(source, row, column, rows, D).to(tl.float32)
            _store(target, row, column, rows, D, x_0 * y + x_l)
        tl.debug_barrier()
        source = target


@triton.jit
def _backward_kernel(
    x, u, v, bias, hidden, grad, of_x, of_y, of_hidden, scratch, B, D, R, L,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Take a tile of rows back through all layers: of_x (B, D), of_y (L, B, D), of_hidden."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.minimum(B - first_row, BLOCK_B).to(tl.int32)
    row = tl.arange(0, BLOCK_B)
    rank = tl.arange(0, BLOCK_R)
    x += first_row * D
    of_x += first_row * D
    scratch += first_row * D
    source = grad + first_row * D
    for index in range(L):
        layer = tl.cast(L - 1 - index, tl.int64)
        weights = layer * D * R
        h = _load(hidden + (layer * B + first_row) * R, row, rank, rows, R)
        of_h = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            u_l = _load(u + weights, column, rank, D, R)
            y = tl.dot(h, tl.trans(u_l), input_precision="tf32x3")
            y += tl.load(bias + layer * D + column, mask=column < D, other=0.0).to(tl.float32)
            dx = _load(source, row, column, rows, D).to(tl.float32)
            x_0 = _load(x, row, column, rows, D).to(tl.float32)
            # Here of_x sums what reaches x_0 as a factor, and in the end as the first input.
            factor = dx * y
            if index > 0:
                factor += _load(of_x, row, column, rows, D).to(tl.float32)
            if layer == 0:
                factor += dx
            _store(of_x, row, column, rows, D, factor)
            dy = dx * x_0
            _store(of_y + (layer * B + first_row) * D, row, column, rows, D, dy)
            of_h = tl.dot(dy.to(u_l.dtype), u_l, of_h, input_precision="tf32x3")
        _store(of_hidden + (layer * B + first_row) * R, row, rank, rows, R, of_h)
        target = scratch
        if layer == 0:
            source = of_x
            target = of_x
        tl.debug_barrier()
        for start in range(0, D, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            v_l = _load(v + weights, rank, column, R, D)
            dx = _load(source, row, column, rows, D).to(tl.float32)
            dx = tl.dot(of_h.to(v_l.dtype), v_l, dx, input_precision="tf32x3")
            _store(target, row, column, rows, D, dx)
        tl.debug_barrier()
        source = target


def tiles(rank: int, dtype: torch.dtype, aligned: bool) -> Blocks:
    """Return rows, columns of a step over the width, warps and stages, of both kernels.

    In bf16 up to rank 64 the fastest of 24 on an H200 (`benchmarks/gpu.py --sweep`), of which two
    programs share a multiprocessor; the others are reasoned: 64 rows fill Hopper's matrix
    instructions, and a rank above 64 takes 8 warps and a multiprocessor of its own. Widths and
    ranks that are no multiples of 16 are loaded value by value, which takes registers: hence 8
    warps and narrower steps. In bf16 at most 48 bytes spill (tests/kernels/test_compile.py); in
    fp32 up to 0.3 KB do. An fp32 step of 16 columns by 8 warps would end in an illegal access when
    compiled by Triton 3.6 (seen on an H200): hence 4.
    """
    if dtype == torch.float32:
        return Blocks(64, 32, 4, 2) if rank <= 64 else Blocks(64, 16, 4, 1)
    if not aligned:
        return Blocks(64, 32 if rank <= 64 else 16, 8, 2 if rank <= 128 else 1)
    if rank <= 64:
        return Blocks(64, 64, 4, 3)
    return Blocks(64, 64 if rank <= 128 else 32, 8, 2)


def _options(width: int, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the kernels' compile-time values."""
    blocks = tiles(rank, dtype, width % 16 == 0 and rank % 16 == 0)
    return {
        "BLOCK_B": blocks.rows, "BLOCK_D": blocks.columns, "BLOCK_R": power_of_two(rank),
        "num_warps": blocks.warps, "num_stages": blocks.stages,
    }  # fmt: skip


Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _empty(x: Tensor, layers: int, rank: int, save: bool) -> Three:
    """Return room for the result (B, D), h (L, B, R) and x_1 ... x_{L-1} (L - 1, B, D)."""
    b, d = x.shape
    if not save:
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
    return torch.empty_like(x), x.new_empty(layers, b, rank), x.new_empty(layers - 1, b, d)


def triton_forward(x: Tensor, u: Tensor, v: Tensor, bias: Tensor, save: bool) -> Three:
    """Return the result and, to be saved, h (L, B, R) and the inputs of all but one layer."""
    if upcast(x.dtype):
        out, hidden, saved = triton_forward(x.float(), u.float(), v.float(), bias.float(), save)
        return out.to(x.dtype), hidden.to(x.dtype), saved.to(x.dtype)
    (b, d), (layers, rank, _) = x.shape, v.shape
    out, hidden, saved = _empty(x, layers, rank, save)
    options = _options(d, rank, x.dtype)
    _forward_kernel[(triton.cdiv(b, options["BLOCK_B"]),)](
        x, u, v, bias, out, hidden, saved, b, d, rank, layers, SAVE=save, **options
    )
    return out, hidden, saved


def triton_backward(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, saved: Tensor, grad: Tensor
) -> Four:
    """Return the gradients of x, u, v and bias."""
    if upcast(x.dtype):
        wide = (t.float() for t in (x, u, v, bias, hidden, saved, grad))
        of_x, of_u, of_v, of_bias = (t.to(x.dtype) for t in triton_backward(*wide))
        return of_x, of_u, of_v, of_bias
    (b, d), (layers, rank, _) = x.shape, v.shape
    of_x, of_y, of_hidden = torch.empty_like(x), x.new_empty(layers, b, d), torch.empty_like(hidden)
    scratch = torch.empty_like(x) if layers > 1 else of_x
    options = _options(d, rank, x.dtype)
    _backward_kernel[(triton.cdiv(b, options["BLOCK_B"]),)](
        x, u, v, bias, hidden, grad, of_x, of_y, of_hidden, scratch, b, d, rank, layers, **options
    )
    of_u, of_v = torch.empty_like(u), torch.empty_like(v)
    for layer in range(layers):
        of_u[layer] = _product(of_y[layer], hidden[layer])
        of_v[layer] = _product(of_hidden[layer], saved[layer - 1] if layer else x)
    return of_x, of_u, of_v, of_y.sum(1, dtype=torch.float32).to(bias.dtype)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left^T right, summed in fp32 whatever the type."""
    if left.is_cuda and left.dtype == torch.bfloat16:
        # Without it, cuBLAS may add its parts in bf16.
        return torch.mm(left.T, right, out_dtype=torch.float32)
    return left.T.float() @ right.float()


def _rows_a_block(x: Tensor) -> int:
    """Return how many rows a round of the eager implementation takes."""
    return len(x) if x.is_cuda else max(64, BLOCK_BYTES // (4 * x.shape[1]))


def eager_forward(x: Tensor, u: Tensor, v: Tensor, bias: Tensor, save: bool) -> Three:
    """Return what `triton_forward` does, by blocks of rows."""
    layers, rank, _ = v.shape
    out, hidden, saved = _empty(x, layers, rank, save)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, v, bias = u.to(wide), v.to(wide), bias.to(wide)
    size = _rows_a_block(x)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        x_0 = x_l = x[rows].to(wide)
        for layer in range(layers):
            h = x_l @ v[layer].T
            y = torch.addmm(bias[layer], h, u[layer].T)
            x_l = torch.addcmul(x_l, x_0, y, out=y)
            if save:
                hidden[layer, rows] = h
                if layer + 1 < layers:
                    saved[layer, rows] = x_l
        out[rows] = x_l
    return out, hidden, saved


def eager_backward(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, saved: Tensor, grad: Tensor
) -> Four:
    """Return what `triton_backward` does, by blocks of rows; the weights' sums are wide."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    kind = x.dtype
    u, v, bias = u.to(wide), v.to(wide), bias.to(wide)
    of_x = torch.empty_like(x)
    of_u, of_v, of_bias = torch.zeros_like(u), torch.zeros_like(v), torch.zeros_like(bias)
    size = _rows_a_block(x)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        x_0, dx = x[rows].to(wide), grad[rows].to(wide)
        factor = torch.zeros_like(x_0)
        for layer in reversed(range(len(u))):
            h = hidden[layer, rows].to(wide)
            x_l = saved[layer - 1, rows].to(wide) if layer else x_0
            y = torch.addmm(bias[layer], h, u[layer].T)
            factor.addcmul_(dx, y)
            dy = torch.mul(dx, x_0, out=y)
            dh = dy @ u[layer]
            of_u[layer].addmm_(dy.T, h)
            of_v[layer].addmm_(dh.T, x_l)
            of_bias[layer] += dy.sum(0)
            dx = torch.addmm(dx, dh, v[layer])
        of_x[rows] = factor.add_(dx)
    return of_x, of_u.to(kind), of_v.to(kind), of_bias.to(kind)


def _fused(x: Tensor, v: Tensor) -> bool:
    return runs_triton(x.device) and v.shape[1] <= HIGHEST_RANK


def _forward_now(x: Tensor, u: Tensor, v: Tensor, bias: Tensor, save: bool) -> Three:
    """Return the result and what the backward pass needs, empty unless it is to be saved."""
    with torch.autocast(x.device.type, enabled=False):
        return (triton_forward if _fused(x, v) else eager_forward)(x, u, v, bias, save)


def _forward_fake(x: Tensor, u: Tensor, v: Tensor, bias: Tensor, save: bool) -> Three:
    return _empty(x, v.shape[0], v.shape[1], save)


_forward = operator("low_rank_cross", _forward_now, _forward_fake)


def _backward_now(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, saved: Tensor, grad: Tensor
) -> Four:
    """Return the gradients of x, u, v and bias."""
    backward = triton_backward if _fused(x, v) else eager_backward
    with torch.autocast(x.device.type, enabled=False):
        return backward(x, u, v, bias, hidden, saved, grad)


def _backward_fake(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, saved: Tensor, grad: Tensor
) -> Four:
    return torch.empty_like(x), torch.empty_like(u), torch.empty_like(v), torch.empty_like(bias)


_backward = operator("low_rank_cross_backward", _backward_now, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    ctx.set_materialize_grads(False)  # of what is saved there are none
    ctx.save_for_backward(*inputs[:4], *output[1:])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    return *_backward(*ctx.saved_tensors, grad.contiguous()), None


torch.library.register_autograd(_forward, _differentiate, setup_context=_setup_context)


def low_rank_cross(x_BD: Tensor, u_LDR: Tensor, v_LRD: Tensor, bias_LD: Tensor) -> Tensor:
    """Return x_L (B, D), the rows behind L cross layers.

    Differentiable, once, by all arguments. fp32 and bf16 are summed in fp32, fp64 (on a CPU) in
    fp64; the result has the inputs' type, and so has what layers hand on and save. Of a rank above
    256 the eager implementation takes care, on a GPU too; the width has no limit.

    Args:
        x_BD: rows, fp32 or bf16; fp64 on a CPU.
        u_LDR: what turns R hidden numbers into D, a matrix a layer, of the same type.
        v_LRD: what turns D columns into R hidden numbers, likewise.
        bias_LD: added to what `u` gives, likewise.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _validate(x_BD, u_LDR, v_LRD, bias_LD)
    tensors = (x_BD, u_LDR, v_LRD, bias_LD)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    result: Tensor = _forward(*(t.contiguous() for t in tensors), save)[0]
    return result


def _validate(x_BD: Tensor, u_LDR: Tensor, v_LRD: Tensor, bias_LD: Tensor) -> None:
    if x_BD.ndim != 2 or 0 in x_BD.shape:
        raise ValueError(f"x must be a matrix with rows and columns, got shape {tuple(x_BD.shape)}")
    d = x_BD.shape[1]
    if u_LDR.ndim != 3 or 0 in u_LDR.shape or u_LDR.shape[1] != d:
        raise ValueError(
            f"u must have shape (layers, {d} (columns of x), rank), got {tuple(u_LDR.shape)}"
        )
    layers, _, rank = u_LDR.shape
    allowed = [torch.float32, torch.bfloat16]
    if not runs_triton(x_BD.device):
        allowed.append(torch.float64)
    if x_BD.dtype not in allowed:
        raise ValueError(f"x must be one of {', '.join(str(t) for t in allowed)}, got {x_BD.dtype}")
    for name, value, shape in (
        ("u", u_LDR, (layers, d, rank)), ("v", v_LRD, (layers, rank, d)),
        ("bias", bias_LD, (layers, d)),
    ):  # fmt: skip
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if value.dtype != x_BD.dtype:
            raise ValueError(f"{name} must be {x_BD.dtype} as x is, got {value.dtype}")
        if value.device != x_BD.device:
            raise ValueError(f"{name} must be on x's device {x_BD.device}, got {value.device}")
