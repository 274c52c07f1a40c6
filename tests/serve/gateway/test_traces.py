"""Traces of requests, as a collector gets them over OTLP."""

import base64
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from twotower.serve.supervisor import running_server

from ..conftest import FREE
from .conftest import Gateway, wait_until

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SERVER, CLIENT = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT


def traced(number: int, flags: str = "01") -> dict[str, str]:
    """Return the headers of a caller whose trace has a number of its own."""
    return {"traceparent": f"00-{TRACE[:-4]}{number:04x}-{CALLER}-{flags}"}


def read_json(body: bytes) -> ExportTraceServiceRequest:
    """Read what Triton sends: OTLP's JSON has ids in hex, protobuf's in base64."""
    text = re.sub(
        r'("(?:traceId|spanId|parentSpanId)":")([0-9a-f]+)"',
        lambda found: f'{found[1]}{base64.b64encode(bytes.fromhex(found[2])).decode()}"',
        body.decode(),
    )
    return json_format.Parse(text, ExportTraceServiceRequest())


class Collector:
    """Receives spans over OTLP/HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                is_json = self.headers["Content-Type"] == "application/json"
                sent = read_json(body) if is_json else ExportTraceServiceRequest.FromString(body)
                for resource in sent.resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = os.environ | {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.url,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf", "OTEL_SERVICE_NAME": "gateway",
            "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }  # fmt: skip

    def trace(self, number: int) -> dict[str, Span]:
        """Return the spans of a trace by name, once that of the request has come, its last."""
        wanted = bytes.fromhex(f"{TRACE[:-4]}{number:04x}")

        def own() -> list[Span]:
            return [s for s in self.spans if s.trace_id == wanted]

        wait_until(lambda: any(s.kind == SERVER for s in own()), "no trace")
        found = own()
        assert len({s.name for s in found}) == len(found)
        return {s.name: s for s in found}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


INSTRUMENT = (str(Path(sys.executable).with_name("opentelemetry-instrument")), "--")


@pytest.fixture
def gateway(start, relay, redis, collector) -> Gateway:
    """A gateway whose users are in Redis and whose spans go to the collector."""
    return start(
        relay.address, f"--gateway.store={redis.url}", "--gateway.store_timeout_ms=1000",
        under=INSTRUMENT, env=collector.environment,
    )  # fmt: skip


def attributes(span: Span) -> dict[str, object]:
    values = {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}
    return {k: v for k, v in values.items() if k != "twotower.request_id"}


def test_a_request_is_one_trace_down_to_triton(gateway, relay, redis, collector) -> None:
    assert gateway.post("/v1/recommend", {"user": 7}, headers=traced(1)).json()["version"] == 1
    spans = collector.trace(1)
    assert set(spans) == {"POST /v1/recommend", "store", "model", "triton"}
    request = spans["POST /v1/recommend"]
    assert (request.parent_span_id.hex(), request.kind) == (CALLER, SERVER)
    for name, parent in (("store", request), ("model", request), ("triton", spans["model"])):
        assert spans[name].parent_span_id == parent.span_id, name
        assert spans[name].kind == CLIENT
        assert spans[name].status.code == Status.STATUS_CODE_UNSET
        assert parent.start_time_unix_nano <= spans[name].start_time_unix_nano
        assert spans[name].end_time_unix_nano <= parent.end_time_unix_nano
    assert attributes(request) == {
        "http.request.method": "POST", "url.path": "/v1/recommend", "twotower.version": 1,
        "http.response.status_code": 200,
    }  # fmt: skip
    assert attributes(spans["triton"]) == {"server.address": relay.address}
    own = spans["triton"].span_id.hex()
    assert relay.metadata["traceparent"] == f"00-{TRACE[:-4]}0001-{own}-01"

    # What fails is an error of the span that it failed in, and says how it was answered.
    relay.delay_s = 1.5
    body = {"user": 7, "timeout_ms": 400}
    answer = gateway.post("/v1/recommend", body, headers=traced(2)).json()
    relay.delay_s = 0.0
    spans = collector.trace(2)
    assert answer["reason"] == attributes(spans["POST /v1/recommend"])["twotower.fallback"]
    assert spans["POST /v1/recommend"].status.code == Status.STATUS_CODE_UNSET
    assert spans["model"].status.code == Status.STATUS_CODE_ERROR
    assert [event.name for event in spans["model"].events] == ["exception"]
    assert spans["store"].status.code == Status.STATUS_CODE_UNSET

    refused = gateway.post("/v1/recommend", {"k": 0}, headers=traced(3))
    (span,) = collector.trace(3).values()
    assert attributes(span)["http.response.status_code"] == refused.status_code == 422
    assert span.status.code == Status.STATUS_CODE_UNSET, "the caller's error"
    assert gateway.client.post(f"/{'x' * 50}", headers=traced(4)).status_code == 404
    assert list(collector.trace(4)) == ["POST other"], "any path would be a name of its own"

    redis.stop()
    event = {"user": 7, "events": [{"item": "item-000001"}]}
    assert gateway.post("/v1/events", event, headers=traced(5)).status_code == 503
    spans = collector.trace(5)
    assert {s.status.code for s in spans.values()} == {Status.STATUS_CODE_ERROR}
    assert gateway.post("/v1/recommend", {"user": 7}, headers=traced(6)).json()["reason"] == "store"
    spans = collector.trace(6)
    assert set(spans) == {"POST /v1/recommend", "store"}
    assert [event.name for event in spans["store"].events] == ["exception"]
    redis.start()

    # Neither probes nor what the caller does not sample; all that is left comes at the end.
    gateway.client.get("/healthz", headers=traced(7))
    gateway.post("/v1/recommend", {"user": 7}, headers=traced(8, flags="00"))
    assert "traceparent" not in relay.metadata, "Triton would trace it"
    gateway.post("/v1/recommend", {"user": 7}, headers=traced(9))
    assert gateway.stop() == 0
    numbers = {int(s.trace_id.hex()[-4:], 16) for s in collector.spans}
    assert numbers == {1, 2, 3, 4, 5, 6, 9}
    assert "Traceback" not in gateway.log.read_text()


def test_tritons_own_spans_are_of_the_same_trace(
    start, collector, loaded_run, tmp_path_factory
) -> None:
    config = replace(FREE, trace_url=f"{collector.url}/v1/traces")
    with running_server(loaded_run.bundle, config, tmp_path_factory.mktemp("traced")) as server:
        gateway = start(server, under=INSTRUMENT, env=collector.environment)
        sampled = range(20, 32)
        for number in sampled:
            gateway.post("/v1/recommend", {"user": 7}, headers=traced(number))
        gateway.post("/v1/recommend", {"user": 7}, headers=traced(32, flags="00"))
        assert gateway.stop() == 0
    # Both have sent what they had. Tritonserver 2.51 loses a request in 30 or so.
    own = {"InferRequest", "recommend", "compute"}
    traces = [collector.trace(number) for number in sampled]
    whole = [spans for spans in traces if own <= set(spans)]
    assert len(whole) >= 6
    for spans in whole:
        assert set(spans) == {"POST /v1/recommend", "store", "model", "triton", *own}
        for name, parent in (("InferRequest", "triton"), ("recommend", "InferRequest"),
                             ("compute", "recommend")):  # fmt: skip
            assert spans[name].parent_span_id == spans[parent].span_id
    asked = {s.trace_id.hex() for s in collector.spans if s.name == "InferRequest"}
    assert asked <= {traced(n)["traceparent"][3:35] for n in sampled}, (
        "neither probes nor what the caller does not sample"
    )


def test_where_nobody_gets_spans_none_are_made(start, relay, collector) -> None:
    before = len(collector.spans)
    gateway = start(relay.address, env=collector.environment)
    sent = traced(10)
    assert gateway.post("/v1/recommend", {"user": 7}, headers=sent).json()["version"] == 1
    # As it came: a span of ours would be the parent.
    assert relay.metadata["traceparent"] == sent["traceparent"]
    broken = {"traceparent": f"00-{TRACE}-broken"}
    assert gateway.post("/v1/recommend", {"user": 7}, headers=broken).status_code == 200
    assert "traceparent" not in relay.metadata
    assert gateway.stop() == 0
    assert len(collector.spans) == before


UNUSED = """
import sys
import twotower.serve.gateway.run
from twotower.serve.gateway.tracing import request_span, trace_headers
with request_span("request", "00-" + "1" * 32 + "-" + "2" * 16 + "-01", {}) as current:
    assert current is None
    assert trace_headers(None) == {}
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
"""


def test_where_nobody_gets_spans_the_sdk_is_not_loaded() -> None:
    subprocess.run([sys.executable, "-c", UNUSED], check=True, timeout=60)
