"""Rendering a bundle as the model repository that Triton loads.

    repository/
      recommend/
        configs/cpu.pbtxt     chosen by --model-config-name=cpu
        config.pbtxt          of the target gpu
        <version>/            one bundle version: model.py, what it imports and the bundle's files,
                              hard-linked
      embed_query/, embed_items/  the same of the towers, where serve.models names them
      query_tower/, item_tower/   of the target gpu: model.onnx or model.plan

A version directory is written beside its name and renamed into place, so Triton sees a whole one.
The tensors of a model are the same for both targets.
"""

from __future__ import annotations

import json
import os
import py_compile
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from twotower.data.schema import TensorSpec
from twotower.errors import UserError
from twotower.export import bundle as bundles
from twotower.export.bundle import Bundle
from twotower.files import atomic_directory, link_or_copy
from twotower.serve import triton
from twotower.serve.config import EMBED, MODEL, SIMILAR, ServeConfig

TARGET = "cpu"  # of the local server
TYPES = {"string": "TYPE_STRING", "int64": "TYPE_INT64", "float32": "TYPE_FP32"}
VECTORS = ("manifest.json", "item_vectors.npy", "item_ids.npy", "filters.npz")
INDEX = (
    *VECTORS, "index.onnx", "index.faiss", "item_cut.npy", "item_int8.npy", "item_scales.npy",
    "scan.onnx", "item_scan.npy", "item_scan_scales.npy",
)  # fmt: skip
# Of a bundle, what each model reads, where it is there.
READS = {
    ("recommend", "cpu"): ("query.onnx", "query.weights", *INDEX),
    ("recommend", "gpu"): ("query_encoding.onnx", *VECTORS),
    ("similar", "cpu"): INDEX,
    ("similar", "gpu"): VECTORS,
    ("embed_query", "cpu"): ("query.onnx", "query.weights"),
    ("embed_query", "gpu"): ("query_encoding.onnx",),
    ("embed_items", "cpu"): ("item.onnx", "item.weights", "query.weights"),
    ("embed_items", "gpu"): ("item_encoding.onnx",),
}  # fmt: skip
TRITON = Path(triton.__file__).parent
# Not imported, which would load ONNX Runtime into every command.
SEARCH = Path(bundles.__file__).with_name("search.py")
# The first one is the model itself.
CODE = {
    MODEL: ("recommend.py", "answers.py", "features.py", "filters.py", "tower.py", "wire.py"),
    SIMILAR: ("similar.py", "answers.py", "features.py", "filters.py", "wire.py"),
    **dict.fromkeys(EMBED, ("embed.py", "features.py", "tower.py", "wire.py")),
}
SEARCHES = (MODEL, SIMILAR)
# What `twotower serve` proves a rendered repository by, and its settings.
PROOF = ("golden.json", "job.json")


def render_repository(
    bundle: Bundle, repository: Path, config: ServeConfig, environment: Path | None,
    target: str = TARGET, plans: dict[str, Path] | None = None,
) -> None:  # fmt: skip
    """Write the models of `serve.models` with this bundle as their one version.

    Args:
        bundle: checked already.
        repository: the model repository.
        config: of the server.
        environment: the Python environment of the models; that of Triton itself without.
        target: cpu or gpu.
        plans: side -> the TensorRT engine of its tower, for gpu; ONNX Runtime runs it without.

    Raises:
        UserError: for gpu, when the bundle has no halves.
    """
    for kind in config.models:
        render_model(kind, bundle, repository / kind, config, environment, target)
    if target == TARGET:
        for name in PROOF:
            link_or_copy(
                bundle.path / name, repository / MODEL / str(bundle.manifest.version) / name
            )
    if target == "gpu":
        for side in {EMBED.get(name, "query") for name in config.models if name != SIMILAR}:
            _write_tower(
                bundle, repository / f"{side}_tower", side, config, (plans or {}).get(side)
            )


def render_model(
    kind: str, bundle: Bundle, model: Path, config: ServeConfig, environment: Path | None,
    target: str = TARGET,
) -> None:  # fmt: skip
    """Write a model whose one version is this bundle; directories of others stay, unused.

    Args:
        kind: one of `serve.models`.
        bundle: checked already.
        model: its folder, whose name is the model's.
        config: of the server.
        environment: see `render_repository`.
        target: cpu or gpu.
    """
    sources = {file: TRITON / file for file in CODE[kind][1:]}
    sources["model.py"] = TRITON / CODE[kind][0]
    if kind in SEARCHES:
        sources |= {"search.py": SEARCH, "fused.py": TRITON / "fused.py"}
    _write_version(bundle, model, READS[kind, target], sources)
    text = render_config(kind, model.name, bundle, config, environment, target)
    _write_config(model, target, text)


