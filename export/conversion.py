"""From a torch module to ONNX, and which layer of it has no way there."""

from __future__ import annotations

import logging
import traceback
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from twotower.errors import UserError
from twotower.export.id_nodes import OPSET


def to_onnx(
    module: nn.Module, example: list[Tensor], dynamic: list[dict[int, Any]], inputs: list[str],
    name: str,
) -> Any:  # fmt: skip
    """Return what torch's exporter makes of a module, with the output `vector`.

    Args:
        module: in evaluation mode.
        example: its arguments.
        dynamic: of each, the dimensions that vary.
        inputs: names of the arguments.
        name: what an error calls the module.

    Raises:
        UserError: naming the layer that ONNX has no operator for, or that cannot be traced.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                module, tuple(example), dynamo=True, verbose=False, optimize=True,
                input_names=inputs, output_names=["vector"],
                dynamic_shapes=(tuple(dynamic),), opset_version=OPSET,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise UserError(f"{name}: {_refusal(error, module)}") from None
    assert program is not None
    return program


def _refusal(error: BaseException, module: nn.Module) -> str:
    """Return in one line which layer could not be exported, and why."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    names = {id(layer): name for name, layer in module.named_modules() if name}
    found = [layer for c in causes for f in _frames(c) for layer in _layers(f, names)]
    reason = next((text for c in reversed(causes) if (text := str(c).strip())), "no reason given")
    kinds = {name: type(part).__name__ for name, part in module.named_modules()}
    what = "a layer that torch does not name"
    if found:
        layer = max(found, key=lambda name: name.count("."))
        what = f"layer '{layer}' ({kinds[layer]})"
    return (
        f"{what} cannot be exported to ONNX: {' '.join(reason.splitlines()[0].split())}: write it "
        "with operators that ONNX has"
    )


def _frames(error: BaseException) -> Iterator[FrameType]:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame


def _layers(frame: FrameType, names: dict[int, str]) -> Iterator[str]:
    """Yield the layers that a frame runs, or translates a node of."""
    runs = frame.f_locals.get("self")
    if id(runs) in names:
        yield names[id(runs)]
    node = frame.f_locals.get("node")
    if isinstance(node, torch.fx.Node):
        for name, _ in node.meta.get("nn_module_stack", {}).values():
            if name in names.values():
                yield name
