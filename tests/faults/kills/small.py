"""The smallest shop: payments, which handles in a transaction with the inbox, and inventory, which does by a key alone.

Neither keeps a second payment or reservation out by itself where it need not, so that nothing hides one.
"""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import Column, Integer, MetaData, Table, insert
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncEngine

from eventbus import Context, Event, Service, run
from eventbus.database import create, open_engine
from eventbus.outbox import Relay

TABLES = MetaData()
# No key: what is done twice is there twice.
PAYMENTS = Table("payments", TABLES, Column("order_id", Integer))
# Whoever handles by a key alone runs again when it dies before that is recorded, so its effect has to be idempotent.
RESERVATIONS = Table("reservations", TABLES, Column("order_id", Integer, primary_key=True, autoincrement=False))


class Placed(Event, name="placed"):
    order_id: int


class Captured(Event, name="captured"):
    order_id: int
    attempt: int  # so that what an attempt said which came to nothing is another event than what counts


class Reserved(Event, name="reserved"):
    order_id: int


async def make_tables(url: str) -> None:
    """Make the bus's tables and the services' in the database at *url*."""
    engine = open_engine(url)
    await create(engine)
    async with engine.begin() as connection:
        await connection.run_sync(TABLES.create_all)
    await engine.dispose()


def payments(database: str, *, fail_first: bool) -> Service[AsyncEngine]:
    """*fail_first*: each first attempt fails once it has written and published all that it wanted."""

    @asynccontextmanager
    async def lifespan(_: Service[AsyncEngine]) -> AsyncIterator[AsyncEngine]:
        engine = open_engine(database)
        async with Relay(engine):
            yield engine
        await engine.dispose()

    service = Service("payments", lifespan=lifespan)

    @service.on(Placed)
    async def capture(event: Placed, context: Context[AsyncEngine]) -> None:
        async with context.transaction() as session:
            await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            captured = Captured(order_id=event.order_id, attempt=context.attempt)
            await context.publish(captured, subject=str(event.order_id))
            if fail_first and context.attempt == 1:
                raise ConnectionError("the first attempt fails")

    return service


def inventory(database: str) -> Service[AsyncEngine]:
    @asynccontextmanager
    async def lifespan(_: Service[AsyncEngine]) -> AsyncIterator[AsyncEngine]:
        engine = open_engine(database)
        yield engine
        await engine.dispose()

    service = Service("inventory", lifespan=lifespan)

    @service.on(Placed)
    async def reserve(event: Placed, context: Context[AsyncEngine]) -> None:
        engine = context.state
        insert_one = (postgresql if engine.dialect.name == "postgresql" else sqlite).insert(RESERVATIONS)
        async with engine.begin() as connection:
            await connection.execute(insert_one.values(order_id=event.order_id).on_conflict_do_nothing())
        await context.publish(Reserved(order_id=event.order_id), subject=str(event.order_id))

    return service


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("service", choices=["payments", "inventory"])
    parser.add_argument("database")
    parser.add_argument("--fail-first", action="store_true")
    options = parser.parse_args()
    if options.service == "payments":
        run(payments(options.database, fail_first=options.fail_first))
    else:
        run(inventory(options.database))
