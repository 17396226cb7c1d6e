"""Spans of the OpenTelemetry SDK, started at half the price.

`Tracer.start_span` copies and checks every attribute it is given and makes two lists, each with a lock, for events and
links that hardly any span has: with tracing on, that is more work than all the rest of handling an event
(PERFORMANCE.md). Here the attributes are taken as they are, for they are ours, and a list is made when something is
put into it. All else is the SDK's own: sampler, ids, limits, processors, and every method of a span.

A tracer that is not the SDK's starts its own, as does an SDK whose spans hold anything else than those that this was
written for, and one whose limits have attributes cut. An SDK that does something else with the same fields is not found
out here, but by the tests.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import time_ns
from typing import TYPE_CHECKING, Any, Final

from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk import trace as sdk
from opentelemetry.sdk.trace import sampling
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util import BoundedList
from opentelemetry.util import types

if TYPE_CHECKING:
    from eventbus.telemetry import Attributes, StartSpan

log = logging.getLogger("eventbus")

MOST_ATTRIBUTES: Final = 16  # of a span of ours when it starts; a handler may add others
_UNSET: Final = trace.Status(trace.StatusCode.UNSET)
_FLAGS: Final = tuple(trace.TraceFlags(flags) for flags in range(4))
_SAMPLED, _RANDOM = 1, 2  # W3C Trace Context level 2, 3.2.2.5
_HOOKS: Final = {"on_start", "_on_ending", "on_end", "shutdown", "force_flush"}  # of a processor


class _Nothing(BoundedList[Any]):
    """The events and the links of every span that has none. Read without its lock, which a fork may leave locked."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


_NOTHING: Final = _Nothing(0)


def start_span_of(tracer: trace.Tracer) -> StartSpan | None:
    """What starts spans of *tracer*; None where the SDK has to do it all.

    It takes name, kind, attributes (strings and whole numbers only; the span keeps the dict) and links, and starts a
    child of the current span, as `Tracer.start_span` does.
    """
    if type(tracer) is not sdk.Tracer:
        return None
    limits = tracer._span_limits
    most = limits.max_span_attributes
    if limits.max_span_attribute_length is not None or (most is not None and most < MOST_ATTRIBUTES):
        return None  # attributes have to be cut
    return _start_span_of(tracer) if _is_known(tracer) else None


def _is_known(tracer: sdk.Tracer) -> bool:
    """Whether the SDK's spans hold what ours hold, neither more nor less, and are started with what it has."""
    nowhere = sdk.SynchronousMultiSpanProcessor()  # type: ignore[no-untyped-call]
    trial = sdk.Tracer(
        sampling.ALWAYS_ON, tracer.resource, nowhere, RandomIdGenerator(), tracer.instrumentation_info,
        tracer._span_limits, tracer._instrumentation_scope, meter_provider=NoOpMeterProvider(),
    )  # fmt: skip
    theirs = trial.start_span("trial", attributes={"a": 1})
    ours = _start_span_of(trial)("trial", trace.SpanKind.INTERNAL, {"a": 1}, ())
    return (
        {name for name in vars(sdk.SpanProcessor) if not name.startswith("__")} == _HOOKS
        and isinstance(theirs, sdk.Span)
        and isinstance(ours, _Span)
        and vars(theirs).keys() == vars(ours).keys()
        and theirs.attributes == ours.attributes
    )


def _start_span_of(tracer: sdk.Tracer) -> StartSpan:
    def start_span(name: str, kind: trace.SpanKind, attributes: Attributes, links: Sequence[trace.Link]) -> trace.Span:
        # Step by step as `Tracer.start_span`: tests/unit/test_spans.py holds it to that.
        parent: trace.SpanContext | None = trace.get_current_span().get_span_context()
        if not tracer._is_enabled():
            return trace.NonRecordingSpan(parent or trace.INVALID_SPAN_CONTEXT)
        ids = tracer.id_generator
        if parent is None or not parent.is_valid:
            parent, trace_id, is_random = None, ids.generate_trace_id(), ids.is_trace_id_random()
        else:
            trace_id, is_random = parent.trace_id, parent.trace_flags.random_trace_id
        sampled = tracer.sampler.should_sample(None, trace_id, name, kind, attributes, links)
        decision = sampled.decision
        is_sampled = decision.is_sampled()  # type: ignore[no-untyped-call]
        flags = (_SAMPLED if is_sampled else 0) | (_RANDOM if is_random else 0)
        context = trace.SpanContext(trace_id, ids.generate_span_id(), False, _FLAGS[flags], sampled.trace_state)
        ended = tracer._tracer_metrics.start_span(parent, decision)
        if not decision.is_recording():  # type: ignore[no-untyped-call]
            return trace.NonRecordingSpan(context)
        span = _Span(tracer, name, context, parent, kind, attributes, sampled.attributes, links, ended)
        span.start()
        return span

    return start_span


class _Span(sdk._Span):
    """One of the SDK's, whose fields are filled in for less."""

    def __init__(
        self,
        tracer: sdk.Tracer,
        name: str,
        context: trace.SpanContext,
        parent: trace.SpanContext | None,
        kind: trace.SpanKind,
        attributes: Attributes,
        sampled: types.Attributes,
        links: Sequence[trace.Link],
        ended: Callable[[], None],
    ) -> None:
        limits = tracer._span_limits
        self._name = name
        self._context = context
        self._kind = kind
        self._parent = parent
        self._start_time = self._end_time = None
        self._resource = tracer.resource
        self._instrumentation_info = tracer.instrumentation_info
        self._instrumentation_scope = tracer._instrumentation_scope
        self._status = _UNSET
        self._sampler = tracer.sampler
        self._trace_config = None
        self._record_exception = self._set_status_on_exception = True
        self._span_processor = tracer.span_processor
        self._limits = limits
        self._lock = threading.Lock()
        self._record_end_metrics = ended
        # A sampler's own are as good as anybody's.
        self._attributes = attributes if sampled == attributes else self._checked(sampled)
        self._events = _NOTHING
        self._links = self._new_links(links) if links else _NOTHING

    def _checked(self, attributes: types.Attributes) -> BoundedAttributes:
        limits = self._limits
        return BoundedAttributes(limits.max_span_attributes, attributes, False, limits.max_span_attribute_length)

    def _open(self) -> None:
        """From now on anybody may write to the attributes."""
        with self._lock:
            if not isinstance(self._attributes, BoundedAttributes):
                self._attributes = self._checked(self._attributes)

    def set_attribute(self, key: str, value: types.AnyValue) -> None:
        self._open()
        super().set_attribute(key, value)

    def set_attributes(self, attributes: Mapping[str, types.AnyValue]) -> None:
        self._open()
        super().set_attributes(attributes)

    def end(self, end_time: int | None = None) -> None:
        """As the SDK's, but what is handed on is the span, not a copy: nobody can write to one that has ended."""
        with self._lock:
            if self._end_time is not None:
                log.warning("Calling end() on an ended span.")
                return
            self._end_time = time_ns() if end_time is None else end_time
        if self._record_end_metrics is not None:
            self._record_end_metrics()
        self._span_processor._on_ending(self)
        self._span_processor.on_end(self)

    def _add_event(self, event: sdk.EventBase) -> None:
        with self._lock:
            if self._events is _NOTHING:
                self._events = self._new_events()  # type: ignore[no-untyped-call]
        super()._add_event(event)

    def _add_link(self, link: trace.Link) -> None:
        with self._lock:
            if self._links is _NOTHING:
                self._links = self._new_links(())
        super()._add_link(link)
