"""Where the time of training steps goes, by torch.profiler: each operation belongs to one stage.

A stage is a range: `stage_of_module` opens one around a module's forward pass, `stage` around any
block. An operation belongs to the innermost range around it; one of the backward pass to the range
of the forward operation that it differentiates, by the sequence number that autograd gives both. So
a fused optimizer, which works in the tables' backward pass, counts as lookup.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.autograd import DeviceType
from torch.profiler import record_function

PREFIX = "stage: "
STAGES = ("data", "lookup", "towers", "loss", "optimizer", "other")
# Ranges that torch and twotower.train.module open themselves.
KNOWN = {
    "enumerate(DataLoader)": "data",
    "Optimizer.": "optimizer",
    "twotower: loss": "loss",
}


def stage(name: str) -> AbstractContextManager[Any]:
    """Return the range of a stage."""
    return record_function(PREFIX + name)


def stage_of_module(module: nn.Module, name: str) -> None:
    """Let a module's forward passes be of a stage."""
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        opened.append(stage(name))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def stages_ms(events: Iterable[Any], wall_ms: float, steps: int) -> dict[str, float]:
    """Return the milliseconds a step of every stage, on the CPU.

    Args:
        events: of a profile.
        wall_ms: of all its steps; what no range covers is "other".
        steps: in the profile.
    """
    spent = dict.fromkeys(STAGES, 0.0)
    for event, name in staged(events):
        spent[name] += event.self_cpu_time_total / 1000
    spent["other"] += wall_ms - sum(spent.values())
    return {name: ms / steps for name, ms in spent.items()}


def device_ms(events: Iterable[Any], wall_ms: float, steps: int) -> dict[str, float]:
    """Return the milliseconds a step that a GPU's kernels and copies took, by their stage.

    What no operation of a stage started, and the GPU's waiting, is "other"; work that overlaps
    counts twice, and may make it negative. See `stages_ms` for the arguments.
    """
    spent = dict.fromkeys(STAGES, 0.0)
    for event, name in staged(events):
        spent[name] += event.self_device_time_total / 1000
    spent["other"] = wall_ms - sum(ms for name, ms in spent.items() if name != "other")
    return {name: ms / steps for name, ms in spent.items()}


def staged(events: Iterable[Any]) -> list[tuple[Any, str]]:
    """Return every event with its stage."""
    of_sequence: dict[int, str] = {}
    found: list[tuple[Any, str]] = []
    # Children before their parents' next siblings, so forward operations before backward ones.
    # Of a GPU's own events, which have no parent either, operations hold the times already.
    host = [e for e in events if e.device_type == DeviceType.CPU]
    waiting = [(e, "other") for e in host if e.cpu_parent is None]
    waiting.sort(key=lambda pair: -pair[0].time_range.start)
    while waiting:
        event, outer = waiting.pop()
        name = _stage_of(event.name, outer)
        if event.name.startswith("autograd::engine::evaluate_function"):
            name = of_sequence.get(event.sequence_nr, "other")
        elif event.sequence_nr >= 0 and "Backward" not in event.name:
            # The last operation that sees a number is the one whose gradient bears it.
            of_sequence[event.sequence_nr] = name
        found.append((event, name))
        children = sorted(event.cpu_children, key=lambda e: -e.time_range.start)
        waiting += [(child, name) for child in children]
    return found


def _stage_of(event: str, outer: str) -> str:
    if event.startswith(PREFIX):
        return event.removeprefix(PREFIX)
    return next((name for start, name in KNOWN.items() if event.startswith(start)), outer)
