"""All services together on the bus: orders of every kind end as they must, and the figures say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest

from eventbus import Bus, Service, Worker
from eventbus.dead_letters import DeadLetters
from eventbus.testing import Harness
from schemas import CATALOGUE, OrderPlaced, UserRegistered
from services.audit import handlers as audit
from services.audit import log as audit_log
from services.inventory import handlers as inventory
from services.inventory import store as inventory_store
from services.marketing import handlers as marketing
from services.marketing import store as marketing_store
from services.notifications import handlers as notifications
from services.notifications import store as notifications_store
from services.orders import handlers as orders
from services.orders import store as orders_store
from services.orders.store import Order
from services.payments import handlers as payments
from services.payments import store as payments_store
from services.settings import Settings
from services.shipping import handlers as shipping
from services.shipping import store as shipping_store
from tests.services.conftest import RunningMailbox
from tests.services.orders_of_every_kind import (
    hopeless,
    in_an_unknown_currency,
    order,
    out_of_stock,
    too_expensive,
)
from tests.services.waiting import eventually


def whole_shop(settings: Settings) -> list[Service]:
    """Every service that listens, on *settings* instead of the environment's."""
    return [
        audit.service.replace(lifespan=lambda _: audit_log.resources(settings)),
        inventory.service.replace(lifespan=lambda _: inventory_store.resources(settings)),
        marketing.service.replace(lifespan=lambda _: marketing_store.resources(settings)),
        notifications.service.replace(lifespan=lambda _: notifications_store.resources(settings)),
        orders.service.replace(lifespan=lambda _: orders_store.resources(settings)),
        payments.service.replace(lifespan=lambda _: payments_store.resources(settings)),
        shipping.service.replace(lifespan=lambda _: shipping_store.resources(settings)),
    ]


@pytest.fixture
async def harness(post: RunningMailbox) -> AsyncIterator[Harness]:
    async with Harness(*whole_shop(post.settings)) as running:
        yield running


def figures(harness: Harness) -> dict[str, int]:
    """How many events of each name were published; the harness counts an id once."""
    counted = {kind.event_name: len(harness.published(kind)) for kind in CATALOGUE}
    return {name: count for name, count in counted.items() if count}


async def order_row(settings: Settings, order_id: UUID) -> Order | None:
    async with orders_store.resources(settings) as database, database.session() as session:
        return await session.get(Order, order_id)


@pytest.mark.parametrize(
    ("placed", "end", "published", "last_mail"),
    [
        (
            order(),
            ("shipped", "captured", "reserved"),
            {"payment_captured", "stock_reserved", "order_shipped"},
            "Your order is on its way",
        ),
        (
            too_expensive(),
            ("cancelled", "declined", "released"),
            {"payment_declined", "stock_reserved", "stock_released", "order_cancelled"},
            "Your order is cancelled",
        ),
        (
            out_of_stock(),
            ("cancelled", "refunded", "rejected"),
            {"payment_captured", "stock_rejected", "payment_refunded", "order_cancelled"},
            "Your order is cancelled",
        ),
        (
            hopeless(),
            ("cancelled", "declined", "rejected"),
            {"payment_declined", "stock_rejected", "order_cancelled"},
            "Your order is cancelled",
        ),
    ],
    ids=["good", "declined", "rejected", "both"],
)
async def test_an_order_ends_by_itself(
    harness: Harness,
    post: RunningMailbox,
    placed: OrderPlaced,
    end: tuple[str, str, str],
    published: set[str],
    last_mail: str,
) -> None:
    await harness.publish(placed)
    await harness.settled()

    assert figures(harness) == dict.fromkeys({"order_placed"} | published, 1)
    ended = await order_row(post.settings, placed.order_id)
    assert ended is not None
    assert (ended.status, ended.payment, ended.stock) == end
    assert post.subjects() == sorted(["We have your order", last_mail])


async def test_many_orders_of_all_kinds_published_twice_end_once(harness: Harness, post: RunningMailbox) -> None:
    post.mailbox.refuse = 6
    placed = [kind() for kind in (order, order, order, too_expensive, out_of_stock, hopeless) for _ in range(5)]
    people = [UserRegistered(user_id=uuid4(), name="Ada", email=f"{n}@example.com") for n in range(5)]

    for event in (*placed, *people):
        for _ in range(2):
            await harness.publish(event, id=f"id-of-{id(event)}")
    await harness.settled()

    assert figures(harness) == {
        "user_registered": 5,
        "order_placed": 30,
        "order_cancelled": 15,
        "payment_captured": 20,
        "payment_declined": 10,
        "payment_refunded": 5,
        "stock_reserved": 20,
        "stock_rejected": 10,
        "stock_released": 5,
        "order_shipped": 15,
    }
    assert Counter(post.subjects()) == {
        "Welcome to the shop": 5,
        "We have your order": 30,
        "Your order is on its way": 15,
        "Your order is cancelled": 15,
    }
    assert len({mail.message_id for mail in post.mailbox.mails}) == len(post.mailbox.mails)
    assert len((post.settings.data / "audit.jsonl").read_text().splitlines()) == sum(figures(harness).values())


async def test_the_poison_is_given_up_by_payments_alone(harness: Harness, post: RunningMailbox) -> None:
    poison, good = in_an_unknown_currency(), order()

    await harness.publish(poison)
    await harness.publish(good)
    await harness.settled()

    (letter,) = harness.dead_letters(payments.service)
    assert (letter.reason, letter.handler, letter.attempts) == ("rejected", "capture", 1)
    waiting, shipped = [await order_row(post.settings, placed.order_id) for placed in (poison, good)]
    assert waiting is not None
    assert shipped is not None
    assert (waiting.status, waiting.payment, waiting.stock) == ("placed", "pending", "reserved")
    assert shipped.status == "shipped"


async def test_the_poison_is_shipped_once_its_account_is_open_and_it_is_replayed(
    post: RunningMailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, poison = "memory://the-poison-is-replayed", in_an_unknown_currency()
    monkeypatch.setenv("EVENTBUS_URL", url)
    relayed = post.settings.model_copy(update={"relay": True})
    wiser = relayed.model_copy(update={"accounts": relayed.accounts | {"XTS"}})

    async def given_up() -> bool:
        return len([letter async for letter in dead]) == 1

    async def is_shipped() -> bool:
        row = await order_row(post.settings, poison.order_id)
        return row is not None and row.status == "shipped"

    async with Bus(url, source="/services/orders") as bus, DeadLetters("payments", url=url) as dead:
        async with Worker(*whole_shop(relayed), url=url):
            await bus.publish(poison)
            await eventually(given_up, "payments gives up the poison")

        async with Worker(*whole_shop(wiser), url=url):
            assert await dead.replay() == 1
            await eventually(is_shipped, "the replayed order is shipped")

    assert post.subjects() == ["We have your order", "Your order is on its way"]
