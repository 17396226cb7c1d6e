"""A connection, a channel or a queue that is lost alone: what was confirmed is delivered, and what was acked is not
delivered again but for what was under way.

What breaks the whole broker, or its settings, needs one of its own: `tests/faults/test_sessions.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from eventbus.errors import TopologyConflict
from eventbus.topology import merge
from tests.contract.bench import (
    DEADLINE_S,
    LOSES_PARTS,
    SEES_A_NEW_QUEUE,
    Bench,
    Inbox,
    acking,
    numbered,
    publish,
    publish_by,
    queue_of,
    say,
    say_all,
)
from tests.servers import ServerError

pytestmark = pytest.mark.needs(LOSES_PARTS)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # it happens in another process
            await asyncio.sleep(0.02)


async def test_a_queue_deleted_under_a_consumer_costs_its_other_queues_nothing(bench: Bench) -> None:
    """The broker cancels one consumer. Its queue is declared again, and the other one goes on where it was."""
    topology = [queue_of("q"), queue_of("p")]
    transport = await bench.open(*topology)
    inbox, bodies = Inbox(), numbered(500, "p")
    consumer, _ = await bench.consume(transport, "q", "p", deliver=acking(inbox), topology=merge(topology))
    await publish(transport, [say("before")])
    await inbox.holds(1)
    publishing = asyncio.create_task(publish_by(10, transport, say_all(bodies, "p")))

    await bench.delete_queue("q")
    await until(lambda: "q" in consumer.missing())
    await publishing
    async with asyncio.timeout(DEADLINE_S):
        while not await transport.publish(say("after"), timeout_s=DEADLINE_S):  # noqa: ASYNC110  # no queue yet
            await asyncio.sleep(0.02)
    await inbox.has_seen([*bodies, b"after"])
    await until(lambda: consumer.missing() == {})


async def test_a_queue_created_again_with_other_arguments_ends_its_consumer(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, _ = await bench.consume(transport, "q", topology=queue_of("q"))
    ending = asyncio.create_task(consumer.wait())

    async with asyncio.timeout(DEADLINE_S):
        while True:
            await bench.delete_queue("q")
            await until(lambda: "q" in consumer.missing())  # sooner, 3.10 would tell it nothing
            try:
                await bench.api("PUT", "q", created_with(delivery_limit=7))
            except ServerError:
                continue  # the consumer was faster, and has declared it as it was
            break
        with pytest.raises(TopologyConflict, match="x-delivery-limit"):
            await ending
    assert "x-delivery-limit" in consumer.missing()["q"]


@pytest.mark.needs(SEES_A_NEW_QUEUE)
async def test_a_queue_that_somebody_created_again_at_once_is_consumed_on(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    inbox = Inbox()
    await bench.consume(transport, "q", deliver=acking(inbox), topology=queue_of("q"))
    await bench.delete_queue("q")
    await bench.api("PUT", "q", created_with(delivery_limit=100))
    async with asyncio.timeout(DEADLINE_S):
        for body in numbered(10):
            while not await transport.publish(say(body, exchange=""), timeout_s=DEADLINE_S):  # noqa: ASYNC110  # nobody tells
                await asyncio.sleep(0.02)

    await inbox.has_seen(numbered(10))


def created_with(*, delivery_limit: int) -> dict[str, object]:
    return {"durable": True, "arguments": {"x-queue-type": "quorum", "x-delivery-limit": delivery_limit}}


async def test_what_a_consumer_held_that_vanished_goes_to_another_one(bench: Bench) -> None:
    """Its side of the connection stays open and silent, as when its computer was unplugged for the broker alone."""
    transport = await bench.open(queue_of("q"))
    proxy, through = await bench.proxy()
    vanishing, held = await bench.consume_widely(
        transport, "q", prefetch=10, on=await bench.open(declare="never", url=through)
    )
    bodies = numbered(10)
    await publish(transport, say_all(bodies))
    await held.holds(10)

    proxy.leave_half_open()
    held.deliveries[0].ack()  # it does not know yet, and nobody hears it
    other, elsewhere = await bench.consume_and_ack(transport, "q")
    await elsewhere.holds(10)
    assert {delivery.message.body: delivery.count for delivery in elsewhere.deliveries} == dict.fromkeys(bodies, 1)
    await other.close()

    await until(lambda: not held.deliveries[0].is_live)
    held.deliveries[1].ack()  # too late, and harmless
    held.deliveries.clear()
    await publish(transport, [say("after")])
    assert [delivery.message.body for delivery in await held.holds(1)] == [b"after"]
    await until(lambda: vanishing.missing() == {})


PUBLISHERS, PREFETCH, CUTS = 20, 30, 5


async def test_connections_cut_again_and_again_lose_nothing_that_was_confirmed(
    bench: Bench, tell: Callable[[str], None]
) -> None:
    proxy, through = await bench.proxy()
    transport = await bench.open(queue_of("q"), url=through)
    inbox, bodies = Inbox(), numbered(2000)
    await bench.consume(transport, "q", prefetch=PREFETCH, deliver=acking(inbox))
    publishing = asyncio.create_task(publish_by(PUBLISHERS, transport, say_all(bodies)))

    for cut in range(1, CUTS + 1):
        await inbox.holds(cut * 250)
        proxy.cut()
    await publishing
    await inbox.has_seen(bodies)

    # What had no confirm is published again, and what had no ack is handed out again: nothing else may come twice.
    twice = len(inbox.deliveries) - len(bodies)
    assert twice <= CUTS * (PUBLISHERS + PREFETCH)
    tell(f"{CUTS} cuts among 2,000 messages: {twice} came again")
