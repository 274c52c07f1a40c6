"""What the tests of the export share."""

import platform
import sys
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def trt() -> ModuleType:
    """NVIDIA's builder of engines ahead of time, a development dependency where there is one."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        pytest.skip("tensorrt-rtx is for Linux on x86-64")
    import tensorrt_rtx

    return tensorrt_rtx
