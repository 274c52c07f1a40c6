"""Spans of requests, where an exporter has been set up, as `opentelemetry-instrument` does.

Where none has, no span is made, and the caller's traceparent goes on to Triton as it came. Names
and attributes follow OpenTelemetry's conventions for HTTP.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any


@cache
def _tracer() -> Any:
    """Return what makes spans, None where nobody gets them."""
    if find_spec("opentelemetry") is None:
        return None
    from opentelemetry import trace

    # The API's own stand-in: FastAPI may bring the API, which alone exports nothing.
    if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return None
    return trace.get_tracer("twotower.gateway")


def request_span(
    name: str, parent: str | None, attributes: dict[str, str]
) -> AbstractContextManager[Any]:
    """Return the trace of a request, which opens as a span for `end_request`, or as None.

    Args:
        name: of the span.
        parent: the caller's traceparent.
        attributes: of the span.
    """
    if (tracer := _tracer()) is None:
        return nullcontext()
    from opentelemetry import propagate, trace

    context = propagate.extract({"traceparent": parent} if parent else {})
    return _started(tracer, name, context, trace.SpanKind.SERVER, attributes)


def end_request(
    current: Any, status: int, error: Exception | None, attributes: dict[str, Any]
) -> None:
    """Note how a request ended.

    Args:
        current: its span.
        status: of HTTP; 5xx is the gateway's error, 4xx the caller's.
        error: that nobody expected.
        attributes: further ones, without those that are None.
    """
    if current is None:
        return
    from opentelemetry import trace

    known = {name: value for name, value in attributes.items() if value is not None}
    current.set_attributes({"http.response.status_code": status} | known)
    if error is not None:
        current.record_exception(error)
    if status >= 500:
        current.set_status(trace.StatusCode.ERROR, str(error or ""))


def span(name: str, attributes: dict[str, str] | None = None) -> AbstractContextManager[Any]:
    """Return the trace of a part of a request, and of its exception; probes have no request.

    Args:
        name: of the span.
        attributes: of the span.
    """
    if (tracer := _tracer()) is None:
        return nullcontext()
    from opentelemetry import trace

    if not trace.get_current_span().get_span_context().is_valid:
        return nullcontext()
    return _started(tracer, name, None, trace.SpanKind.CLIENT, attributes)


def _started(tracer: Any, *options: Any) -> AbstractContextManager[Any]:
    started: AbstractContextManager[Any] = tracer.start_as_current_span(*options)
    return started


def trace_headers(traceparent: str | None) -> dict[str, str]:
    """Return what carries the trace on: the span under way, or the caller's own traceparent.

    Nothing does where the caller does not sample: tritonserver 2.51 would trace it all the same.
    """
    headers: dict[str, str] = {}
    if _tracer() is not None:
        from opentelemetry import propagate

        propagate.inject(headers)
    if not headers and traceparent:
        headers["traceparent"] = traceparent
    sampled = int(headers.get("traceparent", "00")[-2:], 16) & 1
    return headers if sampled else {}
