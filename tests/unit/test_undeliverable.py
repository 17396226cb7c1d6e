"""What no queue took: read as what it is, and sent on to where it was going."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import Bus, Event, Service, SetupError, Worker
from eventbus import message as header
from eventbus.delay import LEVELS
from eventbus.message import Message
from eventbus.topology import Names, Queue, Topology, merge, quorum, shared
from eventbus.transport.base import Publication
from eventbus.transport.memory import MemoryTransport
from eventbus.undeliverable import Undeliverable, UndeliverableMessage, again, interpret

NAMES = Names()
URL = "memory://test-undeliverable"
BITS = ".".join("0" * LEVELS)
WHEN = datetime(2030, 1, 31, 12, tzinfo=UTC)
TAKEN = {"x-death": [{"queue": "events.mails.dead", "reason": "expired", "time": WHEN}]}

RETRY = ("events.delay.v1.end", f"{BITS}.retry.mails")
DELAYED = ("events.delay.v1.07", f"{BITS}.publish.shop.order_placed.v1")
DEAD = ("events.dead", "mails")


def undelivered(exchange: str, key: str, **headers: object) -> UndeliverableMessage:
    return interpret(NAMES, exchange, key, Message(headers, b"body"))


@pytest.mark.parametrize(
    ("exchange", "key", "headers", "why", "target"),
    [
        (*RETRY, {}, "no-retry-queue", "mails"),
        (*DELAYED, {}, "no-subscriber", "shop.order_placed.v1"),
        (*DEAD, {}, "no-dead-queue", "mails"),
        ("events.undeliverable", "mails", TAKEN, "taken-from-dead-letters", "mails"),
        ("events.undeliverable", "mails", {}, "unknown", None),
        ("events.dead", "Not A Service", {}, "unknown", None),
        ("events.delay.v1.end", f"{BITS}.elsewhere.mails", {}, "unknown", None),
        ("events.delay.v1.end", f"{BITS}.retry.a.b", {}, "unknown", None),
        ("events.delay.v1.end", "short.key", {}, "unknown", None),
        ("staging.dead", "mails", {}, "unknown", None),
    ],
)
def test_exchange_and_key_say_where_it_was_going(
    exchange: str, key: str, headers: dict[str, object], why: str, target: str | None
) -> None:
    found = undelivered(exchange, key, **headers)

    assert (found.why, found.target) == (why, target)
    assert found.body == b"body"


@pytest.mark.parametrize(
    ("place", "goes_to"),
    [
        (RETRY, ("", "events.mails.retry")),
        (DELAYED, ("events", "shop.order_placed.v1")),
        (DEAD, ("", "events.mails.dead")),
        (("events", "x"), None),
    ],
)
def test_it_is_published_to_where_it_was_going(place: tuple[str, str], goes_to: tuple[str, str] | None) -> None:
    publication = again(NAMES, undelivered(*place), Message({}, b"body"))

    assert (publication and (publication.exchange, publication.key)) == goes_to


def test_a_retry_keeps_its_handler_and_attempt_and_loses_what_the_broker_wrote() -> None:
    ours = {header.HANDLER: "mail", header.ATTEMPT: 3}
    message = Message({**ours, "x-death": [{"queue": "q"}], "x-delivery-count": 1}, b"body")

    publication = again(NAMES, undelivered(*RETRY), message)

    assert publication is not None
    assert publication.message == Message(ours, b"body")


def test_a_dead_letter_keeps_the_reason_that_only_the_broker_had_noted() -> None:
    deaths = [
        {"queue": "events.mails.dead", "reason": "expired"},
        {"queue": "events.mails", "reason": "delivery_limit"},
    ]

    publication = again(NAMES, undelivered(*DEAD), Message({"x-death": deaths}, b"body"))

    assert publication is not None
    assert publication.message.headers[header.REASON] == "delivery-limit"
    assert "x-death" not in publication.message.headers


def test_our_own_reason_stays() -> None:
    ours = {header.REASON: "exhausted", header.ERROR: "why"}

    publication = again(NAMES, undelivered(*DEAD), Message({**ours, **TAKEN}, b"body"))

    assert publication is not None
    assert publication.message.headers == ours


def test_it_says_since_when_as_far_as_the_broker_does() -> None:
    assert undelivered("events.undeliverable", "mails", **TAKEN).since == WHEN
    assert undelivered(*RETRY).since is None


@given(st.text(max_size=60), st.text(max_size=60), st.dictionaries(st.text(max_size=9), st.text(max_size=9)))
def test_whatever_is_there_can_be_looked_at(exchange: str, key: str, headers: dict[str, str]) -> None:
    assert interpret(NAMES, exchange, key, Message(headers, b"body")).id


# ── on a broker ─────────────────────────────────────────────────────────────────────────────────────


class Placed(Event, name="placed"):
    order_id: int


async def listed() -> list[UndeliverableMessage]:
    async with Undeliverable(url=URL) as desk:
        return [message async for message in desk]


async def replayed() -> int:
    async with Undeliverable(url=URL) as desk:
        return await desk.replay()


async def test_what_came_without_a_subscriber_stays_until_there_is_one() -> None:
    service, handled = Service("shop"), asyncio.Event()

    @service.on("placed")
    async def bill(event: Placed) -> None:
        handled.set()

    async with Bus(URL) as bus:
        await bus.publish(Placed(order_id=1), delay=timedelta(milliseconds=1))
        async with asyncio.timeout(10):
            while not (found := await listed()):  # noqa: ASYNC110  # another program would have to ask, too
                await asyncio.sleep(0.005)

        assert [(message.why, message.target) for message in found] == [("no-subscriber", "placed.v1")]
        assert await replayed() == 0
        assert await listed() == found
        async with Worker(service, url=URL):
            assert await replayed() == 1
            await asyncio.wait_for(handled.wait(), 10)
        assert await listed() == []


async def test_what_has_a_queue_goes_there_bound_or_not_and_what_has_none_stays() -> None:
    unbound = Queue(NAMES.dead_queue("mails"), quorum())
    transport = MemoryTransport(URL)
    await transport.open(merge([shared(NAMES), Topology((), (unbound,))]), "apply")
    for exchange, key in (DEAD, RETRY):
        await transport.publish(Publication(exchange, key, Message({}, key.encode())), timeout_s=5)

    assert await replayed() == 1
    assert [message.why for message in await listed()] == ["no-retry-queue"]
    assert transport.embedded.depth(unbound.name) == 1
    await transport.close()


async def test_only_what_is_picked_goes() -> None:
    transport = MemoryTransport(URL)
    await transport.open(shared(NAMES), "apply")
    for service in ("mails", "audit"):
        await transport.publish(Publication("events.dead", service, Message({}, service.encode())), timeout_s=5)

    async with Undeliverable(url=URL) as desk:
        assert await desk.replay(lambda message: message.target == "nobody") == 0
        assert {message.target async for message in desk} == {"mails", "audit"}
    await transport.close()


async def test_a_desk_that_is_not_open_says_so() -> None:
    with pytest.raises(SetupError, match="use it inside `async with Undeliverable"):
        await Undeliverable(url=URL).replay()
