"""Low-rank cross layers, a stack of them: DCN-v2's explicit feature crosses.

    x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l,   l = 0 ... L - 1

(Wang et al. 2021, "DCN V2: Improved Deep & Cross Network", section 3.1; `*` is elementwise.)

Every x_l is x_0 * s_l, with s_0 = 1, s_{l+1} = s_l + y_l and y_l = U_l h_l + b_l: so h_l = V_l x_l,
R numbers a row and layer, is all that a later layer must know of an earlier one, and all that is
saved. On a GPU a program takes a tile of rows through all layers with its h in registers: a layer
walks over the columns, makes s_l anew from them and sums its h. Operations: B D R L (L + 3), of
which L (L + 1) / 2 products are the scales'; handing on x_l would take fewer, but now no x_l is
written, read or saved. Bytes of memory: 2 B D and L B R, while the tiles that are at work, which
are read once a layer, rest in the L2 cache.

Backward the same holds with the roles of U and V exchanged. t_l, the gradient of x_l by what comes
after it, is the gradient that comes and the sum of dh_j V_j over j >= l, and
dh_l = (x_0 * t_{l+1}) U_l: so the same kernel walks back from the last layer, in B D R L (L + 1)
operations and 2 B D and L B R bytes likewise. From h and dh two kernels make the rest, of which no
column depends on another: dU_l = (x_0 * t_{l+1})^T h_l and db_l = sum x_0 * t_{l+1}; then
dV_l = dh_l^T (x_0 * s_l) and dx = s_L * grad + sum s_l * (dh_l V_l). A program holds 64 columns of
all weights in shared memory and goes through a part of the rows; the parts' sums are added in fp32
in a fixed order. Bytes: 5 B D, and 4 L B R for each 64 columns, of which the L2 cache spares most;
operations: (10 L - 2) B D R. So of the layers whose sums fit the registers, three in bf16 up to
rank 64 and one otherwise; the next layers read x twice and the gradient again, and make their t and
s anew. At R = 64 and L = 3 a Hopper's products alone take longer than reading x and the gradient
once and writing the results would.

On a CPU, blocks of rows go through all layers, with explicit gradients: what they hold besides h
does not grow with B.

Shape legend: `B` rows, `D` width, `L` layers, `R` rank.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.launch import Blocks, operator, power_of_two, runs_triton, splits_for, upcast

# Of the kernels: a higher rank's sums do not fit Hopper's registers, and more bytes of weights a
# column, layers x rank, not its shared memory.
HIGHEST_RANK = 128
HELD_BYTES = 768
# Each number of layers is a kernel of its own, which takes longer to compile with its square.
MOST_LAYERS = 8
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
def _weight(pointer, column, rank, D, column_stride, rank_stride):
    """Load columns of a layer's matrix as a tile (columns, ranks), however it lies in memory."""
    place = column[:, None] * column_stride + rank[None, :] * rank_stride
    return tl.load(pointer + place, mask=(column < D)[:, None], other=0.0)


