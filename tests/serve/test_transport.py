"""The messages that the clients make and read, beside those of Triton's own client."""

import numpy as np
import pytest
import tritonclient.grpc as grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as messages

from twotower.serve.transport import GrpcTransport

ENTRIES = {
    "BYTES": st.binary(max_size=20) | st.sampled_from([b"", b"a\0", "é".encode()]),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "FP32": st.floats(width=32, allow_nan=False),
}  # fmt: skip
DTYPE = {"BYTES": object, "INT64": np.int64, "FP32": np.float32}


@st.composite
def tensors(draw) -> dict[str, tuple[str, np.ndarray]]:
    """Tensors of one row, as requests and answers have them."""
    drawn = {}
    for name in draw(st.lists(st.sampled_from("abcde"), unique=True)):
        kind = draw(st.sampled_from(sorted(ENTRIES)))
        values = draw(st.lists(ENTRIES[kind], min_size=1, max_size=30))
        drawn[name] = (kind, np.array([values], dtype=DTYPE[kind]))
    return drawn


@pytest.fixture(scope="module")
def transport():
    made = GrpcTransport("127.0.0.1:9", asynchronous=False, proxy=False, tls=None)
    yield made
    made.close()


@settings(deadline=None)
@given(tensors(), st.lists(st.sampled_from(["scores", "version"]), unique=True))
def test_a_request_is_the_one_that_tritons_client_makes(transport, asked, outputs) -> None:
    expected = messages.ModelInferRequest(model_name="m")
    for name, (kind, value) in asked.items():
        tensor = grpc.InferInput(name, list(value.shape), kind)
        tensor.set_data_from_numpy(value)
        expected.inputs.append(tensor._get_tensor())
        expected.raw_input_contents.append(tensor._get_content())
    expected.outputs.extend(grpc.InferRequestedOutput(n)._get_tensor() for n in outputs)
    made = transport.prepare("m", asked, outputs)
    assert messages.ModelInferRequest.FromString(made) == expected


@settings(deadline=None)
@given(tensors())
def test_an_answer_is_read_as_tritons_client_reads_it(transport, answered) -> None:
    answer = messages.ModelInferResponse()
    for name, (kind, value) in answered.items():
        answer.outputs.add(name=name, datatype=kind, shape=value.shape)
        tensor = grpc.InferInput(name, list(value.shape), kind)
        tensor.set_data_from_numpy(value)
        answer.raw_output_contents.append(tensor._get_content())
    own, found = grpc.InferResult(answer), transport.read(answer)
    assert list(found) == list(answered)
    for name, values in found.items():
        assert values == own.as_numpy(name)[0].tolist()
