"""What the embedded broker does beyond the port's contract: its clock, its memory, its names and its instruments."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from eventbus.clock import VirtualClock
from eventbus.delay import rounded, way
from eventbus.errors import SetupError, TopologyConflict, TransportError
from eventbus.message import Message
from eventbus.topology import Binding, Exchange, Names, Queue, Topology, merge, of_service, quorum, shared
from eventbus.transport.base import Declare, Delivery, NotPublished, Publication, Source, Unpublishable
from eventbus.transport.memory import MAX_MESSAGE_BYTES, MemoryConsumer, MemoryTransport
from eventbus.transport.memory_broker import MemoryBroker

NAMES = Names()
BUS = merge([shared(NAMES), of_service(NAMES, "mail", ["order_placed.*"])])
EMPTY = Topology(())
MODES: tuple[Declare, ...] = ("apply", "verify")


def queue_of(name: str, **arguments: str | int) -> Topology:
    """A queue that the exchange `x` leads to by the queue's name."""
    data = Queue(name, quorum({f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}))
    return Topology((Exchange("x", "topic"),), (data,), (Binding("x", name, "queue", name),))


def say(body: str, key: str = "q", exchange: str = "x") -> Publication:
    return Publication(exchange, key, Message({}, body.encode()))


@asynccontextmanager
async def opened(
    *topologies: Topology, broker: MemoryBroker | None = None, url: str = ""
) -> AsyncIterator[MemoryTransport]:
    transport = MemoryTransport(url) if url else MemoryTransport.on_broker(broker or MemoryBroker())
    await transport.open(merge(topologies), "apply")
    try:
        yield transport
    finally:
        await transport.close()


async def publish(transport: MemoryTransport, *publications: Publication) -> None:
    for publication in publications:
        assert await transport.publish(publication, timeout_s=5), publication


async def turns(count: int = 5) -> None:
    """Let what was called soon happen."""
    for _ in range(count):
        await asyncio.sleep(0)


@asynccontextmanager
async def consuming(
    transport: MemoryTransport, deliver: Callable[[Delivery], None], *, queue: str = "q", prefetch: int = 100
) -> AsyncIterator[MemoryConsumer]:
    consumer = transport.consumer([Source(queue, prefetch, deliver)], EMPTY, "never")
    await consumer.start()
    try:
        yield consumer
    finally:
        await consumer.close()


def bodies(broker: MemoryBroker, queue: str = "q") -> list[str]:
    return [waiting.message.body.decode() for waiting in broker.peek(queue)]


# ── delivering ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_delivery_never_arrives_from_inside_a_publish_or_an_ack() -> None:
    broker, depth, deepest = MemoryBroker(), 0, 0
    async with opened(queue_of("q"), broker=broker) as transport:

        def deliver(delivery: Delivery) -> None:
            nonlocal depth, deepest
            depth += 1
            deepest = max(deepest, depth)
            broker.put(broker.route("x", "q"), delivery.message, "x", "q") if broker.size < 5 else None
            delivery.ack()
            depth -= 1

        async with consuming(transport, deliver, prefetch=1):
            broker.put(broker.route("x", "q"), Message({}, b""), "x", "q")
            assert deepest == 0
            await turns(20)

    assert deepest == 1


async def test_who_only_publishes_still_lets_the_consumers_run() -> None:
    handled: list[Delivery] = []
    async with opened(queue_of("q")) as transport, consuming(transport, handled.append):
        for _ in range(10):
            await transport.publish(say("again"), timeout_s=5)

        assert len(handled) >= 8


async def test_a_backlog_is_handed_out_over_many_turns_of_the_loop() -> None:
    broker, handled = MemoryBroker(), 0

    def deliver(delivery: Delivery) -> None:
        nonlocal handled
        handled += 1
        delivery.ack()

    async with opened(queue_of("q"), broker=broker) as transport:
        await publish(transport, *[say("one of many")] * 1000)
        async with consuming(transport, deliver):
            await turns(2)
            assert 0 < handled < 1000
            await turns(50)
            assert handled == 1000


