"""Spans that are started for less are those that the SDK would have started, whatever is done with them."""

from __future__ import annotations

import itertools
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk import trace as sdk
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import sampling
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.util import types

from eventbus import telemetry
from eventbus.spans import start_span_of
from eventbus.telemetry import Attributes, StartSpan

PLACED: Attributes = {"messaging.system": "rabbitmq", "messaging.message.id": "1", "eventbus.attempt": 1}
OTHER = trace.SpanContext(7, 8, is_remote=True, trace_flags=trace.TraceFlags(1))


class Counting(IdGenerator):
    """The same ids for whoever asks in the same order."""

    def __init__(self, *, is_random: bool = False) -> None:
        self._numbers = itertools.count(1)
        self._is_random = is_random

    def generate_span_id(self) -> int:
        return next(self._numbers)

    def generate_trace_id(self) -> int:
        return next(self._numbers) << 64

    def is_trace_id_random(self) -> bool:
        return self._is_random


class Seen(sdk.SpanProcessor):
    """What a processor is told, in its order."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def on_start(self, span: sdk.Span, parent_context: otel_context.Context | None = None) -> None:
        self.told.append(("start", shown(span), parent_context))

    def _on_ending(self, span: sdk.Span) -> None:
        self.told.append(("ending", shown(span)))

    def on_end(self, span: sdk.ReadableSpan) -> None:
        dropped = span.dropped_attributes, span.dropped_events, span.dropped_links
        self.told.append(("end", shown(span), dropped, span.resource, span.instrumentation_scope))


def shown(span: sdk.ReadableSpan) -> dict[str, Any]:
    """All that there is to see of a span, but for its times."""
    found: dict[str, Any] = json.loads(span.to_json())
    for name in ("start_time", "end_time"):
        found[name] = found[name] is not None
    for event in found["events"]:
        del event["timestamp"]
        if "exception.stacktrace" in event["attributes"]:
            event["attributes"]["exception.stacktrace"] = event["attributes"]["exception.stacktrace"].splitlines()[-1]
    return found


class Picky(sampling.Sampler):
    """Decides by what it is given, and says more of it."""

    def __init__(self, decision: sampling.Decision) -> None:
        self._decision = decision

    def should_sample(
        self,
        parent_context: otel_context.Context | None,
        trace_id: int,
        name: str,
        kind: trace.SpanKind | None = None,
        attributes: types.Attributes = None,
        links: Sequence[trace.Link] | None = None,
        trace_state: trace.TraceState | None = None,
    ) -> sampling.SamplingResult:
        more = {**(attributes or {}), "links": len(links or ()), "asked": f"{parent_context} {trace_id} {name} {kind}"}
        return sampling.SamplingResult(self._decision, more, trace.TraceState([("picky", "1")]))

    def get_description(self) -> str:
        return "picky"


def by_the_sdk(tracer: trace.Tracer) -> StartSpan:
    def start_span(name: str, kind: trace.SpanKind, attributes: Attributes, links: Sequence[trace.Link]) -> trace.Span:
        return tracer.start_span(name, kind=kind, attributes=attributes, links=links)

    return start_span


def by_us(tracer: trace.Tracer) -> StartSpan:
    start_span = start_span_of(tracer)
    assert start_span is not None, "it is the SDK's way that would be tested"
    return start_span


@contextmanager
def inside(parent: trace.SpanContext | None) -> Iterator[None]:
    token = otel_context.attach(
        otel_context.Context() if parent is None else trace.set_span_in_context(trace.NonRecordingSpan(parent))
    )
    try:
        yield
    finally:
        otel_context.detach(token)


def told(
    way: Callable[[trace.Tracer], StartSpan],
    work: Callable[[trace.Span], object] = lambda span: None,
    *,
    parent: trace.SpanContext | None = None,
    links: Sequence[trace.Link] = (),
    ids: Callable[[], IdGenerator] = Counting,
    **options: Any,
) -> list[object]:
    """What a processor is told of a span that is started on this *way*, and what its context is."""
    seen = Seen()
    provider = sdk.TracerProvider(
        id_generator=ids(), resource=Resource({"service.name": "shop"}), shutdown_on_exit=False, **options
    )
    provider.add_span_processor(seen)
    start_span = way(provider.get_tracer("eventbus", "1"))
    with inside(parent):
        span = start_span("process events:placed.v1", trace.SpanKind.CONSUMER, PLACED.copy(), links)
    assert span.is_recording() is isinstance(span, sdk.Span)
    work(span)
    span.end()
    assert span.is_recording() is False
    return [*seen.told, span.get_span_context()]


@pytest.mark.parametrize(
    "parent",
    [
        None,
        OTHER,
        trace.SpanContext(7, 8, is_remote=False, trace_flags=trace.TraceFlags(0)),
        trace.SpanContext(7, 8, is_remote=True, trace_flags=trace.TraceFlags(2)),
        trace.SpanContext(
            7, 8, is_remote=True, trace_flags=trace.TraceFlags(3), trace_state=trace.TraceState([("a", "b")])
        ),
        trace.INVALID_SPAN_CONTEXT,
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "sampler",
    [
        sampling.ALWAYS_ON,
        sampling.ALWAYS_OFF,
        sampling.DEFAULT_ON,
        sampling.ParentBased(sampling.TraceIdRatioBased(0.5)),
        *(Picky(decision) for decision in sampling.Decision),
    ],
    ids=lambda sampler: sampler.get_description(),
)
@pytest.mark.parametrize("is_random", [True, False])
def test_whatever_the_sampler_and_the_parent_it_is_the_same_span(
    parent: trace.SpanContext | None, sampler: sampling.Sampler, is_random: bool
) -> None:
    def both(way: Callable[[trace.Tracer], StartSpan]) -> list[object]:
        return told(way, parent=parent, sampler=sampler, ids=lambda: Counting(is_random=is_random))

    assert both(by_us) == both(by_the_sdk)


def attributes(span: trace.Span) -> None:
    span.set_attribute("mine", "x")
    span.set_attributes({"messaging.system": "else", "list": ["a", "b"], "": "no name", "is": None})


def many_attributes(span: trace.Span) -> None:
    for number in range(200):
        span.set_attribute(f"a{number}", number)


def events(span: trace.Span) -> None:
    span.add_event("one", {"a": 1})
    span.add_event("two")
    span.record_exception(ConnectionError("gone"), {"more": "b"})


def many_events(span: trace.Span) -> None:
    for number in range(200):
        span.add_event(str(number))


def add_links(span: trace.Span) -> None:
    span.add_link(OTHER, {"a": 1})
    span.add_link(OTHER)
    span.add_link(trace.INVALID_SPAN_CONTEXT)


def status(span: trace.Span) -> None:
    span.set_status(trace.Status(trace.StatusCode.ERROR, "why"))
    span.set_status(trace.StatusCode.OK)
    span.set_status(trace.StatusCode.ERROR, "too late")


def failing_block(span: trace.Span) -> None:
    with pytest.raises(ZeroDivisionError), trace.use_span(span, end_on_exit=True):
        raise ZeroDivisionError


def own_block(span: trace.Span) -> None:
    with pytest.raises(ZeroDivisionError), span:
        raise ZeroDivisionError


def after_its_end(span: trace.Span) -> None:
    span.end(end_time=5)
    for late in (attributes, events, add_links, status):
        late(span)
    span.update_name("late")


@pytest.mark.parametrize("links", [(), (trace.Link(OTHER, {"why": "origin"}), trace.Link(trace.INVALID_SPAN_CONTEXT))])
@pytest.mark.parametrize(
    "work",
    [
        attributes, many_attributes, events, many_events, add_links, status, failing_block, own_block, after_its_end,
        lambda span: span.update_name("else"),
    ],
)  # fmt: skip
def test_whatever_a_handler_does_with_it_it_is_the_same_span(
    work: Callable[[trace.Span], object], links: Sequence[trace.Link], caplog: pytest.LogCaptureFixture
) -> None:
    ours = told(by_us, work, links=links)
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()

    assert ours == told(by_the_sdk, work, links=links)
    assert said == [record.getMessage() for record in caplog.records]


def test_it_has_the_times_that_it_is_given_and_those_of_its_beginning_and_end() -> None:
    span = by_us(sdk.TracerProvider(shutdown_on_exit=False).get_tracer("x"))("x", trace.SpanKind.CLIENT, {}, ())
    assert isinstance(span, sdk.Span)
    assert span.start_time is not None
    span.end()
    assert span.end_time is not None
    assert 0 <= span.end_time - span.start_time < 60e9
    span.end(end_time=5)  # it has ended
    assert span.end_time != 5


def test_first_events_from_many_threads_are_all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread is held up where another one could take its list for the first one."""
    start_span = by_us(sdk.TracerProvider(shutdown_on_exit=False).get_tracer("x"))
    span = start_span("x", trace.SpanKind.CLIENT, {}, ())
    assert isinstance(span, sdk.Span)
    for name in ("_new_events", "_new_links", "_checked"):
        make = getattr(span, name)

        def slowly(*arguments: Any, make: Callable[..., Any] = make) -> Any:
            made = make(*arguments)
            time.sleep(0.01)
            return made

        monkeypatch.setattr(span, name, slowly)
    with ThreadPoolExecutor(8) as threads:
        done = [
            threads.submit(work, *arguments)
            for number in range(8)
            for work, arguments in (
                (span.add_event, (str(number),)),
                (span.add_link, (OTHER,)),
                (span.set_attribute, (str(number), number)),
            )
        ]
    for one in done:
        one.result()

    assert (len(span.events), len(span.links), len(span.attributes or {})) == (8, 8, 8)


