"""What is published arrives unchanged, is refused before it is sent, or is told to have had no queue."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from eventbus.message import Message
from eventbus.topology import Binding, Topology
from eventbus.transport.base import Delivery, NotPublished, Publication, Unpublishable
from tests.contract.bench import (
    DEADLINE_S,
    Bench,
    Inbox,
    acking,
    content,
    look,
    numbered,
    publish,
    queue_of,
    say,
    say_all,
)


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
        await transport.publish(say("astray", exchange="absent"), timeout_s=DEADLINE_S)

    assert not caught.value.maybe_stored


# ── confirmed, returned, refused ─────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_confirmed_is_in_its_queue(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))

    for count, body in enumerate(numbered(20), start=1):
        assert await transport.publish(say(body), timeout_s=DEADLINE_S)
        found = await look(transport, "q")  # at once: nothing is waited for
        assert len(found) == count
        assert found[-1].message.body == body


async def test_a_publish_that_breaks_the_channel_takes_no_other_with_it(bench: Bench) -> None:
    """An exchange that does not exist is a channel error on RabbitMQ: whatever was outstanding is published again."""
    transport = await bench.open(queue_of("q"))
    in_hand, others = Inbox(), Inbox()

    def deliver(delivery: Delivery) -> None:
        (in_hand if delivery.message.body == b"in hand" else acking(others))(delivery)

    await bench.consume(transport, "q", deliver=deliver)
    await publish(transport, [say("in hand")])
    (held,) = await in_hand.holds(1)
    bodies = numbered(200)
    mixed = say_all(bodies)
    for number, place in enumerate((70, 201)):
        mixed.insert(place, say("astray", exchange=f"absent-{number}"))

    answers = await asyncio.gather(
        *[transport.publish(each, timeout_s=DEADLINE_S) for each in mixed], return_exceptions=True
    )

    assert [isinstance(a, NotPublished) for a in answers] == [each.exchange != "x" for each in mixed]
    assert [answer for answer in answers if not isinstance(answer, NotPublished)] == [True] * 200
    assert held.is_live  # consuming has a connection of its own
    held.ack()
    await others.has_seen(bodies)


async def test_a_full_queue_refuses_publishes_until_there_is_room(bench: Bench) -> None:
    transport = await bench.open_with_room_for(20)
    confirmed = numbered(20)
    assert await publish(transport, say_all(confirmed)) == [True] * 20

    async def fill() -> None:
        for body in numbered(500, "more "):
            assert await transport.publish(say(body), timeout_s=2)
            confirmed.append(body)

    with pytest.raises(NotPublished) as caught:
        await fill()
    assert caught.value.timed_out
    refused = f"more {len(confirmed) - 20}".encode()

    patient = numbered(5, "patient ")
    publishing = asyncio.create_task(publish(transport, say_all(patient)))
    await asyncio.sleep(0)
    _, inbox = await bench.consume_and_ack(transport, "q", prefetch=5)

    assert await publishing == [True] * 5
    await inbox.has_seen([*confirmed, *patient])
    assert inbox.tally - Counter([refused]) == Counter([*confirmed, *patient])
    assert caught.value.maybe_stored or refused not in inbox.tally


# ── up to the limits ─────────────────────────────────────────────────────────────────────────────────────────────────


LONGEST_KEYS = {
    "one word": "k" * 255,
    "two bytes each": "ü" * 127 + "k",
    "four bytes each": "𝄞" * 63 + "end",
    "128 words": ".".join("w" * 128),
    "nothing but blanks": " " * 255,
}


@pytest.mark.parametrize("key", LONGEST_KEYS.values(), ids=LONGEST_KEYS)
async def test_a_key_of_the_greatest_length_arrives_as_it_was(bench: Bench, key: str) -> None:
    assert len(key.encode()) == 255
    transport = await bench.open(queue_of("q", key=key), queue_of("p", key="#"))

    assert await transport.publish(say("far", key), timeout_s=DEADLINE_S)
    assert await transport.publish(say("near", key[:-1]), timeout_s=DEADLINE_S)

    assert [(found.message.body, found.key) for found in await content(transport, "q", 1)] == [(b"far", key)]
    assert {found.key for found in await content(transport, "p", 2)} == {key, key[:-1]}


def scalar(chance: random.Random) -> object:
    """Any scalar that a header of ours may have, the borders more often than by chance."""
    borders = [2**bits - less for bits in (0, 7, 8, 15, 16, 31, 32, 63) for less in (0, 1) if 2**bits - less < 2**63]
    alphabet = "a ~\0\n\x7f\x80éß☃￿𝄞🧑‍🚀"
    match chance.randrange(4):
        case 0:
            return chance.random() < 0.5
        case 1:
            return chance.choice([1, -1]) * chance.choice([*borders, chance.randrange(2**63)])
        case 2:
            return "".join(chance.choices(alphabet, k=chance.choice([0, 1, 7, 255, 256, 1000])))
        case _:
            return chance.choice([-(2**63), -(2**31), -(2**15), -128, 0, 2**63 - 1])


async def test_headers_of_any_scalars_arrive_as_they_were(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    chance = random.Random(20)
    sent = {
        body: {f"é{n}".ljust(chance.choice([1, 40, 126]), "n"): scalar(chance) for n in range(chance.randrange(15))}
        for body in numbered(300)
    }
    _, inbox = await bench.consume_and_ack(transport, "q")

    await publish(transport, [Publication("x", "q", Message(headers, body)) for body, headers in sent.items()])
    await inbox.holds(300)

    assert inbox.tally == Counter(list(sent))
    for delivery in inbox.deliveries:
        wanted, got = sent[delivery.message.body], delivery.message.headers
        assert dict(got) == wanted
        assert {name: type(value) for name, value in got.items()} == {n: type(value) for n, value in wanted.items()}


async def test_a_body_of_the_greatest_size_arrives_and_one_byte_more_is_refused(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    limit = transport.broker.max_message_bytes
    body = random.Random(limit).randbytes(1 << 20) * (limit >> 20)
    assert len(body) == limit

    assert await transport.publish(say(body), timeout_s=DEADLINE_S)
    with pytest.raises(Unpublishable, match=str(limit)):
        await transport.publish(say(body + b"!"), timeout_s=DEADLINE_S)
    _, inbox = await bench.consume_and_ack(transport, "q")
    (delivery,) = await inbox.holds(1)

    assert len(delivery.message.body) == limit
    assert hashlib.sha256(delivery.message.body).digest() == hashlib.sha256(body).digest()
