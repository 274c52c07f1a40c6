"""Rendering a bundle as the model repository that Triton loads.

    repository/
      recommend/
        configs/cpu.pbtxt     chosen by --model-config-name=cpu
        <version>/            one bundle version: model.py, search.py and the bundle's files,
                              hard-linked

A version directory is written beside its name and renamed into place, so Triton sees a whole one.
"""

from __future__ import annotations

import json
import os
import py_compile
import shutil
from pathlib import Path
from typing import Any

from twotower.data.schema import TensorSpec
from twotower.export import search
from twotower.export.bundle import Bundle
from twotower.export.manifest import HALVES
from twotower.files import atomic_directory, link_or_copy
from twotower.serve.config import MODEL, ServeConfig

TARGET = "cpu"
TYPES = {"string": "TYPE_STRING", "int64": "TYPE_INT64", "float32": "TYPE_FP32"}
# What a request does not need stays in the bundle.
LEFT_OUT = {"item.onnx", "item.weights", "items.parquet", "golden.json", "job.json", *HALVES}


def render_repository(
    bundle: Bundle, repository: Path, config: ServeConfig, environment: Path, *, model: str = MODEL
) -> None:
    """Write a model whose one version is this bundle; directories of others stay, unused.

    Args:
        bundle: checked already.
        repository: the model repository.
        config: of the server.
        environment: the Python environment of the model.
        model: the model's name.
    """
    folder = repository / model
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    version = str(bundle.manifest.version)
    with atomic_directory(folder / version) as partial:
        for name in ("manifest.json", *bundle.manifest.files):
            if name not in LEFT_OUT:
                link_or_copy(bundle.path / name, partial / name)
        for source in (Path(__file__).with_name("model.py"), Path(str(search.__file__))):
            shutil.copy2(source, partial / source.name)
            # The stub writes what is compiled if it is not there, which would look like a change
            # of the model; unchecked, so that touching model.py for a reload does not make it
            # stale.
            py_compile.compile(
                str(partial / source.name),
                dfile=str(folder / version / source.name),
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
    text = render_config(bundle, config, environment, model)
    target = folder / "configs" / f"{TARGET}.pbtxt"
    temporary = target.with_suffix(".partial")
    temporary.write_text(text)
    os.replace(temporary, target)


def served_bytes(bundle: Bundle) -> int:
    """Return the size of the files that answering needs."""
    names = [name for name in bundle.manifest.files if name not in LEFT_OUT]
    return sum((bundle.path / name).stat().st_size for name in names)


def schema_of(bundle: Bundle, config: ServeConfig) -> dict[str, Any]:
    """Return what a client needs to know of the model."""
    m = bundle.manifest
    return {
        "version": m.version,
        "item_id_dtype": m.item_id_dtype,
        "num_items": m.num_items,
        "default_k": min(config.default_k, m.num_items),
        "max_k": min(config.max_k, m.num_items),
        "features": [vars(spec) for spec in m.query],
    }


def render_config(
    bundle: Bundle, config: ServeConfig, environment: Path, model: str = MODEL
) -> str:
    """Return the model's configuration as protobuf text."""
    m = bundle.manifest
    inputs = [
        _tensor(
            s.name, s.dtype, _size(s), ragged=s.is_list, optional=s.kind == "times"
        )
        for s in m.query
    ]  # fmt: skip
    # Rows of one batch may exclude different numbers of items.
    inputs.append(_tensor("exclude", m.item_id_dtype, -1, ragged=True, optional=True))
    inputs.append(_entry(name="k", data_type="TYPE_INT32", dims=1, optional=True))
    outputs = [
        _tensor("item_ids", m.item_id_dtype, -1),
        _tensor("scores", "float32", -1),
        _tensor("version", "int64", 1),
    ]
    parameters = {
        "EXECUTION_ENV_PATH": str(environment.resolve()),
        "schema": json.dumps(schema_of(bundle, config)),
        "index": json.dumps(vars(m.index)),
        "threads": str(config.threads),
    }
    return "\n".join([
        f'name: "{model}"',
        'backend: "python"',
        f"max_batch_size: {config.max_batch_size}",
        f"version_policy {{ specific {{ versions: [{m.version}] }} }}",
        f"instance_group [{{ kind: KIND_CPU, count: {config.instances} }}]",
        *(f"input [{t}]" for t in inputs),
        *(f"output [{t}]" for t in outputs),
        # No queue policy: with one, tritonserver 2.51's batcher leaves what is queued asleep for
        # its 0.5 s default wait when no further request comes (200 requests at once took 0.5 to
        # 1.5 s with a policy and 0.05 s without). Clients hold deadlines instead.
        f"dynamic_batching {{ max_queue_delay_microseconds: {config.max_queue_delay_us} }}",
        *(
            f"parameters {{ key: {_text(k)} value {{ string_value: {_text(v)} }} }}"
            for k, v in parameters.items()
        ),
        "",
    ])  # fmt: skip


def _size(spec: TensorSpec) -> int:
    return -1 if spec.is_list else spec.length


def _tensor(
    name: str, dtype: str, dims: int, *, ragged: bool = False, optional: bool = False
) -> str:
    return _entry(
        name=name, data_type=TYPES[dtype], dims=dims, ragged=ragged, optional=optional
    )  # fmt: skip


def _entry(
    *, name: str, data_type: str, dims: int, ragged: bool = False, optional: bool = False
) -> str:
    extra = (", allow_ragged_batch: true" if ragged else "") + (
        ", optional: true" if optional else ""
    )
    return f"{{ name: {_text(name)}, data_type: {data_type}, dims: [{dims}]{extra} }}"


def _text(value: str) -> str:
    # JSON's escapes are protobuf text's too, with ASCII alone.
    return json.dumps(value)
