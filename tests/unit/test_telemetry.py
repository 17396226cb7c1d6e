"""Spans and metrics as an OpenTelemetry SDK sees them, and what travels without one."""

from __future__ import annotations

import contextvars
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

import pytest
from opentelemetry import context as otel_context
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from eventbus import Context, Envelope, Event, PublishError, Reject, Retry, Service, SetupError
from eventbus.envelope import encode
from eventbus.message import Message
from eventbus.spans import start_span_of
from eventbus.telemetry import fields, install_sdk
from eventbus.transport.base import NotPublished, Publication
from tests.rig import Rig


class Placed(Event, name="placed"):
    email: str = "MARKER"


class Captured(Event, name="captured"):
    email: str = "MARKER"


class Sdk:
    """An SDK that keeps what it is given."""

    def __init__(self, limits: SpanLimits) -> None:
        self.exporter = InMemorySpanExporter()
        self.reader = InMemoryMetricReader()
        self.traces = TracerProvider(span_limits=limits)
        self.traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.meters = MeterProvider([self.reader])

    def spans(self, name: str) -> list[ReadableSpan]:
        """In the order in which they began."""
        found = [span for span in self.exporter.get_finished_spans() if span.name == name]
        return sorted(found, key=lambda span: span.start_time or 0)

    def span(self, name: str) -> ReadableSpan:
        (span,) = self.spans(name)
        return span

    def points(self, metric: str) -> list[NumberDataPoint | HistogramDataPoint]:
        data = self.reader.get_metrics_data()
        assert data is not None
        return [
            point  # type: ignore[misc]  # exponential histograms are not ours
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for found in scope.metrics
            if found.name == metric
            for point in found.data.data_points
        ]

    def counts(self, metric: str) -> dict[tuple[object, object], int]:
        """How many were counted or measured, by destination and error."""
        counts: Counter[tuple[object, object]] = Counter()
        for point in self.points(metric):
            of = attributes(point)
            amount = point.count if isinstance(point, HistogramDataPoint) else int(point.value)
            counts[of["messaging.destination.name"], of.get("error.type")] += amount
        return dict(counts)


def attributes(of: ReadableSpan | NumberDataPoint | HistogramDataPoint) -> Mapping[str, object]:
    return of.attributes or {}


def id_of(span: ReadableSpan) -> int:
    return span.get_span_context().span_id  # type: ignore[union-attr]  # a finished span has one


def trace_of(span: ReadableSpan) -> int:
    return span.get_span_context().trace_id  # type: ignore[union-attr]  # as above


def parent_of(span: ReadableSpan) -> int | None:
    return span.parent.span_id if span.parent is not None else None


@pytest.fixture(params=[SpanLimits(), SpanLimits(max_span_attribute_length=10_000)], ids=["ours", "the SDK's"])
def sdk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sdk:
    """Installed for this test only: the API's own way is once for the process.

    Once its spans are started by us (eventbus/spans.py), once by the SDK.
    """
    sdk = Sdk(request.param)
    is_ours = start_span_of(sdk.traces.get_tracer("eventbus")) is not None
    assert is_ours is (request.param.max_span_attribute_length is None)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: sdk.traces)
    monkeypatch.setattr(trace, "get_tracer", sdk.traces.get_tracer)
    monkeypatch.setattr(metrics, "get_meter_provider", lambda: sdk.meters)
    monkeypatch.setattr(metrics, "get_meter", sdk.meters.get_meter)
    return sdk


def shop(*, fails: int = 0) -> Service:
    """`payments` handles `placed` at its attempt *fails* + 1, and publishes `captured`."""
    payments = Service("payments", retry=Retry(attempts=3, delay=timedelta(seconds=1)))

    @payments.on("placed")
    async def capture(event: Placed, context: Context) -> None:
        if context.attempt <= fails:
            raise ConnectionError(event.email)
        await context.publish(Captured())

    return payments


def mail() -> Service:
    made = Service("mail")

    @made.on("captured")
    async def tell(event: Captured) -> None: ...

    return made