def test_to_read_one_without_events_waits_for_no_lock_of_all_spans() -> None:
    """A fork while an exporter reads would leave that locked for ever."""
    start_span = by_us(sdk.TracerProvider(shutdown_on_exit=False).get_tracer("x"))
    span = start_span("x", trace.SpanKind.CLIENT, {}, ())
    assert isinstance(span, sdk.Span)
    reading = threading.Thread(target=shown, args=(span,), daemon=True)
    with span._events._lock:  # type: ignore[attr-defined]  # a BoundedList of the SDK's, and the links' too
        reading.start()
        reading.join(10)
        assert not reading.is_alive()


def test_one_span_has_nothing_of_another() -> None:
    start_span = by_us(sdk.TracerProvider(shutdown_on_exit=False).get_tracer("x"))
    first, second = (start_span("x", trace.SpanKind.CLIENT, PLACED.copy(), ()) for _ in range(2))
    assert isinstance(first, sdk.Span)
    assert isinstance(second, sdk.Span)
    before = shown(second)
    for work in (attributes, events, add_links, status):
        work(first)

    assert shown(second) == before


def test_a_tracer_that_is_switched_off_starts_none() -> None:
    provider = sdk.TracerProvider(shutdown_on_exit=False, _tracer_configurator=sdk._disable_tracer_configurator)
    with inside(OTHER):
        span = by_us(provider.get_tracer("x"))("x", trace.SpanKind.CLIENT, {}, ())

    assert not span.is_recording()
    assert span.get_span_context() == OTHER


