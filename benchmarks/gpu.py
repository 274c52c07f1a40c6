"""The kernels on a GPU: the `gpu` tests, then every op beside eager, compiled eager and the limits.

    python benchmarks/gpu.py                         # at most 8 minutes on one H200
    python benchmarks/gpu.py --sweep                 # tile sizes instead, at most 8 minutes
    python benchmarks/gpu.py --training              # training instead, at most 5 minutes

Needs torch and triton alone (PYTHONPATH=src where the package is not installed); training, which
gpu_training.py describes, needs TorchRec with FBGEMM's CUDA kernels too, and pyarrow. The machine's
limits, a copy and a matmul, are measured in the same process. Each time is the median over many
launches that go through several sets of random inputs, by CUDA events. Peak memory is what a work
allocates above its inputs. What is printed is also written to
benchmarks/results/gpu-<device>.json, or sweep- or gpu_training-<device>.json. `--device cpu
--small` only tries the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
import triton

from twotower.kernels import dot_interaction as dot
from twotower.kernels import low_rank_cross as cross
from twotower.kernels import sampled_softmax as softmax
from twotower.kernels import top_k_inner_product as top_k
from twotower.kernels.exclusions import exclusion_words
from twotower.kernels.launch import Blocks

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16
Work = Callable[[int], Any]
SETS = 3


@dataclass
class Device:
    """Where the works run, and how they are timed there."""

    device: torch.device
    repeat: int

    @property
    def cuda(self) -> bool:
        """Whether it is a GPU."""
        return self.device.type == "cuda"

    def milliseconds(self, work: Work) -> float:
        """Return the median time of a launch, going through the sets of inputs.

        On a GPU launches are queued without waiting: what the host takes to launch shows only
        where it takes longer than the GPU does.
        """
        for number in range(3):
            work(number % SETS)
        if not self.cuda:
            times = []
            for number in range(self.repeat):
                began = time.perf_counter()
                work(number % SETS)
                times.append(1e3 * (time.perf_counter() - began))
            return median(times)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.repeat + 1)]
        torch.cuda.synchronize()
        events[0].record()
        for number in range(self.repeat):
            work(number % SETS)
            events[number + 1].record()
        torch.cuda.synchronize()
        return median(a.elapsed_time(b) for a, b in itertools.pairwise(events))

    def graph_milliseconds(self, work: Work) -> float:
        """Return the median time of a replayed graph: what the GPU alone takes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work(0)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work(0)
        return self.milliseconds(lambda _: graph.replay())

    def peak_mb(self, work: Work) -> float:
        """Return what a work allocates above its inputs."""
        if not self.cuda:
            return 0.0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work(0)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def measured(self, work: Work) -> dict[str, Any]:
        """Return time and memory, or that the memory does not suffice.

        Where the host's share may show, below 5 ms, it is the time of a graph; `host_ms` is that of
        launches.
        """
        try:
            found = {"ms": self.milliseconds(work), "peak_mb": self.peak_mb(work)}
            if self.cuda and found["ms"] < 5:
                found["host_ms"] = found["ms"]
                with contextlib.suppress(RuntimeError):  # what no graph can hold stays as it was
                    found["ms"] = self.graph_milliseconds(work)
            return found
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return {"ms": float("inf"), "peak_mb": float("inf")}


def compiled(function: Callable[..., Any], on: Device) -> Callable[..., Any]:
    """Return the function under torch.compile."""
    backend = "inductor" if on.cuda else "aot_eager"
    # For each size anew: what was compiled for two sizes is compiled for any.
    return torch.compile(function, backend=backend, dynamic=False)


def limits(on: Device, small: bool) -> dict[str, float]:
    """Measure a copy (bytes read and written) and a bf16 matmul of random numbers."""
    size = 1 << (20 if small else 31)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=on.device)
    target = torch.empty_like(source)
    copy_ms = on.milliseconds(lambda _: target.copy_(source))
    side = 256 if small else 8192
    a, b = (torch.randn(side, side, device=on.device, dtype=BF16) for _ in range(2))
    matmul_ms = on.milliseconds(lambda _: a @ b)
    return {"copy_gb_s": 2 * size / copy_ms / 1e6, "matmul_tflop_s": 2 * side**3 / matmul_ms / 1e9}


