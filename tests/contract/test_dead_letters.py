"""What is given up is kept: its bytes and headers as they came, and beside them what it died of."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta

import pytest

from eventbus.message import Message
from eventbus.topology import Binding, Exchange, Queue, Topology, quorum
from eventbus.transport.base import Delivery, Publication, Transport
from tests.contract.bench import (
    DEADLINE_S,
    MAIL,
    Bench,
    Inbox,
    acking,
    content,
    later,
    numbered,
    publish,
    queue_of,
    say,
)


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
    transport = await bench.open(dead, queue_of("q", quorum(dead_letter_to="dlx", delivery_limit=2)))
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


async def test_a_dead_letter_for_an_unknown_service_is_kept_as_undeliverable(bench: Bench) -> None:
    transport = await bench.open(MAIL)
    await publish(transport, [say("whose?", "nobody", "events.dead")])

    assert len(await content(transport, "events.undeliverable", 1)) == 1


# ── bytes and headers ────────────────────────────────────────────────────────────────────────────────────────────────

GARBAGE = {
    "no UTF-8": b"\xff\xfe\xfd",
    "half a character": "☃".encode()[:2],
    "JSON that ends too early": b'{"order_id": ',
    "something else's": bytes(range(256)) * 300,
    "nothing": b"",
    "zeros": bytes(4096),
}
HEADERS = {
    "text": "ünïcode ☃ 𝄞",
    "empty": "",
    "yes": True,
    "no": False,
    "least": -(2**63),
    "most": 2**63 - 1,
    "x-eventbus-attempt": 3,
    "cloudEvents_type": "not.a.type",
    "n" * 128: "long",
}


@pytest.mark.parametrize("body", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("cause", ["rejected", "delivery_limit", "expired"])
async def test_whatever_it_died_of_a_message_keeps_its_bytes_and_headers(bench: Bench, cause: str, body: bytes) -> None:
    graveyard = Topology(
        (Exchange("dlx", "fanout"),), (Queue("dead", quorum()),), (Binding("dlx", "dead", "queue", ""),)
    )
    deadly = quorum({"x-message-ttl": 1} if cause == "expired" else {}, dead_letter_to="dlx", delivery_limit=1)
    transport = await bench.open(graveyard, queue_of("q", deadly))
    sent = Message(HEADERS, body, "application/octet-stream", {"correlation_id": "c-1", "app_id": "app"})

    assert await transport.publish(Publication("x", "q", sent), timeout_s=DEADLINE_S)
    await die(bench, transport, cause)

    (dead,) = await content(transport, "dead", 1)
    assert dead.message.body == body
    assert dead.message.content_type == sent.content_type
    assert {name: dead.message.headers[name] for name in HEADERS} == HEADERS
    assert {name: dead.message.properties[name] for name in sent.properties} == sent.properties
    assert (dead.message.headers["x-first-death-queue"], dead.message.headers["x-first-death-reason"]) == ("q", cause)
    deaths = dead.message.headers["x-death"]
    assert isinstance(deaths, list)
    assert [(d["queue"], d["reason"], d["count"], d["exchange"], d["routing-keys"]) for d in deaths] == [
        ("q", cause, 1, "x", ["q"])
    ]


async def die(bench: Bench, transport: Transport, cause: str) -> None:
    """See to it that the one message in `q` dies."""
    if cause == "expired":
        return  # within a millisecond
    for _ in range(2 if cause == "delivery_limit" else 1):
        consumer, inbox = await bench.consume(transport, "q")
        (delivery,) = await inbox.holds(1)
        if cause == "rejected":
            delivery.reject()
        await consumer.close()


async def test_garbage_among_good_ones_is_given_up_to_the_byte(bench: Bench) -> None:
    transport = await bench.open(MAIL)
    good, acked = numbered(300), Inbox()
    bad = [body + bytes([number]) for number, body in enumerate(GARBAGE.values(), start=128) for _ in range(5)]

    def deliver(delivery: Delivery) -> None:
        if delivery.message.body in good:
            acking(acked)(delivery)
        else:
            delivery.reject()

    await bench.consume(transport, "events.mail", prefetch=20, deliver=deliver)
    mixed = [body for ten in range(30) for body in (*good[ten * 10 : ten * 10 + 10], bad[ten])]
    await publish(transport, [say(body, "order_placed.v1", "events") for body in mixed])
    dead = await content(transport, "events.mail.dead", len(bad))
    await acked.holds(300)

    assert Counter(letter.message.body for letter in dead) == Counter(bad)
    assert acked.tally == Counter(good)
    assert {delivery.count for delivery in acked.deliveries} == {0}


async def test_each_further_death_stands_before_the_earlier_ones(bench: Bench) -> None:
    transport = await bench.open(MAIL)

    await publish(transport, [later(timedelta(milliseconds=750), "retry.nobody", "waited in two queues")])

    (waited,) = await content(transport, "events.undeliverable", 1)
    deaths = waited.message.headers["x-death"]
    assert isinstance(deaths, list)
    assert [(death["queue"], death["reason"], death["count"]) for death in deaths] == [
        ("events.delay.v1.00", "expired", 1),
        ("events.delay.v1.01", "expired", 1),
    ]
    assert waited.message.headers["x-first-death-queue"] == "events.delay.v1.01"
