"""Looking at what waits and at what passes takes nothing, changes nothing and leaves nothing behind."""

from __future__ import annotations

import asyncio

import pytest

from eventbus.errors import SetupError
from tests.contract.bench import DEADLINE_S, Bench, content, publish, queue_of, say


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
    bodies = [str(n).encode() for n in range(100)]  # a broker may keep the order of a few by chance
    for body in bodies:
        await publish(transport, [say(body.decode())])

    async with transport.browse("q") as browsed:
        assert [delivery.message.body async for delivery in browsed] == bodies

    assert [found.message.body for found in await content(transport, "q", 100)] == bodies


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
