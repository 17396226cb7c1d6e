"""Spans, metrics and log fields: what the outside may know. Never an event's data.

Follows OpenTelemetry's messaging conventions (semantic conventions 1.44: `send` and `process` spans, four metrics). A
message carries two trace contexts: the hop's in the plain headers `traceparent`/`tracestate`, and the one it was first
published in as CloudEvents attributes. A `process` span is the child of the hop's `send` span, so that one order is one
trace; attempts after the first also link to the origin. Only the API is used here, the SDK's own spans are spans.py's:
without an SDK nothing is recorded, and the caller's trace context still travels.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import Token
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from eventbus.envelope import Envelope
from eventbus.errors import SetupError
from eventbus.topology import Names
from eventbus.transport.base import Broker

log = logging.getLogger("eventbus")

# The conventions' own boundaries, in seconds.
_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
INVALID_ENVELOPE = "invalid-envelope"  # as dead letters call it
_MOST_KNOWN = 10_000
_ORIGIN_PREFIX = "cloudEvents_"
_propagator = TraceContextTextMapPropagator()
# W3C Trace Context 3.2: version 00, trace id, parent id, flags.
_PLAIN_TRACEPARENT = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})").fullmatch
_FLAGS = {f"{flags:02x}": trace.TraceFlags(flags) for flags in range(256)}
_ROOT = otel_context.Context()

Attributes = dict[str, str | int]
StartSpan = Callable[[str, trace.SpanKind, Attributes, Sequence[trace.Link]], trace.Span]
Joined = Token[otel_context.Context]  # what tells how to leave a trace
T = TypeVar("T")


def fields(envelope: Envelope | None, **more: object) -> dict[str, object]:
    """Log fields of one event (`logger.info(..., extra=fields(...))`): never its data."""
    known: dict[str, object] = {}
    if envelope is not None:
        known = {"event_id": envelope.id, "event_type": envelope.type, "event_source": envelope.source}
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        known["trace_id"] = trace.format_trace_id(span.trace_id)
    return known | {name: value for name, value in more.items() if value is not None}


class _Sending:
    """One publish as it is measured. A class, not a generator: this runs for every event."""

    __slots__ = ("_attributes", "_began_s", "_span", "_telemetry")

    def __init__(self, telemetry: Telemetry, span: trace.Span | None, attributes: Attributes) -> None:
        self._telemetry, self._span, self._attributes = telemetry, span, attributes

    def __enter__(self) -> None:
        self._began_s = time.perf_counter()

    def __exit__(self, t: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._span is not None:
            if error is not None:
                _record_error(self._span, error)
            self._span.end()
        self._telemetry.sent(time.perf_counter() - self._began_s, self._attributes, error)


_UNMEASURED = nullcontext()


class Processing:
    """One attempt as it is measured; `error_type` is set by whoever learns that it failed."""

    __slots__ = ("_attributes", "_began_s", "_span", "_telemetry", "_token", "error_type")

    def __init__(self, telemetry: Telemetry, span: trace.Span | None, attributes: Attributes) -> None:
        self._telemetry, self._span, self._attributes = telemetry, span, attributes
        self.error_type: str | None = None

    def __enter__(self) -> Self:
        if self._span is not None:  # where nothing is traced the caller's stays the current one
            self._token = otel_context.attach(trace.set_span_in_context(self._span))
        self._began_s = time.perf_counter()
        return self

    def __exit__(self, t: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        took_s = time.perf_counter() - self._began_s
        if self._span is not None:
            otel_context.detach(self._token)
            if isinstance(error, Exception):
                _record_error(self._span, error)
            elif self.error_type is not None:
                self._span.set_status(trace.Status(trace.StatusCode.ERROR, self.error_type))
                self._span.set_attribute("error.type", self.error_type)
            self._span.end()
        self._telemetry.processed(took_s, self._attributes, self.error_type)


def _record_error(span: trace.Span, error: BaseException) -> None:
    span.record_exception(error)
    span.set_status(trace.Status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}"))


class _Operation(NamedTuple):
    """What is said of one operation on one destination: the same every time, and dear to put together.

    Nobody may change it.
    """

    span: str  # the name of its spans
    measured: Attributes  # of its points in metrics
    spanned: Attributes  # of its spans, but for what is of the one event


class Telemetry:
    """Records what one process sends and handles. Install an SDK before creating it."""

    def __init__(self, broker: Broker, names: Names) -> None:
        self._names = names
        self._common: Attributes = {"messaging.system": "rabbitmq", "server.address": broker.host}
        if broker.port is not None:
            self._common["server.port"] = broker.port
        self._traces = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        # Otherwise whatever is measured goes nowhere, and measuring costs as much as publishing.
        self._measures = not _is_of_the_api(metrics.get_meter_provider())
        self.is_recording = self._traces or self._measures
        self._known: dict[tuple[str, str, str, str], _Operation] = {}
        self._start_span = _start_span_of(trace.get_tracer("eventbus"))
        meter = metrics.get_meter("eventbus")
        self._send_duration = meter.create_histogram(
            "messaging.client.operation.duration", "s", "How long a publish took until it was confirmed",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )  # fmt: skip
        self._process_duration = meter.create_histogram(
            "messaging.process.duration", "s", "How long one attempt of a handler took",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )  # fmt: skip
        self._sent = meter.create_counter("messaging.client.sent.messages", "{message}", "Messages published")
        self._consumed = meter.create_counter("messaging.client.consumed.messages", "{message}", "Deliveries taken")
        self._outbox_rows = meter.create_gauge("eventbus.outbox.rows", "{row}", "Rows that wait to be published")
        self._outbox_age = meter.create_gauge("eventbus.outbox.age", "s", "For how long the oldest of them has waited")
        self._outbox_set_aside = meter.create_gauge(
            "eventbus.outbox.set_aside", "{row}", "Rows that can never be published, and wait to be mended"
        )
        self._unroutable = meter.create_counter("eventbus.unroutable", "{message}", "Published, but no queue took it")

    def send(self, envelope: Envelope, headers: dict[str, object]) -> AbstractContextManager[None]:
        """Measure one publish, and write its trace context into *headers*."""
        if not self.is_recording:
            inject(headers)
            return _UNMEASURED
        operation = self._operation("send", envelope.type)
        span = self._send_span(envelope, operation) if self._traces else None
        write_context((span or trace.get_current_span()).get_span_context(), headers)
        return _Sending(self, span, operation.measured)

    def sent(self, took_s: float, attributes: Attributes, error: BaseException | None) -> None:
        """Count one publish."""
        if self._measures:
            measured = attributes if error is None else attributes | {"error.type": type(error).__name__}
            self._send_duration.record(took_s, measured)
            self._sent.add(1, measured)

    def _send_span(self, envelope: Envelope, operation: _Operation) -> trace.Span:
        """A child of the current span. It does not become that: nobody's code runs inside."""
        attributes = operation.spanned.copy()
        attributes["messaging.message.id"] = envelope.id
        attributes["messaging.message.body.size"] = len(envelope.data)
        return self._start_span(operation.span, trace.SpanKind.PRODUCER, attributes, ())

    def join(self, headers: Mapping[str, object]) -> Joined | None:
        """Let the running task belong to the trace that the message came with, its log lines included, until it leaves.

        None if it came with none.
        """
        if "traceparent" not in headers:
            return None
        parent = _extract(headers, "")
        return None if parent is None else otel_context.attach(parent)

    def leave(self, joined: Joined) -> None:
        """Belong to no trace any more, or to the one before."""
        otel_context.detach(joined)

    def process(
        self, envelope: Envelope, headers: Mapping[str, object], *, queue: str, handler: str, attempt: int
    ) -> Processing:
        """Measure one attempt of one handler: enter what this returns."""
        operation = self._operation("process", envelope.type, queue, handler)
        span = self._process_span(envelope, headers, operation, attempt) if self._traces else None
        return Processing(self, span, operation.measured)

    def processed(self, took_s: float, attributes: Attributes, error_type: str | None) -> None:
        """Count one attempt."""
        if self._measures:
            measured = attributes if error_type is None else attributes | {"error.type": error_type}
            self._process_duration.record(took_s, measured)

    def _process_span(
        self, envelope: Envelope, headers: Mapping[str, object], operation: _Operation, attempt: int
    ) -> trace.Span:
        attributes = operation.spanned.copy()
        attributes["messaging.message.id"] = envelope.id
        attributes["eventbus.attempt"] = attempt
        if (correlation := envelope.extensions.get("correlationid")) is not None:
            attributes["messaging.message.conversation_id"] = str(correlation)
        links: tuple[trace.Link, ...] = ()
        if attempt > 1 and (origin := _extract(headers, _ORIGIN_PREFIX)) is not None:
            links = (trace.Link(trace.get_current_span(origin).get_span_context()),)
        return self._start_span(operation.span, trace.SpanKind.CONSUMER, attributes, links)

    def consumed(self, type_: str | None, queue: str) -> None:
        """Count one delivery; *type_* is None where it is no event."""
        if not self._measures:
            return
        if type_ is None:
            # Without its key, which may be anything at all: each would be a time series of its own, for ever.
            attributes = self._operation("process", "", queue).measured | {"error.type": INVALID_ENVELOPE}
        else:
            attributes = self._operation("process", type_, queue).measured
        self._consumed.add(1, attributes)

    def unroutable(self, type_: str) -> None:
        """Count one event that no queue took."""
        self._unroutable.add(1, {"messaging.destination.name": f"{self._names.events}:{type_}"})

    def outbox(self, rows: int, oldest: timedelta, set_aside: int) -> None:
        """Say how far the outbox's relays are behind."""
        self._outbox_rows.set(rows)
        self._outbox_age.set(oldest.total_seconds())
        self._outbox_set_aside.set(set_aside)

    def _operation(self, name: str, type_: str, queue: str = "", handler: str = "") -> _Operation:
        of = (name, type_, queue, handler)
        known = self._known.get(of)
        if known is None:
            destination = ":".join(part for part in (self._names.events, type_, queue) if part)
            measured = self._common | {"messaging.operation.name": name, "messaging.destination.name": destination}
            spanned = measured | {"messaging.operation.type": name, "messaging.rabbitmq.destination.routing_key": type_}
            if handler:
                spanned["eventbus.handler"] = handler
            known = _Operation(f"{name} {destination}", measured, spanned)
            if len(self._known) < _MOST_KNOWN:  # foreign senders may use any number of types
                self._known[of] = known
        return known


