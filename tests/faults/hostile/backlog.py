"""How much memory a worker takes that has far too much to do: behind a million events, or with handlers that hang."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pamqp import commands

from tests.faults.hostile.amqp import Connection, Raw, encode_properties
from tests.faults.hostile.run import Worker, until, working
from tests.servers import BrokerServer

LIMIT_MB = 150.0
LIMIT = 1.2
HANDLED = 20_000  # before memory is looked at: the store of idempotency keys grows with what was handled
LITTLE = 20_000  # more than this is left behind where there is no backlog to speak of
PREFETCHED = 100  # what a service of the worker holds at the most
QUEUE = "events.everything"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class State:
    """A worker, what lies before it, and its memory."""

    what: str
    behind: int
    handled: int
    rss_mb: float


@dataclass(frozen=True, slots=True)
class Result:
    """Workers in each of the states."""

    broker: str
    states: tuple[State, ...]
    took_s: float

    @property
    def growth(self) -> float:
        """The memory behind the backlog, against that behind a little one."""
        return self.states[1].rss_mb / self.states[0].rss_mb

    @property
    def is_good(self) -> bool:
        return all(state.rss_mb <= LIMIT_MB for state in self.states) and self.growth <= LIMIT


async def run_backlog(
    broker: BrokerServer,
    *,
    events: int,
    handled: int = HANDLED,
    little: int = LITTLE,
    progress: Progress = lambda _done, _of: None,
) -> Result:
    """The same work before a little backlog and one of *events*; then handlers that hang before what is left of it."""
    began = time.monotonic()
    url = await asyncio.to_thread(broker.new_vhost)
    async with working(url) as worker:  # declares its queues
        await ready(worker)
        worker.stop()
    with Connection(url) as connection:
        states = [await _behind(connection, url, "little before it", handled + little, handled, progress)]
        connection.call(commands.Queue.Purge(queue=QUEUE), commands.Queue.PurgeOk)
        states.append(await _behind(connection, url, "a backlog", events, handled, progress))
        states.append(await _hanging(connection, url, events))
        connection.call(commands.Queue.Delete(queue=QUEUE), commands.Queue.DeleteOk)
    return Result(broker.line, tuple(states), time.monotonic() - began)


async def ready(worker: Worker) -> None:
    await until(lambda: "\nready" in worker.log.read_text() or not worker.is_alive, "the worker consumes")


async def _behind(connection: Connection, url: str, what: str, events: int, handled: int, progress: Progress) -> State:
    """A worker that has handled *handled* of *events*; the others are left in the queue."""

    def tell(number: int) -> None:
        progress(number, events)

    await asyncio.to_thread(connection.publish, "", _events(QUEUE, events, what), progress=tell)
    async with working(url) as worker:
        await until(lambda: _noted(worker) >= handled, f"{handled} handled", within_s=handled / 100 + 60)
        rss_mb, behind = worker.rss_mb(), connection.count(QUEUE)
        await asyncio.to_thread(worker.stop)
        return State(what, behind, _noted(worker), rss_mb)


async def _hanging(connection: Connection, url: str, events: int) -> State:
    """A worker whose every handler hangs: what it may hold is full, and behind that the backlog waits."""
    connection.call(commands.Queue.Purge(queue=QUEUE), commands.Queue.PurgeOk)
    number = max(events // 100, 2 * PREFETCHED)
    # The first ones are handled: a session takes one at a time until a few have come through.
    hanging = itertools.chain(_events(QUEUE, 10, "first"), _events(QUEUE, number, "hangs", subject=b"hangs"))
    await asyncio.to_thread(connection.publish, "", hanging)
    async with working(url) as worker:
        await until(lambda: connection.count(QUEUE) <= number - PREFETCHED, "all that it may hold hangs")
        rss_mb, behind = worker.rss_mb(), connection.count(QUEUE)
        return State("handlers hang", behind, _noted(worker), rss_mb)


def _noted(worker: Worker) -> int:
    return worker.notes.read_bytes().count(b"\n")


def _events(queue: str, number: int, prefix: str, subject: bytes = b"") -> Iterator[Raw]:
    """Small good events, straight into *queue*."""
    source = f"/{prefix.replace(' ', '-')}".encode()
    for n in range(number):
        headers = [
            (b"cloudEvents_specversion", ("S", b"1.0")), (b"cloudEvents_id", ("S", b"%d" % n)),
            (b"cloudEvents_source", ("S", source)), (b"cloudEvents_type", ("S", b"order_placed.v1")),
            (b"cloudEvents_time", ("S", b"2030-01-31T12:00:00Z")),
        ]  # fmt: skip
        if subject:
            headers.append((b"cloudEvents_subject", ("S", subject)))
        values = {"content_type": b"application/json", "headers": headers, "delivery_mode": 2}
        yield Raw(queue.encode(), encode_properties(values), b'{"order_id":1,"email":"ada@example.com"}')
