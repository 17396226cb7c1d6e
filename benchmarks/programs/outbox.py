"""The outbox of this bus: a relay, transactions that write events, and a reader that sees what a relay must not do."""

# No `from __future__ import annotations`: the handler is made for a class that exists only here.
import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Coroutine

from sqlalchemy import Column, Integer, MetaData, Table, Text, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from benchmarks.order import lines_of, note_of
from benchmarks.programs import job as jobs
from benchmarks.programs.job import HELD_UP_S, PREFETCH, Job, Meter
from benchmarks.programs.looping import paced, until_done
from benchmarks.programs.ours import NoIdempotency, OrderPlaced
from eventbus import Service, Worker
from eventbus.bus import enclosed
from eventbus.database import LEASES, OUTBOX, open_engine
from eventbus.outbox import Outbox, Relay
from eventbus.outbox.base import BUCKETS, values_of
from eventbus.outbox.sql import LEASE_PREFIX

SOURCE = "/bench"
# What an API would write besides the event.
ORDERS = Table("orders", MetaData(), Column("number", Integer), Column("note", Text))
MORE_S = 0.5  # is there more than was written?
BLOCK = 50  # transactions of one kind, before those of the other


def order_of(number: int, job: Job, sent_ns: int = 0) -> OrderPlaced:
    return OrderPlaced(number=number, sent_ns=sent_ns, lines=lines_of(job.payload), note=note_of(job.payload))


def subject_of(number: int, job: Job) -> str:
    return f"order-{number % job.keys}"


async def fill(job: Job) -> None:
    """Write all rows of *job* in one transaction: relays see all or nothing."""
    engine = open_engine(job.database)
    event = order_of(0, job)
    async with engine.begin() as connection:
        for first in range(0, job.events, 1000):
            rows = [
                values_of(
                    enclosed(event.model_copy(update={"number": n}), SOURCE, subject=subject_of(n, job)),
                    due_ms=None,
                    trace={},
                )
                for n in range(first, min(first + 1000, job.events))
            ]
            await connection.execute(insert(OUTBOX), rows)
    await engine.dispose()


async def shared(database: str, relays: int) -> None:
    """Return when as many *relays* have shared the buckets out."""
    engine = open_engine(database)
    held = select(LEASES.c.holder, func.count()).where(LEASES.c.name.startswith(LEASE_PREFIX), LEASES.c.holder != "")
    async with asyncio.timeout(HELD_UP_S):
        while True:
            async with engine.connect() as connection:
                shares = [count for _, count in await connection.execute(held.group_by(LEASES.c.holder))]
            if shares == [BUCKETS // relays] * relays:
                break
            await asyncio.sleep(0.1)
    await engine.dispose()


async def published(database: str, rows: int, within_s: float) -> list[tuple[int, float, float]]:
    """Wait until all *rows* are published; how many were by when, as a meter notes it."""
    engine = open_engine(database)
    when = select(OUTBOX.c.published_ms, func.count()).where(OUTBOX.c.published_ms.is_not(None))
    async with asyncio.timeout(within_s):
        while True:
            async with engine.connect() as connection:
                waiting = await connection.scalar(select(func.count()).where(OUTBOX.c.published_ms.is_(None)))
                if not waiting:
                    found = (
                        await connection.execute(when.group_by(OUTBOX.c.published_ms).order_by("published_ms"))
                    ).all()
                    break
            await asyncio.sleep(0.25)  # often enough, and little for the database to do besides
    await engine.dispose()
    counts = itertools.accumulate(count for _, count in found)
    return [(count, ms / 1000, 0.0) for count, (ms, _) in zip(counts, found, strict=True)]


async def relay(job: Job) -> None:
    """Relay until told to stop."""
    meter = Meter(job)
    engine = open_engine(job.database)
    async with Relay(engine, url=job.url):
        await asyncio.to_thread(jobs.wait_for_go)
    await engine.dispose()
    jobs.report(meter)


async def place(job: Job) -> None:
    """Commit at the job's rate, each an event and a row."""
    meter, outbox = Meter(job), Outbox(source=SOURCE)
    engine = open_engine(job.database)
    await _make_orders(engine)

    async def commit(number: int, sent_ns: int) -> None:
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(insert(ORDERS).values(number=number, note="paid"))
            await outbox.publish(session, order_of(number, job, sent_ns), subject=subject_of(number, job))

    jobs.wait_for_go()
    await paced(commit, job, meter)
    await engine.dispose()
    jobs.report(meter)


async def transact(job: Job) -> None:
    """Commit one after the other, with an event and without by turns."""
    meter, outbox = Meter(job), Outbox(source=SOURCE)
    engine = open_engine(job.database)
    await _make_orders(engine)
    taken: dict[bool, list[int]] = {False: [], True: []}
    jobs.wait_for_go()
    for number in range(job.events):
        has_event = number // BLOCK % 2 == 1
        began_ns = time.monotonic_ns()
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(insert(ORDERS).values(number=number, note="paid"))
            if has_event:
                await outbox.publish(session, order_of(number, job), subject=subject_of(number, job))
        taken[has_event].append((time.monotonic_ns() - began_ns) // 1000)
        meter.saw(0)
    await engine.dispose()
    jobs.report(meter, without_us=taken[False], with_us=taken[True])


async def _make_orders(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.run_sync(ORDERS.metadata.create_all)


def reader_of(job: Job, saw: Callable[[int], None]) -> Worker:
    """What declares the queue, and reads it in the broker's order: nothing is claimed, no handler waits."""
    service: Service[None] = Service("bench", prefetch=PREFETCH, concurrency=PREFETCH)

    @service.on(OrderPlaced)
    async def handle(event: OrderPlaced) -> None:
        saw(event.number)

    return Worker(service, url=job.url, idempotency=NoIdempotency())


async def check(job: Job) -> None:
    """Read what the relays have published; how often a row came again, and how often one came before an earlier one."""
    meter, seen, last = Meter(job), set[int](), dict[str, int]()
    again = disordered = 0

    def saw(number: int) -> None:
        nonlocal again, disordered
        key = subject_of(number, job)
        again += number in seen
        disordered += number < last.get(key, -1)
        seen.add(number)
        last[key] = number
        meter.saw(0)

    async with reader_of(job, lambda _: None):
        pass  # its queue is declared
    jobs.wait_for_go()
    async with reader_of(job, saw):
        await until_done(meter, HELD_UP_S)
        await asyncio.sleep(MORE_S)
    jobs.report(meter, again=again, disordered=disordered)


ROLES: dict[str, Callable[[Job], Coroutine[object, object, None]]] = {
    "relay": relay,
    "place": place,
    "transact": transact,
    "check": check,
}

if __name__ == "__main__":
    asked = jobs.job_of(sys.argv)
    asyncio.run(ROLES[asked.role](asked))