SEND = "send events:placed.v1"
PROCESS = "process events:placed.v1:events.payments"
RETRY = "process events:placed.v1:events.payments.retry"
FOLLOW_UP = "send events:captured.v1"
TELL = "process events:captured.v1:events.mail"


async def test_one_order_is_one_trace_across_services(sdk: Sdk) -> None:
    async with Rig(shop(), mail()) as rig:
        await rig.publish(Placed())
        await rig.settled()

    send, process, follow_up, tell = (sdk.span(name) for name in (SEND, PROCESS, FOLLOW_UP, TELL))
    assert {trace_of(span) for span in (send, process, follow_up, tell)} == {trace_of(send)}
    assert parent_of(send) is None
    assert parent_of(process) == id_of(send)
    assert parent_of(follow_up) == id_of(process)
    assert parent_of(tell) == id_of(follow_up)
    assert [span.kind for span in (send, process)] == [trace.SpanKind.PRODUCER, trace.SpanKind.CONSUMER]


async def test_a_publish_inside_a_span_of_the_callers_is_its_child(sdk: Sdk) -> None:
    async with Rig(shop()) as rig:
        with sdk.traces.get_tracer("web").start_as_current_span("POST /orders") as request:
            await rig.publish(Placed())
        await rig.settled()

    assert parent_of(sdk.span(SEND)) == request.get_span_context().span_id


async def test_spans_carry_the_attributes_of_the_conventions_and_no_data(sdk: Sdk) -> None:
    async with Rig(shop(), mail()) as rig:
        sent = await rig.publish(Placed())
        await rig.settled()

    common = {"messaging.system": "rabbitmq", "server.address": "memory", "messaging.message.id": sent.id}
    assert attributes(sdk.span(SEND)) == {
        **common,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "events:placed.v1",
        "messaging.rabbitmq.destination.routing_key": "placed.v1",
        "messaging.message.body.size": len(sent.data),
    }
    assert attributes(sdk.span(PROCESS)) == {
        **common,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "events:placed.v1:events.payments",
        "messaging.rabbitmq.destination.routing_key": "placed.v1",
        "eventbus.handler": "capture",
        "eventbus.attempt": 1,
    }
    assert attributes(sdk.span(TELL))["messaging.message.conversation_id"] == sent.id
    assert "MARKER" not in "".join(span.to_json() for span in sdk.exporter.get_finished_spans())


async def test_each_attempt_is_a_span_and_later_ones_link_to_the_origin(sdk: Sdk) -> None:
    async with Rig(shop(fails=2)) as rig:
        await rig.publish(Placed())
        await rig.settled()

    send, first = sdk.span(SEND), sdk.span(PROCESS)
    retries = sdk.spans(RETRY)
    assert [attributes(span)["eventbus.attempt"] for span in (first, *retries)] == [1, 2, 3]
    assert first.links == ()
    assert [[link.context.span_id for link in span.links] for span in retries] == [[id_of(send)], [id_of(send)]]
    assert {trace_of(span) for span in (first, *retries)} == {trace_of(send)}


async def test_a_failed_attempt_is_an_error_without_its_text(sdk: Sdk) -> None:
    async with Rig(shop(fails=1)) as rig:
        await rig.publish(Placed())
        await rig.settled()

    failed, handled = sdk.span(PROCESS), sdk.span(RETRY)
    assert failed.status.status_code is trace.StatusCode.ERROR
    assert attributes(failed)["error.type"] == "ConnectionError"
    assert handled.status.status_code is trace.StatusCode.UNSET
    assert "error.type" not in attributes(handled)
    assert "MARKER" not in failed.to_json()


async def test_a_publish_that_is_not_confirmed_is_an_error(sdk: Sdk) -> None:
    def refuse(publication: Publication) -> bool:
        raise NotPublished("no", maybe_stored=False)

    async with Rig(shop()) as rig:
        rig.transport.fault = refuse
        with pytest.raises(PublishError):
            await rig.publish(Placed())
        rig.transport.fault = None

    assert sdk.span(SEND).status.status_code is trace.StatusCode.ERROR
    assert sdk.counts("messaging.client.sent.messages") == {("events:placed.v1", "PublishError"): 1}
    assert sdk.counts("messaging.client.operation.duration") == {("events:placed.v1", "PublishError"): 1}


