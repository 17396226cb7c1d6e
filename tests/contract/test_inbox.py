"""The transactional inbox, on real SQLite files and a real PostgreSQL: a handler's whole effect happens once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Column, Integer, MetaData, Table, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from eventbus import Context, Event, Reject, Retry, RetryLater, Service
from eventbus.database import INBOX, SCHEMA, create, open_engine
from eventbus.idempotency.base import digest
from eventbus.testing import context
from tests.outboxes import Placed, rows_of
from tests.rig import FlakyStore, Rig, until

PAYMENTS = Table("payments", MetaData(), Column("order_id", Integer))


class Captured(Event, name="captured"):
    order_id: int


@dataclass(frozen=True)
class Deps:
    engine: AsyncEngine


@pytest.fixture(params=["sqlite", "postgresql"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    engine = open_engine(request.getfixturevalue(f"{request.param}_url"))
    await create(engine)
    async with engine.begin() as connection:
        await connection.run_sync(PAYMENTS.metadata.create_all)
    yield engine
    await engine.dispose()


def payments_on(state: object) -> Service[Any]:
    @asynccontextmanager
    async def lifespan(_: Service[Any]) -> AsyncIterator[object]:
        yield state

    return Service("payments", lifespan=lifespan, retry=Retry(attempts=4, delay=timedelta(seconds=1)))


async def count(engine: AsyncEngine, table: Table) -> int:
    async with engine.connect() as connection:
        return (await connection.execute(select(func.count()).select_from(table))).scalar_one()


async def pay(context: Context[Any], order_id: int) -> None:
    """What a handler does: a row, and an event that tells of it."""
    async with context.transaction() as session:
        await session.execute(insert(PAYMENTS).values(order_id=order_id))
        await context.publish(Captured(order_id=order_id), subject=str(order_id))


@pytest.mark.parametrize("has_engine", [False, True])
async def test_row_inbox_and_event_are_committed_together(engine: AsyncEngine, has_engine: bool) -> None:
    service = payments_on(Deps(engine) if has_engine else engine)

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        await pay(context, event.order_id)

    async with Rig(service) as rig:
        sent = await rig.publish(Placed(order_id=1))
        await rig.settled()

        assert rig.published(Captured) == [Captured(order_id=1)]
    (row,) = await rows_of(engine)
    assert (row["subject"], row["ordering_key"], row["source"]) == ("1", "1", "/services/payments")
    assert f'"causationid": "{sent.id}"' in row["extensions"]
    assert (await count(engine, PAYMENTS), await count(engine, INBOX)) == (1, 1)
    async with engine.connect() as connection:
        key = (await connection.execute(select(INBOX.c.key))).scalar_one()
    assert key == digest(f"payments/capture/placed/{sent.source} {sent.id}")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("away"),
        RetryLater(timedelta(seconds=1)),
        BaseExceptionGroup("both", [SystemExit(1), KeyError()]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_attempt_that_fails_leaves_nothing_and_the_next_one_does_it_all(
    engine: AsyncEngine, error: BaseException
) -> None:
    service, in_between = payments_on(engine), list[int]()

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        async with context.transaction() as session:
            await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            await context.publish(Captured(order_id=event.order_id))
            if context.attempt < 3:
                raise error
            in_between.append((await session.execute(select(func.count()).select_from(PAYMENTS))).scalar_one())

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.settled()

        assert rig.attempts(capture) == 3
        assert len(rig.published(Captured)) == 1
    assert in_between == [1]
    assert (await count(engine, PAYMENTS), await count(engine, INBOX), len(await rows_of(engine))) == (1, 1, 1)


async def test_a_handler_that_times_out_leaves_nothing(engine: AsyncEngine) -> None:
    service = payments_on(engine)

    @service.on("placed", timeout=timedelta(seconds=2))  # time for the second attempt on a busy computer
    async def capture(event: Placed, context: Context[Any]) -> None:
        async with context.transaction() as session:
            await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            if context.attempt == 1:
                await asyncio.sleep(3600)

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.settled()
        assert rig.attempts(capture) == 2
    assert await count(engine, PAYMENTS) == 1


async def test_a_rejected_event_leaves_nothing(engine: AsyncEngine) -> None:
    service = payments_on(engine)

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        async with context.transaction() as session:
            await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            raise Reject("no")

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.settled()
        assert [letter.reason for letter in rig.dead_letters(service)] == ["rejected"]
    assert (await count(engine, PAYMENTS), await count(engine, INBOX)) == (0, 0)


async def test_what_the_inbox_knows_is_a_duplicate_though_the_store_has_forgotten_it(
    engine: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "eventbus.delivery")
    service, swallowed, after = payments_on(engine), list[Exception](), list[int]()

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        try:
            await pay(context, event.order_id)
        except Exception as error:  # must not meet what ends a duplicate
            swallowed.append(error)
        after.append(event.order_id)

    store = FlakyStore()
    async with Rig(service, store=store) as rig:
        sent = await rig.publish(Placed(order_id=1), id="same")
        await rig.settled()
        store.forget()
        assert (await rig.publish(Placed(order_id=1), id="same")).source == sent.source
        await rig.settled()
        asked = list(store.asked)
        await rig.publish(Placed(order_id=1), id="same")
        await rig.settled()

        assert rig.attempts(capture) == 2
        assert rig.dead_letters(service) == []
    assert swallowed == []
    assert after == [1]  # what follows the block is not run again
    assert asked[-2:] == ["claim", "complete"]  # the store knows it again
    assert await count(engine, PAYMENTS) == 1
    assert "suppressed a duplicate" in caplog.text


async def test_of_two_runs_at_the_same_time_one_has_an_effect(engine: AsyncEngine) -> None:
    began, go_on, service = asyncio.Event(), asyncio.Event(), payments_on(engine)

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        async with context.transaction() as session:
            began.set()
            await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            await go_on.wait()

    store = FlakyStore()
    async with Rig(service, store=store) as rig:
        await rig.publish(Placed(order_id=1), id="same")
        await began.wait()
        store.forget()  # so that nothing else keeps the second one out
        await rig.publish(Placed(order_id=1), id="same")
        await until(lambda: store.asked.count("claim") == 2)
        go_on.set()
        await rig.settled()
    assert await count(engine, PAYMENTS) == 1


async def test_a_second_transaction_in_one_run_is_refused(engine: AsyncEngine) -> None:
    service = payments_on(engine)

    @service.on("placed", retry=Retry(attempts=1))
    async def capture(event: Placed, context: Context[Any]) -> None:
        async with context.transaction():
            pass
        async with context.transaction():
            raise AssertionError

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.settled()
        (letter,) = rig.dead_letters(service)
    assert letter.error is not None
    assert "payments.capture opens a second transaction in one run" in letter.error


async def test_what_is_published_outside_the_block_goes_to_the_broker_at_once(engine: AsyncEngine) -> None:
    service = payments_on(engine)

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        await context.publish(Captured(order_id=1))
        async with context.transaction():
            await context.publish(Captured(order_id=2))
        await context.publish(Captured(order_id=3))

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.settled()
        assert rig.published(Captured) == [Captured(order_id=n) for n in (1, 2, 3)]
    assert len(await rows_of(engine)) == 1


async def error_of_capture(state: object) -> str:
    """What the dead letter says of a handler that asks for a transaction, where *state* cannot give it one."""
    service = payments_on(state)

    @service.on("placed", retry=Retry(attempts=1))
    async def capture(event: Placed, context: Context[Any]) -> None:
        await pay(context, 1)

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.settled()
        (letter,) = rig.dead_letters(service)
    assert letter.error is not None
    return letter.error


@pytest.mark.parametrize("state", [None, "sqlite:///x", Deps])
async def test_a_state_without_an_engine_is_told_what_is_missing(state: object) -> None:
    assert "let the service's lifespan yield an SQLAlchemy AsyncEngine" in await error_of_capture(state)


async def test_without_tables_the_remedy_is_named(sqlite_url: str, postgresql_url: str) -> None:
    for url in (sqlite_url, postgresql_url):
        engine = open_engine(url)
        error = await error_of_capture(engine)
        await engine.dispose()
        assert "eventbus store create" in error


async def test_tables_of_another_version_are_told_and_left_alone(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(update(SCHEMA).values(version=999))

    assert "are of version 999, and this eventbus needs" in await error_of_capture(engine)

    assert (await count(engine, PAYMENTS), await count(engine, INBOX)) == (0, 0)


async def test_an_event_that_does_not_serialise_undoes_the_whole_attempt_and_is_named(engine: AsyncEngine) -> None:
    class Odd(Event, name="odd"):
        what: Any

    service = payments_on(engine)

    @service.on("placed", retry=Retry(attempts=1))
    async def capture(event: Placed, context: Context[Any]) -> None:
        async with context.transaction() as session:
            await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            await context.publish(Odd(what=object()) if event.order_id == 1 else Captured(order_id=event.order_id))

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.publish(Placed(order_id=2))  # is not held up
        await rig.settled()
        (letter,) = rig.dead_letters(service)
        assert rig.published(Captured) == [Captured(order_id=2)]
    assert letter.error is not None
    assert "odd" in letter.error
    assert (await count(engine, PAYMENTS), await count(engine, INBOX)) == (1, 1)


async def test_a_connection_that_is_lost_in_the_middle_leaves_nothing_and_is_tried_again(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(postgresql_url)
    await create(engine)
    async with engine.begin() as connection:
        await connection.run_sync(PAYMENTS.metadata.create_all)
    service, errors = payments_on(engine), list[DBAPIError]()

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        async with context.transaction() as session:
            await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            if context.attempt == 1:
                mine = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
                async with engine.connect() as other:
                    await other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": mine})
            try:
                await session.execute(insert(PAYMENTS).values(order_id=event.order_id))
            except DBAPIError as error:
                errors.append(error)
                raise

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.settled()
        assert rig.attempts(capture) == 2
    assert len(errors) == 1
    assert "attempt 1: failed, again in" in caplog.text
    assert await count(engine, PAYMENTS) == 2  # both of the second attempt
    await engine.dispose()


async def test_a_deadlock_is_an_attempt_that_failed(postgresql_url: str, caplog: pytest.LogCaptureFixture) -> None:
    engine = open_engine(postgresql_url)
    await create(engine)
    async with engine.begin() as connection:
        await connection.run_sync(PAYMENTS.metadata.create_all)
        await connection.execute(insert(PAYMENTS), [{"order_id": 1}, {"order_id": 2}])
    service, met = payments_on(engine), asyncio.Barrier(2)

    @service.on("placed")
    async def capture(event: Placed, context: Context[Any]) -> None:
        one, other = (1, 2) if event.order_id == 1 else (2, 1)
        lock = select(PAYMENTS).with_for_update()
        async with context.transaction() as session:
            await session.execute(lock.where(PAYMENTS.c.order_id == one))
            if context.attempt == 1:
                await met.wait()
            await session.execute(lock.where(PAYMENTS.c.order_id == other))
            await context.publish(Captured(order_id=event.order_id))

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.publish(Placed(order_id=2))
        await rig.settled()
        assert rig.attempts(capture) == 3
        assert len(rig.published(Captured)) == 2
    await engine.dispose()
    assert "attempt 1: failed, again in" in caplog.text
    assert "deadlock detected" in caplog.text


async def test_a_serialisation_failure_is_an_attempt_that_failed(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(postgresql_url)
    await create(engine)
    async with engine.begin() as connection:
        await connection.run_sync(PAYMENTS.metadata.create_all)
        await connection.execute(text("CREATE TABLE stock (item INTEGER, left_over INTEGER)"))
        await connection.execute(text("INSERT INTO stock VALUES (1, 10)"))
    serializable = engine.execution_options(isolation_level="SERIALIZABLE")
    service, met = payments_on(serializable), asyncio.Barrier(2)

    @service.on("placed")
    async def reserve(event: Placed, context: Context[Any]) -> None:
        async with context.transaction() as session:
            left = (await session.execute(text("SELECT left_over FROM stock"))).scalar_one()
            if context.attempt == 1:
                await met.wait()  # both have read what only one of them may change
            await session.execute(text("UPDATE stock SET left_over = :left"), {"left": left - 1})
            await context.publish(Captured(order_id=event.order_id))

    async with Rig(service) as rig:
        await rig.publish(Placed(order_id=1))
        await rig.publish(Placed(order_id=2))
        await rig.settled()
        assert rig.attempts(reserve) == 3
        assert len(rig.published(Captured)) == 2
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT left_over FROM stock"))).scalar_one() == 8
    await engine.dispose()
    assert "attempt 1: failed, again in" in caplog.text
    assert "could not serialize access" in caplog.text


# ── in a unit test ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_handler_is_called_directly_on_a_database_of_the_test(engine: AsyncEngine) -> None:
    ctx = context(Placed(order_id=1), state=Deps(engine))

    await pay(ctx, 1)

    assert ctx.published == [Captured(order_id=1)]
    assert (await count(engine, PAYMENTS), len(await rows_of(engine))) == (1, 1)


async def test_what_was_rolled_back_is_not_in_published(engine: AsyncEngine) -> None:
    ctx = context(Placed(order_id=1), state=engine)
    await ctx.publish(Captured(order_id=0))

    async def fail() -> None:
        async with ctx.transaction():
            await ctx.publish(Captured(order_id=1))
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await fail()

    assert ctx.published == [Captured(order_id=0)]
    assert await rows_of(engine) == []
