"""Publishing: confirmed, or an error that says what to do; refused before anything is sent."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from eventbus import (
    Bus,
    Envelope,
    EnvelopeError,
    Event,
    PartlyPublished,
    PublishError,
    PublishTimeout,
    Service,
    SetupError,
    Unroutable,
    Worker,
)
from eventbus.delay import LONGEST
from eventbus.transport.base import NotPublished, Publication, Unpublishable
from eventbus.transport.memory import MAX_MESSAGE_BYTES, MemoryTransport
from tests.rig import FaultyTransport, until

URL = "memory://test-bus"


class Placed(Event, name="placed"):
    order_id: int


class Document(Event):
    text: str


class Strange(Event):
    thing: Any


@pytest.fixture
def transport(monkeypatch: pytest.MonkeyPatch) -> FaultyTransport:
    """What the bus publishes with."""
    transport = FaultyTransport(MemoryTransport(URL))
    monkeypatch.setattr("eventbus.bus.from_url", lambda url, **_: transport)
    return transport


@pytest.fixture
async def bus(transport: FaultyTransport) -> AsyncIterator[Bus]:
    async with Bus(URL, source="/shop") as bus:
        yield bus


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVENTBUS_URL", "EVENTBUS_SOURCE", "EVENTBUS_NAMESPACE"):
        monkeypatch.delenv(name, raising=False)


def fail(error: NotPublished, *, of: Callable[[Publication], bool] = lambda _: True) -> Callable[[Publication], bool]:
    def fault(publication: Publication) -> bool:
        if of(publication):
            raise error
        return False

    return fault


# ── one event ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_becomes_an_envelope_with_a_fresh_id_from_the_buss_source(
    bus: Bus, transport: FaultyTransport
) -> None:
    first, second = await bus.publish(Placed(order_id=1), subject="ada"), await bus.publish(Placed(order_id=1))

    assert (first.type, first.source, first.subject) == ("placed.v1", "/shop", "ada")
    assert first.event(Placed) == Placed(order_id=1)
    assert UUID(first.id).version == 4
    assert first.id != second.id
    assert [(p.exchange, p.key) for p in transport.published] == [("events", "placed.v1")] * 2


async def test_an_id_and_extensions_are_those_given(bus: Bus) -> None:
    envelope = await bus.publish(Placed(order_id=1), id="order-placed-1", extensions={"tenant": "eu"})

    assert (envelope.id, envelope.extensions) == ("order-placed-1", {"tenant": "eu"})


async def test_an_envelope_that_is_published_again_is_the_same_event(bus: Bus, transport: FaultyTransport) -> None:
    sent = await bus.publish(Placed(order_id=1))

    again = await bus.publish(sent)

    assert again == sent
    first, second = (p.message.headers["cloudEvents_id"] for p in transport.published)
    assert first == second


async def test_an_envelope_can_be_given_another_id_on_purpose(bus: Bus) -> None:
    sent = await bus.publish(Placed(order_id=1), extensions={"a": 1})

    other = await bus.publish(sent, id="new", subject="s", extensions={"b": 2})

    assert (other.id, other.subject, other.extensions) == ("new", "s", {"a": 1, "b": 2})


async def test_the_source_is_the_programs_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/my shop.py"])
    async with Bus(URL) as bus:
        assert (await bus.publish(Placed(order_id=1))).source == "/programs/my%20shop"

    monkeypatch.setenv("EVENTBUS_SOURCE", "/from/environment")
    async with Bus(URL) as bus:
        assert (await bus.publish(Placed(order_id=1))).source == "/from/environment"


async def test_the_namespace_is_in_front_of_the_exchange(transport: FaultyTransport) -> None:
    async with Bus(URL, namespace="staging") as bus:
        await bus.publish(Placed(order_id=1))

    assert [p.exchange for p in transport.published] == ["staging"]


# ── delays ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("delay", "exchange"),
    [
        (timedelta(0), "events.delay.v1.end"),
        (timedelta(milliseconds=1), "events.delay.v1.00"),
        (timedelta(seconds=1), "events.delay.v1.02"),
        (LONGEST, "events.delay.v1.23"),
    ],
)
async def test_a_delayed_event_enters_the_delay_tree(
    bus: Bus, transport: FaultyTransport, delay: timedelta, exchange: str
) -> None:
    await bus.publish(Placed(order_id=1), delay=delay)

    (publication,) = transport.published
    assert publication.exchange == exchange
    assert publication.key.endswith(".publish.placed.v1")


@pytest.mark.parametrize("delay", [timedelta(microseconds=-1), LONGEST + timedelta(microseconds=1)])
async def test_a_delay_out_of_bounds_is_a_value_error_and_nothing_is_sent(
    bus: Bus, transport: FaultyTransport, delay: timedelta
) -> None:
    with pytest.raises(ValueError, match="a delay of"):
        await bus.publish(Placed(order_id=1), delay=delay)

    assert transport.published == []


async def test_a_delayed_event_is_handled_when_it_is_due() -> None:
    handled = asyncio.Event()
    service = Service("shop")

    @service.on("placed")
    async def handle(event: Placed) -> None:
        handled.set()

    async with Worker(service, url=URL), Bus(URL) as bus:
        began = asyncio.get_running_loop().time()
        await bus.publish(Placed(order_id=1), delay=timedelta(milliseconds=250))
        await until(handled.is_set)
        assert asyncio.get_running_loop().time() - began >= 0.25


# ── no subscriber ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_event_that_nobody_wants_is_logged_once_per_type(bus: Bus, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3):
        await bus.publish(Placed(order_id=number))
    await bus.publish(Document(text="MARKER"))

    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "nobody subscribes to placed.v1: it was stored nowhere",
        "nobody subscribes to document.v1: it was stored nowhere",
    ]
    assert "MARKER" not in repr([vars(record) for record in caplog.records])


async def test_an_event_that_must_have_a_subscriber_is_unroutable_without_one(bus: Bus) -> None:
    with pytest.raises(Unroutable, match=r"no queue is bound for placed.v1: start its subscriber") as raised:
        await bus.publish(Placed(order_id=1), id="1", require_subscriber=True)

    assert raised.value.envelope.id == "1"
    assert raised.value.maybe_stored is False


async def test_an_event_that_has_its_subscriber_is_not_unroutable() -> None:
    service = Service("shop")

    @service.on("placed")
    async def handle(event: Placed) -> None: ...

    async with Worker(service, url=URL), Bus(URL) as bus:
        await bus.publish(Placed(order_id=1), require_subscriber=True)


async def test_whether_a_delayed_event_has_a_subscriber_cannot_be_asked(bus: Bus) -> None:
    with pytest.raises(ValueError, match="cannot be known"):
        await bus.publish(Placed(order_id=1), delay=timedelta(1), require_subscriber=True)


# ── what is not confirmed ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("maybe_stored", [True, False])
async def test_an_event_that_is_not_confirmed_can_be_published_again(
    bus: Bus, transport: FaultyTransport, maybe_stored: bool
) -> None:
    transport.fault = fail(NotPublished("the broker said no", maybe_stored=maybe_stored))

    with pytest.raises(PublishError, match="publish the same envelope again") as raised:
        await bus.publish(Placed(order_id=1), id="mine")
    assert type(raised.value) is PublishError
    assert raised.value.maybe_stored is maybe_stored
    assert ("may have been stored" in str(raised.value)) is maybe_stored

    transport.fault = None
    assert (await bus.publish(raised.value.envelope)).id == "mine"


async def test_the_end_of_the_publish_timeout_is_an_error_of_its_own(bus: Bus, transport: FaultyTransport) -> None:
    transport.fault = fail(NotPublished("no answer", maybe_stored=True, timed_out=True))

    with pytest.raises(PublishTimeout):
        await bus.publish(Placed(order_id=1))


async def test_the_publish_timeout_is_the_buss(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    class Asked(FaultyTransport):
        async def publish(self, publication: Publication, *, timeout_s: float) -> bool:
            asked.append(timeout_s)
            return True

    monkeypatch.setattr("eventbus.bus.from_url", lambda url, **_: Asked(MemoryTransport(URL)))
    async with Bus(URL, publish_timeout=timedelta(seconds=1.5)) as bus:
        await bus.publish(Placed(order_id=1))

    assert asked == [1.5]
    with pytest.raises(SetupError, match="publish_timeout=0:00:00 must be longer than zero"):
        Bus(URL, publish_timeout=timedelta(0))


# ── what can never be sent ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("event", "problem"),
    [
        (Document(text="x" * MAX_MESSAGE_BYTES), "and the broker takes 16777216: keep large things elsewhere"),
        (Strange(thing=object()), "Strange (strange.v1) does not serialise"),
        (Strange(thing=Decimal("nan")), None),
        ({"order_id": 1}, "dict is neither an Event nor an Envelope"),
    ],
)
async def test_what_can_never_be_sent_is_refused_before(
    bus: Bus, transport: FaultyTransport, event: Any, problem: str | None
) -> None:
    if problem is None:  # a Decimal is written as a string: fine
        await bus.publish(event)
        return
    with pytest.raises(EnvelopeError) as raised:
        await bus.publish(event)

    assert problem in str(raised.value)
    assert transport.published == []


@pytest.mark.parametrize("id", ["", "a\x00b"])
async def test_an_id_that_is_none_is_refused(bus: Bus, transport: FaultyTransport, id: str) -> None:
    with pytest.raises(EnvelopeError, match="'id'"):
        await bus.publish(Placed(order_id=1), id=id)

    assert transport.published == []


async def test_a_type_that_is_too_long_for_a_routing_key_is_refused(bus: Bus, transport: FaultyTransport) -> None:
    sent = await bus.publish(Placed(order_id=1))
    foreign = Envelope(id="1", source="/x", type="t" * 200, time=sent.time)

    with pytest.raises(EnvelopeError, match="too long for a routing key: at most 199 bytes"):
        await bus.publish(foreign)
    await bus.publish(Envelope(id="1", source="/x", type="t" * 199, time=sent.time), delay=timedelta(1))


async def test_what_the_transport_finds_out_late_is_an_envelope_error_too(bus: Bus, transport: FaultyTransport) -> None:
    transport.fault = fail(Unpublishable("its headers have 200 KiB"))

    with pytest.raises(EnvelopeError, match=r"placed.v1 1 cannot be published: its headers have 200 KiB"):
        await bus.publish(Placed(order_id=1), id="1")


# ── many ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_many_events_are_published_and_returned_in_order(bus: Bus, transport: FaultyTransport) -> None:
    envelopes = await bus.publish_many(Placed(order_id=number) for number in range(2500))

    assert [envelope.event(Placed).order_id for envelope in envelopes] == list(range(2500))
    assert len(transport.published) == 2500
    assert await bus.publish_many([]) == []


async def test_what_was_not_confirmed_of_many_is_told_with_what_was(bus: Bus, transport: FaultyTransport) -> None:
    def is_odd(publication: Publication) -> bool:
        return publication.message.body.endswith((b"1}", b"3}", b"5}"))

    transport.fault = fail(NotPublished("no", maybe_stored=False), of=is_odd)

    with pytest.raises(PartlyPublished, match=r"3 of 7 events were not confirmed; the first: placed.v1") as raised:
        await bus.publish_many([Placed(order_id=number) for number in range(7)])

    assert [e.event(Placed).order_id for e in raised.value.published] == [0, 2, 4, 6]
    assert [f.envelope.event(Placed).order_id for f in raised.value.failed] == [1, 3, 5]
    transport.fault = None
    again = await bus.publish_many([failure.envelope for failure in raised.value.failed])
    assert [e.id for e in again] == [f.envelope.id for f in raised.value.failed]


@pytest.mark.parametrize("bad", [Document(text="x" * MAX_MESSAGE_BYTES), Strange(thing=object())])
async def test_one_of_many_that_can_never_be_sent_is_found_before_anything_is(
    bus: Bus, transport: FaultyTransport, bad: Event
) -> None:
    with pytest.raises(EnvelopeError):
        await bus.publish_many([Placed(order_id=1), bad])

    assert transport.published == []


async def test_one_of_many_that_the_transport_refuses_late_does_not_stop_the_others(
    bus: Bus, transport: FaultyTransport
) -> None:
    transport.fault = fail(Unpublishable("too large"), of=lambda p: p.message.body == b'{"order_id":1}')

    with pytest.raises(PartlyPublished) as raised:
        await bus.publish_many([Placed(order_id=number) for number in range(3)])

    assert len(raised.value.published) == 2
    (failure,) = raised.value.failed
    assert failure.maybe_stored is False


# ── connecting ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("many", [False, True])
async def test_a_bus_that_is_not_entered_says_so(many: bool) -> None:
    left = Bus(URL, source="/x")
    async with left:
        pass

    for bus in (Bus(URL), left):
        with pytest.raises(SetupError, match="the bus is not connected: use it inside `async with Bus"):
            await (bus.publish_many([Placed(order_id=1)]) if many else bus.publish(Placed(order_id=1)))


async def test_a_bus_is_entered_once_at_a_time(bus: Bus) -> None:
    with pytest.raises(SetupError, match="this bus is connected already"):
        await bus.__aenter__()
    await bus.publish(Placed(order_id=1))


async def test_without_a_url_there_is_no_broker() -> None:
    with pytest.raises(SetupError, match=r"no broker: pass url=\.\.\. or set EVENTBUS_URL"):
        await Bus().__aenter__()


async def test_the_environment_names_the_broker_where_the_program_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENTBUS_URL", URL)
    monkeypatch.setenv("EVENTBUS_NAMESPACE", "staging")

    async with Bus() as bus:
        await bus.publish(Placed(order_id=1))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": "http://user:hunter2@host/"}, "'http://user:***@host/' names no broker: use amqp://, amqps:// or mem"),
        ({"url": "localhost"}, "'localhost' names no broker"),
        ({"url": URL, "source": "not a uri"}, "source='not a uri' cannot be"),
        ({"url": URL, "namespace": "Not One"}, "'Not One' is no namespace"),
    ],
)
async def test_what_cannot_work_is_told_when_the_bus_is_entered(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(SetupError) as raised:
        await Bus(**options).__aenter__()

    assert problem in str(raised.value)


async def test_publishing_is_silent_where_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "eventbus")
    service = Service("shop")

    @service.on("placed")
    async def handle(event: Placed) -> None: ...

    async with Worker(service, url=URL), Bus(URL) as bus:
        await bus.publish_many([Placed(order_id=number) for number in range(3)])

    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
