"""Whatever tensors come, the server answers or refuses them, and their neighbours are right."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

from .conftest import raw_inputs, stubs_of

NAMES = ["history", "history_times", "country", "age", "device", "k", "exclude", "allow", "filter"]
TYPE = {
    "history": "BYTES", "history_times": "INT64", "country": "BYTES", "age": "FP32",
    "device": "BYTES", "k": "INT32", "exclude": "BYTES", "allow": "BYTES", "filter": "BYTES",
}  # fmt: skip
ENTRY = {
    "INT64": st.integers(-(2**63), 2**63 - 1), "INT32": st.integers(-(2**31), 2**31 - 1),
    "FP32": st.floats(width=32),
    "BYTES": st.binary(max_size=20)
    | st.sampled_from([b"item-000001", b"c1", b'{"genre": "x"}', b"{}", b"[", b'{"a": {}}']),
}  # fmt: skip
DTYPE = {"INT64": np.int64, "INT32": np.int32, "FP32": np.float32, "BYTES": object}


@st.composite
def tensors(draw) -> dict[str, tuple[str, np.ndarray]]:
    """Tensors of a request, most of them of the right type and the same number of rows."""
    rows = draw(st.integers(1, 3))
    chosen = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=5)):
        kind = draw(st.sampled_from([TYPE[name]] * 9 + sorted(ENTRY)))
        own = draw(st.sampled_from([rows] * 9 + [1, 2]))
        columns = draw(st.sampled_from([1, 1, 1, 2, 50, 51]))
        flat = draw(st.lists(ENTRY[kind], min_size=1, max_size=4))
        array = np.empty((own, columns), DTYPE[kind])
        array.reshape(-1)[:] = (flat * (own * columns))[: own * columns]
        chosen[name] = (kind, array)
    return chosen


@pytest.fixture(scope="module")
def asker(server):
    with ThreadPoolExecutor(4) as pool, grpc.InferenceServerClient(server.grpc_url) as client:
        good = client.infer("recommend", raw_inputs()).as_numpy("item_ids").tolist()
        yield pool, client, good, [s.pid for s in stubs_of(server.process.pid)]


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_any_tensors_are_answered_or_refused_and_neighbours_are_right(server, asker, odd) -> None:
    pool, client, good, stubs = asker

    def ask(inputs) -> list:
        found = client.infer("recommend", inputs, client_timeout=10)
        return found.as_numpy("item_ids").tolist()

    neighbours = [pool.submit(ask, raw_inputs()) for _ in range(2)]
    asked = pool.submit(ask, raw_inputs(**odd))
    neighbours.append(pool.submit(ask, raw_inputs()))
    rows = max([len(array) for _, array in odd.values()], default=1)
    try:
        outcome = str(len(asked.result()))
    except InferenceServerException as error:
        outcome = str(error.status())
    assert outcome in (str(rows), "StatusCode.INVALID_ARGUMENT")
    for neighbour in neighbours:
        assert neighbour.result() == good
    assert [s.pid for s in stubs_of(server.process.pid)] == stubs