async def test_consumers_with_room_take_turns() -> None:
    first: list[Delivery] = []
    second: list[Delivery] = []
    async with opened(queue_of("q")) as transport:
        await publish(transport, *[say(str(n)) for n in range(6)])
        async with consuming(transport, first.append), consuming(transport, second.append, prefetch=2):
            await turns()

            assert [len(first), len(second)] == [4, 2]


async def test_a_consumer_that_raises_does_not_stop_its_queue(caplog: pytest.LogCaptureFixture) -> None:
    handled: list[str] = []

    def deliver(delivery: Delivery) -> None:
        handled.append(delivery.message.body.decode())
        delivery.ack()
        if handled == ["bad"]:
            raise ValueError("from the consumer")

    async with opened(queue_of("q")) as transport, consuming(transport, deliver):
        await publish(transport, say("bad"), say("good"))
        await turns()

    assert handled == ["bad", "good"]
    assert "from the consumer" in caplog.text


async def test_what_a_consumer_or_publisher_writes_into_a_message_nobody_else_sees() -> None:
    broker = MemoryBroker()
    sent: dict[str, object] = {"plain": "as sent", "table": {"list": [1]}, "bytes": bytearray(b"1")}
    topology = merge([queue_of("q"), queue_of("other"), Topology((), (), (Binding("x", "other", "queue", "q"),))])
    async with opened(topology, broker=broker) as transport:
        await publish(transport, Publication("x", "q", Message(sent, b"body")))
        sent["plain"] = "changed by the publisher"

        async with transport.browse("q") as browsed:
            async for delivery in browsed:
                assert isinstance(delivery.message.headers, dict)
                delivery.message.headers["plain"] = "changed by a consumer"
                delivery.message.headers["table"]["list"].append(2)
                delivery.message.headers["bytes"].extend(b"2")
        broker.peek("q")[0].message.headers["table"]["list"].append(3)  # type: ignore[index]

    for queue in ("q", "other"):
        assert broker.peek(queue)[0].message.headers == {
            "plain": "as sent",
            "table": {"list": [1]},
            "bytes": bytearray(b"1"),
        }


# ── returning and dying ──────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_returned_goes_to_where_it_was_whoever_returns_first() -> None:
    broker = MemoryBroker()
    async with opened(queue_of("q"), broker=broker) as transport:
        await publish(transport, *[say(str(n)) for n in range(8)])
        hold: Callable[[Delivery], None] = lambda _: None  # noqa: E731
        async with consuming(transport, hold, prefetch=3), consuming(transport, hold, prefetch=3):
            await turns()
            assert bodies(broker) == ["6", "7"]
        # The second is closed first; both held every other message.

        assert bodies(broker) == [str(n) for n in range(8)]
        assert [waiting.count for waiting in broker.peek("q")] == [1] * 6 + [0] * 2


async def test_over_the_delivery_limit_a_message_is_dropped_where_no_exchange_takes_it() -> None:
    broker = MemoryBroker()
    async with opened(queue_of("q", delivery_limit=1), broker=broker) as transport:
        await publish(transport, say("poison"))
        for _ in range(2):
            assert bodies(broker) == ["poison"]
            async with consuming(transport, lambda _: None):
                await turns()

    assert (bodies(broker), broker.size) == ([], 0)


async def test_a_second_death_in_one_queue_counts_up_and_the_first_is_remembered() -> None:
    clock = VirtualClock()
    broker = MemoryBroker(clock=clock)
    back = {"dead_letter_exchange": "x", "dead_letter_strategy": "at-least-once"}
    topology = merge(
        [
            queue_of("work", **back, dead_letter_routing_key="wait"),
            queue_of("wait", **back, dead_letter_routing_key="work", message_ttl=1000),
        ]
    )
    async with opened(topology, broker=broker) as transport:
        await publish(transport, say("poison", key="work"))
        async with consuming(transport, lambda delivery: delivery.reject(), queue="work"):
            await turns()
            clock.ring_next()
            await turns()

    (waiting,) = broker.peek("wait")
    deaths = waiting.message.headers["x-death"]
    assert isinstance(deaths, list)
    assert [(d["queue"], d["reason"], d["count"], d["exchange"], d["routing-keys"]) for d in deaths] == [
        ("work", "rejected", 2, "x", ["work"]),
        ("wait", "expired", 1, "x", ["wait"]),
    ]
    assert all(d["time"].tzinfo is UTC and d["time"] <= clock.now() for d in deaths)
    assert waiting.message.headers["x-first-death-queue"] == "work"
    assert waiting.message.headers["x-first-death-reason"] == "rejected"
    assert waiting.message.headers["x-first-death-exchange"] == "x"
    assert waiting.message.headers["x-last-death-queue"] == "work"