def served_bytes(bundle: Bundle, models: Iterable[str]) -> int:
    """Return the size of the files that answering on a CPU needs."""
    names = {name for kind in models for name in READS[kind, "cpu"]} & set(bundle.manifest.files)
    return sum((bundle.path / name).stat().st_size for name in names)


def _write_version(
    bundle: Bundle, model: Path, reads: Iterable[str], sources: dict[str, Path]
) -> None:
    """Write a version directory, unless it is there: what a bundle holds never changes."""
    model.mkdir(parents=True, exist_ok=True)
    version = model / str(bundle.manifest.version)
    with atomic_directory(version) as partial:
        for name in reads:
            if name == "manifest.json" or name in bundle.manifest.files:
                link_or_copy(bundle.path / name, partial / name)
        for name, source in sources.items():
            copy_code(source, partial / name, version / name)


def copy_code(source: Path, target: Path, final: Path | None = None) -> None:
    """Copy code of a model, with what is compiled of it.

    Args:
        source: of the code.
        target: where it is written.
        final: the name that it will have, where that is another.

    Raises:
        PyCompileError: for code that is none.
    """
    shutil.copy2(source, target)
    # The stub writes what is compiled if it is not there, which would look like a change of the
    # model; unchecked, so that touching model.py for a reload does not make it stale.
    py_compile.compile(
        str(target), dfile=str(final or target), doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )  # fmt: skip


def _write_config(model: Path, target: str, text: str) -> None:
    path = model / "config.pbtxt" if target == "gpu" else model / "configs" / f"{target}.pbtxt"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def _write_tower(
    bundle: Bundle, model: Path, side: str, config: ServeConfig, plan: Path | None
) -> None:
    """Write the model of a tower's layers, of the first of the bundle's precisions."""
    described = bundle.tensorrt()
    if described is None:
        raise UserError(
            f"{bundle.path}: holds nothing for a GPU: export it with "
            "--export.tensorrt.precisions=[fp16]"
        )
    tower = described["towers"][side]
    graph = next(iter(tower["graphs"].values()))
    model.mkdir(parents=True, exist_ok=True)
    with atomic_directory(model / str(bundle.manifest.version)) as partial:
        if plan is not None:
            link_or_copy(plan, partial / "model.plan")
        else:
            link_or_copy(bundle.path / graph, partial / "model.onnx")
            for name in tower["weights"]:
                link_or_copy(bundle.path / name, partial / name)
    _write_config(model, "gpu", _tower_config(bundle, side, config, plan is not None))


def schema_of(bundle: Bundle, config: ServeConfig, kind: str = MODEL) -> dict[str, Any]:
    """Return what a client needs to know of a model."""
    m = bundle.manifest
    side = EMBED.get(kind, "query")
    specs = m.query if side == "query" else m.item
    if kind == SIMILAR:
        specs = [TensorSpec(name="item", kind="id", dtype=m.item_id_dtype, length=1)]
    schema = {
        "version": m.version,
        "dim": m.dim,
        "bias": bool(m.index.bias),
        "features": [vars(spec) for spec in specs],
    }
    if kind not in SEARCHES:
        return schema | {"side": side}
    return schema | {
        "item_id_dtype": m.item_id_dtype,
        "num_items": m.num_items,
        "default_k": min(config.default_k, m.num_items),
        "max_k": min(config.max_k, m.num_items),
        "filters": m.filters,
    }


def render_config(
    kind: str, name: str, bundle: Bundle, config: ServeConfig, environment: Path | None, target: str
) -> str:
    """Return the configuration of a model of a kind and a name, as protobuf text."""
    m = bundle.manifest
    schema = schema_of(bundle, config, kind)
    inputs = [
        _tensor(s.name, s.dtype, _size(s), ragged=s.is_list, optional=s.kind == "times")
        for s in (TensorSpec(**spec) for spec in schema["features"])
    ]
    if kind in SEARCHES:
        # Rows of one batch may exclude, or ask for, different numbers of items.
        for ids in ("exclude", "allow"):
            inputs.append(_tensor(ids, m.item_id_dtype, -1, ragged=True, optional=True))
        inputs.append(_tensor("filter", "string", 1, optional=True))
        inputs.append(_entry(name="k", data_type="TYPE_INT32", dims="1", optional=True))
        outputs = [
            _tensor("item_ids", m.item_id_dtype, -1),
            _tensor("scores", "float32", -1),
            _tensor("explanation", "string", 1),
        ]
    else:
        outputs = [_tensor("vector", "float32", m.dim)]
    outputs.append(_tensor("version", "int64", 1))
    parameters = {
        "schema": json.dumps(schema),
        "index": json.dumps(vars(m.index)),
        "target": target,
        "threads": str(config.threads),
    }
    if environment is not None:
        parameters["EXECUTION_ENV_PATH"] = str(environment.resolve())
    return "\n".join([
        f'name: "{name}"',
        'backend: "python"',
        f"max_batch_size: {config.max_batch_size}",
        f"version_policy {{ specific {{ versions: [{m.version}] }} }}",
        f"instance_group [{{ {_instances(config, target)} }}]",
        *(f"input [{t}]" for t in inputs),
        *(f"output [{t}]" for t in outputs),
        _batching(config),
        *(["response_cache { enable: true }"] if config.response_cache_mb else []),
        *(
            f"parameters {{ key: {_text(k)} value {{ string_value: {_text(v)} }} }}"
            for k, v in parameters.items()
        ),
        "",
    ])  # fmt: skip