async def test_the_hops_context_and_the_origins_travel_with_the_message(sdk: Sdk) -> None:
    async with Rig(shop()) as rig:
        await rig.publish(Placed())
        await rig.settled()
        first = rig.transport.published[0].message.headers

    context = sdk.span(SEND).get_span_context()
    assert context is not None
    assert str(first["traceparent"]).startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert first["cloudEvents_traceparent"] == first["traceparent"]


async def test_an_event_that_is_handed_on_keeps_its_origin(sdk: Sdk) -> None:
    origin = "00-11111111111111111111111111111111-2222222222222222-01"
    relay = Service("relay")

    @relay.on("foreign.v1")
    async def hand_on(envelope: Envelope, context: Context) -> None:
        await context.publish(Envelope(id="2", source="/y", type="other.v1", time=envelope.time,
                                       extensions=envelope.extensions))  # fmt: skip

    async with Rig(relay) as rig:
        foreign = Envelope(
            id="1", source="/x", type="foreign.v1", time=datetime.now(UTC), extensions={"traceparent": origin}
        )
        await rig.raw(encode(foreign), "foreign.v1")
        await rig.settled()
        (handed_on,) = rig.transport.published

    assert handed_on.message.headers["cloudEvents_traceparent"] == origin
    assert handed_on.message.headers["traceparent"] != origin


async def test_handlers_have_nothing_of_a_publisher_in_the_same_process_but_its_trace(sdk: Sdk) -> None:
    user = contextvars.ContextVar("user", default="nobody")
    seen: list[str] = []
    peeking = Service("peeking")

    @peeking.on("placed")
    async def peek(event: Placed) -> None:
        seen.append(user.get())

    async with Rig(peeking) as rig:
        user.set("ada")
        with sdk.traces.get_tracer("web").start_as_current_span("POST /orders"):
            await rig.raw(
                encode(Envelope(id="1", source="/x", type="placed.v1", time=datetime.now(UTC), data=b"{}")), "placed.v1"
            )
            await rig.settled()

    assert seen == ["nobody"]
    assert parent_of(sdk.span("process events:placed.v1:events.peeking")) is None


