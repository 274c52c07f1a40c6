"""The kernels compiled for Hopper on a machine without a GPU: what the interpreter cannot see.

Tensor cores are used, shared memory suffices and no register spills, at the tiles in production.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twotower.kernels import (
    dot_interaction,
    exclusions,
    low_rank_cross,
    sampled_softmax,
    top_k_inner_product,
)
from twotower.kernels.launch import INTERPRET, Blocks

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
SHARED_BYTES = 227 << 10  # of an H100's multiprocessor
# Bytes that the softmax's fastest tiles spill, as measured on an H200; all others spill none.
SPILLS = {
    ("_forward_kernel", 128): 48, ("_query_gradient_kernel", 64): 8,
    ("_query_gradient_kernel", 128): 124, ("_candidate_gradient_kernel", 128): 40,
}  # fmt: skip
# The same with exclusions, whose words take registers: by hand, no other of eight tiles was faster
# on an H200.
EXCLUDING_SPILLS = {
    ("_forward_kernel", 128): 208, ("_query_gradient_kernel", 64): 48,
    ("_query_gradient_kernel", 128): 172, ("_candidate_gradient_kernel", 128): 80,
}  # fmt: skip
pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")

SCALARS = {
    "B",
    "N",
    "D",
    "WORDS",
    "CHOSEN",
    "split_size",
    "in_column",
    "in_rank",
    "out_column",
    "out_rank",
    "groups_a_program",
    "first_query",
    "stride",
    "S",
    "W",
}
WIDTHS = {"D", "in_column", "in_rank", "out_column", "out_rank"}
IDS = {"candidate_id", "item_bits", "required_bits", "exclude_row", "exclude_offset",
       "exclude_owner", "chosen", "at"}  # fmt: skip


def compiled(kernel, types: dict[str, str], constants: dict, tiles: Blocks, aligned: bool = True):
    """Return PTX, shared bytes and spilled bytes for compute capability 9.0.

    Args:
        kernel: Triton function.
        types: of the arguments that are neither fp32 pointers nor named above.
        constants: compile-time values.
        tiles: for warps and stages.
        aligned: whether widths are multiples of 16, which loads of several values at once need.
    """
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = "i32"
        else:
            signature[name] = types.get(name, "*i64" if name in IDS else "*fp32")
        if signature[name][0] == "*" or (signature[name] == "i32" and name in WIDTHS and aligned):
            attributes[(place,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages},
    )
    ptx = built.asm["ptx"]
    architecture = re.search(r"\.target (\S+)", ptx)[1]
    said = subprocess.run(
        [PTXAS, "-v", f"--gpu-name={architecture}", "-", "-o", "/dev/null"],
        input=ptx, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    return ptx, built.metadata.shared, spilled


@pytest.mark.parametrize(("diagonal", "excludes"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [("_forward_kernel", "forward_blocks"), ("_query_gradient_kernel", "backward_blocks"),
     ("_candidate_gradient_kernel", "backward_blocks")],
)  # fmt: skip
def test_sampled_softmax_in_bf16_fits_hopper(kernel, blocks, width, diagonal, excludes) -> None:
    tiles = getattr(sampled_softmax, blocks)(width, torch.bfloat16)
    if excludes:
        tiles = sampled_softmax.with_exclusions(tiles)
    rows, columns = tiles.rows, tiles.columns
    if kernel == "_candidate_gradient_kernel":
        rows, columns = columns, rows
    constants = {"BLOCK_B": rows, "BLOCK_N": columns, "BLOCK_D": width, "HAS_ID": True,
                 "DIAGONAL": diagonal, "EXCLUDE": excludes, "SMOOTH": False,
                 "UPCAST": False}  # fmt: skip
    if kernel == "_forward_kernel":
        constants["STAGES"] = tiles.stages
    types = {"query": "*bf16", "candidate": "*bf16", "exclude": "*i32"}
    ptx, shared, spilled = compiled(
        getattr(sampled_softmax, kernel), types, constants, tiles
    )  # fmt: skip
    assert "wgmma" in ptx, "tensor cores"
    assert shared <= SHARED_BYTES
    allowed = EXCLUDING_SPILLS if excludes else SPILLS
    assert spilled <= allowed.get((kernel, width), 0), spilled


@pytest.mark.parametrize(("kernel", "constants"), [
    ("_time_kernel", {"BLOCK_B": exclusions.QUERIES, "BLOCK_W": exclusions.WORDS}),
    ("_taken_kernel", {"BLOCK_S": exclusions.PAIRS, "STRETCH": exclusions.STRETCH}),
])  # fmt: skip
def test_exclusions_fit_hopper(kernel, constants) -> None:
    function = getattr(exclusions, kernel)
    longs = dict.fromkeys(("first", "time", "query", "low", "high"), "*i64")
    _, shared, spilled = compiled(
        function, {**longs, "out": "*i32"}, constants, Blocks(0, 0, 4, 2)
    )  # fmt: skip
    assert shared <= SHARED_BYTES // 4
    assert spilled == 0


@pytest.mark.parametrize(("query", "item"), [("bf16", "bf16"), ("bf16", "i8"), ("fp32", "fp32")])
@pytest.mark.parametrize("width", [64, 128, 512])
@pytest.mark.parametrize("kernel", ["_group_maximum_kernel", "_exclude_kernel", "_rescore_kernel"])
def test_top_k_fits_hopper(kernel, width, query, item) -> None:
    function = getattr(top_k_inner_product, kernel)
    fp32 = query == "fp32"
    group, stages = top_k_inner_product.group_size(width, 4 if fp32 else 2)
    queries = top_k_inner_product.query_block(64, width, fp32)
    constants = {"GROUP": group, "BLOCK_B": queries, "BLOCK_D": width, "BLOCK_X": 32,
                 "HAS_SCALE": item == "i8", "HAS_BITS": True, "HAS_EXCLUDED": True,
                 "UPCAST": False}  # fmt: skip
    constants = {n: v for n, v in constants.items() if n in function.arg_names}
    types = {"query": f"*{query}", "item": f"*{item}"}
    ptx, shared, spilled = compiled(function, types, constants, Blocks(group, 64, 4, stages))
    assert "mma" in ptx, "tensor cores"
    assert shared <= SHARED_BYTES
    # Three TF32 products of fp32, and the widest rows, hold more in registers than there are.
    if not fp32 and width < 512:
        assert spilled == 0


@pytest.mark.parametrize("k", [16, 128, 256])
def test_the_selection_of_keys_fits_hopper(k) -> None:
    types = {"key": "*i64", "out": "*i64", "M": "i32", "parts": "i32"}
    block = max(top_k_inner_product.SELECT_BLOCK, 4 * k)
    tiles = Blocks(block, 1, top_k_inner_product.SELECT_WARPS, 2)
    _, shared, spilled = compiled(
        top_k_inner_product._select_kernel, types, {"BLOCK": block, "K": k}, tiles
    )
    assert shared <= SHARED_BYTES // 2, "two programs share a multiprocessor"
    assert spilled == 0


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("features", "width"), [(4, 64), (9, 128), (27, 64), (27, 128), (64, 512)])
@pytest.mark.parametrize("kernel", ["_forward_kernel", "_backward_kernel"])
def test_dot_interaction_in_bf16_fits_hopper(kernel, features, width, aligned) -> None:
    function = getattr(dot_interaction, kernel)
    choose = kernel.removeprefix("_").replace("kernel", "tiles")
    tiles = getattr(dot_interaction, choose)(features, width)
    samples = tiles.rows // features
    constants = {"F": features, "SAMPLES": samples, "BLOCK_S": triton.next_power_of_2(samples),
                 "BLOCK_F": tiles.rows, "BLOCK_D": tiles.columns}  # fmt: skip
    constants = {n: v for n, v in constants.items() if n in function.arg_names}
    types = dict.fromkeys(("feature", "out", "grad", "of_feature"), "*bf16")
    ptx, shared, spilled = compiled(function, types, constants, tiles, aligned)
    assert "mma" in ptx, "tensor cores"
    # At 64 features 4 programs share a multiprocessor, at fewer 16 and more.
    assert shared <= SHARED_BYTES // (4 if features > 32 else 16)
    assert spilled == 0


@pytest.mark.parametrize(
    ("layers", "rank", "spills"), [(2, 32, 0), (3, 64, 0), (3, 128, 96), (6, 64, 480)]
)
@pytest.mark.parametrize("kernel", ["forward", "backward", "_outward_kernel", "_inward_kernel"])
def test_low_rank_cross_in_bf16_fits_hopper(kernel, layers, rank, spills) -> None:
    """At any width, which is not known at compile time."""
    chain = kernel[0] != "_"
    choose = "chain_tiles" if chain else f"{kernel.split('_')[1]}_tiles"
    tiles = getattr(low_rank_cross, choose)(rank, torch.bfloat16)
    together = low_rank_cross.layers_together(rank, torch.bfloat16)
    constants = {"BLOCK_B": tiles.rows, "BLOCK_D": tiles.columns, "R": rank, "L": layers,
                 "STAGES": tiles.stages}  # fmt: skip
    if chain:
        ones = ("in_column", "out_rank") if kernel == "forward" else ("in_rank", "out_column")
        constants |= {"BACKWARD": kernel == "backward"} | dict.fromkeys(ones, 1)
    else:
        constants |= {"FROM": 0, "TO": min(together, layers)}
    function = getattr(low_rank_cross, "_chain_kernel" if chain else kernel)
    pointers = [n for n in function.arg_names if n not in SCALARS and n not in constants]
    types = dict.fromkeys(pointers, "*bf16") | {"parts": "*fp32"}
    ptx, shared, spilled = compiled(function, types, constants, tiles)
    assert "wgmma" in ptx, "tensor cores"
    # Up to three layers of rank 64, two programs share a multiprocessor.
    assert shared <= SHARED_BYTES // (2 if layers * rank <= 192 else 1)
    assert spilled <= spills


@pytest.mark.parametrize(("layers", "rank"), [(1, 128), (3, 64), (8, 16)])
def test_low_rank_cross_in_fp32_fits_hopper_s_shared_memory(layers, rank) -> None:
    tiles = low_rank_cross.inward_tiles(rank, torch.float32)
    constants = {"BLOCK_B": tiles.rows, "BLOCK_D": tiles.columns, "R": rank, "L": layers,
                 "STAGES": tiles.stages, "FROM": 0, "TO": 1}  # fmt: skip
    _, shared, _ = compiled(low_rank_cross._inward_kernel, {}, constants, tiles)
    assert shared <= SHARED_BYTES
