"""Messages of other programs, through a real RabbitMQ: written by pika and by the CloudEvents SDK, read by a worker;
and what the bus publishes, read by pika and the SDK.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pika
from cloudevents.core.bindings import amqp, rabbitmq
from cloudevents.core.v1.event import CloudEvent
from pika.adapters.blocking_connection import BlockingChannel

from eventbus import Bus, Envelope, Event, Service, Worker
from eventbus.dead_letters import DeadLetter, DeadLetters

NOON = datetime(2030, 1, 31, 12, 0, tzinfo=UTC)
DATA = b'{"order_id":7,"email":"ada@example.com"}'
JSON = "application/json"
STRUCTURED = "application/cloudevents+json"


class OrderPlaced(Event):
    order_id: int
    email: str


@dataclass(frozen=True)
class Foreign:
    """A message as another program publishes it."""

    headers: Mapping[str, object]
    body: bytes
    content_type: str | None = None
    timestamp: int | None = None


@dataclass
class Seen:
    envelopes: dict[str, Envelope] = field(default_factory=dict)
    orders: list[OrderPlaced] = field(default_factory=list)


def attributes(id: str, prefix: str = "cloudEvents_", **more: object) -> dict[str, object]:
    given = {"specversion": "1.0", "id": id, "source": "/legacy", "type": "order_placed.v1"}
    return {prefix + name: value for name, value in (given | more).items()}


def envelope(id: str, **more: Any) -> Envelope:
    return replace(
        Envelope(id=id, source="/legacy", type="order_placed.v1", time=NOON, datacontenttype=JSON, data=DATA), **more
    )


def by_amqp(message: amqp.AMQPMessage) -> Foreign:
    return Foreign(message.application_properties, message.application_data, message.properties.get("content-type"))


def by_rabbitmq(message: rabbitmq.RabbitMQMessage) -> Foreign:
    return Foreign(message.headers, message.body, message.content_type)


def sdk_event(id: str, content_type: str, data: Any) -> CloudEvent:
    given = {"id": id, "source": "/legacy", "type": "order_placed.v1", "time": NOON, "subject": "ada", "tenant": "t"}
    return CloudEvent(given | {"datacontenttype": content_type}, data)


TIME = "2030-01-31T12:00:00Z"
# What pika publishes, and the envelope that a worker must make of it.
BY_PIKA: list[tuple[Foreign, Envelope]] = [
    *(
        (Foreign(attributes(f"prefix {prefix}", prefix, time=TIME), DATA, JSON), envelope(f"prefix {prefix}"))
        for prefix in ("cloudEvents_", "cloudEvents:", "ce-", "ce_", "Ce-", "CLOUDEVENTS:")
    ),
    (Foreign(attributes("rfc", time="2030-01-31T14:00:00.000+02:00"), DATA, JSON), envelope("rfc")),
    (Foreign(attributes("timestamp", time=NOON), DATA, JSON), envelope("timestamp")),
    (Foreign(attributes("ms", time=int(NOON.timestamp() * 1000)), DATA, JSON), envelope("ms")),
    (Foreign(attributes("property"), DATA, JSON, int(NOON.timestamp())), envelope("property")),
    (Foreign(attributes("no type", time=TIME), DATA), envelope("no type", datacontenttype=None)),
    (
        Foreign(attributes("types", time=TIME, flag=True, n=-5, blob=b"\xff\xfe", at=NOON, nothing=None), DATA, JSON),
        envelope("types", extensions={"flag": True, "n": -5, "blob": "//4=", "at": TIME}),
    ),
    (
        Foreign(attributes("more", time=TIME) | {"traceparent": "00-a", "x-app": {"deep": [1, {}]}}, DATA, JSON),
        envelope("more"),
    ),
    (
        Foreign({}, json.dumps({**attributes("by hand", "", time=TIME), "data": {"order_id": 7}}).encode(), STRUCTURED),
        envelope("by hand", datacontenttype=None, data=b'{"order_id": 7}'),
    ),
    (
        Foreign({}, json.dumps({**attributes("b64", "", time=TIME), "data_base64": "//4="}).encode(), STRUCTURED),
        envelope("b64", datacontenttype=None, data=b"\xff\xfe"),
    ),
]

MODES: dict[str, Callable[[CloudEvent], Foreign]] = {
    "amqp binary": lambda event: by_amqp(amqp.to_binary_event(event)),
    "amqp structured": lambda event: by_amqp(amqp.to_structured_event(event)),
    "rabbitmq binary": lambda event: by_rabbitmq(rabbitmq.to_binary_event(event)),
    "rabbitmq structured": lambda event: by_rabbitmq(rabbitmq.to_structured_event(event)),
}
KINDS: dict[str, tuple[str, Any, bytes]] = {
    "json": (JSON, {"order_id": 7, "email": "ada@example.com"}, b'{"order_id": 7, "email": "ada@example.com"}'),
    "text": ("text/plain", "grün", "grün".encode()),
    "bytes": ("image/png", b"\xff\xfe\x00", b"\xff\xfe\x00"),
}
BY_SDK: list[tuple[Foreign, Envelope]] = [
    (
        write(sdk_event(f"{mode} {kind}", content_type, data)),
        envelope(f"{mode} {kind}", datacontenttype=content_type, data=body, subject="ada", extensions={"tenant": "t"}),
    )
    for mode, write in MODES.items()
    for kind, (content_type, data, body) in KINDS.items()
]


@contextmanager
def pika_channel(url: str) -> Iterator[BlockingChannel]:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        connection.close()


def publish_by_pika(url: str, messages: list[Foreign]) -> None:
    with pika_channel(url) as channel:
        for message in messages:
            properties = pika.BasicProperties(
                headers=dict(message.headers), content_type=message.content_type, timestamp=message.timestamp
            )
            channel.basic_publish("events", "order_placed.v1", message.body, properties, mandatory=True)


def listening(seen: Seen) -> Service[None]:
    service = Service("listening")

    @service.on("#")
    async def keep(envelope: Envelope) -> None:
        seen.envelopes[envelope.id] = envelope

    return service


def ordering(seen: Seen) -> Service[None]:
    service = Service("ordering")

    @service.on("order_placed")
    async def order(event: OrderPlaced) -> None:
        seen.orders.append(event)

    return service


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  # what is waited for comes from another process
            await asyncio.sleep(0.05)


async def test_messages_of_pika_and_of_the_sdk_are_handled_in_every_mode(rabbitmq_url: str) -> None:
    seen, written = Seen(), BY_PIKA + BY_SDK
    expected = {envelope.id: envelope for _, envelope in written}
    before = datetime.now(UTC)

    async with Worker(listening(seen), url=rabbitmq_url):
        timeless = Foreign(attributes("timeless"), DATA, JSON)
        await asyncio.to_thread(publish_by_pika, rabbitmq_url, [*(foreign for foreign, _ in written), timeless])
        await until(lambda: len(seen.envelopes) > len(expected))

    came = seen.envelopes.pop("timeless").time
    assert seen.envelopes == expected
    assert before <= came <= datetime.now(UTC)


async def test_foreign_data_are_read_as_the_handlers_event(rabbitmq_url: str) -> None:
    seen = Seen()
    readable = [foreign for foreign, envelope in BY_PIKA + BY_SDK if b"email" in envelope.data]

    async with Worker(ordering(seen), url=rabbitmq_url):
        await asyncio.to_thread(publish_by_pika, rabbitmq_url, readable)
        await until(lambda: len(seen.orders) == len(readable))

    assert set(seen.orders) == {OrderPlaced(order_id=7, email="ada@example.com")}


BAD: list[tuple[Foreign, str, str]] = [
    (Foreign({}, b"\xff\x00garbage"), "invalid-envelope", "no CloudEvents attributes"),
    (Foreign({"id": "1"}, b"{}", JSON), "invalid-envelope", "no CloudEvents attributes"),
    (Foreign({}, b"[]", "application/cloudevents-batch+json"), "invalid-envelope", "one event per message"),
    (Foreign({}, b'{"id":"\xff"}', STRUCTURED), "invalid-envelope", "not UTF-8"),
    (Foreign({}, b"{", STRUCTURED), "invalid-envelope", "no JSON object"),
    (Foreign(attributes("v", specversion="0.3"), DATA, JSON), "invalid-envelope", "'specversion' is '0.3'"),
    (Foreign(attributes(""), DATA, JSON), "invalid-envelope", "'id' is empty"),
    (Foreign(attributes("n", source=7), DATA, JSON), "invalid-envelope", "'source' is a value of type int"),
    (Foreign(attributes("m") | {"ce-id": "m"}, DATA, JSON), "invalid-envelope", "mix the prefixes"),
    (Foreign(attributes("t", time="now"), DATA, JSON), "invalid-envelope", "'time' is no time"),
    (Foreign(attributes("text"), DATA, "text/plain"), "invalid-data", "'text/plain'"),
    (Foreign(attributes("utf"), b'{"email":"\xff"}', JSON), "invalid-data", "no JSON (invalid unicode"),
    (Foreign(attributes("fit"), b'{"email":"ada@example.com"}', JSON), "invalid-data", "order_id: missing"),
    (Foreign(attributes("list"), b"[]", JSON), "invalid-data", "model_type"),
]


async def test_what_cannot_be_read_is_dead_lettered_untouched_and_the_next_is_handled(rabbitmq_url: str) -> None:
    seen = Seen()
    good = Foreign(attributes("good"), DATA, JSON)

    async with Worker(ordering(seen), url=rabbitmq_url):
        await asyncio.to_thread(publish_by_pika, rabbitmq_url, [*(foreign for foreign, _, _ in BAD), good])
        await until(lambda: bool(seen.orders))
        letters = await dead_letters(rabbitmq_url, len(BAD))

    found = {(letter.body, str(letter.headers.get("cloudEvents_id"))): letter for letter in letters}
    for foreign, reason, said in BAD:
        letter = found.pop((foreign.body, str(foreign.headers.get("cloudEvents_id"))))
        assert letter.reason == reason
        assert said in letter.error
        assert "ada@example.com" not in letter.error
        assert foreign.headers.items() <= letter.headers.items()
    assert not found


async def dead_letters(url: str, count: int) -> list[DeadLetter]:
    async with DeadLetters("ordering", url=url) as dead, asyncio.timeout(60):
        while len(letters := [letter async for letter in dead]) < count:  # noqa: ASYNC110  # as above
            await asyncio.sleep(0.05)
    return letters


async def test_what_the_bus_publishes_is_read_by_pika_and_the_sdk_as_the_same_event(rabbitmq_url: str) -> None:
    event = OrderPlaced(order_id=7, email="ada@example.com")
    foreign = envelope("png", datacontenttype="image/png", data=b"\xff\xfe\x00", dataschema="https://a.b/c")

    async with Bus(rabbitmq_url, source="/shop") as bus:
        with pika_channel(rabbitmq_url) as channel:
            queue = str(channel.queue_declare("", exclusive=True).method.queue)
            channel.queue_bind(queue, "events", "#")
            channel.queue_bind(queue, "events.delay.v1.end", "*." * 24 + "publish.#")
            sent = [
                await bus.publish(event, subject="grün", extensions={"tenant": "t", "n": -5, "flag": True}),
                await bus.publish(event, delay=timedelta(milliseconds=250)),
                await bus.publish(foreign),
            ]
            got = [await taken(channel, queue) for _ in sent]

    assert sorted(read_by_sdk(*message) for message in got) == sorted(facts(one.to_cloudevent()) for one in sent)
    assert all(properties.delivery_mode == 2 for properties, _ in got)
    message_ids = {properties.message_id for properties, _ in got}
    assert len(message_ids) == len(sent)
    assert not message_ids & {envelope.id for envelope in sent}


async def taken(channel: BlockingChannel, queue: str) -> tuple[pika.BasicProperties, bytes]:
    async with asyncio.timeout(30):
        while True:
            got: tuple[Any, Any, Any] = channel.basic_get(queue, auto_ack=True)  # its stubs have the types wrong
            if got[0] is not None:
                return got[1], got[2]
            await asyncio.sleep(0.05)


def read_by_sdk(properties: pika.BasicProperties, body: bytes) -> tuple[str, dict[str, Any], object]:
    given = {} if properties.content_type is None else {"content-type": properties.content_type}
    event = amqp.from_amqp_event(amqp.AMQPMessage(given, dict(properties.headers or {}), body))
    return facts(event)


def facts(event: CloudEvent) -> tuple[str, dict[str, Any], object]:
    """Everything about *event*, its id first."""
    return event.get_id(), event.get_attributes(), event.get_data()
