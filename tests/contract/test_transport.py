"""The port's promises, kept by every adapter: one suite, on the embedded broker and on each RabbitMQ that is here."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pika
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pika.adapters.blocking_connection import BlockingChannel

from eventbus.delay import rounded, way
from eventbus.errors import SetupError, TopologyConflict
from eventbus.message import Message, matches
from eventbus.topology import Binding, Exchange, Names, Queue, Topology, merge, of_service, quorum, shared
from eventbus.transport import from_url
from eventbus.transport.base import (
    Consumer,
    Declare,
    Delivery,
    NotPublished,
    Publication,
    Source,
    Transport,
    Unpublishable,
)
from tests.contract.conftest import LACKING
from tests.servers import Brokers, BrokerServer, find_lines, lines_to_test

DEADLINE_S = 20
CAREFUL = 10  # more deliveries than any adapter wants to see settled before it takes many at a time
WARM_UP = b"warm up"
NAMES = Names()
EMPTY = Topology(())
MAIL = merge([shared(NAMES), of_service(NAMES, "mail", ["order_placed.*"])])
AUDIT = of_service(NAMES, "audit", ["#"])


# ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Adapter:
    """One way to keep the port's promises. *lacks*: what it cannot do, and the contract does not promise everywhere."""

    name: str
    line: str | None
    lacks: frozenset[str] = frozenset()


KEEPS = "keeps messages when nobody is connected"
SEES_BINDINGS = "finds a missing binding when it verifies"
COMPARES_SHARED = "compares the arguments of shared queues and exchanges"