async def test_deaths_that_a_client_wrote_are_not_believed() -> None:
    broker = MemoryBroker()
    forged = {"x-death": [{"queue": "elsewhere", "count": 7}], "x-first-death-queue": "elsewhere"}
    async with opened(BUS, broker=broker) as transport:
        await publish(transport, Publication("events", "order_placed.v1", Message(forged, b"")))
        async with consuming(transport, lambda delivery: delivery.reject(), queue="events.mail"):
            await turns()

    (dead,) = broker.peek("events.mail.dead")
    assert dead.message.headers["x-first-death-queue"] == "events.mail"
    assert len(dead.message.headers["x-death"]) == 1  # type: ignore[arg-type]


async def test_at_least_once_a_dead_letter_without_a_route_is_kept_until_there_is_one() -> None:
    broker = MemoryBroker()
    dying = queue_of("q", dead_letter_exchange="later", dead_letter_strategy="at-least-once")
    async with opened(dying, broker=broker) as transport:
        await publish(transport, say("kept"))
        async with consuming(transport, lambda delivery: delivery.reject()):
            await turns()
        assert (broker.depth("q"), broker.size) == (0, 1)

        later = Topology((Exchange("later", "fanout"),), (Queue("dead", quorum()),))
        broker.declare(merge([later, Topology((), (), (Binding("later", "dead", "queue", ""),))]), "apply")

        assert bodies(broker, "dead") == ["kept"]
        assert broker.size == 1


async def test_at_most_once_a_dead_letter_without_a_route_is_gone() -> None:
    broker = MemoryBroker()
    async with opened(queue_of("q", dead_letter_exchange="nowhere"), broker=broker) as transport:
        await publish(transport, say("dropped"))
        async with consuming(transport, lambda delivery: delivery.reject()):
            await turns()

    assert (broker.depth("q"), broker.size) == (0, 0)


async def test_settling_twice_or_after_the_session_ended_changes_nothing() -> None:
    broker = MemoryBroker()
    held: list[Delivery] = []
    async with opened(queue_of("q"), broker=broker) as transport:
        await publish(transport, say("first"), say("second"))
        async with consuming(transport, held.append):
            await turns()
            held[0].ack()
            held[0].reject()
        assert not held[1].is_live
        held[1].ack()

        assert bodies(broker) == ["second"]


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("delay", [timedelta(seconds=s) for s in (0.25, 1, 10, 3600, 86400 * 40)])
async def test_the_delay_tree_takes_exactly_the_rounded_delay(delay: timedelta) -> None:
    clock = VirtualClock()
    broker = MemoryBroker(clock=clock)
    through = way(delay, "retry.mail")
    async with opened(BUS, broker=broker) as transport:
        await publish(transport, say("late", through.key, NAMES.delay_level(through.level)))
        while broker.depth("events.mail.retry") == 0:
            assert clock.next_due_s() is not None
            clock.ring_next()

    assert clock.monotonic_s() == pytest.approx(rounded(delay).total_seconds(), abs=1e-6)
    (arrived,) = broker.peek("events.mail.retry")
    assert arrived.key == through.key
    assert arrived.message.headers["x-first-death-queue"] == NAMES.delay_level(through.level)
    deaths = arrived.message.headers["x-death"]
    assert isinstance(deaths, list)
    assert arrived.message.headers["x-last-death-queue"] == deaths[0]["queue"]
    assert [death["reason"] for death in deaths] == ["expired"] * through.key.count("1")