@pytest.mark.parametrize("foreign", ["garbage", 7, bytearray(b"\xff"), "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_trace_context_that_is_none_begins_a_trace_at_the_handler(sdk: Sdk, foreign: object) -> None:
    async with Rig(shop()) as rig:
        message = encode(Envelope(id="1", source="/x", type="placed.v1", time=datetime.now(UTC), data=b"{}"))
        await rig.raw(message.republished({"traceparent": foreign, "tracestate": foreign}), "placed.v1")
        await rig.settled()

    assert parent_of(sdk.span(PROCESS)) is None


async def test_the_four_metrics_count_what_was_sent_taken_and_handled(sdk: Sdk) -> None:
    async with Rig(shop(fails=1), mail()) as rig:
        await rig.publish(Placed(), id="1")
        await rig.settled()
        await rig.publish(Placed(), id="1")  # a duplicate: taken, not handled
        await rig.settled()

    sent = {("events:placed.v1", None): 2, ("events:captured.v1", None): 1}
    assert sdk.counts("messaging.client.sent.messages") == sent
    assert sdk.counts("messaging.client.operation.duration") == sent
    assert sdk.counts("messaging.client.consumed.messages") == {
        ("events:placed.v1:events.payments", None): 2,
        ("events:placed.v1:events.payments.retry", None): 1,
        ("events:captured.v1:events.mail", None): 1,
    }
    assert sdk.counts("messaging.process.duration") == {
        ("events:placed.v1:events.payments", "ConnectionError"): 1,
        ("events:placed.v1:events.payments.retry", None): 1,
        ("events:captured.v1:events.mail", None): 1,
    }
    for metric in ("messaging.client.operation.duration", "messaging.process.duration"):
        for point in sdk.points(metric):
            assert isinstance(point, HistogramDataPoint)
            assert point.explicit_bounds[:3] == (0.005, 0.01, 0.025)
            assert attributes(point)["messaging.system"] == "rabbitmq"


async def test_a_delivery_that_is_no_event_is_counted_whatever_its_key_is(sdk: Sdk) -> None:
    mails = mail()
    async with Rig(mails) as rig:
        for number in range(3):
            await rig.raw(Message({}, b"garbage"), f"captured.{number}")
        await rig.settled()
        assert len(rig.dead_letters(mails)) == 3

    assert sdk.counts("messaging.client.consumed.messages") == {("events:events.mail", "invalid-envelope"): 3}
    assert sdk.counts("messaging.process.duration") == {}


async def test_what_nobody_wants_is_counted(sdk: Sdk) -> None:
    async with Rig(mail()) as rig:
        await rig.publish(Placed())
        await rig.publish(Placed())

    assert sdk.counts("eventbus.unroutable") == {("events:placed.v1", None): 2}


async def test_a_dead_letter_belongs_to_its_trace_in_the_log_too(sdk: Sdk, caplog: pytest.LogCaptureFixture) -> None:
    refusing = Service("refusing")

    @refusing.on("placed")
    async def refuse(event: Placed) -> None:
        logging.getLogger("mine").warning("in the handler", extra=fields(None))
        raise Reject("no")

    async with Rig(refusing) as rig:
        await rig.publish(Placed())
        await rig.settled()
        rig.dead_letters(refusing)

    (mine,) = (record for record in caplog.records if record.name == "mine")
    assert mine.__dict__["trace_id"] == f"{trace_of(sdk.span(SEND)):032x}"
    (dead,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert dead.__dict__["trace_id"] == f"{trace_of(sdk.span(SEND)):032x}"


# ── without an SDK ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_an_sdk_nothing_is_written() -> None:
    async with Rig(shop()) as rig:
        await rig.publish(Placed())
        await rig.settled()

        for publication in rig.transport.published:
            assert not {"traceparent", "tracestate", "cloudEvents_traceparent"} & publication.message.headers.keys()


async def test_without_an_sdk_the_callers_trace_context_still_travels_to_the_follow_up() -> None:
    remote = trace.NonRecordingSpan(
        trace.SpanContext(0x1111, 0x2222, is_remote=True, trace_flags=trace.TraceFlags(trace.TraceFlags.SAMPLED))
    )
    async with Rig(shop()) as rig:
        token = otel_context.attach(trace.set_span_in_context(remote))
        try:
            await rig.publish(Placed())
        finally:
            otel_context.detach(token)
        await rig.settled()

        assert [p.message.headers["traceparent"] for p in rig.transport.published] == [
            f"00-{0x1111:032x}-{0x2222:016x}-01"
        ] * 2


# ── the SDK that `eventbus run` starts ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(autouse=True)
def no_otel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_SDK_DISABLED", "OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SDK_DISABLED": "TRUE", "OTEL_TRACES_EXPORTER": "console"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"},
    ],
)
def test_no_sdk_is_started_that_was_not_asked_for(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert install_sdk("shop") is False


@pytest.mark.parametrize("variable", ["OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER"])
def test_an_exporter_that_there_is_not_is_a_mistake(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "zipkin")

    with pytest.raises(SetupError, match=f"{variable}='zipkin' is not known: use otlp, console or none"):
        install_sdk("shop")


def test_an_sdk_that_is_asked_for_and_not_installed_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    with pytest.raises(SetupError, match=r"is not installed: pip install 'eventbus\[otel\]'"):
        install_sdk("shop")


PROGRAM = """
import asyncio
from eventbus import Bus, Event
from eventbus.telemetry import install_sdk

class Placed(Event, name="placed"):
    pass

async def main():
    async with Bus("memory://") as bus:
        await bus.publish(Placed())

print(install_sdk("shop"))
asyncio.run(main())
"""


def test_the_console_exporter_shows_what_was_sent() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={"OTEL_TRACES_EXPORTER": "console", "OTEL_METRICS_EXPORTER": "console"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert done.stdout.startswith("True\n")
    assert '"name": "send events:placed.v1"' in done.stdout
    assert '"service.name": "shop"' in done.stdout
    assert '"name": "messaging.client.sent.messages"' in done.stdout
