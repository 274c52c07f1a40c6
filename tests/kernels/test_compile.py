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

from twotower.kernels import sampled_softmax
from twotower.kernels.launch import INTERPRET, Blocks

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
SHARED_BYTES = 227 << 10  # of an H100's multiprocessor
INTEGERS = {"candidate_id": "*i64"}

pytestmark = pytest.mark.skipif(INTERPRET, reason="interpreted kernels are not compiled")


def compiled(kernel, dtype: str, inputs: tuple[str, ...], constants: dict, tiles: Blocks):
    """Return PTX, shared bytes and spilled bytes for compute capability 9.0."""
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in inputs:
            signature[name] = "*" + dtype
        elif name in INTEGERS:
            signature[name] = INTEGERS[name]
        elif name == "positive_share":
            signature[name] = "fp32"
        elif name in ("B", "N", "D", "offset", "split_size"):
            signature[name] = "i32"
        else:
            signature[name] = "*fp32"
        if signature[name][0] == "*" or name == "D":
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


@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [("_forward_kernel", "forward_blocks"), ("_query_gradient_kernel", "backward_blocks"),
     ("_candidate_gradient_kernel", "backward_blocks")],
)  # fmt: skip
def test_sampled_softmax_in_bf16_fits_hopper(kernel, blocks, width) -> None:
    tiles = getattr(sampled_softmax, blocks)(width, torch.bfloat16)
    rows, columns = tiles.rows, tiles.columns
    if kernel == "_candidate_gradient_kernel":
        rows, columns = columns, rows
    constants = {"BLOCK_B": rows, "BLOCK_N": columns, "BLOCK_D": width, "HAS_LOG_Q": True,
                 "HAS_ID": True, "UPCAST": False}  # fmt: skip
    if kernel == "_forward_kernel":
        constants["SMOOTH"] = False
    ptx, shared, spilled = compiled(
        getattr(sampled_softmax, kernel), "bf16", ("query", "candidate"), constants, tiles
    )
    assert "wgmma" in ptx, "tensor cores"
    assert shared <= SHARED_BYTES
    assert spilled == 0