async def test_each_message_of_a_queue_expires_at_its_own_time_and_not_before() -> None:
    clock = VirtualClock()
    broker = MemoryBroker(clock=clock)
    async with opened(queue_of("q", message_ttl=1000), broker=broker) as transport:
        await publish(transport, say("first"))
        clock.set_to(0.4)
        await publish(transport, say("second"))

        clock.ring_next()
        assert (clock.monotonic_s(), bodies(broker)) == (1.0, ["second"])
        clock.ring_next()
        assert clock.monotonic_s() == pytest.approx(1.4)
        assert bodies(broker) == []


async def test_what_was_held_over_its_time_expires_as_soon_as_it_returns() -> None:
    clock = VirtualClock()
    broker = MemoryBroker(clock=clock)
    async with opened(queue_of("q", message_ttl=1000), broker=broker) as transport:
        await publish(transport, say("held"))
        async with consuming(transport, lambda _: None, prefetch=1):
            await turns()
            clock.set_to(0.9)
            await publish(transport, say("young"))
            clock.ring_next()
            clock.set_to(1.5)
        clock.ring_next()

        assert (clock.monotonic_s(), bodies(broker)) == (1.5, ["young"])


async def test_without_a_clock_of_its_own_time_is_real() -> None:
    broker = MemoryBroker()
    async with opened(queue_of("q", message_ttl=20), broker=broker) as transport:
        began_s = broker.clock.monotonic_s()
        await publish(transport, say("soon gone"))
        async with asyncio.timeout(5):
            while broker.size:  # noqa: ASYNC110  # the broker has nobody to tell
                await asyncio.sleep(0.001)

    assert broker.clock.monotonic_s() - began_s >= 0.02


# ── topology ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_new_binding_is_seen_by_keys_that_were_routed_before() -> None:
    async with opened(queue_of("q")) as transport:
        assert not await transport.publish(say("too early", key="other"), timeout_s=5)
        await transport.open(Topology((), (), (Binding("x", "q", "queue", "other"),)), "apply")

        assert await transport.publish(say("in time", key="other"), timeout_s=5)


async def test_exchanges_that_lead_to_each_other_deliver_once() -> None:
    broker = MemoryBroker()
    circle = Topology(
        (Exchange("x", "topic"), Exchange("y", "fanout")),
        (Queue("q", quorum()),),
        (
            Binding("x", "y", "exchange", "#"),
            Binding("y", "x", "exchange", ""),
            Binding("x", "q", "queue", "#"),
            Binding("y", "q", "queue", ""),
        ),
    )
    async with opened(circle, broker=broker) as transport:
        await publish(transport, say("once"))

    assert bodies(broker) == ["once"]


async def test_a_binding_to_an_exchange_that_leads_nowhere_is_a_route_and_no_alternate_is_taken() -> None:
    topology = Topology(
        (Exchange("spare", "fanout"), Exchange("x", "topic", {"alternate-exchange": "spare"}), Exchange("y", "topic")),
        (Queue("q", quorum()),),
        (Binding("spare", "q", "queue", ""), Binding("x", "y", "exchange", "blind")),
    )
    async with opened(topology) as transport:
        assert not await transport.publish(say("as on RabbitMQ", key="blind"), timeout_s=5)
        assert await transport.publish(say("to the spare one", key="other"), timeout_s=5)


async def test_the_default_exchange_leads_to_the_queue_that_the_key_names() -> None:
    broker = MemoryBroker()
    async with opened(queue_of("q"), broker=broker) as transport:
        await publish(transport, say("direct", exchange=""))
        assert not await transport.publish(say("nobody", key="absent", exchange=""), timeout_s=5)

    assert bodies(broker) == ["direct"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (queue_of("q", message_ttl=2), ["'q'", "x-message-ttl=1", "x-message-ttl=2"]),
        (queue_of("q"), ["'q'", "x-message-ttl=1", "no x-message-ttl"]),
        (Topology((Exchange("x", "fanout"),)), ["'x'", "topic", "fanout"]),
        (Topology((Exchange("x", "topic", {"alternate-exchange": "y"}),)), ["no alternate-exchange", "'y'"]),
    ],
)
async def test_a_conflict_shows_both_sides_and_the_way_out(other: Topology, says: list[str]) -> None:
    async with opened(queue_of("q", message_ttl=1)) as transport:
        for mode in MODES:
            with pytest.raises(TopologyConflict) as caught:
                await transport.open(other, mode)

            for part in (*says, "EVENTBUS_NAMESPACE"):
                assert part in str(caught.value)


