"""Builds the TensorRT engine of a bundle's query tower, on the host that will run it.

    python build_engine.py [--precision fp16] [--cache DIR] [--output model.plan]

An engine fits one kind of GPU and one version of TensorRT, so that no bundle can carry it; this
script lies in the bundle instead, and needs only tensorrt (10.15 or later, 11 too), numpy and the
GPU. The path of the engine is the last line that it prints. Engines are kept in a cache, named by
what they depend on: the graph with its weights, this script, the version of TensorRT, the GPU's
compute capability and the batch sizes. The line for `trtexec`, which builds the same, is printed
before.
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

HERE = Path(__file__).resolve().parent
OLDEST = (10, 15)
# Of CUDA's driver: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and MINOR.
MAJOR, MINOR = 75, 76


class BuildError(Exception):
    """What keeps an engine from being built, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Build one engine, or find it in the cache; returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Build the TensorRT engine of this bundle's query tower for this host's GPU."
    )
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
    options = parser.parse_args(arguments)
    try:
        description = read_description(HERE, options.precision)
        trt, capability = find_tensorrt(), compute_capability()
        name = engine_name(description, trt.__version__, capability)
        print(trtexec_line(description), file=sys.stderr)
        engine = cached_engine(trt, description, options.cache / name)
        if options.output is not None:
            write_whole(options.output, engine.read_bytes())
    except (BuildError, OSError) as error:
        print(f"build_engine: {error}", file=sys.stderr)
        return 1
    print(engine)
    return 0


def read_description(bundle: Path, precision: str | None) -> dict[str, Any]:
    """Return the part of a bundle's `tensorrt.json` that one precision needs.

    Returns:
        `precision`; `graph`, the path of the ONNX file; `weights`, those of files that it reads;
        `inputs`, name -> shape without the batch; `batch`, the least, usual and largest.

    Raises:
        BuildError: when there is none.
    """
    file = bundle / "tensorrt.json"
    try:
        described = json.loads(file.read_text())
        graphs: dict[str, str] = described["graphs"]
        weights, rest = described["weights"], {k: described[k] for k in ("inputs", "batch")}
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
    for path in paths:
        if not path.is_file():
            raise BuildError(f"{path}: missing: copy the bundle whole")
    return {"precision": chosen, "graph": paths[0], "weights": paths[1:], **rest}


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


def compute_capability() -> str:
    """Return the first GPU's compute capability, `90` for 9.0, as the driver says it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise BuildError(
            "no NVIDIA driver on this host (libcuda.so.1 cannot be loaded): an engine is built on "
            "the GPU that runs it"
        ) from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    for code in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetAttribute(ctypes.byref(major), MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), MINOR, device),
    ):
        if code:
            raise BuildError(f"the NVIDIA driver finds no GPU (CUDA error {code})")
    return f"{major.value}{minor.value}"


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
        f"query_tower.{description['precision']}.{digest.hexdigest()[:16]}.trt{version}"
        f".sm{capability}.batch{batch}.plan"
    )


def cached_engine(trt: Any, description: dict[str, Any], path: Path) -> Path:
    """Return the path of an engine, built unless it is there."""
    if not path.is_file():
        write_whole(path, build(trt, description))
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
    errors: list[str] = []

    class Log(trt.ILogger):
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)

    log = Log()
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


def trtexec_line(description: dict[str, Any]) -> str:
    """Return the command that builds the same engine; see `read_description`."""
    words = ["trtexec", f"--onnx={description['graph']}", "--stronglyTyped", "--noTF32"]
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
