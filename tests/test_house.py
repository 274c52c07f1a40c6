"""The walls of the house: import direction, and a serving host without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import twotower

ROOT = Path(__file__).resolve().parent.parent
COMMON = {"errors", "files"}
MAY_IMPORT = {
    "data": {"data"},
    "kernels": {"kernels"},
    "towers": {"data", "kernels", "towers"},
    "train": {"data", "kernels", "towers", "train"},
    "export": {"data", "kernels", "towers", "export", "train.checkpoint"},
    "serve": {"serve", "data.schema", "export.bundle", "export.manifest", "export.search"},
}
# Runs inside Triton on a host with a GPU, where twotower is installed with torch.
ON_GPU = "serve/triton/fused.py"


def imports_of(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_its_floor_allows(room: str) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    allowed = [f"twotower.{name}" for name in MAY_IMPORT[room] | COMMON]
    for file in files:
        if file == ROOT / ON_GPU:
            continue
        for name in imports_of(file):
            ours = name.split(".")[0] == "twotower"
            if ours:
                fits = any(name == a or name.startswith(a + ".") for a in allowed)
                assert fits, f"{file.relative_to(ROOT)} imports {name}"


def test_every_room_is_part_of_the_package() -> None:
    package = Path(twotower.__file__).parent
    for room in MAY_IMPORT:
        assert (package / room).resolve() == ROOT / room


LIGHT = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchrec", "lightning", "onnx"}:
            raise ImportError(f"{name} is not installed on a serving host")
        if name == "twotower.train.train" or name.startswith("twotower.train.m"):
            raise ImportError(f"{name} may not be imported by serve")
sys.meta_path.insert(0, Wall())
import pkgutil, importlib, twotower.serve
for module in pkgutil.walk_packages(twotower.serve.__path__, "twotower.serve."):
    if not module.name.startswith("twotower.serve.triton."):  # runs inside Triton alone
        importlib.import_module(module.name)
from twotower.cli import build_parser
build_parser().parse_args(["serve", "--config", "configs/quickstart.yaml"])
assert "torch" not in sys.modules and "twotower.train.train" not in sys.modules
print("light")
"""


def test_a_serving_host_needs_neither_torch_nor_train() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "light", done.stderr
