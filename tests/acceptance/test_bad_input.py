"""Whatever somebody publishes: it ends in the dead letters with its reason and its body untouched, and the next good
message is handled. Written raw, by another client, to a real RabbitMQ.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pika
import pytest
from pika.adapters.blocking_connection import BlockingChannel

from eventbus import Bus, Event, Retry, Service, Worker
from eventbus.dead_letters import DeadLetter, DeadLetters
from tests.rig import until
from tests.servers import BrokerServer


class Placed(Event, name="placed"):
    order_id: int


class Known(Event, name="foreign.known"):
    pass


@dataclass
class Shop:
    url: str
    service: Service
    handled: list[int] = field(default_factory=list)

    async def letters(self, number: int) -> list[DeadLetter]:
        """Its dead letters, once there are *number*."""
        async with asyncio.timeout(20), DeadLetters("shop", url=self.url) as dead:
            while len(found := [letter async for letter in dead]) < number:  # noqa: ASYNC110  # a broker is asked
                await asyncio.sleep(0.05)
        return found


@pytest.fixture
def rabbitmq_url(every_line: BrokerServer) -> str:
    """A fresh virtual host on each broker line, one after the other."""
    return every_line.new_vhost()


@pytest.fixture
def shop(rabbitmq_url: str) -> Shop:
    service = Service("shop", retry=Retry(attempts=2, delay=timedelta(milliseconds=1)))
    shop = Shop(rabbitmq_url, service)

    @service.on("placed")
    async def handle(event: Placed) -> None:
        shop.handled.append(event.order_id)

    @service.on("foreign.#")
    async def follow(event: Known) -> None: ...

    return shop


@contextmanager
def pika_channel(url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        connection.close()


def publish(url: str, key: str, headers: dict[str, Any], body: bytes, content_type: str | None) -> None:
    with pika_channel(url) as channel:
        properties = pika.BasicProperties(headers=headers, content_type=content_type)
        channel.basic_publish("events", key, body, properties, mandatory=True)


def attributes(**changed: Any) -> dict[str, Any]:
    """Good ones, but for what is *changed*; None leaves an attribute out."""
    good = {"specversion": "1.0", "id": "1", "source": "/x", "type": "placed.v1"}
    return {f"cloudEvents_{name}": value for name, value in (good | changed).items() if value is not None}


GOOD = b'{"order_id": 1}'
JSON = "application/json"
BAD: dict[str, tuple[dict[str, Any], bytes, str | None, str]] = {
    # what: headers, body, content type, reason
    "garbage": ({}, bytes(range(256)) * 40, None, "invalid-envelope"),
    "nothing at all": ({}, b"", None, "invalid-envelope"),
    "no id": (attributes(id=None), GOOD, JSON, "invalid-envelope"),
    "no source": (attributes(source=None), GOOD, JSON, "invalid-envelope"),
    "no type": (attributes(type=None), GOOD, JSON, "invalid-envelope"),
    "no specversion": (attributes(specversion=None), GOOD, JSON, "invalid-envelope"),
    "another specversion": (attributes(specversion="0.3"), GOOD, JSON, "invalid-envelope"),
    "an id that is a number": (attributes(id=7), GOOD, JSON, "invalid-envelope"),
    "an empty id": (attributes(id=""), GOOD, JSON, "invalid-envelope"),
    "a source that is no URI": (attributes(source="not a uri"), GOOD, JSON, "invalid-envelope"),
    "a time that is none": (attributes(time="yesterday"), GOOD, JSON, "invalid-envelope"),
    "an extension with a bad name": (attributes(**{"Bad-Name": "x"}), GOOD, JSON, "invalid-envelope"),
    "two kinds of prefixes": (attributes() | {"ce-id": "1"}, GOOD, JSON, "invalid-envelope"),
    "structured and not JSON": ({}, b"{", "application/cloudevents+json", "invalid-envelope"),
    "structured and not UTF-8": ({}, b'{"id": "\xff"}', "application/cloudevents+json", "invalid-envelope"),
    "a batch": ({}, b"[]", "application/cloudevents-batch+json", "invalid-envelope"),
    "a content type that is not JSON": (attributes(), GOOD, "text/xml", "invalid-data"),
    "no JSON": (attributes(), b"{not json", JSON, "invalid-data"),
    "invalid UTF-8": (attributes(), b'{"order_id": "\xff\xfe"}', JSON, "invalid-data"),
    "no body": (attributes(), b"", JSON, "invalid-data"),
    "a missing field": (attributes(), b"{}", JSON, "invalid-data"),
    "a field of another type": (attributes(), b'{"order_id": "MARKER"}', JSON, "invalid-data"),
    "an unknown version": (attributes(type="placed.v9"), GOOD, JSON, "unknown-version"),
    "an unknown type": (attributes(type="foreign.thing"), GOOD, JSON, "unknown-version"),
    "a type that is not the key": (attributes(type="gone.v1"), GOOD, JSON, "no-handler"),
}


async def test_every_kind_of_bad_input_ends_in_the_dead_letters_and_the_good_is_handled(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    async with Worker(shop.service, url=shop.url), Bus(shop.url) as bus:
        for number, (headers, body, content_type, _) in enumerate(BAD.values()):
            type_ = str(headers.get("cloudEvents_type", ""))
            key = type_ if type_.startswith("foreign.") else "placed.v9" if type_ == "placed.v9" else "placed.v1"
            await asyncio.to_thread(publish, shop.url, key, {**headers, "x-case": number}, body, content_type)
            await bus.publish(Placed(order_id=number))
        letters = await shop.letters(len(BAD))
        await until(lambda: len(shop.handled) >= len(BAD), "the good ones in between")

    assert sorted(shop.handled) == list(range(len(BAD)))
    by_case = {letter.headers["x-case"]: letter for letter in letters}
    told = {what: (by_case[n].reason, by_case[n].body) for n, what in enumerate(BAD)}
    assert told == {what: (reason, body) for what, (_, body, _, reason) in BAD.items()}
    assert all(letter.error and "\n" not in letter.error for letter in letters)
    assert all((letter.envelope is None) == (letter.reason == "invalid-envelope") for letter in letters)
    assert "MARKER" not in "".join(letter.error + letter.trace for letter in letters) + caplog.text


async def test_what_is_over_the_limit_to_be_published_again_is_moved_by_the_broker(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVENTBUS_MAX_MESSAGE_BYTES", "1000")
    body = b'{"order_id": "' + b"x" * 5000 + b'"}'

    async with Worker(shop.service, url=shop.url), Bus(shop.url) as bus:
        await asyncio.to_thread(publish, shop.url, "placed.v1", attributes(), body, JSON)
        await bus.publish(Placed(order_id=2))
        (letter,) = await shop.letters(1)
        await until(lambda: shop.handled == [2])

    assert (letter.reason, letter.body) == ("rejected", body)
    assert letter.error == "rejected to the broker: no copy of it could be published"


async def test_a_raw_reject_is_a_dead_letter_that_can_be_replayed(shop: Shop) -> None:
    async with Worker(shop.service, url=shop.url):
        pass  # its queues exist from now on
    await asyncio.to_thread(publish, shop.url, "placed.v1", attributes(), GOOD, JSON)

    await asyncio.to_thread(settle_by_hand, shop.url, times=1, requeue=False)

    (letter,) = await shop.letters(1)
    assert (letter.reason, letter.body, letter.attempts) == ("rejected", GOOD, 1)
    assert letter.envelope is not None
    async with Worker(shop.service, url=shop.url), DeadLetters("shop", url=shop.url) as dead:
        assert await dead.replay() == 1
        await until(lambda: shop.handled == [1])


async def test_a_reached_delivery_limit_is_a_dead_letter(shop: Shop) -> None:
    async with Worker(shop.service, url=shop.url):
        pass
    await asyncio.to_thread(publish, shop.url, "placed.v1", attributes(), GOOD, JSON)

    await asyncio.to_thread(settle_by_hand, shop.url, times=101, requeue=True)

    (letter,) = await shop.letters(1)
    assert (letter.reason, letter.body) == ("delivery-limit", GOOD)
    assert letter.error == "its workers ended in the middle of it, again and again"


def settle_by_hand(url: str, *, times: int, requeue: bool) -> None:
    """Take the message of the shop's queue and reject it, again and again."""
    with pika_channel(url) as channel:
        deliveries = channel.consume("events.shop", inactivity_timeout=20)
        for method, _, _ in itertools.islice(deliveries, times):
            assert method is not None
            assert method.delivery_tag is not None
            channel.basic_reject(method.delivery_tag, requeue=requeue)
        channel.cancel()