@pytest.mark.parametrize(
    ("wanted", "missing"),
    [
        (Topology((Exchange("y", "topic"),)), "exchange 'y'"),
        (Topology((), (Queue("r", quorum()),)), "queue 'r'"),
        (Topology((), (), (Binding("x", "q", "queue", "new"),)), "binding 'new'"),
    ],
)
async def test_verify_names_what_is_missing_and_declares_nothing(wanted: Topology, missing: str) -> None:
    async with opened(queue_of("q")) as transport:
        for _ in range(2):
            with pytest.raises(SetupError, match=missing):
                await transport.open(wanted, "verify")


async def test_a_binding_to_what_does_not_exist_is_a_setup_error() -> None:
    async with opened(queue_of("q")) as transport:
        with pytest.raises(SetupError, match="'absent' does not exist"):
            await transport.open(Topology((), (), (Binding("x", "absent", "queue", "k"),)), "apply")


@pytest.mark.parametrize(
    "argument", [{"x-max-length": 3}, {"x-queue-type": "classic"}, {"x-single-active-consumer": True}]
)
async def test_an_argument_that_would_be_ignored_is_refused(argument: dict[str, str | int]) -> None:
    wanted = Topology((), (Queue("q", {**quorum(), **argument}),))
    with pytest.raises(SetupError, match=next(iter(argument))):
        await MemoryTransport.on_broker(MemoryBroker()).open(wanted, "apply")


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_broker_takes_nothing_and_says_so_when_the_time_is_over() -> None:
    broker = MemoryBroker(max_messages=2)
    async with opened(queue_of("q"), broker=broker) as transport:
        await publish(transport, say("1"), say("2"))

        with pytest.raises(NotPublished, match="max_messages=2") as caught:
            await transport.publish(say("3"), timeout_s=0.05)

        assert (caught.value.maybe_stored, caught.value.timed_out) == (False, True)
        assert not await transport.publish(say("to no queue", key="nowhere"), timeout_s=0.05)
    assert bodies(broker) == ["1", "2"]


async def test_a_publish_to_a_full_broker_waits_for_room() -> None:
    broker = MemoryBroker(max_messages=1)
    async with opened(queue_of("q"), broker=broker) as transport:
        await publish(transport, say("1"))
        waiting = asyncio.create_task(transport.publish(say("2"), timeout_s=5))
        await turns()
        assert not waiting.done()

        async with consuming(transport, lambda delivery: delivery.ack(), prefetch=1):
            assert await waiting


async def test_a_message_for_two_queues_needs_room_for_two() -> None:
    broker = MemoryBroker(max_messages=1)
    both = merge([queue_of("q"), queue_of("other"), Topology((), (), (Binding("x", "other", "queue", "q"),))])
    async with opened(both, broker=broker) as transport:
        with pytest.raises(NotPublished):
            await transport.publish(say("twice"), timeout_s=0.01)

    assert (bodies(broker), bodies(broker, "other")) == ([], [])


async def test_a_full_broker_still_buries() -> None:
    broker = MemoryBroker(max_messages=1)
    async with opened(BUS, broker=broker) as transport:
        await publish(transport, say("poison", "order_placed.v1", "events"))
        async with consuming(transport, lambda delivery: delivery.reject(), queue="events.mail"):
            await turns()

    assert bodies(broker, "events.mail.dead") == ["poison"]


async def test_closing_fails_a_publish_that_waits_for_room() -> None:
    transport = MemoryTransport.on_broker(MemoryBroker(max_messages=1))
    await transport.open(queue_of("q"), "apply")
    await publish(transport, say("1"))
    waiting = asyncio.create_task(transport.publish(say("2"), timeout_s=30))
    await turns()

    await transport.close()

    with pytest.raises(NotPublished, match="closed") as caught:
        await waiting
    assert not caught.value.timed_out


# ── what AMQP carries ────────────────────────────────────────────────────────────────────────────────────────────────