def test_the_sdks_own_measures_count_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")

    def measured(way: Callable[[trace.Tracer], StartSpan]) -> list[tuple[str, object]]:
        reader = InMemoryMetricReader()
        told(way, meter_provider=MeterProvider([reader]))
        data = reader.get_metrics_data()
        assert data is not None
        return [
            (metric.name, [(point.value, point.attributes) for point in metric.data.data_points])  # type: ignore[union-attr]
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        ]

    assert measured(by_us)
    assert measured(by_us) == measured(by_the_sdk)


# ── what is left to the SDK ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "limits", [sdk.SpanLimits(max_span_attributes=4), sdk.SpanLimits(max_span_attribute_length=100)], ids=repr
)
def test_attributes_that_have_to_be_cut_are_the_sdks(limits: sdk.SpanLimits) -> None:
    assert start_span_of(sdk.TracerProvider(shutdown_on_exit=False, span_limits=limits).get_tracer("x")) is None


def test_without_a_limit_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = sdk.SpanLimits(max_span_attributes=sdk.SpanLimits.UNSET)

    assert told(by_us, many_attributes, span_limits=limits) == told(by_the_sdk, many_attributes, span_limits=limits)


def test_a_tracer_of_anybody_elses_starts_its_own() -> None:
    class Mine(sdk.Tracer):
        pass

    tracer = sdk.TracerProvider(shutdown_on_exit=False).get_tracer("x")
    tracer.__class__ = Mine

    assert start_span_of(tracer) is None
    assert start_span_of(trace.NoOpTracer()) is None


def one_more_field(monkeypatch: pytest.MonkeyPatch) -> None:
    start = sdk.Span.start

    def and_more(self: sdk.Span, *arguments: Any, **options: Any) -> None:
        if type(self).__module__ == sdk.__name__:
            self._more = 1  # type: ignore[attr-defined]
        start(self, *arguments, **options)

    monkeypatch.setattr(sdk.Span, "start", and_more)


def one_more_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdk.SpanProcessor, "on_more", lambda self: None, raising=False)


def one_hook_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sdk.SpanProcessor, "_on_ending")


def no_longer_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eventbus.spans", None)


@pytest.mark.parametrize("change", [one_more_field, one_more_hook, one_hook_less, no_longer_there])
def test_an_sdk_that_has_changed_starts_all_of_them(
    change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = sdk.TracerProvider(shutdown_on_exit=False).get_tracer("x")
    change(monkeypatch)

    with caplog.at_level(logging.INFO):
        span = telemetry._start_span_of(tracer)("x", trace.SpanKind.CLIENT, {"a": 1}, ())
    assert type(span).__module__ == sdk.__name__
    assert span.is_recording()
    assert "each costs twice as much" in caplog.text
