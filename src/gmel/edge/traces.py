"""Spans of tasks for OpenTelemetry: where the time of each one went, across gateway and servers.

Off unless asked for: then every call below is a method that does nothing. On, each process sends its spans to a
collector over OTLP/HTTP in the background; a collector that is away costs spans and nothing else. The context goes from
process to process as the W3C header `traceparent`.

The provider is our own, not the one of the whole process, so that nothing else begins to send because this does.
"""

import os
import time
from collections.abc import Mapping
from contextvars import ContextVar
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from gmel import __version__
from gmel.scenario.errors import InputError

__all__ = ["CONTEXT", "NOTHING", "OFF", "OtelTraces", "Span", "Traces", "server_spans", "traces_of"]

CONTEXT: ContextVar[str] = ContextVar("traceparent", default="")
"""Header of the attempt that is being sent; empty for none. Engines hand it over."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

Value = str | int | float | bool


class Span(Protocol):
    """Something that takes time."""

    @property
    def header(self) -> str:
        """Its `traceparent`; empty where nobody looks."""
        ...

    def end(self, error: str | None = None, **attributes: Value) -> None:
        """It is over; with an error where it did not do what it should."""
        ...


class Traces(Protocol):
    """Where spans begin."""

    def begin(self, name: str, parent: "Span | str | None" = None, **attributes: Value) -> Span:
        """A span that begins now.

        Args:
            name: what it is.
            parent: what it is part of: a span of ours, or the header of one elsewhere; what is no header is nothing.
            attributes: facts; those of tasks begin with `gmel.` there.
        """
        ...

    def past(self, name: str, parent: str, began_s: float, ended_s: float, **attributes: Value) -> None:
        """A span that is over, from and to so many seconds since 1970; nothing where `parent` is no header."""
        ...

    def close(self) -> None:
        """Sends what is waiting, and ends. Blocks some seconds at most."""
        ...


class _Nothing:
    """A span that nobody looks at."""

    header = ""

    def end(self, error: str | None = None, **attributes: Value) -> None: ...


NOTHING: Span = _Nothing()


class _Off:
    def begin(self, name: str, parent: "Span | str | None" = None, **attributes: Value) -> Span:
        return NOTHING

    def past(self, name: str, parent: str, began_s: float, ended_s: float, **attributes: Value) -> None: ...

    def close(self) -> None: ...


OFF: Traces = _Off()


class OtelTraces:
    """Spans of a tracer provider of the OpenTelemetry SDK.

    Args:
        provider: an `opentelemetry.sdk.trace.TracerProvider`.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("gmel", __version__)
        self._api: Any = import_module("opentelemetry.trace")
        propagation: Any = import_module("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()

    def begin(self, name: str, parent: "Span | str | None" = None, **attributes: Value) -> Span:
        """As :meth:`Traces.begin`."""
        header = parent if isinstance(parent, str) else "" if parent is None else parent.header
        span = self._tracer.start_span(name, context=self._context(header), attributes=_named(attributes))
        return _OtelSpan(span, self._api, self._propagator)

    def past(self, name: str, parent: str, began_s: float, ended_s: float, **attributes: Value) -> None:
        """As :meth:`Traces.past`."""
        context = self._context(parent)
        if not self._api.get_current_span(context).get_span_context().is_valid:
            return
        span = self._tracer.start_span(
            name, context=context, attributes=_named(attributes), start_time=round(began_s * 1e9)
        )
        span.end(round(max(ended_s, began_s) * 1e9))

    def close(self) -> None:
        """As :meth:`Traces.close`."""
        self._provider.shutdown()

    def _context(self, header: str) -> Any:
        # An empty context, not the current one: a span is part of what its caller says and of nothing else.
        empty: Any = import_module("opentelemetry.context").Context()
        return self._propagator.extract({"traceparent": header}, empty) if header else empty


class _OtelSpan:
    def __init__(self, span: Any, api: Any, propagator: Any) -> None:
        self._span, self._api, self._propagator = span, api, propagator

    @property
    def header(self) -> str:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, self._api.set_span_in_context(self._span))
        return carrier.get("traceparent", "")

    def end(self, error: str | None = None, **attributes: Value) -> None:
        self._span.set_attributes(_named(attributes))
        if error is not None:
            self._span.set_status(self._api.Status(self._api.StatusCode.ERROR, error[:200]))
        self._span.end()


def _named(attributes: Mapping[str, Value]) -> dict[str, Value]:
    return {f"gmel.{key}": value for key, value in attributes.items()}


def server_spans(
    traces: Traces, header: str, queued: float, began: float, ready: float, ended: float, **attributes: Value
) -> None:
    """The spans of a task at a server: `queue`, `load`, `run`.

    Args:
        traces: where they go.
        header: of the attempt that brought it; empty for none.
        queued: when it came, of the monotonic clock, as are the others.
        began: when a GPU took it; 0 where none did.
        ready: when its model was in memory.
        ended: when it was over.
        attributes: of the last one that there is.
    """
    if not header or traces is OFF:
        return
    shift_s = time.time() - time.monotonic()
    times = [("queue", queued, began or ended), ("load", began, ready), ("run", ready, ended)]
    there = times[: 1 if not began else 3]
    for place, (name, start, end) in enumerate(there):
        if name != "load" or end > start:
            facts = attributes if place == len(there) - 1 else {}
            traces.past(name, header, start + shift_s, end + shift_s, **facts)


def traces_of(service: str, asked: bool) -> Traces:
    """Spans of this process: where the environment names a collector, or where they are asked for.

    Args:
        service: name of this process there, unless `OTEL_SERVICE_NAME` gives one.
        asked: on the command line; then the extra has to be there, and without an address the usual one of this
            machine is taken.

    Raises:
        InputError: asked for, but the extra is not installed.
    """
    named = any(os.environ.get(name) for name in _ENDPOINTS)
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not (asked or named):
        return OFF
    exporter_module = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    if not _is_there("opentelemetry.sdk.trace") or not _is_there(exporter_module):
        if not asked:
            return OFF
        raise InputError(
            "--traces: needs the extra 'otel': pip install 'gmel[otel]', or uv sync --extra edge --extra otel"
        )
    sdk: Any = import_module("opentelemetry.sdk.trace")
    export: Any = import_module("opentelemetry.sdk.trace.export")
    resources: Any = import_module("opentelemetry.sdk.resources")
    facts = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    provider = sdk.TracerProvider(resource=resources.Resource.create(facts))
    provider.add_span_processor(export.BatchSpanProcessor(import_module(exporter_module).OTLPSpanExporter()))
    return OtelTraces(provider)


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is not installed
        return False
