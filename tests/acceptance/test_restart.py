"""Programs that are killed, and programs of different ages, on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import pytest

from eventbus import Bus, Envelope, Event, Retry, Service, Worker
from eventbus.dead_letters import DeadLetter, DeadLetters
from tests.rig import until
from tests.servers import BrokerServer


class Placed(Event, name="placed"):
    order_id: int


class PlacedV2(Event, name="placed", version=2):
    order_id: int


@pytest.fixture
def rabbitmq_url(every_line: BrokerServer) -> str:
    """A fresh virtual host on each broker line, one after the other."""
    return every_line.new_vhost()


PAYMENTS = """
    import asyncio, sys
    from eventbus import Context, Event, Service, run

    class Placed(Event, name="placed"):
        order_id: int

    class Captured(Event, name="captured"):
        order_id: int

    payments = Service("payments")

    @payments.on("placed")
    async def capture(event: Placed, context: Context) -> None:
        await context.publish(Captured(order_id=event.order_id))
        print("published", flush=True)
        if sys.argv[1] == "hang":
            await asyncio.sleep(600)
        print("handled", flush=True)

    run(payments, url=sys.argv[2])
"""


@asynccontextmanager
async def payments(program: Path, what: str, url: str) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(sys.executable, program, what, url, stdout=PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: Process, wanted: str) -> None:
    """Read until *process* has printed *wanted*."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        async for printed in process.stdout:
            if printed.decode().strip() == wanted:
                return
    raise AssertionError(f"it never printed {wanted!r}")


async def test_a_handler_that_was_killed_after_it_published_publishes_the_same_id_again(
    rabbitmq_url: str, tmp_path: Path
) -> None:
    program = tmp_path / "payments.py"
    program.write_text(textwrap.dedent(PAYMENTS))
    copies: list[str] = []
    handled: list[str] = []
    watcher = Service("watcher")

    @watcher.on("captured", idempotency_key=lambda envelope: str(uuid4()))
    async def see_each_copy(envelope: Envelope) -> None:
        copies.append(envelope.id)

    @watcher.on("captured")
    async def see_each_event(envelope: Envelope) -> None:
        handled.append(envelope.id)

    async with Worker(watcher, url=rabbitmq_url), Bus(rabbitmq_url) as bus:
        async with payments(program, "hang", rabbitmq_url) as process:
            await line(process, "ready")
            await bus.publish(Placed(order_id=1))
            await line(process, "published")
            process.kill()
            await process.wait()
        await until(lambda: len(copies) == 1, "the first copy")
        async with payments(program, "work", rabbitmq_url) as process:
            await line(process, "handled")
            await until(lambda: len(copies) == 2, "the second copy")

    assert copies[0] == copies[1]
    assert handled == copies[:1]  # recognised


def reading_both(handled: list[Event]) -> Service:
    service = Service("shop", retry=QUICK)

    @service.on("placed")
    async def handle(event: Placed | PlacedV2) -> None:
        handled.append(event)

    return service


def reading_v1(handled: list[Event]) -> Service:
    service = Service("shop", retry=QUICK)

    @service.on("placed")
    async def handle(event: Placed) -> None:
        handled.append(event)

    return service


QUICK = Retry(attempts=2, delay=timedelta(milliseconds=1))


async def test_both_versions_reach_a_handler_of_their_union(rabbitmq_url: str) -> None:
    handled: list[Event] = []
    async with Worker(reading_both(handled), url=rabbitmq_url), Bus(rabbitmq_url) as bus:
        await bus.publish_many([Placed(order_id=1), PlacedV2(order_id=2)])
        await until(lambda: len(handled) == 2)

    assert sorted(handled, key=lambda event: event.event_version) == [Placed(order_id=1), PlacedV2(order_id=2)]


async def test_a_version_that_nobody_reads_is_kept_and_handled_after_the_upgrade(rabbitmq_url: str) -> None:
    handled: list[Event] = []
    async with Worker(reading_v1(handled), url=rabbitmq_url), Bus(rabbitmq_url) as bus:
        sent = await bus.publish(PlacedV2(order_id=2))
        letter = await dead_letter(rabbitmq_url)
        assert (letter.reason, letter.handler, letter.envelope) == ("unknown-version", "handle", sent)
    assert handled == []

    async with Worker(reading_both(handled), url=rabbitmq_url), DeadLetters("shop", url=rabbitmq_url) as dead:
        assert await dead.replay(lambda letter: letter.reason == "unknown-version") == 1
        await until(lambda: handled)

        assert handled == [PlacedV2(order_id=2)]
        assert [letter async for letter in dead] == []


async def dead_letter(url: str) -> DeadLetter:
    """The one that there is, once there is one."""
    async with asyncio.timeout(20), DeadLetters("shop", url=url) as dead:
        while not (found := [letter async for letter in dead]):  # noqa: ASYNC110  # a broker is asked
            await asyncio.sleep(0.05)
    (letter,) = found
    return letter
