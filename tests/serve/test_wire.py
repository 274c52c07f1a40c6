"""Our reading and writing of strings inside Triton, beside what Triton's own functions do."""

import importlib.util
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import twotower.serve.triton as triton
from twotower.serve.runtime import find_runtime
from twotower.serve.triton import wire

BYTES = st.lists(st.binary(max_size=20) | st.sampled_from([b"", b"\0", b"a\0", b"item-000001"]))
SAME_LENGTH = st.lists(st.binary(min_size=7, max_size=7))


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_fast_strings(utils: types.ModuleType) -> types.ModuleType:
    """Return the stub's module after ours has been at it, as in the stub's process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", utils)
        patch.setitem(sys.modules, "wire", wire)
        load(Path(triton.__file__).parent / "features.py").use_fast_strings()
    return utils


@pytest.fixture(scope="module")
def utils() -> Path:
    return find_runtime().backends / "python" / "triton_python_backend_utils.py"


@pytest.fixture(scope="module")
def own(utils):
    return load(utils)


@pytest.fixture(scope="module")
def ours(utils):
    return with_fast_strings(load(utils))


def test_both_functions_of_this_triton_are_replaced(own, ours) -> None:
    for name in ("serialize_byte_tensor", "deserialize_bytes_tensor"):
        assert getattr(ours, name).__code__ is not getattr(own, name).__code__


@settings(deadline=None)
@given(BYTES | SAME_LENGTH)
def test_strings_are_written_and_read_byte_for_byte_as_tritons_own(own, ours, strings) -> None:
    array = np.array(strings, dtype=object)
    written = own.serialize_byte_tensor(array)
    assert ours.serialize_byte_tensor(array) == written
    for shape in ((1, -1), (-1, 1)):
        assert ours.serialize_byte_tensor(array.reshape(shape)) == written
    encoded = np.frombuffer(written or b"", np.uint8)
    read = ours.deserialize_bytes_tensor(encoded)
    assert read.tolist() == own.deserialize_bytes_tensor(encoded).tolist() == strings
    assert (read.dtype, read.shape) == (object, (len(strings),))


@settings(deadline=None)
@given(st.lists(st.text(max_size=5) | st.binary(max_size=5) | st.integers(), min_size=1))
def test_what_is_no_bytes_is_written_as_tritons_own(own, ours, values) -> None:
    array = np.empty(len(values), object)
    array[:] = values
    assert ours.serialize_byte_tensor(array) == own.serialize_byte_tensor(array)
    fixed = np.array([str(value).encode() for value in values])
    assert ours.serialize_byte_tensor(fixed) == own.serialize_byte_tensor(fixed)


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_strings_that_are_cut_off_are_refused_as_by_tritons_own(own, ours, cut) -> None:
    encoded = np.frombuffer(struct.pack("<I", 3) + b"abc", np.uint8)[:-cut]
    for module in (own, ours):
        with pytest.raises(struct.error):
            module.deserialize_bytes_tensor(encoded)


def test_a_triton_of_another_kind_is_left_as_it_is() -> None:
    other = types.ModuleType("triton_python_backend_utils")
    with_fast_strings(other)
    assert not hasattr(other, "serialize_byte_tensor")
    # As older ones do it: not bytes, but an array of one object.
    other.serialize_byte_tensor = lambda array: np.array([b"".join(array)], dtype=object)
    other.deserialize_bytes_tensor = lambda encoded: encoded
    before = dict(vars(other))
    with_fast_strings(other)
    assert dict(vars(other)) == before