def _tower_config(bundle: Bundle, side: str, config: ServeConfig, plan: bool) -> str:
    """Return the configuration of a tower's layers on a GPU, as protobuf text."""
    described = bundle.tensorrt()
    assert described is not None
    least, usual, most = described["batch"]
    # Their types are those of what an engine is checked by.
    with np.load(bundle.path / "tensorrt_check.npz", allow_pickle=False) as known:
        inputs = [
            (name, TYPES[str(known[f"{side}/{name}"].dtype)], shape)
            for name, shape in described["towers"][side]["inputs"].items()
        ]
    warm = [
        f"{{ name: \"{batch}\", batch_size: {batch}, inputs ["
        + ", ".join(
            f"{{ key: {_text(name)} value {{ data_type: {kind}, dims: [{_dims(shape)}], "
            "zero_data: true } }" for name, kind, shape in inputs
        ) + "] }" for batch in sorted({least, usual})
    ]  # fmt: skip
    return "\n".join([
        f'name: "{side}_tower"',
        'platform: "tensorrt_plan"' if plan else 'backend: "onnxruntime"',
        f"max_batch_size: {most}",
        f"version_policy {{ specific {{ versions: [{bundle.manifest.version}] }} }}",
        "instance_group [{ kind: KIND_GPU, count: 1 }]",
        *(
            f"input [{_entry(name=n, data_type=kind, dims=_dims(shape), scalar=not shape)}]"
            for n, kind, shape in inputs
        ),
        f"output [{_tensor('vector', 'float32', bundle.manifest.dim)}]",
        f"dynamic_batching {{ max_queue_delay_microseconds: {config.max_queue_delay_us} }}",
        *(["optimization { cuda { graphs: true } }"] if plan else []),
        *(f"model_warmup [{w}]" for w in warm),
        "",
    ])  # fmt: skip


def _dims(shape: list[int]) -> str:
    return ", ".join(map(str, shape or [1]))


def _instances(config: ServeConfig, target: str) -> str:
    text = f"kind: KIND_{target.upper()}, count: {config.instances}"
    if config.concurrent_batches:
        # One of the server's `batch` resources each; see `TritonServer`.
        text += ', rate_limiter { resources [{ name: "batch", global: true, count: 1 }] }'
    return text


def _batching(config: ServeConfig) -> str:
    """Return the dynamic batcher's settings, without a queue policy unless one is asked for.

    With one, tritonserver 2.51's batcher leaves what is queued asleep for its 0.5 s default wait
    when no further request comes (200 requests at once took 0.5 to 1.5 s with a policy and 0.05 s
    without). Clients hold deadlines instead.
    """
    settings = [f"max_queue_delay_microseconds: {config.max_queue_delay_us}"]
    if config.preferred_batch_sizes:
        settings.append(f"preferred_batch_size: {sorted(config.preferred_batch_sizes)}")
    if config.priority_levels:
        last = config.priority_levels
        settings.append(f"priority_levels: {last}, default_priority_level: {last}")
    policy = []
    if config.max_queue_size:
        policy.append(f"max_queue_size: {config.max_queue_size}")
    if config.queue_timeout_ms:
        micros = int(config.queue_timeout_ms * 1000)
        policy.append(f"timeout_action: REJECT, default_timeout_microseconds: {micros}")
    if policy:
        settings.append(f"default_queue_policy {{ {', '.join(policy)} }}")
    return f"dynamic_batching {{ {', '.join(settings)} }}"


def _size(spec: TensorSpec) -> int:
    return -1 if spec.is_list else spec.length


def _tensor(
    name: str, dtype: str, dims: int, *, ragged: bool = False, optional: bool = False
) -> str:
    return _entry(
        name=name, data_type=TYPES[dtype], dims=str(dims), ragged=ragged, optional=optional
    )  # fmt: skip


def _entry(
    *, name: str, data_type: str, dims: str, ragged: bool = False, optional: bool = False,
    scalar: bool = False,
) -> str:  # fmt: skip
    extra = ", allow_ragged_batch: true" * ragged + ", optional: true" * optional
    extra += ", reshape: { shape: [] }" * scalar
    return f"{{ name: {_text(name)}, data_type: {data_type}, dims: [{dims}]{extra} }}"


def _text(value: str) -> str:
    # JSON's escapes are protobuf text's too, with ASCII alone.
    return json.dumps(value)
