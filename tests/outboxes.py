"""What tests of the outbox are written with: rows, and what arrives at a broker, in the order in which it does."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime

from sqlalchemy import Connection, RowMapping, event, func, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from eventbus import Envelope, Event
from eventbus.bus import enclosed
from eventbus.database import OUTBOX
from eventbus.envelope import decode
from eventbus.outbox import Outbox
from eventbus.outbox.base import values_of
from eventbus.topology import Names, shared
from eventbus.transport import from_url


class Placed(Event, name="placed"):
    order_id: int


def new_broker() -> str:
    """The URL of an embedded broker of one's own."""
    return f"memory://{secrets.token_hex(4)}"


async def place(engine: AsyncEngine, *orders: int, subject: str | None = None) -> list[Envelope]:
    """Write an event for each of *orders*, and commit."""
    outbox = Outbox(source="/shop")
    async with AsyncSession(engine) as session, session.begin():
        return [await outbox.publish(session, Placed(order_id=order), subject=subject) for order in orders]


async def place_many(engine: AsyncEngine, count: int, *, keys: int) -> None:
    """As `place` for orders 0 to *count*, whose subjects go round: one statement, for tests that need many."""
    rows = [
        values_of(enclosed(Placed(order_id=n), "/shop", subject=f"key-{n % keys}"), due_ms=None, trace={})
        for n in range(count)
    ]
    async with engine.begin() as connection:
        await connection.execute(insert(OUTBOX), rows)


async def rows_of(engine: AsyncEngine) -> Sequence[RowMapping]:
    """All rows, oldest first."""
    async with engine.connect() as connection:
        return (await connection.execute(select(OUTBOX).order_by(OUTBOX.c.id))).mappings().all()


async def waiting(engine: AsyncEngine) -> int:
    """How many rows are neither published nor set aside."""
    statement = select(func.count()).where(OUTBOX.c.published_ms.is_(None), OUTBOX.c.error.is_(None))
    async with engine.connect() as connection:
        return (await connection.execute(statement)).scalar_one()


async def relayed(engine: AsyncEngine) -> None:
    """Return when no row waits."""
    await until_asked(lambda: waiting(engine), 0)


async def until_asked(ask: Callable[[], Awaitable[object]], expected: object) -> None:
    """Return when *ask* answers what is *expected*; an AssertionError after a minute."""
    deadline_s = asyncio.get_running_loop().time() + 60
    while (answer := await ask()) != expected:
        assert asyncio.get_running_loop().time() < deadline_s, f"still {answer!r}, not {expected!r}"
        await asyncio.sleep(0.02)


class Arrived:
    """The events that a broker was given, in order."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []

    @property
    def orders(self) -> list[int]:
        return [json.loads(envelope.data)["order_id"] for envelope in self.envelopes]

    def by_key(self) -> dict[str | None, list[int]]:
        """The orders of each subject."""
        found: dict[str | None, list[int]] = defaultdict(list)
        for envelope, order in zip(self.envelopes, self.orders, strict=True):
            found[envelope.subject].append(order)
        return found


@asynccontextmanager
async def arriving(url: str) -> AsyncIterator[Arrived]:
    """What arrives at the broker at *url* from now on, whoever published it."""
    arrived = Arrived()
    transport = from_url(url)
    await transport.open(shared(Names()), "apply")
    try:
        async with transport.tail("events", "#") as deliveries:

            async def collect() -> None:
                async for delivery in deliveries:
                    arrived.envelopes.append(decode(delivery.message, received=datetime.now(UTC)))

            collecting = asyncio.create_task(collect())
            try:
                yield arrived
            finally:
                collecting.cancel()
                await asyncio.gather(collecting, return_exceptions=True)
    finally:
        await transport.close()


@contextmanager
def broken_commits(engine: AsyncEngine) -> Iterator[None]:
    """Inside the block every commit fails: PostgreSQL has hung up, SQLite has no transaction any more."""

    def break_it(connection: Connection) -> None:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
        else:
            connection.exec_driver_sql("ROLLBACK")
            connection.exec_driver_sql("COMMIT")

    event.listen(engine.sync_engine, "commit", break_it)
    try:
        yield
    finally:
        event.remove(engine.sync_engine, "commit", break_it)
