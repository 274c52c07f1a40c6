"""A tower's ONNX graph with the products of its layers in int8 or fp8, as Q/DQ nodes say it.

What enters a layer is quantised with one scale, from the largest magnitude that calibration saw;
its weight with one an output (Jacob et al. 2018; Micikevicius et al. 2022 for fp8, E4M3). Products
of two activations, as in attention, stay fp32, as does everything between.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from twotower.export.precision import PRODUCTS, replace_nodes

# The type and the largest number that scales map to.
QUANTISED: dict[str, tuple[int, float, torch.dtype]] = {
    "int8": (TensorProto.INT8, 127.0, torch.int8),
    "fp8": (TensorProto.FLOAT8E4M3FN, 448.0, torch.float8_e4m3fn),
}
# Of a scale whose numbers are all zero.
LEAST = float(np.finfo(np.float32).tiny)


def layer_inputs(graph: Any) -> list[str]:
    """Return the names of what enters the layers of a tower: products with a weight."""
    weights = {i.name for i in graph.graph.initializer}
    layers = (n for n in graph.graph.node if n.op_type in PRODUCTS and n.input[1] in weights)
    return list(dict.fromkeys(n.input[0] for n in layers))


def quantised(graph: Any, precision: str, largest: Mapping[str, float], folder: Path) -> Any:
    """Return a copy of a graph whose layers multiply int8 or fp8.

    Args:
        graph: ONNX model of fp32.
        precision: int8 or fp8.
        largest: magnitude of each of `layer_inputs`.
        folder: of the graph's external data.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    kind = QUANTISED[precision][0]
    weights = {i.name: i for i in model.graph.initializer}
    zero = f"{precision}:zero"
    model.graph.initializer.append(helper.make_tensor(zero, kind, [], bytes(1), raw=True))
    nodes: list[Any] = []
    done: set[str] = set()
    for node in model.graph.node:
        if node.op_type in PRODUCTS and node.input[1] in weights:
            for place, name in enumerate(node.input[:2]):
                node.input[place] = f"{name}:{precision}"
                if name in done:
                    continue
                done.add(name)
                scale, small = f"{name}:scale", f"{name}:small"
                if place == 0:
                    number = np.float32(max(largest[name], LEAST) / QUANTISED[precision][1])
                    model.graph.initializer.append(numpy_helper.from_array(number, scale))
                    nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [small]))
                    axis = {}
                else:
                    axis = {"axis": _output_axis(node)}
                    weight = numpy_helper.to_array(weights[name], str(folder))
                    model.graph.initializer.extend(
                        _small(weight, axis["axis"], precision, small, scale)
                    )
                nodes.append(
                    helper.make_node(
                        "DequantizeLinear", [small, scale], [node.input[place]], **axis
                    )
                )
        nodes.append(node)
    replace_nodes(model, nodes)
    return model


def _output_axis(node: Any) -> int:
    turned = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if turned else 1


def _small(
    weight: npt.NDArray[Any], axis: int, precision: str, name: str, scale_name: str
) -> list[Any]:
    """Return a weight's quantised values and their scales, one an output, as initializers."""
    kind, most, dtype = QUANTISED[precision]
    scale = np.maximum(np.abs(weight).max(axis=1 - axis), LEAST * most) / np.float32(most)
    ratio = torch.from_numpy(weight / np.expand_dims(scale, 1 - axis))
    if precision == "int8":
        ratio = ratio.round()
    values = ratio.clamp(-most, most).to(dtype).view(torch.uint8).numpy()
    return [
        helper.make_tensor(name, kind, weight.shape, values.tobytes(), raw=True),
        numpy_helper.from_array(scale.astype(np.float32), scale_name),
    ]
