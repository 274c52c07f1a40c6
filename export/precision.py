"""A tower's ONNX graph with its products in half precision, every type written down.

TensorRT takes the types from the graph (as 11 always does), so a graph says where it rounds: the
operands and the results of `MatMul` and `Gemm` are fp16 or bf16, and everything between, L2 norms,
softmax and layer norms among it, stays fp32. That is what automatic mixed precision does too
(Micikevicius et al. 2018).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

PRODUCTS = ("MatMul", "Gemm")
HALF: dict[str, tuple[int, torch.dtype]] = {
    "fp16": (TensorProto.FLOAT16, torch.float16), "bf16": (TensorProto.BFLOAT16, torch.bfloat16),
}  # fmt: skip


def lowered(graph: Any, precision: str, folder: Path) -> Any:
    """Return a copy of a graph whose products are fp16 or bf16, their weights stored so.

    Args:
        graph: ONNX model of fp32.
        precision: fp32, of which the graph is a copy, fp16 or bf16.
        folder: of its external data.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    if precision == "fp32":
        return model
    kind, dtype = HALF[precision]
    weights = {i.name: i for i in model.graph.initializer}
    nodes: list[Any] = []
    halves: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type not in PRODUCTS:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name not in halves:
                halves[name] = f"{name}:{precision}"
                if name in weights:
                    half = _half(weights[name], halves[name], kind, dtype, folder)
                    model.graph.initializer.append(half)
                else:
                    nodes.append(helper.make_node("Cast", [name], [halves[name]], to=kind))
            node.input[place] = halves[name]
        (result,) = node.output
        node.output[0] = f"{result}:product"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [result], to=TensorProto.FLOAT)]
    replace_nodes(model, nodes)
    return model


def rounded(graph: Any) -> Any:
    """Return a `lowered` graph for runtimes without such products: fp32 ones, rounded as those.

    Tensor cores sum the products of halves in fp32 and round the sum, and so does this graph; what
    differs is the order of the sum. ONNX Runtime has no bf16 products for a CPU, and leaves out
    casts around its fp16 ones.

    Args:
        graph: ONNX model that `lowered` returned; external data stay where they are.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    halves = {kind for kind, _ in HALF.values()}
    of_name = {i.name: i.data_type for i in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Cast":
            of_name[node.output[0]] = node.attribute[0].i
    nodes: list[Any] = []
    for node in model.graph.node:
        kind = of_name.get(node.input[0]) if node.op_type in PRODUCTS else None
        if kind not in halves:
            nodes.append(node)
            continue
        (result,) = node.output
        for place, name in enumerate(node.input):
            node.input[place] = f"{result}:operand_{place}"
            nodes.append(
                helper.make_node("Cast", [name], [node.input[place]], to=TensorProto.FLOAT)
            )
        node.output[0] = f"{result}:sum"
        nodes += [node, helper.make_node("Cast", [node.output[0]], [result], to=kind)]
    replace_nodes(model, nodes)
    return model


def _half(weight: Any, name: str, kind: int, dtype: torch.dtype, folder: Path) -> Any:
    """Return an initializer's values rounded, as another of the name."""
    values = torch.tensor(numpy_helper.to_array(weight, str(folder))).to(dtype).view(torch.int16)
    return helper.make_tensor(name, kind, weight.dims, values.numpy().tobytes(), raw=True)


def replace_nodes(model: Any, nodes: list[Any]) -> None:
    """Give a graph other nodes, and take out the initializers that none of them reads."""
    graph = model.graph
    used = {name for node in nodes for name in node.input}
    for field, kept in (
        (graph.node, list(nodes)),
        (graph.initializer, [i for i in graph.initializer if i.name in used]),
    ):
        # Emptied first, since a repeated field takes copies.
        kept = [type(part).FromString(part.SerializeToString()) for part in kept]
        del field[:]
        field.extend(kept)
    # Of types that the nodes no longer have.
    del graph.value_info[:]