def unit(*shape: int, on: Device) -> torch.Tensor:
    """Return random bf16 vectors of length 1."""
    return F.normalize(torch.randn(*shape, device=on.device), dim=-1).to(BF16)


def softmax_inputs(batch: int, width: int, on: Device) -> list[dict[str, Any]]:
    """Return sets of queries, candidates, logQ and ids, some of which are equal."""
    return [
        {
            "leaves": [unit(batch, width, on=on).requires_grad_() for _ in range(2)],
            "temperature": torch.tensor(0.05, device=on.device),
            "log_q_N": torch.randn(batch, device=on.device),
            "candidate_id_N": (torch.rand(batch, device=on.device) ** 3 * batch).int(),
        }
        for _ in range(SETS)
    ]


def softmax_step(loss: Callable[..., torch.Tensor], inputs: list[dict[str, Any]]) -> Work:
    """Return a forward and backward pass."""

    def work(number: int) -> Any:
        chosen = inputs[number]
        leaves = chosen["leaves"]
        value = loss(*leaves, chosen["temperature"], log_q_N=chosen["log_q_N"],
                     candidate_id_N=chosen["candidate_id_N"])  # fmt: skip
        return torch.autograd.grad(value, leaves)

    return work


def softmax_peers() -> dict[str, Callable[..., torch.Tensor]]:
    """Return fused losses of others where they are importable; they know neither logQ nor hits."""
    peers: dict[str, Callable[..., torch.Tensor]] = {}
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        peers["cut cross entropy"] = lambda q, c, t, **_: linear_cross_entropy(
            q / t.to(q.dtype), c, torch.arange(len(q), device=q.device)
        )
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        peers["liger"] = lambda q, c, t, **_: loss(
            c, q / t.to(q.dtype), torch.arange(len(q), device=q.device)
        )
    return peers