@triton.jit
def _chain_kernel(
    x, grad, inward, outward, bias, hidden, out, B, D,
    in_column, in_rank, out_column, out_rank,
    L: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr,
    BACKWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Take a tile of rows through all layers: hidden (L, B, R), and forward out (B, D).

    Forward `inward` is V and `outward` U, and the scales begin with 1; backward it is U and V, from
    the last layer, and they begin with the gradient.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_B
    rows = tl.minimum(B - first_row, BLOCK_B).to(tl.int32)
    row = tl.arange(0, BLOCK_B)
    rank = tl.arange(0, R)
    x += first_row * D
    grad += first_row * D
    out += first_row * D
    before = ()
    # Forward, one more step for the result.
    for step in tl.static_range(L if BACKWARD else L + 1):
        h = tl.zeros([BLOCK_B, R], tl.float32)
        layer = L - 1 - step if BACKWARD else step
        # The stages are named, or loads that no product reads would wait for memory.
        for start in tl.range(0, D, BLOCK_D, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_D)
            x_0 = _load(x, row, column, rows, D).to(tl.float32)
            if BACKWARD:
                scale = _load(grad, row, column, rows, D).to(tl.float32)
            else:
                scale = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
                shift = tl.full([BLOCK_D], 1.0, tl.float32)
                for j in tl.static_range(step):
                    b_j = tl.load(bias + j * D + column, mask=column < D, other=0.0)
                    shift += b_j.to(tl.float32)
            for j in tl.static_range(step):
                past = L - 1 - j if BACKWARD else j
                w = _weight(outward + past * D * R, column, rank, D, out_column, out_rank)
                scale = tl.dot(before[j], tl.trans(w), scale, input_precision="tf32x3")
            if not BACKWARD:
                scale += shift[None, :]
            x_l = x_0 * scale
            if step < L:
                w = _weight(inward + layer * D * R, column, rank, D, in_column, in_rank)
                h = tl.dot(x_l.to(w.dtype), w, h, input_precision="tf32x3")
            else:
                _store(out, row, column, rows, D, x_l)
        if step < L:
            _store(hidden + (layer * tl.cast(B, tl.int64) + first_row) * R, row, rank, rows, R, h)
            before = before + (h.to(hidden.dtype.element_ty),)


@triton.jit
def _outward_kernel(
    x, grad, v, hidden, of_hidden, parts, B, D, split_size,
    L: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum dU and db of the layers FROM to TO over a split's rows, in BLOCK_D columns.

    Tiles lie on their sides, (columns, rows): what h is multiplied by stays in registers so.
    """
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    rank = tl.arange(0, R)
    row = tl.arange(0, BLOCK_B)
    place = row[None, :] * D + column[:, None]
    # Products sum the bias's gradient too: a sum over tiles would cross the warps.
    ones = tl.full([BLOCK_B, 16], 1.0, x.dtype.element_ty)
    v_all = ()
    of_u = ()
    of_b = ()
    for layer in tl.static_range(FROM + 1, L):
        v_all = v_all + (_weight(v + layer * D * R, column, rank, D, 1, D),)
    for _ in tl.static_range(TO - FROM):
        of_u = of_u + (tl.zeros([BLOCK_D, R], tl.float32),)
        of_b = of_b + (tl.zeros([BLOCK_D, 16], tl.float32),)
    first = split * split_size
    rows = tl.minimum(B - first, split_size).to(tl.int32)
    # The stages are named, or the gradient, which no product reads, would wait for memory.
    for start in tl.range(0, rows, BLOCK_B, num_stages=STAGES):
        inside = (column < D)[:, None] & (row < rows - start)[None, :]
        at = (first + start) * D
        x_0 = tl.load(x + at + place, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(grad + at + place, mask=inside, other=0.0).to(tl.float32)
        next_u = ()
        next_b = ()
        for back in tl.static_range(L - FROM):
            first_row = (L - 1 - back) * tl.cast(B, tl.int64) + first + start
            if L - 1 - back < TO:
                dy = (x_0 * t).to(x.dtype.element_ty)
                h = _load(hidden + first_row * R, row, rank, rows - start, R)
                of_l = of_u[L - 1 - back - FROM]
                next_u = (tl.dot(dy, h, of_l, input_precision="tf32x3"),) + next_u
                of_l = of_b[L - 1 - back - FROM]
                next_b = (tl.dot(dy, ones, of_l, input_precision="tf32x3"),) + next_b
            if L - 1 - back > FROM:
                dh = _load(of_hidden + first_row * R, row, rank, rows - start, R)
                v_l = v_all[L - 2 - back - FROM]
                t = tl.dot(v_l, tl.trans(dh), t, input_precision="tf32x3")
        of_u = next_u
        of_b = next_b
    inside = (column < D)[:, None]
    for index in tl.static_range(TO - FROM):
        part = parts + (split * L + FROM + index) * (2 * R + 1) * D
        tl.store(part + column[:, None] * R + rank[None, :], of_u[index], mask=inside)
        # All 16 columns are the same sum.
        tl.store(part + 2 * R * D + column, tl.max(of_b[index], axis=1), mask=column < D)


@triton.jit
def _inward_kernel(
    x, grad, u, v, bias, hidden, of_hidden, of_x, parts, B, D, split_size,
    L: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum dV likewise; the launch of layer 0 writes x's gradient too."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    rank = tl.arange(0, R)
    row = tl.arange(0, BLOCK_B)
    place = row[None, :] * D + column[:, None]
    LAST: tl.constexpr = L if FROM == 0 else TO
    u_all = ()
    v_all = ()
    b_all = ()
    of_v = ()
    for layer in tl.static_range(LAST):
        u_all = u_all + (_weight(u + layer * D * R, column, rank, D, R, 1),)
        v_all = v_all + (_weight(v + layer * D * R, column, rank, D, 1, D),)
        b_l = tl.load(bias + layer * D + column, mask=column < D, other=0.0)
        b_all = b_all + (b_l.to(tl.float32),)
    for _ in tl.static_range(TO - FROM):
        of_v = of_v + (tl.zeros([BLOCK_D, R], tl.float32),)
    first = split * split_size
    rows = tl.minimum(B - first, split_size).to(tl.int32)
    for start in tl.range(0, rows, BLOCK_B, num_stages=STAGES):
        inside = (column < D)[:, None] & (row < rows - start)[None, :]
        at = (first + start) * D
        x_0 = tl.load(x + at + place, mask=inside, other=0.0).to(tl.float32)
        s = tl.full([BLOCK_D, BLOCK_B], 1.0, tl.float32)
        dx = tl.zeros([BLOCK_D, BLOCK_B], tl.float32)
        next_v = ()
        for layer in tl.static_range(LAST):
            first_row = layer * tl.cast(B, tl.int64) + first + start
            h = _load(hidden + first_row * R, row, rank, rows - start, R)
            dh = _load(of_hidden + first_row * R, row, rank, rows - start, R)
            if (layer >= FROM) & (layer < TO):
                x_l = (x_0 * s).to(h.dtype)
                of_l = of_v[layer - FROM]
                next_v = next_v + (tl.dot(x_l, dh, of_l, input_precision="tf32x3"),)
            if FROM == 0:
                dx += s * tl.dot(v_all[layer], tl.trans(dh), input_precision="tf32x3")
            s = tl.dot(u_all[layer], tl.trans(h), s, input_precision="tf32x3")
            s += b_all[layer][:, None]
        of_v = next_v
        if FROM == 0:
            dx += s * tl.load(grad + at + place, mask=inside, other=0.0).to(tl.float32)
            tl.store(of_x + at + place, dx.to(of_x.dtype.element_ty), mask=inside)
    inside = (column < D)[:, None]
    for index in tl.static_range(TO - FROM):
        part = parts + (split * L + FROM + index) * (2 * R + 1) * D
        tl.store(part + (R + rank)[None, :] * D + column[:, None], of_v[index], mask=inside)


def chain_tiles(rank: int, dtype: torch.dtype) -> Blocks:
    """Return rows, columns of a step over the width, warps and stages of `_chain_kernel`.

    In bf16 these and the other kernels' were the fastest of 4 to 13 tried on an H200 at ranks 32,
    64 and 128, one by one (`benchmarks/gpu.py --sweep` tries more at a time); those of fp32 fit.
    Each warp has 16 rows of a product: with 8 warps for 64 rows, as compiled by Triton 3.6,
    gradients of rank 32 ended in an illegal access.
    """
    if dtype == torch.float32:
        return Blocks(64, 32 if rank <= 64 else 16, 4, 2)
    return Blocks(64, 64 if rank <= 64 else 32, 4, 3)


def outward_tiles(rank: int, dtype: torch.dtype) -> Blocks:
    """Return rows of a step, columns, warps and stages of `_outward_kernel`."""
    narrow = dtype == torch.bfloat16 and rank <= 64
    return Blocks(64 if narrow else 32, 64, 4, 2 if dtype == torch.bfloat16 else 1)


def inward_tiles(rank: int, dtype: torch.dtype) -> Blocks:
    """Return the same of `_inward_kernel`."""
    return Blocks(32, 64, 4, 2 if dtype == torch.bfloat16 else 1)


def layers_together(rank: int, dtype: torch.dtype) -> int:
    """Return of how many layers a launch sums the weights' gradients, which registers hold."""
    return 3 if dtype == torch.bfloat16 and rank <= 64 else 1


Two = tuple[Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _options(blocks: Blocks, rank: int) -> dict[str, Any]:
    """Return what the kernels know at compile time of their tiles."""
    return {
        "BLOCK_B": blocks.rows, "BLOCK_D": blocks.columns, "R": rank,
        "STAGES": blocks.stages, "num_warps": blocks.warps,
    }  # fmt: skip


def triton_forward(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Two:
    """Return the result and, to be saved, h (L, B, R)."""
    if upcast(x.dtype):
        out, hidden = triton_forward(x.float(), u.float(), v.float(), bias.float())
        return out.to(x.dtype), hidden.to(x.dtype)
    (b, d), (layers, rank, _) = x.shape, v.shape
    out, hidden = torch.empty_like(x), x.new_empty(layers, b, rank)
    blocks = chain_tiles(rank, x.dtype)
    _chain_kernel[(triton.cdiv(b, blocks.rows),)](
        x, x, v, u, bias, hidden, out, b, d, 1, d, rank, 1,
        L=layers, BACKWARD=False, **_options(blocks, rank),
    )  # fmt: skip
    return out, hidden


def triton_backward(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, grad: Tensor
) -> Four:
    """Return the gradients of x, u, v and bias."""
    if upcast(x.dtype):
        wide = (t.float() for t in (x, u, v, bias, hidden, grad))
        of_x, of_u, of_v, of_bias = (t.to(x.dtype) for t in triton_backward(*wide))
        return of_x, of_u, of_v, of_bias
    (b, d), (layers, rank, _) = x.shape, v.shape
    of_x, of_hidden = torch.empty_like(x), torch.empty_like(hidden)
    blocks = chain_tiles(rank, x.dtype)
    _chain_kernel[(triton.cdiv(b, blocks.rows),)](
        x, grad, u, v, bias, of_hidden, x, b, d, rank, 1, 1, d,
        L=layers, BACKWARD=True, **_options(blocks, rank),
    )  # fmt: skip
    outward, inward = outward_tiles(rank, x.dtype), inward_tiles(rank, x.dtype)
    across_outward, across_inward = (triton.cdiv(d, t.columns) for t in (outward, inward))
    step = max(outward.rows, inward.rows)
    size = triton.cdiv(triton.cdiv(b, splits_for(across_outward, b, step)), step) * step
    splits = triton.cdiv(b, size)
    parts = x.new_empty(splits, layers, 2 * rank + 1, d, dtype=torch.float32)
    together = layers_together(rank, x.dtype)
    for first in range(0, layers, together):
        group = {"L": layers, "FROM": first, "TO": min(first + together, layers)}
        _outward_kernel[(across_outward, splits)](
            x, grad, v, hidden, of_hidden, parts, b, d, size, **group, **_options(outward, rank)
        )
        _inward_kernel[(across_inward, splits)](
            x, grad, u, v, bias, hidden, of_hidden, of_x, parts, b, d, size, **group,
            **_options(inward, rank),
        )  # fmt: skip
    summed = parts.sum(0)
    of_u = summed[:, :rank].reshape(layers, d, rank)
    of_v, of_bias = summed[:, rank : 2 * rank], summed[:, -1]
    # Copies, for an operator's results share no memory.
    of_u, of_v, of_bias = (t.to(x.dtype, copy=True) for t in (of_u, of_v, of_bias))
    return of_x, of_u, of_v, of_bias


def _rows_a_block(x: Tensor) -> int:
    """Return how many rows a round of the eager implementation takes."""
    return max(64, BLOCK_BYTES // (4 * x.shape[1]))


def eager_forward(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Two:
    """Return what `triton_forward` does, by blocks of rows."""
    layers, rank, _ = v.shape
    out, hidden = torch.empty_like(x), x.new_empty(layers, len(x), rank)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, v, bias = u.to(wide), v.to(wide), bias.to(wide)
    size = _rows_a_block(x)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        x_0 = x_l = x[rows].to(wide)
        for layer in range(layers):
            h = x_l @ v[layer].T
            hidden[layer, rows] = h
            y = torch.addmm(bias[layer], h, u[layer].T)
            x_l = torch.addcmul(x_l, x_0, y, out=y)
        out[rows] = x_l
    return out, hidden


def eager_backward(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, grad: Tensor
) -> Four:
    """Return what `triton_backward` does, by blocks of rows; the weights' sums are wide."""
    kind = x.dtype
    wide = torch.float64 if kind == torch.float64 else torch.float32
    u, v, bias = u.to(wide), v.to(wide), bias.to(wide)
    of_x = torch.empty_like(x)
    of_u, of_v, of_bias = torch.zeros_like(u), torch.zeros_like(v), torch.zeros_like(bias)
    size = _rows_a_block(x)
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        x_0, dx = x[rows].to(wide), grad[rows].to(wide)
        h = hidden[:, rows].to(wide)
        y = [torch.addmm(bias[layer], h[layer], u[layer].T) for layer in range(len(u))]
        inputs = [x_0]
        for y_l in y[:-1]:
            inputs.append(torch.addcmul(inputs[-1], x_0, y_l))
        factor = torch.zeros_like(x_0)
        for layer in reversed(range(len(u))):
            factor.addcmul_(dx, y[layer])
            dy = torch.mul(dx, x_0, out=y[layer])
            dh = dy @ u[layer]
            of_u[layer].addmm_(dy.T, h[layer])
            of_v[layer].addmm_(dh.T, inputs[layer])
            of_bias[layer] += dy.sum(0)
            dx = torch.addmm(dx, dh, v[layer])
        of_x[rows] = factor.add_(dx)
    return of_x, of_u.to(kind), of_v.to(kind), of_bias.to(kind)


def _held(v: Tensor) -> bool:
    """Whether the kernels hold weights of these sizes."""
    layers, rank, _ = v.shape
    held = layers * power_of_two(rank) * v.element_size()
    return rank <= HIGHEST_RANK and layers <= MOST_LAYERS and held <= HELD_BYTES


def _forward_now(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Two:
    """Return the result and what the backward pass needs of it, h (L, B, R).

    On a GPU the rank must be a power of two, 16 at least, which `_padded` sees to.
    """
    with torch.autocast(x.device.type, enabled=False):
        return (triton_forward if runs_triton(x.device) else eager_forward)(x, u, v, bias)


def _forward_fake(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> Two:
    layers, rank, _ = v.shape
    return torch.empty_like(x), x.new_empty(layers, x.shape[0], rank)


_forward = operator("low_rank_cross", _forward_now, _forward_fake)


def _backward_now(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, grad: Tensor
) -> Four:
    """Return the gradients of x, u, v and bias."""
    backward = triton_backward if runs_triton(x.device) else eager_backward
    with torch.autocast(x.device.type, enabled=False):
        return backward(x, u, v, bias, hidden, grad)


def _backward_fake(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor, hidden: Tensor, grad: Tensor
) -> Four:
    return torch.empty_like(x), torch.empty_like(u), torch.empty_like(v), torch.empty_like(bias)


_backward = operator("low_rank_cross_backward", _backward_now, _backward_fake)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Two) -> None:
    ctx.set_materialize_grads(False)  # of what is saved there are none
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    gradients: Four = _backward(*ctx.saved_tensors, grad.contiguous())
    return gradients


torch.library.register_autograd(_forward, _differentiate, setup_context=_setup_context)


def low_rank_cross(x_BD: Tensor, u_LDR: Tensor, v_LRD: Tensor, bias_LD: Tensor) -> Tensor:
    """Return x_L (B, D), the rows behind L cross layers.

    Differentiable, once, by all arguments. fp32 and bf16 are summed in fp32, fp64 (on a CPU) in
    fp64; the result has the inputs' type, and so has h (L, B, R), which is made in any case. On a
    GPU PyTorch's own operators, as they sum, take care of ranks above 128, of more than 8 layers
    and of more than 384 layers x ranks (fp32: 192), the rank rounded up to a power of two; the
    width has no limit.

    Args:
        x_BD: rows, fp32 or bf16; fp64 on a CPU.
        u_LDR: what turns R hidden numbers into D, a matrix a layer, of the same type.
        v_LRD: what turns D columns into R hidden numbers, likewise.
        bias_LD: added to what `u` gives, likewise.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _validate(x_BD, u_LDR, v_LRD, bias_LD)
    tensors: tuple[Tensor, ...] = (x_BD, u_LDR, v_LRD, bias_LD)
    d = x_BD.shape[1]
    if runs_triton(x_BD.device):
        if not _held(v_LRD):
            with torch.autocast(x_BD.device.type, enabled=False):
                return low_rank_cross_reference(*tensors)
        tensors = _padded(*tensors)
    result: Tensor = _forward(*(t.contiguous() for t in tensors))[0]
    return result[:, :d].contiguous()


def _padded(x: Tensor, u: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Widen all by zeros to what the kernels load 16 bytes at a time, and a tile's ranks.

    The copies take less time than columns loaded one by one.
    """
    d, rank = -x.shape[1] % 16, power_of_two(v.shape[1]) - v.shape[1]
    if not d and not rank:
        return x, u, v, bias
    pad = torch.nn.functional.pad
    return pad(x, (0, d)), pad(u, (0, rank, 0, d)), pad(v, (0, d, 0, rank)), pad(bias, (0, d))


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