def adapters(config: pytest.Config) -> list[Adapter]:
    # AMQP cannot list bindings, and looking at something without declaring it compares nothing.
    blind = frozenset({SEES_BINDINGS, COMPARES_SHARED})
    return [
        Adapter("memory", None, frozenset({KEEPS})),
        *(Adapter(f"rabbitmq {line}", line, blind) for line in lines_to_test(find_lines(), config)),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "adapter" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("needs")
    able = adapters(metafunc.config)
    if marker is not None:
        capability = marker.args[0]
        for adapter in able:
            if capability in adapter.lacks:
                metafunc.config.stash[LACKING].append(f"{adapter.name} lacks: {capability}")
        able = [adapter for adapter in able if capability not in adapter.lacks]
    metafunc.parametrize("adapter", able, ids=lambda adapter: adapter.name)


class Inbox:
    """What a consumer was handed."""

    def __init__(self) -> None:
        self.deliveries: list[Delivery] = []
        self._has_news = asyncio.Event()

    def __call__(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        self._has_news.set()

    @property
    def bodies(self) -> list[bytes]:
        return [delivery.message.body for delivery in self.deliveries]

    async def holds(self, count: int) -> list[Delivery]:
        """At least *count* deliveries, in the order of their arrival."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.deliveries) < count:
                self._has_news.clear()
                await self._has_news.wait()
        return self.deliveries


class Bench:
    """Transports and consumers on one broker, ended together."""

    def __init__(self, url: str, ending: AsyncExitStack) -> None:
        self._url = url
        self._ending = ending

    async def open(self, *topologies: Topology, declare: Declare = "apply") -> Transport:
        transport = from_url(self._url)
        self._ending.push_async_callback(transport.close)
        await transport.open(merge(topologies), declare)
        return transport

    async def consume(
        self, transport: Transport, *queues: str, prefetch: int = 100, deliver: Callable[[Delivery], None] | None = None
    ) -> tuple[Consumer, Inbox]:
        """A consumer that keeps what it gets in the inbox, unless *deliver* does something else with it.

        An adapter may begin carefully: the first deliveries may come one at a time, each after the last was settled.
        """
        inbox = Inbox()
        sources = [Source(queue, prefetch, deliver or inbox) for queue in queues]
        consumer = transport.consumer(sources, EMPTY, "apply")
        self._ending.push_async_callback(consumer.close)
        await consumer.start()
        return consumer, inbox

    async def consume_and_ack(self, transport: Transport, queue: str, prefetch: int = 100) -> tuple[Consumer, Inbox]:
        """A consumer that acks what it gets at once."""
        inbox = Inbox()

        def deliver(delivery: Delivery) -> None:
            delivery.ack()
            inbox(delivery)

        consumer, _ = await self.consume(transport, queue, prefetch=prefetch, deliver=deliver)
        return consumer, inbox

    async def consume_widely(self, transport: Transport, *queues: str, prefetch: int = 100) -> tuple[Consumer, Inbox]:
        """A consumer of empty queues that is past its careful beginning."""
        careful, inbox = Inbox(), Inbox()

        def deliver(delivery: Delivery) -> None:
            if delivery.message.body != WARM_UP:
                inbox(delivery)
                return
            delivery.ack()
            careful(delivery)

        consumer, _ = await self.consume(transport, *queues, prefetch=prefetch, deliver=deliver)
        warm_up = [say(WARM_UP, queue, exchange="") for queue in queues for _ in range(CAREFUL)]
        assert all(await publish(transport, warm_up))
        await careful.holds(len(warm_up))
        return consumer, inbox


@pytest.fixture
async def bench(adapter: Adapter, brokers: Brokers) -> AsyncIterator[Bench]:
    name = f"contract-{secrets.token_hex(4)}"
    async with AsyncExitStack() as ending:
        if adapter.line is None:
            yield Bench(f"memory://{name}", ending)
        else:
            server = brokers.shared(adapter.line)
            ending.callback(server.drop_vhosts)
            yield Bench(server.new_vhost(), ending)


def queue_of(
    name: str, *, dead_letter_to: str | None = None, delivery_limit: int = 100, is_shared: bool = False
) -> Topology:
    """A queue that the exchange `x` leads to by the queue's name."""
    arguments = quorum(dead_letter_to=dead_letter_to, delivery_limit=delivery_limit)
    return Topology(
        (Exchange("x", "topic"),), (Queue(name, arguments, is_shared),), (Binding("x", name, "queue", name),)
    )


def say(body: str | bytes = b"", key: str = "q", exchange: str = "x") -> Publication:
    return Publication(exchange, key, Message({}, body.encode() if isinstance(body, str) else body))


def later(delay: timedelta, target: str, body: str) -> Publication:
    through = way(delay, target)
    return say(body, through.key, NAMES.delay_level(through.level))


async def publish(transport: Transport, publications: Sequence[Publication]) -> list[bool]:
    return await asyncio.gather(*[transport.publish(each, timeout_s=DEADLINE_S) for each in publications])


async def content(transport: Transport, queue: str, count: int) -> list[Delivery]:
    """All of *queue*, once *count* messages wait there, and left there."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            async with transport.browse(queue) as browsed:
                found = [delivery async for delivery in browsed]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.02)


# ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_message_reaches_every_queue_that_its_key_leads_to(bench: Bench) -> None:
    also = Topology((), (), (Binding("x", "p", "queue", "q"), Binding("x", "p", "queue", "#")))
    transport = await bench.open(queue_of("q"), queue_of("p"), queue_of("other"), also)

    assert await transport.publish(say("hello"), timeout_s=DEADLINE_S)

    for queue in ("q", "p"):
        (found,) = await content(transport, queue, 1)
        assert (found.message.body, found.queue, found.exchange, found.key) == (b"hello", queue, "x", "q")
    assert await content(transport, "other", 0) == []


async def test_a_message_that_no_queue_took_is_reported(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))

    assert not await transport.publish(say("to nobody", key="nobody"), timeout_s=DEADLINE_S)
    assert await transport.publish(say("to somebody"), timeout_s=DEADLINE_S)


async def test_of_many_publishes_at_once_each_gets_its_own_answer(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    keys = [("q", "nobody", "q", "q", "nowhere")[n % 5] for n in range(300)]

    assert await publish(transport, [say(str(n), key) for n, key in enumerate(keys)]) == [key == "q" for key in keys]

    wanted = {str(n).encode() for n, key in enumerate(keys) if key == "q"}
    found = await content(transport, "q", len(wanted))
    assert {delivery.message.body for delivery in found} == wanted
    assert len(found) == len(wanted)


CONTENTS = {
    "text": Message({"plain": "as sent", "ünïcode": "snow ☃ and 𝄞", "empty": ""}, "snow ☃".encode(), "text/plain"),
    "numbers": Message(
        {
            "yes": True,
            "no": False,
            "zero": 0,
            "one": 1,
            "small": -128,
            "byte": 255,
            "short": -(2**15),
            "word": 2**16 - 1,
            "long": -(2**31),
            "unsigned": 2**32 - 1,
            "longest": 2**63 - 1,
            "least": -(2**63),
        },
        b"{}",
        "application/json",
    ),
    "an empty body": Message({"h": "v"}, b""),
    "200 KiB": Message({}, bytes(range(256)) * 800, "application/octet-stream"),
    "every byte and no headers": Message({}, bytes(range(256))),
    "long headers": Message({f"header-{n}": "x" * 8192 for n in range(8)}, b""),
    "foreign properties": Message(
        {}, b"", "text/plain", {"content_encoding": "utf-8", "correlation_id": "c-1", "app_id": "app", "priority": 4}
    ),
    "what foreign senders use": Message(
        {
            "nothing": None,
            "float": -0.5,
            "bytes": bytearray(b"\xff\x00"),
            "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
            "decimal": Decimal("-1.25"),
            "list": ["a", 1, [True, None], {"deep": "er"}],
            "table": {"inner": {"n": -1, "list": []}},
        },
        b"",
    ),
}


@pytest.mark.parametrize("sent", CONTENTS.values(), ids=CONTENTS)
async def test_what_is_sent_arrives(bench: Bench, sent: Message) -> None:
    transport = await bench.open(queue_of("q"))
    await transport.publish(Publication("x", "q", sent), timeout_s=DEADLINE_S)

    _, inbox = await bench.consume(transport, "q")
    (delivery,) = await inbox.holds(1)

    assert delivery.message.body == sent.body
    assert delivery.message.content_type == sent.content_type
    assert dict(delivery.message.headers) == dict(sent.headers)
    assert {name: type(v) for name, v in delivery.message.headers.items()} == {
        name: type(v) for name, v in sent.headers.items()
    }
    assert {**delivery.message.properties} | {**sent.properties} == {**delivery.message.properties}


DELICATE = {
    "a float of 64 bits": 1.1,
    "a float that is no number": float("nan"),
    "a time with a fraction": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
    "a time without a zone": datetime(2026, 1, 2, 3, 4, 5),  # noqa: DTZ001  # what is tried here
    "a time of another zone": datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=2))),
    "a decimal of many places": Decimal("1e-300"),
    "bytes": b"\xff\x00",
    "a tuple": (1, 2),
}


@pytest.mark.parametrize("value", DELICATE.values(), ids=DELICATE)
async def test_what_cannot_be_carried_unchanged_is_refused(bench: Bench, value: object) -> None:
    transport = await bench.open(queue_of("q"))

    try:
        await transport.publish(Publication("x", "q", Message({"h": value}, b"")), timeout_s=DEADLINE_S)
    except Unpublishable:
        assert await content(transport, "q", 0) == []
    else:
        (found,) = await content(transport, "q", 1)
        assert found.message.headers["h"] == value


UNPUBLISHABLE = {
    "a header of a foreign type": Publication("x", "q", Message({"h": object()}, b"")),
    "an integer over 64 bits": Publication("x", "q", Message({"h": 2**63}, b"")),
    "a header that is no text": Publication("x", "q", Message({"h": "\ud800"}, b"")),
    "a header that is no text inside a list": Publication("x", "q", Message({"h": ["\ud800"]}, b"")),
    "headers over one frame": Publication("x", "q", Message({f"h{n}": "x" * 8192 for n in range(17)}, b"")),
    "a header's name over 128 bytes": Publication("x", "q", Message({"n" * 129: ""}, b"")),
    "a key over 255 bytes": Publication("x", "k" * 256, Message({}, b"")),
}


@pytest.mark.parametrize("publication", UNPUBLISHABLE.values(), ids=UNPUBLISHABLE)
async def test_what_can_never_be_published_is_refused_before_it_is_sent(bench: Bench, publication: Publication) -> None:
    transport = await bench.open(queue_of("q"))

    with pytest.raises(Unpublishable) as caught:
        await transport.publish(publication, timeout_s=DEADLINE_S)

    assert not caught.value.maybe_stored
    assert await transport.publish(say("the next one"), timeout_s=DEADLINE_S)


async def test_a_body_over_the_limit_is_refused_before_it_is_sent(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))

    with pytest.raises(Unpublishable, match=str(transport.broker.max_message_bytes)):
        await transport.publish(say(bytes(transport.broker.max_message_bytes + 1)), timeout_s=DEADLINE_S)

    assert await transport.publish(say("the next one"), timeout_s=DEADLINE_S)


async def test_a_closed_transport_publishes_nothing(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await transport.close()

    with pytest.raises(NotPublished) as caught:
        await transport.publish(say("too late"), timeout_s=DEADLINE_S)

    assert not caught.value.maybe_stored


async def test_an_exchange_that_does_not_exist_takes_nothing(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))

    with pytest.raises(NotPublished) as caught:
        await transport.publish(say("astray", exchange="absent"), timeout_s=1)

    assert not caught.value.maybe_stored


# ── consuming ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_acked_never_comes_back(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, inbox = await bench.consume_widely(transport, "q")
    await publish(transport, [say(str(n)) for n in range(20)])
    for delivery in (await inbox.holds(20))[:19]:
        assert delivery.count == 0
        assert delivery.is_live
        delivery.ack()
    await consumer.close()

    (left,) = await content(transport, "q", 1)

    assert left.message.body == inbox.bodies[19]


async def test_consumers_of_one_queue_share_it_and_none_gets_what_the_other_got(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    first, second, together = Inbox(), Inbox(), Inbox()
    for inbox in (first, second):

        def deliver(delivery: Delivery, inbox: Inbox = inbox) -> None:
            delivery.ack()
            inbox(delivery)
            together(delivery)

        await bench.consume(await bench.open(declare="never"), "q", prefetch=10, deliver=deliver)

    await publish(transport, [say(str(n)) for n in range(200)])
    await together.holds(200)

    assert first.bodies
    assert second.bodies
    assert {*together.bodies} == {str(n).encode() for n in range(200)}
    assert len(together.bodies) == 200


async def test_no_more_than_the_prefetch_is_unsettled(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    _, narrow = await bench.consume_widely(transport, "q", prefetch=3)
    await publish(transport, [say(str(n)) for n in range(10)])
    await narrow.holds(3)

    _, other = await bench.consume_and_ack(transport, "q")
    await other.holds(7)

    assert len(narrow.deliveries) == 3
    assert {*narrow.bodies, *other.bodies} == {str(n).encode() for n in range(10)}


async def test_each_ack_makes_room_for_one_more(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say(str(n)) for n in range(5)])
    _, inbox = await bench.consume(transport, "q", prefetch=1)

    for arrived in range(1, 6):
        assert len(await inbox.holds(arrived)) == arrived
        inbox.deliveries[-1].ack()

    assert inbox.bodies == [b"0", b"1", b"2", b"3", b"4"]


async def test_one_consumer_takes_several_queues_each_with_its_own_prefetch(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"), queue_of("p"))
    _, inbox = await bench.consume_widely(transport, "q", "p", prefetch=3)
    await publish(transport, [say(key=key) for key in ("q", "p") for _ in range(3)])

    await inbox.holds(6)

    assert sorted(delivery.queue for delivery in inbox.deliveries) == ["p"] * 3 + ["q"] * 3


async def test_what_was_not_settled_comes_back_and_is_counted(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("kept")])
    counts = []
    for _ in range(3):
        consumer, inbox = await bench.consume(transport, "q")
        (delivery,) = await inbox.holds(1)
        counts.append(delivery.count)
        await consumer.close()
        assert not delivery.is_live
        delivery.ack()

    assert counts[0] == 0
    assert counts[2] > counts[1] >= 1


async def test_a_rejected_message_is_in_the_dead_queue_untouched(bench: Bench) -> None:
    transport = await bench.open(MAIL)
    sent = Message({"h": "ü", "n": 1}, b"\x00\xffnot even json", "application/json")
    await transport.publish(Publication("events", "order_placed.v1", sent), timeout_s=DEADLINE_S)
    _, inbox = await bench.consume(transport, "events.mail")
    (await inbox.holds(1))[0].reject()

    (dead,) = await content(transport, "events.mail.dead", 1)

    assert (dead.message.body, dead.message.content_type) == (sent.body, sent.content_type)
    assert {name: dead.message.headers[name] for name in sent.headers} == sent.headers
    assert (dead.exchange, dead.key) == ("events.dead", "mail")
    deaths = dead.message.headers["x-death"]
    assert isinstance(deaths, list)
    assert [(d["queue"], d["reason"], d["count"], d["exchange"], d["routing-keys"]) for d in deaths] == [
        ("events.mail", "rejected", 1, "events", ["order_placed.v1"])
    ]
    assert isinstance(deaths[0]["time"], datetime)
    assert dead.message.headers["x-first-death-queue"] == "events.mail"
    assert dead.message.headers["x-first-death-reason"] == "rejected"
    assert dead.message.headers["x-first-death-exchange"] == "events"


async def test_over_the_delivery_limit_a_message_is_a_dead_letter(bench: Bench) -> None:
    dead = Topology((Exchange("dlx", "fanout"),), (Queue("dead", quorum()),), (Binding("dlx", "dead", "queue", ""),))
    transport = await bench.open(dead, queue_of("q", dead_letter_to="dlx", delivery_limit=2))
    await publish(transport, [say("poison")])

    for _ in range(3):
        consumer, inbox = await bench.consume(transport, "q")
        await inbox.holds(1)
        await consumer.close()

    (found,) = await content(transport, "dead", 1)
    assert found.message.body == b"poison"  # its count is not asked for: 4.x carries the old queue's over
    deaths = found.message.headers["x-death"]
    assert isinstance(deaths, list)
    assert [(death["queue"], death["reason"]) for death in deaths] == [("q", "delivery_limit")]


async def test_a_pause_hands_back_and_resume_takes_again(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("held")])
    consumer, inbox = await bench.consume(transport, "q")
    (held,) = await inbox.holds(1)

    await consumer.pause()
    assert not held.is_live
    other, elsewhere = await bench.consume(transport, "q")
    assert (await elsewhere.holds(1))[0].count >= 1
    await other.close()
    assert len(inbox.deliveries) == 1

    await consumer.resume()
    again = (await inbox.holds(2))[1]
    assert (again.message.body, again.is_live) == (b"held", True)
    again.ack()


async def test_after_stop_nothing_is_taken_and_what_was_taken_can_be_settled(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, inbox = await bench.consume_widely(transport, "q")
    await publish(transport, [say("held"), say("held, too")])
    first, second = await inbox.holds(2)

    await consumer.stop()
    async with asyncio.timeout(DEADLINE_S):
        await consumer.wait()
    await publish(transport, [say(f"later {n}") for n in range(10)])
    _, elsewhere = await bench.consume_and_ack(transport, "q")
    await elsewhere.holds(10)
    assert (first.is_live, second.is_live) == (True, True)
    first.ack()
    await consumer.close()
    await elsewhere.holds(11)

    assert len(inbox.deliveries) == 2
    assert elsewhere.bodies[10] == second.message.body


async def test_closing_the_publishing_side_leaves_consumers_alone(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    _, inbox = await bench.consume(transport, "q", prefetch=1)
    await transport.close()

    other = await bench.open(declare="never")
    await publish(other, [say("1"), say("2")])
    (await inbox.holds(1))[0].ack()

    await inbox.holds(2)


async def test_a_consumer_of_a_missing_queue_does_not_start(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))

    with pytest.raises(SetupError, match="absent"):
        await bench.consume(transport, "q", "absent")


# ── looking ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_browsing_shows_everything_in_order_and_takes_only_what_is_acked(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    for n in range(5):
        await publish(transport, [say(str(n))])

    async with transport.browse("q") as browsed:
        async for delivery in browsed:
            if delivery.message.body in (b"1", b"3"):
                delivery.ack()

    assert [found.message.body for found in await content(transport, "q", 3)] == [b"0", b"2", b"4"]


async def test_what_was_looked_at_is_in_its_place_again(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies = [str(n).encode() for n in range(40)]  # few would keep their order by chance
    for body in bodies:
        await publish(transport, [say(body.decode())])

    async with transport.browse("q") as browsed:
        assert [delivery.message.body async for delivery in browsed] == bodies

    assert [found.message.body for found in await content(transport, "q", 40)] == bodies


async def test_what_one_browses_another_does_not_see_until_it_is_given_back(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("1")])

    async with transport.browse("q") as browsed:
        held = await anext(browsed)
        assert held.is_live
        async with transport.browse("q") as second:
            assert [delivery async for delivery in second] == []

    assert not held.is_live
    assert len(await content(transport, "q", 1)) == 1


async def test_browsing_a_missing_queue_is_a_setup_error(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))

    with pytest.raises(SetupError, match="absent"):
        async with transport.browse("absent") as browsed:
            await anext(browsed)

    assert await transport.publish(say("still open"), timeout_s=DEADLINE_S)


async def test_a_tail_shows_what_passes_and_leaves_no_queue_behind(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("before")])

    async with transport.tail("x", "q.#") as passing:
        await publish(transport, [say("not this", "other"), say("this", "q.v1"), say("and this", "q")])
        async with asyncio.timeout(DEADLINE_S):
            seen = [await anext(passing) for _ in range(2)]
        assert {(delivery.message.body, delivery.key) for delivery in seen} == {(b"this", "q.v1"), (b"and this", "q")}

    async with asyncio.timeout(DEADLINE_S):
        while await transport.publish(say("after", "q.v1"), timeout_s=DEADLINE_S):  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.02)


# ── delays ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_delayed_message_is_never_early_and_arrives(bench: Bench) -> None:
    transport = await bench.open(MAIL)
    loop, arrived, sent = asyncio.get_running_loop(), dict[str, float](), dict[str, float]()
    delays = {str(units): timedelta(milliseconds=units) for units in (0, 1, 250, 500, 750, 1000, 1250, 1750)}
    inbox = Inbox()

    def deliver(delivery: Delivery) -> None:
        arrived[delivery.message.body.decode()] = loop.time()
        delivery.ack()
        inbox(delivery)

    await bench.consume(transport, "events.mail.retry", deliver=deliver)
    for name, delay in delays.items():
        sent[name] = loop.time()
        assert await transport.publish(later(delay, "retry.mail", name), timeout_s=DEADLINE_S)
    await inbox.holds(len(delays))

    for name, delay in delays.items():
        assert arrived[name] - sent[name] >= rounded(delay).total_seconds() >= delay.total_seconds()


async def test_a_retry_comes_back_to_its_service_alone(bench: Bench) -> None:
    transport = await bench.open(MAIL, AUDIT)
    await publish(transport, [later(timedelta(milliseconds=300), "retry.mail", "again")])

    (found,) = await content(transport, "events.mail.retry", 1)

    assert found.message.body == b"again"
    for queue in ("events.mail", "events.audit", "events.audit.retry", "events.undeliverable"):
        assert await content(transport, queue, 0) == []


async def test_a_delayed_publish_reaches_the_subscribers_of_its_type(bench: Bench) -> None:
    billing = of_service(NAMES, "billing", ["payment_captured.*"])
    transport = await bench.open(MAIL, AUDIT, billing)
    await publish(transport, [later(timedelta(milliseconds=250), "publish.order_placed.v1", "later")])

    for queue in ("events.mail", "events.audit"):
        (found,) = await content(transport, queue, 1)
        assert found.message.body == b"later"
    for queue in ("events.billing", "events.mail.retry", "events.undeliverable"):
        assert await content(transport, queue, 0) == []


@pytest.mark.parametrize("target", ["retry.nobody", "publish.unheard_of.v1"])
async def test_what_leads_nowhere_through_the_tree_is_kept_as_undeliverable(bench: Bench, target: str) -> None:
    transport = await bench.open(MAIL)
    await publish(transport, [later(timedelta(0), target, "at once"), later(timedelta(seconds=0.25), target, "late")])

    found = await content(transport, "events.undeliverable", 2)

    assert sorted(delivery.message.body for delivery in found) == [b"at once", b"late"]


async def test_a_dead_letter_for_an_unknown_service_is_kept_as_undeliverable(bench: Bench) -> None:
    transport = await bench.open(MAIL)
    await publish(transport, [say("whose?", "nobody", "events.dead")])

    assert len(await content(transport, "events.undeliverable", 1)) == 1


# ── declaring ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_declaring_the_same_again_changes_nothing(bench: Bench) -> None:
    transport = await bench.open(MAIL)
    await publish(transport, [say("kept", "order_placed.v1", "events")])

    for declare in ("apply", "verify", "never"):
        await bench.open(MAIL, declare=declare)

    assert len(await content(transport, "events.mail", 1)) == 1


async def test_verify_names_a_missing_queue_and_declares_nothing(bench: Bench) -> None:
    await bench.open(MAIL)

    for _ in range(2):
        with pytest.raises(SetupError, match=r"events\.audit"):
            await bench.open(MAIL, AUDIT, declare="verify")


async def test_a_queue_with_other_arguments_is_a_conflict_that_shows_both(bench: Bench) -> None:
    await bench.open(queue_of("q", delivery_limit=3))

    with pytest.raises(TopologyConflict) as caught:
        await bench.open(queue_of("q", delivery_limit=4))

    for part in ("'q'", "x-delivery-limit", "3", "4"):
        assert part in str(caught.value)


async def test_a_consumer_declares_its_topology_before_it_consumes(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    inbox = Inbox()
    consumer = transport.consumer([Source("p", 10, inbox)], queue_of("p"), "apply")
    try:
        await consumer.start()
        await publish(transport, [say("hello", "p")])
        await inbox.holds(1)
    finally:
        await consumer.close()


@pytest.mark.needs(KEEPS)
async def test_what_is_stored_outlives_every_connection(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("kept")])
    await transport.close()

    again = await bench.open(declare="never")

    assert len(await content(again, "q", 1)) == 1


@pytest.mark.needs(SEES_BINDINGS)
async def test_verify_finds_a_missing_binding(bench: Bench) -> None:
    await bench.open(MAIL)

    with pytest.raises(SetupError, match=r"invoice_sent"):
        await bench.open(MAIL, of_service(NAMES, "mail", ["invoice_sent.*"]), declare="verify")


@pytest.mark.needs(COMPARES_SHARED)
async def test_a_shared_queue_with_other_arguments_is_a_conflict(bench: Bench) -> None:
    await bench.open(queue_of("q", delivery_limit=3, is_shared=True))

    with pytest.raises(TopologyConflict):
        await bench.open(queue_of("q", delivery_limit=4, is_shared=True))


# ── topic matching: a real broker says what is right ─────────────────────────────────────────────────────────────────


class Judge:
    """Asks a RabbitMQ which of some patterns lead a key to their queue."""

    def __init__(self, channel: BlockingChannel, most_patterns: int) -> None:
        self._channel = channel
        self._received: list[tuple[str, bytes]] = []
        self._queues = [f"judge.{number}" for number in range(most_patterns)]
        for queue in self._queues:
            channel.queue_declare(queue, exclusive=True)
            channel.basic_consume(queue, self._receiver(queue), auto_ack=True)

    def _receiver(self, queue: str) -> Callable[..., None]:
        return lambda _channel, _method, _properties, body: self._received.append((queue, body))

    def matches(self, patterns: Sequence[str], keys: Sequence[str]) -> set[tuple[str, str]]:
        """The pairs of *patterns* and *keys* that match."""
        queues = dict(zip(self._queues, patterns, strict=False))
        for queue, pattern in queues.items():
            self._channel.queue_bind(queue, "amq.topic", pattern)
        for number, key in enumerate(keys):
            self._channel.basic_publish("amq.topic", key, str(number).encode())
        for queue in queues:  # behind everything that was routed there
            self._channel.basic_publish("", queue, b"end")
        until_s = time.monotonic() + DEADLINE_S
        while sum(body == b"end" for _, body in self._received) < len(queues):
            assert time.monotonic() < until_s, "the broker did not deliver"
            self._channel.connection.process_data_events(time_limit=DEADLINE_S)
        for queue, pattern in queues.items():
            self._channel.queue_unbind(queue, "amq.topic", pattern)
        received, self._received[:] = list(self._received), []
        return {(queues[queue], keys[int(body)]) for queue, body in received if body != b"end"}


WORDS = st.sampled_from(["a", "b", "*", "#", ""])
KEYS = st.lists(WORDS, max_size=5).map(".".join)
# RabbitMQ 4.3.5 refuses a binding key with more than two '#'.
PATTERNS = KEYS.filter(lambda pattern: pattern.split(".").count("#") <= 2)


def test_topic_matching_agrees_with_rabbitmq(every_line: BrokerServer) -> None:
    connection = pika.BlockingConnection(pika.URLParameters(every_line.new_vhost()))
    judge = Judge(connection.channel(), most_patterns=8)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(
        st.lists(PATTERNS, min_size=8, max_size=8, unique=True), st.lists(KEYS, min_size=30, max_size=30, unique=True)
    )
    def agree(patterns: list[str], keys: list[str]) -> None:
        ours = {(pattern, key) for pattern in patterns for key in keys if matches(pattern, key)}

        assert ours == judge.matches(patterns, keys)

    try:
        agree()
    finally:
        connection.close()