def bench_softmax(on: Device, limit: dict[str, float], small: bool) -> list[dict[str, Any]]:
    """Time a training step's loss; eager's logits alone take 17 GB at the largest batch."""
    rows = []
    for batch in (256,) if small else (8192, 65_536):
        inputs = softmax_inputs(batch, 128, on)
        words = torch.randint(-(2**31), 2**31, (2, batch, batch // 32), device=on.device).int()
        works = {
            "twotower": softmax.sampled_softmax,
            "twotower, a quarter excluded": partial(
                softmax.sampled_softmax, exclude_BW=words[0] & words[1]
            ),
            "compiled eager": compiled(softmax.sampled_softmax_reference, on),
            "eager": softmax.sampled_softmax_reference,
            **softmax_peers(),
        }
        found = {name: on.measured(softmax_step(loss, inputs)) for name, loss in works.items()}
        own = found["twotower"]
        # Forward 2, backward 8 (the logits once more for each side) x B N D operations.
        rate = 10 * batch * batch * 128 / own["ms"] / 1e9
        rows += table_rows(f"sampled_softmax {batch}² x 128", found, {
            "of matmul rate": rate / limit["matmul_tflop_s"],
            "target": "3x as fast and 50x less memory than compiled eager, 0.45 of matmul",
        })  # fmt: skip
    return rows


def bench_exclusions(on: Device, limit: dict[str, float], small: bool) -> list[dict[str, Any]]:
    """Time the words of exclusions: 50 items taken a query, of a skewed catalogue, and times."""
    rows = []
    for batch in (256,) if small else (8192, 65_536):
        candidate_id, taken_id = (
            (torch.rand(count, device=on.device) ** 3 * 16 * batch).long()
            for count in (batch, 50 * batch)
        )
        candidate_id = candidate_id.sort().values
        own = partial(
            exclusion_words, candidate_id, batch, taken_id_S=taken_id,
            taken_query_S=torch.arange(batch, device=on.device).repeat_interleave(50),
        )  # fmt: skip
        first, time = (torch.randint(0, 2**40, (batch,), device=on.device) for _ in range(2))
        timed = partial(own, first_N=first, time_B=time)
        works = {"twotower": own, "with times": timed}
        found = {name: on.measured(lambda _, work=work: work()) for name, work in works.items()}
        rate = batch * batch / 8 / found["twotower"]["ms"] / 1e6
        rows += table_rows(f"exclusion_words {batch}², 50 taken", found, {
            "of copy rate": rate / limit["copy_gb_s"]})  # fmt: skip
    return rows


def bench_top_k(on: Device, limit: dict[str, float], small: bool) -> list[dict[str, Any]]:
    """Time exact search over bf16 items at the batches of serving."""
    rows = []
    items, k = (20_000, 10) if small else (10_000_000, 100)
    item = unit(items, 128, on=on)
    for batch in (1, 4, 16, 64):
        queries = [unit(batch, 128, on=on) for _ in range(SETS)]

        def full(number: int, queries: list[torch.Tensor] = queries) -> Any:
            return (queries[number] @ item.T).topk(k)

        def own(number: int, queries: list[torch.Tensor] = queries) -> Any:
            return top_k.top_k_inner_product(queries[number], item, k)

        found = {"twotower": on.measured(own), "matmul + topk": on.measured(full)}
        rate = items * 128 * 2 / found["twotower"]["ms"] / 1e6
        rows += table_rows(f"top_k {batch} x {items:,} x 128, k={k}", found, {
            "of copy rate": rate / limit["copy_gb_s"], "target": "0.8 of copy, 3x as fast",
        })  # fmt: skip
    return rows


@dataclass
class Suite:
    """An interaction with its inputs, the bytes that it must move and the sums of its products."""

    own: Callable[..., torch.Tensor]
    reference: Callable[..., torch.Tensor]
    inputs: list[torch.Tensor]
    weights: list[torch.Tensor]
    moved: int
    operations: int

    def step(self, function: Callable[..., torch.Tensor]) -> Work:
        """Return a forward and backward pass, whose gradient is at hand."""
        with torch.no_grad():
            ones = torch.ones_like(self.reference(self.inputs[0], *self.weights))

        def work(number: int) -> Any:
            out = function(self.inputs[number], *self.weights)
            return torch.autograd.grad(out, [self.inputs[number], *self.weights], ones)

        return work


def interactions(on: Device, small: bool) -> dict[str, Suite]:
    """Return both interactions at the sizes of a ranking model's, and crosses of other ranks."""
    batch = 256 if small else 65_536
    features, width, inner = 27, 128, 512

    def leaf(*shape: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*shape, device=on.device, dtype=BF16) * scale
        return values.requires_grad_()

    pairs = features * (features - 1) // 2
    suites = {
        # Read x and write the output; then read x and the gradient, write x's gradient. Of the
        # products, half of one square and all of another.
        "dot_interaction": Suite(
            dot.dot_interaction, dot.dot_interaction_reference,
            [leaf(batch, features, width) for _ in range(SETS)], [],
            2 * batch * (3 * features * width + 2 * (width + pairs)),
            batch * 3 * features**2 * width,
        ),
    }  # fmt: skip
    for layers, rank in ((3, 64), (2, 32), (3, 128)):
        shapes = (layers, inner, rank), (layers, rank, inner), (layers, inner)
        suites[f"low_rank_cross of {layers} layers, rank {rank},"] = Suite(
            cross.low_rank_cross, cross.low_rank_cross_reference,
            [leaf(batch, inner) for _ in range(SETS)], [leaf(*s, scale=0.02) for s in shapes],
            # A layer's products: two forward, four backward, and U h once more.
            2 * batch * 5 * inner, 2 * 7 * layers * batch * inner * rank,
        )  # fmt: skip
    return suites


def bench_interactions(on: Device, limit: dict[str, float], small: bool) -> list[dict[str, Any]]:
    """Time the interactions, forward and backward, against what bounds them."""
    rows = []
    for name, suite in interactions(on, small).items():
        works = {"twotower": suite.own, "compiled eager": compiled(suite.reference, on),
                 "eager": suite.reference}  # fmt: skip
        found = {n: on.measured(suite.step(f)) for n, f in works.items()}
        of_copy = suite.moved / found["twotower"]["ms"] / 1e6 / limit["copy_gb_s"]
        of_matmul = suite.operations / found["twotower"]["ms"] / 1e9 / limit["matmul_tflop_s"]
        rows += table_rows(f"{name} {tuple(suite.inputs[0].shape)}, with gradients", found, {
            "of copy rate": of_copy, "of matmul rate": of_matmul,
            "target": f"0.8 of {'copy' if of_copy > of_matmul else 'matmul'}",
        })  # fmt: skip
    return rows


def table_rows(op: str, found: dict[str, Any], more: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row an implementation, with ratios to ours."""
    own = found["twotower"]
    return [
        {
            "op": op, "by": name, **value, "twotower is": value["ms"] / own["ms"],
            **(more if name == "twotower" else {}),
        }
        for name, value in found.items()
    ]  # fmt: skip


def compile_ahead(processes: int, arguments: list[str]) -> None:
    """Let processes compile the sweep's kernels, a share each, into Triton's cache."""
    shares = [
        subprocess.Popen(
            [sys.executable, __file__, "--sweep", f"--share={i}/{processes}", *arguments],
            stdout=subprocess.DEVNULL,
        )
        for i in range(processes)
    ]
    for share in shares:
        share.wait()


def sweep(on: Device, small: bool, share: str) -> list[dict[str, Any]]:
    """Time tile sizes of the softmax and the interactions, and group sizes of the search.

    Args:
        on: where.
        small: try the script only.
        share: i/n, to run each n-th work alone.
    """
    rows = []
    own, shares = map(int, share.split("/"))
    number = itertools.count()

    def attempt(op: str, by: str, work: Work) -> None:
        if next(number) % shares == own:
            rows.append({"op": op, "by": by} | _tried(on, work))

    batch = 256 if small else 32_768
    shapes = itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3))
    tiles = [Blocks(*s) for s in shapes][: 2 if small else None]
    for width in (64, 128):
        inputs = softmax_inputs(batch, width, on)
        for part in ("forward_blocks", "backward_blocks"):
            usual = getattr(softmax, part)
            for choice in tiles:
                setattr(softmax, part, lambda *_, choice=choice: choice)
                work = softmax_step(softmax.sampled_softmax, inputs)
                attempt(f"sampled_softmax {batch}² x {width}", f"{part} {choice}", work)
            setattr(softmax, part, usual)
    # A share compiles; where all of them run at once, memory is short.
    item = unit(20_000 if small or shares > 1 else 10_000_000, 128, on=on)

    def search(batch: int, by: str) -> None:
        query = unit(batch, 128, on=on)
        attempt(
            f"top_k {batch} x {len(item):,} x 128", by,
            lambda _: top_k.top_k_inner_product(query, item, 100),
        )  # fmt: skip

    usual_group = top_k.group_size
    for batch, *group in itertools.product((1, 16, 64), (64, 128), (2, 3, 4)):
        top_k.group_size = lambda *_, group=group: group
        search(batch, "group {} stages {}".format(*group))
    top_k.group_size = usual_group
    usual_select = top_k.SELECT_BLOCK, top_k.SELECT_WARPS
    for batch, *select in itertools.product((1, 64), (512, 1024, 2048, 4096), (2, 4, 8)):
        top_k.SELECT_BLOCK, top_k.SELECT_WARPS = select
        search(batch, "select {} warps {}".format(*select))
    top_k.SELECT_BLOCK, top_k.SELECT_WARPS = usual_select
    # In the crosses' each warp takes 16 rows of a product: of a tile's rows in the chain, of its
    # columns in the others. A tile of 27 features holds 32 or 64 rows.
    crossing = itertools.product((64, 128), (32, 64, 128), (2, 3))
    rows_first = [(m, n, m // 16, stages) for m, n, stages in crossing]
    columns_first = [(n, m, warps, stages) for m, n, warps, stages in rows_first]
    dotting = list(itertools.product((32, 64), (64, 128), (1, 2, 4), (2, 3)))
    choices = {
        dot.dot_interaction: (dot, {"forward_tiles": dotting, "backward_tiles": dotting}),
        cross.low_rank_cross: (cross, {
            "chain_tiles": rows_first, "outward_tiles": columns_first,
            "inward_tiles": columns_first,
        }),
    }  # fmt: skip
    for name, suite in interactions(on, small).items():
        module, parts = choices[suite.own]
        for part, shapes in parts.items():
            usual_tiles = getattr(module, part)
            for shape in shapes[: 2 if small else None]:
                choice = Blocks(*shape)
                setattr(module, part, lambda *_, choice=choice: choice)
                op = f"{name} {tuple(suite.inputs[0].shape)}"
                attempt(op, f"{part} {choice}", suite.step(suite.own))
            setattr(module, part, usual_tiles)
    return sorted(rows, key=lambda r: (r["op"], r["by"].split()[0], r["ms"]))


def _tried(on: Device, work: Work) -> dict[str, Any]:
    try:
        return on.measured(work)
    except triton.runtime.errors.OutOfResources as error:
        return {"ms": float("inf"), "peak_mb": float("inf"), "target": str(error).split(".")[0]}


def run_tests() -> str:
    """Run the kernels' tests on the GPU; their last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels",
               "--confcutdir=tests/kernels", "-p", "no:cacheprovider"]  # fmt: skip
    if find_spec("xdist"):  # they mostly compile
        command += ["-n", str(min(12, os.cpu_count() or 1))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:])
    return (done.stdout.strip().splitlines() or ["no output"])[-1]


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    last = ""
    for r in rows:
        if r["op"] != last:
            print(r["op"], f"({r['target']})" if "target" in r else "")
            last = r["op"]
        more = [f"{k} {v:.2f}" for k, v in r.items() if k in ("of matmul rate", "of copy rate")]
        if "host_ms" in r:
            more.append(f"launched {r['host_ms']:.3f} ms")
        ratio = f"twotower {r['twotower is']:6.2f}x as fast" if "twotower is" in r else ""
        print(f"  {r['by']:44} {r['ms']:9.3f} ms {r['peak_mb']:10.1f} MB {ratio}", *more)


def train(on: Device, limit: dict[str, float], small: bool) -> dict[str, Any]:
    """Measure training, where the libraries for it are."""
    missing = [n for n in ("fbgemm_gpu", "torchrec", "pyarrow", "tensordict") if not find_spec(n)]
    if missing:
        raise SystemExit(f"--training needs {', '.join(missing)}: install, or add to PYTHONPATH")
    import fbgemm_gpu  # noqa: F401 (its operators)
    from gpu_training import bench_training

    operator = "fbgemm::asynchronous_complete_cumsum"
    if on.cuda and not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA"):
        raise SystemExit("--training needs FBGEMM's CUDA kernels; this build is for CPUs")
    return bench_training(on.device, limit, small)


def write(kind: str, device: str, result: dict[str, Any]) -> None:
    """Write a result with its origin."""
    packages = [n for n in ("torch", "triton", "fbgemm-gpu", "torchrec") if _version(n)]
    result |= {
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in packages},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True,
                                 text=True, check=False).stdout.strip(),
    }  # fmt: skip
    file = ROOT / "benchmarks" / "results" / f"{kind}-{device.replace(' ', '-')}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=2, default=str) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Run the tests and every benchmark of a kernel, or the sweep, or training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sweep", action="store_true", help="time tile sizes instead")
    instead.add_argument("--training", action="store_true", help="time training instead")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes that try the script only")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument("--share", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this benchmark measures one")
    torch.manual_seed(0)
    on = Device(torch.device(arguments.device), arguments.repeat)
    name = torch.cuda.get_device_name() if on.cuda else "cpu"
    limit = limits(on, arguments.small or bool(arguments.share))
    print(f"{name}: copy {limit['copy_gb_s']:,.0f} GB/s, bf16 matmul "
          f"{limit['matmul_tflop_s']:,.0f} TFLOP/s")  # fmt: skip
    result: dict[str, Any] = {"device": name, "limits": limit}
    kind = "sweep" if arguments.sweep else "gpu_training" if arguments.training else "gpu"
    if arguments.training:
        result["training"] = train(on, limit, arguments.small)
    elif arguments.sweep:
        if not arguments.share:
            small = ["--small"] * arguments.small
            given = [f"--device={arguments.device}", "--repeat=1", *small]
            compile_ahead(min(14, os.cpu_count() or 1), given)
        result["rows"] = sweep(on, arguments.small, arguments.share or "0/1")
        if arguments.share:
            return
        show(result["rows"])
    else:
        tested = on.cuda and not arguments.no_tests
        result["tests"] = run_tests() if tested else "not run"
        result["rows"] = [
            row for bench in (bench_softmax, bench_exclusions, bench_top_k, bench_interactions)
            for row in bench(on, limit, arguments.small)
        ]  # fmt: skip
        show(result["rows"])
    if not arguments.small:
        write(kind, name, result)
    sys.stdout.flush()
    if arguments.training:
        os._exit(0)  # threads of the process group may abort an orderly exit


if __name__ == "__main__":
    main()
