"""Builds the TensorRT engine of a bundle's tower, on the host that will run it.

    python build_engine.py [--tower query] [--precision fp16] [--cache DIR] [--output model.plan]
    python build_engine.py --refit OLD.plan --output model.plan

An engine fits one kind of GPU and one version of TensorRT, so that no bundle can carry it; this
script lies in the bundle instead, and needs only tensorrt (10.15 or later, 11 too), numpy and the
GPU. Before an engine is kept, the vectors that it gives are compared with those of the export. The
path of the engine is the last line that is printed. Engines are kept in a cache, named by what they
depend on: the graph with its weights, this script, the version of TensorRT, the GPU's compute
capability and the batch sizes. The line for `trtexec`, which builds the same, is printed before.

With --refit, an engine of another bundle with the same layers (built with export.tensorrt.refit)
gets this bundle's weights, in seconds.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
OLDEST = (10, 15)
CHECK = "tensorrt_check.npz"
# Of CUDA's driver: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and MINOR.
MAJOR, MINOR = 75, 76


class BuildError(Exception):
    """What keeps an engine from being built, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build one engine, or find it in the cache; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Build the TensorRT engine of this bundle's tower for this host's GPU."
    )
    parser.add_argument("--tower", choices=("query", "item"), default="query")
    parser.add_argument(
        "--precision", default=None, help="Of the products; the first that the bundle has."
    )
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "twotower" / "engines",
        help="Folder of the engines (default: %(default)s).",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=None, help="Also copy the engine here: model.plan."
    )
    parser.add_argument(
        "--refit", type=Path, default=None,
        help="Put this bundle's weights into this engine, built from one with the same layers.",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        description = read_description(HERE, options.precision, options.tower)
        trt, gpu = find_tensorrt(), Gpu()
        name = engine_name(description, trt.__version__, gpu.compute_capability())
        print(trtexec_line(description), file=sys.stderr)
        engine = cached_engine(trt, gpu, description, options.cache / name, options.refit)
        if options.output is not None:
            write_whole(options.output, engine.read_bytes())
    except (BuildError, OSError) as error:
        print(f"build_engine: {error}", file=sys.stderr)
        return 1
    print(engine)
    return 0


def read_description(bundle: Path, precision: str | None, tower: str = "query") -> dict[str, Any]:
    """Return the part of a bundle's `tensorrt.json` that one tower in one precision needs.

    Returns:
        `tower`; `precision`; `graph`, the path of the ONNX file; `weights`, those of files that it
        reads; `inputs`, name -> shape without the batch; `batch`, the least, usual and largest;
        `refit`; `tolerance`, of a vector's coordinate; `check`, the path of what to compare with.

    Raises:
        BuildError: when there is none.
    """
    file = bundle / "tensorrt.json"
    try:
        described = json.loads(file.read_text())
        own = described["towers"][tower]
        graphs: dict[str, str] = own["graphs"]
        tolerances: dict[str, float] = described["tolerance"]
        weights, rest = own["weights"], {k: described[k] for k in ("batch", "refit")}
        rest |= {"tower": tower, "inputs": own["inputs"], "check": bundle / CHECK}
    except FileNotFoundError:
        raise BuildError(
            f"{file}: missing: this bundle was exported without export.tensorrt.precisions"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{file}: damaged ({error!r}): copy the bundle again") from None
    chosen = next(iter(graphs)) if precision is None else precision
    if chosen not in graphs:
        raise BuildError(f"--precision must be one of {', '.join(graphs)}, got '{chosen}'")
    paths = [bundle / name for name in (graphs[chosen], *weights)]
    for path in (*paths, rest["check"]):
        if not path.is_file():
            raise BuildError(f"{path}: missing: copy the bundle whole")
    rest |= {"precision": chosen, "tolerance": tolerances[chosen]}
    return {"graph": paths[0], "weights": paths[1:], **rest}


def find_tensorrt() -> Any:
    """Return the module, refusing one that is missing, broken or too old."""
    try:
        import tensorrt as trt
    except ImportError as error:
        raise BuildError(
            f"TensorRT cannot be imported ({error}): pip install 'tensorrt>=10.15', or run this "
            "in NVIDIA's container"
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise BuildError(
            f"TensorRT {trt.__version__} is too old: 10.15 or later is needed for these graphs"
        )
    return trt


class Gpu:
    """The first GPU, through CUDA's driver alone."""

    def __init__(self) -> None:
        try:
            self._driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise BuildError(
                "no NVIDIA driver on this host (libcuda.so.1 cannot be loaded): an engine is built "
                "on the GPU that runs it"
            ) from None
        self._device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def compute_capability(self) -> str:
        """Return it as `90` for 9.0."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(major), MAJOR, self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), MINOR, self._device)
        return f"{major.value}{minor.value}"

    def copy_in(self, array: Any) -> int:
        """Return the address of a copy in the GPU's memory, which stays until the process ends."""
        place = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(place), ctypes.c_size_t(max(1, array.nbytes)))
        source = ctypes.c_void_p(array.ctypes.data)
        self._call("cuMemcpyHtoD_v2", place, source, ctypes.c_size_t(array.nbytes))
        return place.value

    def copy_out(self, place: int, array: Any) -> None:
        """Wait for what runs, and fill an array from an address of `copy_in`."""
        self._call("cuCtxSynchronize")
        target, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        self._call("cuMemcpyDtoH_v2", target, ctypes.c_uint64(place), size)

    def _call(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._driver, name)(*arguments):
            raise BuildError(f"the NVIDIA driver fails: {name} gives CUDA error {code}")


def engine_name(description: dict[str, Any], version: str, capability: str) -> str:
    """Return the file name of an engine, which says all that it depends on."""
    digest = hashlib.sha256()
    for path in (description["graph"], *description["weights"], Path(__file__)):
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
        digest.update(b"|")
    batch = "-".join(map(str, description["batch"]))
    return (
        f"{description['tower']}_tower.{description['precision']}.{digest.hexdigest()[:16]}"
        f".trt{version}.sm{capability}.batch{batch}{'.refit' * description['refit']}.plan"
    )


def cached_engine(
    trt: Any, gpu: Any, description: dict[str, Any], path: Path, refit: Path | None = None
) -> Path:
    """Return the path of an engine, built or refitted, and checked, unless it is there.

    Raises:
        BuildError: when there can be none, or its vectors are not those of the export.
    """
    if not path.is_file():
        engine = build(trt, description) if refit is None else refitted(trt, description, refit)
        check(trt, gpu, description, engine)
        write_whole(path, engine)
    return path


def build(trt: Any, description: dict[str, Any], capability: str | None = None) -> bytes:
    """Return the engine's bytes.

    Args:
        trt: the module `tensorrt`, or `tensorrt_rtx`, which builds ahead of time without a GPU.
        description: see `read_description`.
        capability: of the GPU that it is built for, with `tensorrt_rtx`: SM80 for 8.0.

    Raises:
        BuildError: naming what was refused.
    """
    log, errors = _log(trt)
    try:
        builder = trt.Builder(log)
    except TypeError:  # what the binding makes of a null pointer
        raise BuildError(f"TensorRT finds no usable GPU: {_last(errors)}") from None
    # Ignored by TensorRT 11, whose networks are all strongly typed.
    typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(description["graph"])):
        first = parser.get_error(0)
        raise BuildError(
            f"TensorRT refuses node '{first.node_name()}' ({first.node_operator()}) of "
            f"{description['graph'].name}: {first.desc()}"
        )
    config = builder.create_builder_config()
    # TF32 keeps 10 bits of fp32's 23, which a graph that says fp32 does not mean.
    config.clear_flag(trt.BuilderFlag.TF32)
    if description["refit"]:
        config.set_flag(trt.BuilderFlag.REFIT)
    if capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for name, shape in description["inputs"].items():
        profile.set_shape(name, *((batch, *shape) for batch in description["batch"]))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(
            f"TensorRT built no engine of {description['graph'].name}: {_last(errors)}"
        )
    return bytes(engine)


def refitted(trt: Any, description: dict[str, Any], plan: Path) -> bytes:
    """Return an engine's bytes with this bundle's weights.

    Raises:
        BuildError: when the engine cannot take them.
    """
    log, errors = _log(trt)
    engine = trt.Runtime(log).deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise BuildError(f"--refit: {plan} is no engine of this GPU and TensorRT: {_last(errors)}")
    if not engine.refittable:
        raise BuildError(
            f"--refit: {plan} cannot be refitted: build it from a bundle that was exported with "
            "export.tensorrt.refit"
        )
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    read = parser.refit_from_file(str(description["graph"]))
    if not read or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise BuildError(
            f"--refit: {plan} has other layers than {description['graph'].name}: {_last(errors)}"
        )
    return bytes(engine.serialize())


def check(trt: Any, gpu: Any, description: dict[str, Any], engine: bytes) -> None:
    """Refuse an engine whose vectors are not those of the export.

    Raises:
        BuildError: saying by how much they differ.
    """
    log, errors = _log(trt)
    loaded = trt.Runtime(log).deserialize_cuda_engine(engine)
    context = None if loaded is None else loaded.create_execution_context()
    if context is None:
        raise BuildError(f"the engine does not load again: {_last(errors)}")
    tower = description["tower"]
    with np.load(description["check"], allow_pickle=False) as known:
        inputs = {name: np.ascontiguousarray(known[f"{tower}/{name}"]) for name in
                  description["inputs"]}  # fmt: skip
        wanted = known[f"{tower}/vector"]
    count = min(len(wanted), description["batch"][2])
    got = np.zeros((count, *wanted.shape[1:]), np.float32)
    for name, value in inputs.items():
        context.set_input_shape(name, (count, *value.shape[1:]))
        context.set_tensor_address(name, gpu.copy_in(value[:count]))
    place = gpu.copy_in(got)
    context.set_tensor_address("vector", place)
    if not context.execute_async_v3(0):
        raise BuildError(f"the engine does not run: {_last(errors)}")
    gpu.copy_out(place, got)
    difference = float(np.abs(got - wanted[:count]).max())
    if not difference <= description["tolerance"]:
        raise BuildError(
            f"the engine's vectors differ by {difference:.2e} from the export's, more than "
            f"{description['tolerance']:g}: it was not kept"
        )


def _log(trt: Any) -> tuple[Any, list[str]]:
    """Return a logger, and the list of errors that it fills."""
    errors: list[str] = []

    class Log(trt.ILogger):
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)

    return Log(), errors


def trtexec_line(description: dict[str, Any]) -> str:
    """Return the command that builds the same engine; see `read_description`."""
    words = ["trtexec", f"--onnx={description['graph']}", "--stronglyTyped", "--noTF32"]
    words += ["--refit"] * description["refit"]
    for option, batch in zip(("min", "opt", "max"), description["batch"], strict=True):
        shapes = (
            f"{name}:{'x'.join(map(str, (batch, *shape)))}"
            for name, shape in description["inputs"].items()
        )
        words.append(f"--{option}Shapes={','.join(shapes)}")
    return " ".join([*words, "--saveEngine=model.plan"])


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that others see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".part-", delete=False) as part:
        try:
            part.write(content)
            part.flush()
            os.fsync(part.fileno())
            os.chmod(part.name, 0o644)
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise


def _last(errors: list[str]) -> str:
    return " ".join(errors[-1].split()) if errors else "it says no reason"


if __name__ == "__main__":
    sys.exit(main())
