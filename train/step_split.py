"""What the time of one profiled step was spent on, read from its trace.

Timers around modules would miss the backward pass, where the tables learn; the operations that the
profiler saw are told apart by their names instead.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

# What an operation belongs to by its name: the first that fits.
KINDS = {
    "communication": re.compile(
        r"nccl|gloo|c10d|param_comms|all2all|all_?to_?all|all_?gather|all_?reduce|reduce_?scatter|"
        r"dist_wait|request wait|(?-i:_Gather)",
        re.IGNORECASE,
    ),
    "lookup": re.compile(
        r"fbgemm|embedding|lookup|jagged|kjt|_dist\]|rowwise", re.IGNORECASE
    ),
}  # fmt: skip
# Where two overlap, the time is the first's: communication counts where nothing hides it.
PARTS = ("lookup", "dense", "communication")
PARTS_CUDA = (*PARTS, "copy")

Event = dict[str, Any]
# Begin and end in microseconds.
Span = tuple[float, float]


def split_step(trace: dict[str, Any], step_name: str) -> dict[str, float]:
    """Return the milliseconds of a step by what they were spent on; together they are the step.

    - `lookup`: fbgemm's and TorchRec's operations: arranging ids, the embedding tables forward and
      backward, and their fused optimizer.
    - `communication`: of gloo and NCCL, waiting for other ranks included.
    - `dense`: every other operation: towers, loss, dense optimizer.
    - `copy`: memory copies, on CUDA alone.
    - `other`: none of these: Python, Lightning, and on CUDA a GPU without work.

    An operation belongs to what its name says, else to what the one that called it belongs to. On a
    CPU the time is that of the thread that trains; on CUDA it is that of the kernels, each of which
    belongs to the operation that launched it.

    Args:
        trace: Chrome's JSON, as the profiler writes it. On CUDA the device must have been idle when
            the step began and when it ended.
        step_name: of the range that is the step.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event["cat"] in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    host = [event for thread in threads.values() for event in thread]
    step = next(event for event in host if event["name"] == step_name)
    spans: dict[str, list[Span]] = {part: [] for part in PARTS}
    parts: tuple[str, ...] = PARTS
    launched: dict[Any, str] = {}  # id of an operation -> what it belongs to
    for thread, operations in threads.items():
        for kind, span in _own_time(operations, launched):
            # Of other threads gloo's count, for which ours may wait.
            if thread == step["tid"] or kind == "communication":
                spans[kind].append(span)
    if any(event["cat"] == "kernel" for event in events):
        spans, parts = _of_device(events, launched), PARTS_CUDA
    began, ended = step["ts"], step["ts"] + step["dur"]
    spent, covered = {}, 0.0
    seen: list[Span] = []
    for part in parts:
        seen += [(max(a, began), min(b, ended)) for a, b in spans[part] if a < ended and b > began]
        before, covered = covered, _length(seen)
        spent[part] = (covered - before) / 1000
    return spent | {"other": (step["dur"] - covered) / 1000}


def _own_time(operations: list[Event], launched: dict[Any, str]) -> Iterator[tuple[str, Span]]:
    """Yield what each operation of a thread belongs to, and when it ran without calling others.

    Args:
        operations: of one thread, one within the other.
        launched: gets what each operation belongs to, by its id.
    """
    stack: list[tuple[float, str | None]] = []  # end, and what it belongs to
    now = 0.0
    outside: Event = {"ts": float("inf"), "dur": 0.0, "name": "", "cat": ""}
    for event in [*sorted(operations, key=lambda e: (e["ts"], -e["dur"])), outside]:
        while stack and stack[-1][0] <= event["ts"]:
            end, kind = stack.pop()
            if kind and end > now:
                yield kind, (now, end)
            now = max(now, end)
        caller = stack[-1][1] if stack else None
        if caller and event["ts"] > now:
            yield caller, (now, event["ts"])
        now = event["ts"]
        kind = _kind(event["name"]) or caller or ("dense" if event["cat"] == "cpu_op" else None)
        stack.append((event["ts"] + event["dur"], kind))
        if kind:
            launched[event.get("args", {}).get("External id")] = kind


def _of_device(events: list[Event], launched: dict[Any, str]) -> dict[str, list[Span]]:
    """Return when kernels and copies ran on the device, by what they belong to."""
    spans: dict[str, list[Span]] = {part: [] for part in PARTS_CUDA}
    for event in events:
        if event["cat"] == "kernel":
            by_launch = launched.get(event.get("args", {}).get("External id"), "dense")
            kind = _kind(event["name"]) or by_launch
        elif event["cat"] in ("gpu_memcpy", "gpu_memset"):
            kind = "copy"
        else:
            continue
        spans[kind].append((event["ts"], event["ts"] + event["dur"]))
    return spans


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), None)


def _length(spans: Iterable[Span]) -> float:
    """Return how long at least one of the spans lasts."""
    total, reached = 0.0, 0.0
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