class Odd:
    pass


UNCARRIED = {
    "an object": Message({"h": Odd()}, b""),
    "an object inside": Message({"h": {"inner": [Odd()]}}, b""),
    "too large an integer": Message({"h": 2**63}, b""),
    "too small an integer": Message({"h": -(2**63) - 1}, b""),
    "too large an exponent": Message({"h": Decimal("1e300")}, b""),
    "a float of 64 bits": Message({"h": 1.1}, b""),
    "a float beyond 32 bits": Message({"h": 1e300}, b""),
    "not a float": Message({"h": float("nan")}, b""),
    "a fraction of a second": Message({"h": datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)}, b""),
    "a time without a zone": Message({"h": datetime(2026, 1, 1)}, b""),  # noqa: DTZ001  # what is refused
    "bytes": Message({"h": b""}, b""),
    "headers over one frame": Message({f"h{n}": "x" * 8192 for n in range(17)}, b""),
    "not a decimal": Message({"h": Decimal("NaN")}, b""),
    "too large a decimal": Message({"h": Decimal(2**31)}, b""),
    "a lone surrogate": Message({"h": "\ud800"}, b""),
    "a tuple": Message({"h": ("a", "tuple")}, b""),
    "a name of 130 bytes": Message({"ü" * 65: ""}, b""),
    "a name that is no text": Message({1: ""}, b""),  # type: ignore[dict-item]
    "an odd property": Message({}, b"", properties={"app_id": Odd()}),
    "too large a body": Message({}, bytes(MAX_MESSAGE_BYTES + 1)),
}


@pytest.mark.parametrize("message", UNCARRIED.values(), ids=UNCARRIED)
async def test_what_amqp_could_not_carry_is_refused(message: Message) -> None:
    broker = MemoryBroker()
    async with opened(queue_of("q"), broker=broker) as transport:
        with pytest.raises(Unpublishable) as caught:
            await transport.publish(Publication("x", "q", message), timeout_s=5)

    assert not caught.value.maybe_stored
    assert broker.size == 0


@pytest.mark.parametrize("key", ["k" * 256, "ü" * 128, "\ud800"])
async def test_a_routing_key_over_255_bytes_or_that_is_no_text_is_refused(key: str) -> None:
    async with opened(queue_of("q")) as transport:
        with pytest.raises(Unpublishable, match="routing key"):
            await transport.publish(say("", key=key), timeout_s=5)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats()
    | st.floats(width=32)
    | st.decimals(places=3)
    | st.decimals()
    | st.text(st.characters())
    | st.binary()
    | st.binary().map(bytearray)
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.datetimes(datetime(1970, 1, 1), timezones=st.just(UTC)).map(lambda at: at.replace(microsecond=0))  # noqa: DTZ001
)
NAMES_OF_HEADERS = st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES_OF_HEADERS, inner, max_size=3)
)


@given(st.dictionaries(NAMES_OF_HEADERS, VALUES, max_size=5))
def test_headers_that_are_taken_are_headers_that_the_amqp_client_carries_unchanged(headers: dict[str, object]) -> None:
    broker = MemoryBroker()

    async def send() -> None:
        async with opened(queue_of("q"), broker=broker) as transport:
            await publish(transport, Publication("x", "q", Message(headers, b"")))

    try:
        asyncio.run(send())
    except Unpublishable:
        return

    taken: Any = broker.peek("q")[0].message.headers
    assert taken == headers
    arrived = ContentHeader()
    arrived.unmarshal(ContentHeader(properties=Basic.Properties(headers=taken)).marshal())
    assert (arrived.properties.headers or {}) == headers


async def test_properties_that_are_not_kept_do_not_travel() -> None:
    broker = MemoryBroker()
    sent = Message({}, b"", properties={"app_id": "shop", "user_id": "guest", "expiration": "1000"})
    async with opened(queue_of("q"), broker=broker) as transport:
        await publish(transport, Publication("x", "q", sent))

    assert broker.peek("q")[0].message.properties == {"app_id": "shop"}


