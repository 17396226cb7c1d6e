"""Where a well-known sample shop loses events or acts on them twice, ours does not: one test for each of its holes.

dotnet/eShop, as it was in 2026, acknowledges what a handler failed at, recognises no duplicate of an event, has a
poller that says the same again and again, neither confirms nor returns nor dead-letters, and copies each event's class
into every service. Here it is the shop's own handlers, on a real RabbitMQ and a real PostgreSQL.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import func, select

import schemas
import services
from eventbus import Bus, Context, Event, Reject, Retry, Service, SetupError, Unroutable, Worker
from eventbus.database import OUTBOX
from eventbus.dead_letters import DeadLetter, DeadLetters
from eventbus.service import check_all
from schemas import CATALOGUE, OrderPlaced, PaymentCaptured
from services.database import Database, open_database
from services.demo.stage import LISTENERS
from services.inventory import handlers as inventory
from services.inventory import store as inventory_store
from services.inventory.store import Article
from services.payments import handlers as payments
from services.payments import store as payments_store
from services.payments.store import Payment
from services.settings import Settings
from services.tables import make_tables
from tests.services.databases import on_postgresql
from tests.services.orders_of_every_kind import in_an_unknown_currency, order
from tests.services.waiting import eventually
from tests.stores import StoreServer


@pytest.fixture
def relayed(settings: Settings, rabbitmq_url: str, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """With relays that publish to the broker of the test."""
    monkeypatch.setenv("EVENTBUS_URL", rabbitmq_url)
    return settings.model_copy(update={"relay": True})


def outcomes(caplog: pytest.LogCaptureFixture, handler: str) -> list[str]:
    """What has come of the deliveries to *handler*."""
    return [r.__dict__["outcome"] for r in caplog.records if r.__dict__.get("handler") == handler]


# ── 1: what a handler fails at is acknowledged, and gone ──────────────────────────────────────────────────────────────


async def test_what_a_handler_fails_at_is_tried_again_until_its_database_is_back(
    own_store: Callable[[str], StoreServer], relayed: Settings, rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, placed, captured = own_store("postgresql"), order(), list[PaymentCaptured]()
    mine = relayed.model_copy(update={"database": server.new_url()})
    await make_tables(mine, "payments")
    listener = Service("listener")

    @listener.on("payment_captured")
    async def hear(event: PaymentCaptured) -> None:
        captured.append(event)

    async def has_failed() -> bool:
        return "retry" in outcomes(caplog, "capture")

    async def is_captured() -> bool:
        return len(captured) == 1

    service = payments.service.replace(lifespan=lambda _: payments_store.resources(mine))
    async with Worker(service, listener, url=rabbitmq_url), Bus(rabbitmq_url, source="/services/orders") as bus:
        await asyncio.to_thread(server.kill)
        await bus.publish(placed)
        await eventually(has_failed, "capture has failed")
        await asyncio.to_thread(server.start)
        await eventually(is_captured, "the payment is captured")

    async with payments_store.resources(mine.model_copy(update={"relay": False})) as till, till.session() as session:
        assert [payment.order_id for payment in await session.scalars(select(Payment))] == [placed.order_id]
    assert [event.order_id for event in captured] == [placed.order_id]


@on_postgresql
async def test_what_a_handler_gives_up_waits_with_its_reason_and_is_handled_when_it_is_replayed(
    relayed: Settings, rabbitmq_url: str
) -> None:
    poison, letters = in_an_unknown_currency(), list[DeadLetter]()
    wiser = relayed.model_copy(update={"accounts": relayed.accounts | {"XTS"}})

    async def given_up() -> bool:
        letters[:] = [letter async for letter in dead]
        return bool(letters)

    async def is_paid() -> bool:
        async with till.session() as session:
            return await session.get(Payment, poison.order_id) is not None

    async with Bus(rabbitmq_url, source="/services/orders") as bus, DeadLetters("payments", url=rabbitmq_url) as dead:
        async with Worker(
            payments.service.replace(lifespan=lambda _: payments_store.resources(relayed)), url=rabbitmq_url
        ):
            await bus.publish(poison)
            await eventually(given_up, "payments gives it up")
        async with (
            payments_store.resources(wiser) as till,
            Worker(payments.service.replace(lifespan=lambda _: nullcontext(till)), url=rabbitmq_url),
        ):
            assert await dead.replay() == 1
            await eventually(is_paid, "the replayed order is paid")

    (letter,) = letters
    assert (letter.reason, letter.handler) == ("rejected", "capture")
    assert "no account takes XTS" in (letter.error or "")


# ── 2: an event that is delivered twice acts twice ────────────────────────────────────────────────────────────────────


@on_postgresql
async def test_an_event_that_comes_many_times_to_several_processes_takes_the_stock_once(
    relayed: Settings, rabbitmq_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    placed, copies = order(quantity=2), 20
    caplog.set_level(logging.DEBUG, "eventbus.delivery")

    def worker() -> Worker:  # with a memory of its own, as another process has one
        mine = inventory.service.replace(lifespan=lambda _: inventory_store.resources(relayed, {"mug": 100}))
        return Worker(mine, url=rabbitmq_url)

    async def all_settled() -> bool:
        return len(outcomes(caplog, "reserve")) == copies

    async with worker(), worker(), Bus(rabbitmq_url, source="/services/orders") as bus:
        sent = await bus.publish(placed)
        await asyncio.gather(*(bus.publish(sent) for _ in range(copies - 1)))
        await eventually(all_settled, f"{copies} deliveries are settled")

    async with open_database(relayed, "inventory") as database, database.session() as session:
        left = (await session.get_one(Article, "mug")).available
        said = await session.scalar(select(func.count()).select_from(OUTBOX))
    assert (left, said) == (98, 1)
    assert set(outcomes(caplog, "reserve")) <= {"handled", "duplicate"}


# ── 3: a poller says that a time is over, again and again ─────────────────────────────────────────────────────────────


class GracePeriodEnded(Event):
    """In time for a confirmation that was not wanted at once."""

    order_id: UUID


def given(database: Database) -> Callable[[Service[Database]], AbstractAsyncContextManager[Database]]:
    return lambda _: nullcontext(database)


@on_postgresql
async def test_that_a_time_is_over_is_said_once_and_not_early_whoever_is_restarted_meanwhile(
    relayed: Settings, rabbitmq_url: str
) -> None:
    placed, grace, heard_s = order(), timedelta(seconds=3), list[float]()
    loop, service = asyncio.get_running_loop(), Service[Database]("grace")

    @service.on("order_placed", idempotency_key="order_id")
    async def wait_for_it(event: OrderPlaced, context: Context[Database]) -> None:
        async with context.transaction():
            await context.publish(GracePeriodEnded(order_id=event.order_id), subject=str(event.order_id), delay=grace)

    @service.on("grace_period_ended")
    async def hear(event: GracePeriodEnded) -> None:
        heard_s.append(loop.time())

    async def has_left() -> bool:
        async with database.session() as session:
            return await session.scalar(select(func.max(OUTBOX.c.published_ms))) is not None

    async def is_heard() -> bool:
        return bool(heard_s)

    async with Bus(rabbitmq_url, source="/services/orders") as bus:
        for restart in range(3):
            async with (
                open_database(relayed, "orders", has_outbox=True) as database,
                Worker(service.replace(lifespan=given(database)), url=rabbitmq_url),
            ):
                if restart == 0:
                    sent, began_s = await bus.publish(placed), loop.time()
                await bus.publish(sent)  # and again after each restart
                await eventually(has_left, "it has left the outbox")
                if restart == 2:
                    await eventually(is_heard, "the time is over")

    async with open_database(relayed, "orders") as database, database.session() as session:
        assert await session.scalar(select(func.count()).select_from(OUTBOX)) == 1
    assert len(heard_s) == 1
    assert heard_s[0] - began_s >= grace.total_seconds()


# ── 4: nothing is confirmed, returned or dead-lettered, and what is unknown is dropped ────────────────────────────────


async def test_who_needs_somebody_to_take_an_event_is_told_that_nobody_does(rabbitmq_url: str) -> None:
    async with Bus(rabbitmq_url, source="/services/orders") as bus:
        with pytest.raises(Unroutable):
            await bus.publish(order(), require_subscriber=True)


class OrderPlacedV2(Event, name="order_placed", version=2):
    """What tomorrow's publisher says to today's handlers."""

    order_id: UUID
    cents: int


async def test_what_no_handler_can_read_is_kept_as_it_came_until_one_can(rabbitmq_url: str) -> None:
    tomorrow, letters, read = OrderPlacedV2(order_id=order().order_id, cents=1230), list[DeadLetter](), list[Event]()
    few = Retry(attempts=2, delay=timedelta(milliseconds=250))  # another worker might be able to read it
    today, upgraded = Service("reader", retry=few), Service("reader", retry=few)

    @today.on("order_placed")
    async def handle(event: OrderPlaced) -> None:
        raise Reject("never called")

    @upgraded.on("order_placed", name="handle")
    async def handle_both(event: OrderPlaced | OrderPlacedV2) -> None:
        read.append(event)

    async def given_up() -> bool:
        letters[:] = [letter async for letter in dead]
        return bool(letters)

    async def is_read() -> bool:
        return bool(read)

    async with Bus(rabbitmq_url, source="/services/orders") as bus, DeadLetters("reader", url=rabbitmq_url) as dead:
        async with Worker(today, url=rabbitmq_url):
            sent = await bus.publish(tomorrow)
            await eventually(given_up, "today's reader gives it up")
        async with Worker(upgraded, url=rabbitmq_url):
            assert await dead.replay() == 1
            await eventually(is_read, "tomorrow's reader reads it")

    (letter,) = letters
    assert (letter.reason, letter.body) == ("unknown-version", sent.data)
    assert read == [tomorrow]


# ── 5: every service has a copy of each event's class ─────────────────────────────────────────────────────────────────


def test_an_event_is_defined_once_and_every_service_reads_that_one() -> None:
    for module in pkgutil.walk_packages(services.__path__, "services."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    of_the_shop = {c for c in all_below(Event) if c.__module__.partition(".")[0] in {"services", "schemas"}}

    assert of_the_shop == set(CATALOGUE)
    assert {event.__module__.partition(".")[0] for event in of_the_shop} == {schemas.__name__}
    assert [s.name for s in LISTENERS if s.catalogue is not CATALOGUE] == [
        "audit"
    ]  # it reads no event, only writes down


def all_below(kind: type[Event]) -> set[type[Event]]:
    return {kind, *(below for sub in kind.__subclasses__() for below in all_below(sub))} - {Event}


def test_a_name_that_is_in_no_catalogue_is_refused_before_anything_starts() -> None:
    service = Service("typo", catalogue=CATALOGUE)

    @service.on("order_plased")
    async def handle(event: OrderPlaced) -> None:
        """Never called."""

    with pytest.raises(SetupError, match="order_placed"):
        check_all((service,))
