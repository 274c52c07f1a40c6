"""A model repository that `twotower render --target=cpu` wrote, served as it is.

    twotower serve REPOSITORY

Its models and their configurations are served as they lie there, also where they were changed by
hand. What the host decides (addresses, probes, TLS) comes from the settings; the Python environment
of the models is this host's, whichever it was rendered with. Beside its own files, the version of
`recommend` holds the golden queries and the job of the bundle.
"""

from __future__ import annotations

import py_compile
from collections.abc import Iterable
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from twotower.errors import UserError
from twotower.export.bundle import Bundle
from twotower.export.manifest import MANIFEST, read_manifest
from twotower.files import link_or_copy, sha256_file
from twotower.serve.config import MODEL, ServeConfig, serve_config
from twotower.serve.repository import PROOF, READS, TARGET, copy_code

REMEDY = "make it again with `twotower render`, or copy it whole"
# What a rendered repository fixes.
FIXED = (
    "models", "instances", "threads", "max_batch_size", "preferred_batch_sizes",
    "max_queue_delay_us", "max_queue_size", "queue_timeout_ms", "priority_levels",
    "response_cache_mb", "concurrent_batches", "default_k", "max_k",
)  # fmt: skip


def is_repository(path: Path) -> bool:
    """Whether `twotower render` wrote `path`, for either target."""
    return any(file.is_file() for file in (_config(path, MODEL), path / MODEL / "config.pbtxt"))


def version_directory(repository: Path, model: str = MODEL) -> Path:
    """Return the directory of a model's one version.

    Raises:
        UserError: for a repository for gpu, or with no or several versions.
    """
    if not _config(repository, model).is_file():
        if (repository / model / "config.pbtxt").is_file():
            raise UserError(
                f"{repository}: rendered for gpu, and the local server has no GPU backends: start "
                "tritonserver on it in NVIDIA's container, or render it with --target=cpu"
            )
        raise UserError(f"{_config(repository, model)}: missing from the repository: {REMEDY}")
    versions = sorted(p for p in (repository / model).iterdir() if p.name.isdigit())
    if len(versions) != 1:
        found = ", ".join(p.name for p in versions) or "none"
        raise UserError(
            f"{repository / model}: must hold one version, as `twotower render` writes it, and "
            f"holds {found}: {REMEDY}"
        )
    return versions[0]


def read_rendered(repository: Path, config: ServeConfig) -> Bundle:
    """Return what a repository holds of its bundle, every file of it compared with its SHA-256.

    Raises:
        UserError: for a damaged or incomplete one, settings other than it was rendered with, or
            where a signature is demanded.
    """
    if config.require_signature is not None:
        raise UserError(
            f"{repository}: a signature is demanded (serve.require_signature), and a repository's "
            "code and configurations are not signed: serve the bundle itself"
        )
    folder = version_directory(repository)
    try:
        manifest = read_manifest((folder / MANIFEST).read_bytes())
    except UserError as error:
        raise UserError(f"{folder / MANIFEST}: {error}") from None
    bundle = Bundle(folder, manifest)
    rendered = serve_config(bundle.job().get("serve", {}))
    for name in FIXED:
        fixed, wanted = getattr(rendered, name), getattr(config, name)
        if fixed != wanted:
            raise UserError(
                f"serve.{name}: {repository} is rendered with {fixed}, got {wanted}: leave it out, "
                "or serve the bundle itself with it"
            )
    for model in config.models:
        version = version_directory(repository, model)
        if version.name != str(manifest.version):
            raise UserError(f"{version}: must be version {manifest.version}: {REMEDY}")
        for name in (*READS[model, TARGET], *(PROOF if model == MODEL else ())):
            if name in manifest.files:
                _check(version / name, manifest.files[name])
    return bundle


def copy_rendered(repository: Path, target: Path, models: Iterable[str], environment: Path) -> None:
    """Write what Triton loads: the same models, run by this host's environment.

    Args:
        repository: checked already.
        target: the model repository that is written.
        models: their names.
        environment: the Python environment of the models.

    Raises:
        UserError: for a configuration or code that cannot be read.
    """
    for model in models:
        source = version_directory(repository, model)
        version = target / model / source.name
        version.mkdir(parents=True)
        for file in source.iterdir():
            if file.suffix == ".py":
                try:
                    copy_code(file, version / file.name)
                except py_compile.PyCompileError as error:
                    reason = str(error.exc_value)
                    raise UserError(f"{file}: is no Python ({reason}): {REMEDY}") from None
            elif file.is_file():
                link_or_copy(file.resolve(), version / file.name)
        path = _config(repository, model)
        try:
            parsed = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        except (text_format.ParseError, ValueError) as error:
            raise UserError(f"{path}: no configuration of a model ({error}): {REMEDY}") from None
        parsed.parameters["EXECUTION_ENV_PATH"].string_value = str(environment.resolve())
        written = _config(target, model)
        written.parent.mkdir()
        written.write_text(text_format.MessageToString(parsed))


def _config(repository: Path, model: str) -> Path:
    return repository / model / "configs" / f"{TARGET}.pbtxt"


def _check(file: Path, expected: str) -> None:
    if not file.is_file():
        raise UserError(f"{file}: missing from the repository: {REMEDY}")
    if sha256_file(file) != expected:
        raise UserError(
            f"{file}: its bytes do not match the manifest's SHA-256 (truncated or changed): "
            f"{REMEDY}"
        )