# ── instruments ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_lose_next_drops_one_delivery_as_if_it_had_been_acked() -> None:
    broker, handled = MemoryBroker(), list[str]()

    def deliver(delivery: Delivery) -> None:
        handled.append(delivery.message.body.decode())
        delivery.ack()

    async with opened(queue_of("q"), broker=broker) as transport, consuming(transport, deliver):
        broker.lose_next("q")
        await publish(transport, say("lost"), say("kept"))
        await turns()

    assert (handled, broker.size) == (["kept"], 0)


async def test_the_instruments_of_a_broker_are_reached_through_its_url() -> None:
    async with opened(queue_of("q"), url="memory://instruments") as transport:
        await publish(transport, say("seen"))

        assert (transport.embedded.queues, bodies(transport.embedded)) == (("q",), ["seen"])

    with pytest.raises(TransportError):
        _ = transport.embedded


async def test_idle_means_that_nothing_can_happen_by_itself() -> None:
    broker, held = MemoryBroker(), list[Delivery]()
    async with opened(queue_of("q"), broker=broker) as transport:
        assert broker.is_idle()
        await publish(transport, say("waits for a consumer"))
        assert broker.is_idle()
        async with consuming(transport, held.append) as consumer:
            assert not broker.is_idle(), "it is about to be delivered"
            await turns()
            assert not broker.is_idle(), "it is unsettled"
            await consumer.stop()
            assert not broker.is_idle(), "it is still unsettled"
            held[0].ack()
            assert broker.is_idle()


def test_the_instruments_name_a_queue_that_is_missing() -> None:
    broker = MemoryBroker()
    for ask in (broker.depth, broker.peek, broker.lose_next):
        with pytest.raises(SetupError, match="queue 'absent'"):
            ask("absent")


# ── names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url",
    [
        "memory:",
        "memory:///queue",
        "memory://a/b",
        "memory://a:5672",
        "memory://user:secret@a",
        "memory://a#b",
        "memory://[",
        "memory://a?max_messages",
        "memory://a?max_messages=0",
        "memory://a?max_messages=-5",
        "memory://a?max_messages=many",
        "memory://a?max_messages=1&max_messages=2",
        "memory://a?max_mesages=1",
        "amqp://localhost",
    ],
)
def test_a_malformed_url_says_what_is_allowed(url: str) -> None:
    with pytest.raises(SetupError) as caught:
        MemoryTransport(url)

    assert "memory://NAME?max_messages=100000" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_one_name_is_one_broker_for_as_long_as_somebody_holds_it() -> None:
    async with opened(queue_of("q"), url="memory://shared") as first:
        await publish(first, say("kept"))
        async with opened(EMPTY, url="memory://shared") as second, second.browse("q") as browsed:
            assert [delivery.message.body async for delivery in browsed] == [b"kept"]
        async with opened(EMPTY, url="memory://other") as other:
            with pytest.raises(SetupError):
                await other.open(queue_of("q"), "verify")

    async with opened(EMPTY, url="memory://shared") as third:
        with pytest.raises(SetupError):
            await third.open(queue_of("q"), "verify")


async def test_a_consumer_holds_its_broker_without_a_transport() -> None:
    async with opened(queue_of("q"), url="memory://held") as transport:
        consumer = transport.consumer([Source("q", 1, lambda _: None)], EMPTY, "never")
        await consumer.start()

    async with opened(EMPTY, url="memory://held") as again:
        await again.open(queue_of("q"), "verify")
    await consumer.close()

    async with opened(EMPTY, url="memory://held") as later:
        with pytest.raises(SetupError):
            await later.open(queue_of("q"), "verify")


async def test_a_transport_that_was_forgotten_does_not_keep_its_broker() -> None:
    transport = MemoryTransport("memory://forgotten")
    await transport.open(queue_of("q", message_ttl=10**9), "apply")
    await publish(transport, say("waits for eleven days"))
    broker = weakref.ref(transport.embedded)

    del transport
    gc.collect()

    assert broker() is None, "its timer must not keep it"

    async with opened(EMPTY, url="memory://forgotten") as later:
        with pytest.raises(SetupError):
            await later.open(queue_of("q"), "verify")