def _start_span_of(tracer: trace.Tracer) -> StartSpan:
    """What starts a span: it takes name, kind, attributes and links."""
    if type(tracer).__module__ == "opentelemetry.sdk.trace":
        with suppress(ImportError, AttributeError, TypeError):  # an SDK that is not as it was
            from eventbus.spans import start_span_of  # needs the SDK, which is an extra

            if (quick := start_span_of(tracer)) is not None:
                return quick
        log.info("the OpenTelemetry SDK starts our spans, for its limits or for what it is: each costs twice as much")

    def start_span(name: str, kind: trace.SpanKind, attributes: Attributes, links: Sequence[trace.Link]) -> trace.Span:
        return tracer.start_span(name, kind=kind, attributes=attributes, links=links)

    return start_span


def _is_of_the_api(provider: metrics.MeterProvider) -> bool:
    """Whether *provider* is the API's own, which records nothing."""
    return type(provider).__module__.startswith("opentelemetry.metrics")


def inject(headers: dict[str, object]) -> None:
    """The current trace context: the hop's, and the origin's where the message has none yet."""
    if otel_context.get_current():  # there is nothing in it where nobody traces, and that is asked for each event
        write_context(trace.get_current_span().get_span_context(), headers)


def write_context(context: trace.SpanContext, headers: dict[str, object]) -> None:
    """*context* as W3C Trace Context has it (section 3.2): the hop's, and the origin's where there is none yet."""
    if not context.is_valid:
        return
    carrier = {"traceparent": f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"}
    if context.trace_state:
        carrier["tracestate"] = context.trace_state.to_header()
    headers.update(carrier)
    if _ORIGIN_PREFIX + "traceparent" not in headers:
        for name, value in carrier.items():
            headers[_ORIGIN_PREFIX + name] = value


@contextmanager
def within(carrier: Mapping[str, object]) -> Iterator[None]:
    """Belong to the trace that *carrier* names, if it does, until the block is left."""
    parent = _extract(carrier, "")
    if parent is None:
        yield
        return
    token = otel_context.attach(parent)
    try:
        yield
    finally:
        otel_context.detach(token)


def _extract(headers: Mapping[str, object], prefix: str) -> otel_context.Context | None:
    traceparent = headers.get(f"{prefix}traceparent")
    if not isinstance(traceparent, str):
        return None
    tracestate = headers.get(f"{prefix}tracestate")
    # What nearly all messages carry is read here, in a third of the time; whatever else there is by the API.
    if tracestate is None and (match := _PLAIN_TRACEPARENT(traceparent)):
        trace_id, span_id, flags = match.groups()
        span = trace.SpanContext(int(trace_id, 16), int(span_id, 16), True, _FLAGS[flags])
        return trace.set_span_in_context(trace.NonRecordingSpan(span), _ROOT) if span.is_valid else _ROOT
    carrier = {"traceparent": traceparent}
    if isinstance(tracestate, str):
        carrier["tracestate"] = tracestate
    return _propagator.extract(carrier)


def install_sdk(service_name: str) -> bool:
    """Start the OpenTelemetry SDK as the OTEL_* variables say; return whether anything will be exported.

    Honours OTEL_SDK_DISABLED, OTEL_TRACES_EXPORTER and OTEL_METRICS_EXPORTER (otlp, console, none; otlp where an
    OTEL_EXPORTER_OTLP_* endpoint is set), and whatever the SDK reads by itself (OTEL_SERVICE_NAME, samplers, headers).

    Raises:
        SetupError: an exporter is asked for that is not there.
    """
    endpoint = any(name.startswith("OTEL_EXPORTER_OTLP") and name.endswith("ENDPOINT") for name in os.environ)
    default = "otlp" if endpoint else "none"
    traces = os.environ.get("OTEL_TRACES_EXPORTER", default)
    measures = os.environ.get("OTEL_METRICS_EXPORTER", default)
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or {traces, measures} == {"none"}:
        return False
    try:
        _install(traces, measures, service_name)
    except ImportError as error:
        raise SetupError(
            f"OTEL_* variables ask for telemetry, but {error.name} is not installed: pip install 'eventbus[otel]'"
        ) from error
    return True


def _install(traces: str, measures: str, service_name: str) -> None:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": service_name}
    resource = Resource.create(named)
    if traces != "none":
        spans = _one_of(traces, "OTEL_TRACES_EXPORTER", {"otlp": OTLPSpanExporter, "console": ConsoleSpanExporter})
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(BatchSpanProcessor(spans()))
        trace.set_tracer_provider(provider)
    if measures != "none":
        points = _one_of(
            measures, "OTEL_METRICS_EXPORTER", {"otlp": OTLPMetricExporter, "console": ConsoleMetricExporter}
        )
        metrics.set_meter_provider(MeterProvider([PeriodicExportingMetricReader(points())], resource=resource))


def _one_of(name: str, variable: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise SetupError(f"{variable}={name!r} is not known: use {', '.join(known)} or none")
    return known[name]
