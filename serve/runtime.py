"""The environment that the local Triton server runs in: `twotower setup-server` makes it.

The server comes from the `nvidia-pytriton` wheel, which holds tritonserver with the Python backend.
It has an environment of its own because its stub corrupts tensors under NumPy 2, which pyarrow
needs; so here are NumPy 1, ONNX Runtime, faiss for what indexes are its files, and the wheel
without its dependencies, and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from twotower.errors import UserError
from twotower.files import write_json

PYTRITON = "nvidia-pytriton==0.7.0"
# Compiled for both NumPy 1 and 2.
FAISS = "faiss-cpu==1.15.1"
MARKER = "runtime.json"
# A search reads all item vectors, more of whose pages of 4 KB than a core keeps the addresses of.
# With pages of 2 MB, where the kernel gives them, it takes 0.92 to 0.95 of the time
# (benchmarks/huge_pages.py).
HUGE_PAGES = "glibc.malloc.hugetlb=1"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Runtime:
    """A complete environment of the local server.

    Attributes:
        path: a virtual environment, named to Triton by EXECUTION_ENV_PATH.
    """

    path: Path

    @property
    def site_packages(self) -> Path:
        """Where the wheel's files are."""
        return self.path / "lib" / f"python{PYTHON_VERSION}" / "site-packages"

    @property
    def server(self) -> Path:
        """The tritonserver binary's folder tree."""
        return self.site_packages / "pytriton" / "tritonserver"

    @property
    def backends(self) -> Path:
        """The backend directory given to tritonserver."""
        return self.path / "backends"

    def environment(self) -> dict[str, str]:
        """Return the process environment of tritonserver.

        The stub embeds Python: it finds its prefix by the first `python3` on PATH, and its
        library only through LD_LIBRARY_PATH.
        """
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        libraries = [
            str(self.site_packages / "nvidia_pytriton.libs"),
            str(libpython().parent),
            env.get("LD_LIBRARY_PATH", ""),
        ]
        env["LD_LIBRARY_PATH"] = ":".join(p for p in libraries if p)
        env["PATH"] = f"{self.path / 'bin'}:{env.get('PATH', '')}"
        # The environment's own come last, and win.
        tunables = [HUGE_PAGES, env.get("GLIBC_TUNABLES", "")]
        env["GLIBC_TUNABLES"] = ":".join(t for t in tunables if t)
        return env


def default_path() -> Path:
    """Return where the environment is: $TWOTOWER_TRITON_RUNTIME, or inside Python's prefix."""
    chosen = os.environ.get("TWOTOWER_TRITON_RUNTIME")
    return Path(chosen) if chosen else Path(sys.prefix) / "share" / "twotower" / "triton"


def libpython() -> Path:
    """Return Python's shared library, which Triton's stub embeds.

    Raises:
        UserError: when this Python was built without one.
    """
    folder = Path(sysconfig.get_config_var("LIBDIR") or "")
    name = f"libpython{PYTHON_VERSION}.so.1.0"
    for place in (folder, folder / (sysconfig.get_config_var("MULTIARCH") or "")):
        if (place / name).exists():
            return place / name
    raise UserError(
        f"{folder}: no {name}: the local Triton server needs a Python with a shared library "
        "(built with --enable-shared, or the distribution's libpython package)"
    )


def find_runtime() -> Runtime:
    """Return the environment.

    Raises:
        UserError: when it is not there, is incomplete, or of other versions.
    """
    runtime = Runtime(default_path())
    if not _is_complete(runtime):
        raise UserError(f"{runtime.path}: no local Triton server: run `twotower setup-server` once")
    libpython()
    return runtime


def setup_runtime() -> Runtime:
    """Make the environment, or leave a complete one of the same versions alone.

    Raises:
        UserError: when a package cannot be installed, or Python has no shared library.
    """
    libpython()
    runtime = Runtime(default_path())
    if _is_complete(runtime):
        return runtime
    _refuse_foreign(runtime.path)
    # A virtual environment cannot be moved, so it is built in place and marked complete last.
    shutil.rmtree(runtime.path, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(runtime.path)])
    pip = [str(runtime.path / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    wanted = ["numpy<2", f"onnxruntime=={version('onnxruntime')}", FAISS]
    _run([*pip, "--disable-pip-version-check", *wanted])
    _run([*pip, "--disable-pip-version-check", "--no-deps", PYTRITON])
    _make_backends(runtime)
    write_json(runtime.path / MARKER, _wanted())
    return runtime


def _is_complete(runtime: Runtime) -> bool:
    try:
        return bool(json.loads((runtime.path / MARKER).read_text()) == _wanted())
    except (OSError, ValueError):
        return False


def _refuse_foreign(path: Path) -> None:
    # What is there is deleted first, so it must be a virtual environment, ours or half-made.
    if path.exists() and not (path / "pyvenv.cfg").exists() and any(path.iterdir()):
        raise UserError(
            f"{path}: not an environment of the local Triton server, and not empty: name an empty "
            "or new folder in TWOTOWER_TRITON_RUNTIME"
        )


def _wanted() -> dict[str, str]:
    return {
        "python": PYTHON_VERSION, "server": PYTRITON, "onnxruntime": version("onnxruntime"),
        "faiss": FAISS,
    }  # fmt: skip


def _make_backends(runtime: Runtime) -> None:
    target = runtime.backends / "python"
    shutil.copytree(runtime.server / "backends" / "python", target)
    name = "triton_python_backend_stub"
    stub = runtime.server / "python_backend_stubs" / PYTHON_VERSION / name
    if not stub.exists():
        raise UserError(f"the local Triton server has no stub for Python {PYTHON_VERSION}")
    shutil.copy2(stub, target / name)
    for file in (target / name, runtime.server / "bin" / "tritonserver"):
        file.chmod(file.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        raise UserError(f"setting up the local Triton server failed: {reason}")