async def test_other_options_under_one_name_are_a_setup_error() -> None:
    async with opened(EMPTY, url="memory://limited?max_messages=5"):
        for url in ("memory://limited", "memory://limited?max_messages=6"):
            with pytest.raises(SetupError, match="max_messages=5"):
                await MemoryTransport(url).open(EMPTY, "apply")
        with pytest.raises(SetupError, match="clock"):
            await MemoryTransport("memory://limited?max_messages=5", clock=VirtualClock()).open(EMPTY, "apply")


def test_a_second_event_loop_gets_a_fresh_broker_once_the_first_is_closed() -> None:
    leaked: list[MemoryTransport] = []

    async def leave_it_open() -> None:
        leaked.append(MemoryTransport("memory://loops"))
        await leaked[0].open(queue_of("q"), "apply")

    async def find_nothing() -> None:
        async with opened(EMPTY, url="memory://loops") as transport:
            with pytest.raises(SetupError):
                await transport.open(queue_of("q"), "verify")

    asyncio.run(leave_it_open())
    asyncio.run(find_nothing())


async def test_a_broker_in_use_by_another_running_loop_is_refused_with_a_way_out() -> None:
    errors: list[SetupError] = []

    async def open_elsewhere() -> None:
        with pytest.raises(SetupError, match="memory://mine") as caught:
            await MemoryTransport("memory://busy").open(EMPTY, "apply")
        errors.append(caught.value)

    async with opened(EMPTY, url="memory://busy"):
        thread = threading.Thread(target=lambda: asyncio.run(open_elsewhere()))
        thread.start()
        await asyncio.to_thread(thread.join, 10)

    assert len(errors) == 1


async def test_a_failed_open_or_start_holds_nothing() -> None:
    transport = MemoryTransport("memory://failed")
    with pytest.raises(SetupError, match="x-max-length"):
        await transport.open(merge([queue_of("early"), queue_of("q", max_length=3)]), "apply")
    with pytest.raises(NotPublished):
        await transport.publish(say("nothing"), timeout_s=1)
    with pytest.raises(RuntimeError):
        _ = transport.broker

    async with opened(queue_of("q"), url="memory://failed") as other:
        with pytest.raises(SetupError):
            await other.open(queue_of("early"), "verify")
        consumer = other.consumer([Source("absent", 1, lambda _: None)], EMPTY, "apply")
        with pytest.raises(SetupError, match="queue 'absent'"):
            await consumer.start()
        await other.close()
        async with opened(EMPTY, url="memory://failed") as later:
            with pytest.raises(SetupError):
                await later.open(queue_of("q"), "verify")


async def test_opening_again_in_vain_leaves_it_open() -> None:
    async with opened(queue_of("q"), url="memory://again") as transport:
        with pytest.raises(SetupError):
            await transport.open(queue_of("absent"), "verify")

        async with opened(EMPTY, url="memory://again") as other:
            await other.open(queue_of("q"), "verify")


async def test_who_answered() -> None:
    async with opened(EMPTY) as transport:
        who = transport.broker

    assert (who.product, who.host, who.port, who.max_message_bytes) == ("embedded", "memory", None, 16 * 1024 * 1024)
    assert who.version[0].isdigit()


async def test_a_tail_that_is_not_read_forgets_the_oldest_and_stops_no_publisher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eventbus.transport.memory._MAX_UNREAD", 3)
    broker = MemoryBroker(max_messages=2)
    async with opened(queue_of("q"), broker=broker) as transport:
        async with transport.tail("x", "seen.#") as seen:
            for n in range(6):
                await transport.publish(say(str(n), key="seen.v1"), timeout_s=1)
            await turns()
            read = [(await anext(seen)).message.body for _ in range(3)]
            assert broker.size == 0
        assert read == [b"3", b"4", b"5"]
        assert not await transport.publish(say("after", key="seen.v1"), timeout_s=1), "its queue is gone"


async def test_closing_the_transport_ends_its_tails() -> None:
    transport = MemoryTransport.on_broker(MemoryBroker())
    await transport.open(queue_of("q"), "apply")
    async with transport.tail("x", "#") as seen:
        await transport.close()
        with pytest.raises(TransportError, match="closed"):
            await anext(seen)
