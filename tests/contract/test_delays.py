"""A delayed message is never early, blocks no other, and arrives where it was meant to."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta

import pytest

from eventbus.delay import LEVELS, UNIT, rounded
from eventbus.topology import of_service
from eventbus.transport.base import Delivery
from tests.contract.bench import (
    AUDIT,
    DEADLINE_S,
    MAIL,
    NAMES,
    Bench,
    Inbox,
    acking,
    content,
    later,
    numbered,
    publish,
)


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


async def test_what_is_due_first_arrives_first(bench: Bench) -> None:
    """Whatever way they take through the tree: the longest is sent first, and the gaps are wider than any lateness."""
    transport = await bench.open(MAIL)
    _, inbox = await bench.consume_and_ack(transport, "events.mail.retry", prefetch=1)

    longest_first = [later(units * UNIT, "retry.mail", str(units)) for units in (22, 10, 0)]  # three hops, two, none
    await publish(transport, longest_first)
    await inbox.holds(3)

    assert inbox.bodies == [b"0", b"10", b"22"]


async def test_ten_thousand_mixed_delays_are_never_early_and_none_blocks_another(
    bench: Bench, tell: Callable[[str], None]
) -> None:
    transport = await bench.open(MAIL)
    arrived, sent, due = dict[bytes, float](), dict[bytes, float](), dict[bytes, float]()
    inbox = Inbox()

    def deliver(delivery: Delivery) -> None:
        arrived.setdefault(delivery.message.body, time.monotonic())
        acking(inbox)(delivery)

    async def publish_later(units: int, body: bytes) -> None:
        sent[body] = time.monotonic()
        due[body] = sent[body] + rounded(units * UNIT).total_seconds()
        assert await transport.publish(later(units * UNIT, "retry.mail", body), timeout_s=DEADLINE_S)

    # In front of the line on every level: who waits behind the head of a queue waits until tomorrow.
    for level in range(10, LEVELS):
        await publish_later(2**level, b"long after, %d" % level)
    await bench.consume(transport, "events.mail.retry", prefetch=500, deliver=deliver)
    bodies, chance = numbered(10_000), random.Random(7)
    units_of = {body: chance.choice([0, 1, 2, 3, 5, 7, 8, 11, 12, 14, 16]) for body in bodies}
    async with asyncio.TaskGroup() as publishers:
        for number in range(20):
            publishers.create_task(publish_in_turn(publish_later, units_of, bodies[number::20]))
    await inbox.has_seen(bodies)

    late_s = sorted(arrived[body] - due[body] for body in bodies)
    assert late_s[0] >= 0
    assert inbox.tally == Counter(bodies)
    tell(
        f"10,000 mixed delays, late by {late_s[5000]:.2f} s in the middle, {late_s[9900]:.2f} s p99, {late_s[-1]:.2f} s"
    )


async def publish_in_turn(
    publish_later: Callable[[int, bytes], Awaitable[None]], units_of: dict[bytes, int], bodies: list[bytes]
) -> None:
    for body in bodies:
        await publish_later(units_of[body], body)
