"""The bus promises no order, and may deliver twice: every interleaving of an order's events ends the same.

A small model of a bus plays them. It delivers what waits in any order, delivers again, and lets a handler crash when it
publishes, in the middle of its transaction. Handlers and databases are the real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import select

from eventbus import Envelope, Event
from eventbus.testing import context
from schemas import (
    OrderCancelled,
    OrderPlaced,
    OrderShipped,
    PaymentCaptured,
    PaymentDeclined,
    PaymentRefunded,
    StockRejected,
    StockReleased,
    StockReserved,
)
from services.database import Database
from services.inventory import handlers as inventory
from services.inventory import store as inventory_store
from services.inventory.store import Article, Reservation
from services.orders import handlers as orders
from services.orders import store as orders_store
from services.orders.api import remember
from services.orders.store import Order, learn
from services.payments import handlers as payments
from services.payments import store as payments_store
from services.payments.store import Payment
from services.settings import Settings
from services.shipping import handlers as shipping
from services.shipping import store as shipping_store
from services.shipping.store import Parcel
from tests.services.orders_of_every_kind import hopeless, order, out_of_stock, too_expensive

T = TypeVar("T")
STOCK = {"mug": 1_000_000, "bicycle": 1_000_000, "unicorn": 0}

# What happens to a delivery: handled, handled and delivered again, or handled up to the moment of publishing.
Fate = Literal["once", "again", "crash"]


class Crash(Exception):
    """The process ends at the moment of publishing; the broker delivers again."""


@dataclass(frozen=True)
class Inbox:
    """One handler and the events that it is subscribed to."""

    handle: Callable[[Any, Any], Awaitable[None]]
    state: object
    wants: tuple[type[Event], ...]

    async def deliver(self, event: Event, *, crash: bool = False) -> list[Event]:
        """What the handler published."""
        recorded = context(event, state=self.state)
        if crash:
            vars(recorded)["publish"] = _crash
        try:
            await self.handle(event, recorded)
        except Crash:
            return []
        return recorded.published


async def _crash(event: Event, **_: object) -> Envelope:
    raise Crash


@dataclass
class Shop:
    """The four services that an order's end depends on, and a bus without manners."""

    inboxes: dict[str, Inbox]
    orders: Database
    payments: payments_store.Till
    inventory: Database
    shipping: Database
    published: list[Event] = field(default_factory=list)

    async def play(self, placed: OrderPlaced, choose: Callable[[int], tuple[int, Fate]]) -> None:
        """Publish an order; *choose* picks one of so many waiting deliveries and its fate, until none waits."""
        self.published = []
        waiting = list(self._sent(placed))
        while waiting:
            number, fate = choose(len(waiting))
            inbox, event = waiting.pop(number)
            for follow_up in await inbox.deliver(event, crash=fate == "crash"):
                waiting.extend(self._sent(follow_up))
            if fate != "once":
                waiting.append((inbox, event))

    def _sent(self, event: Event) -> Iterator[tuple[Inbox, Event]]:
        self.published.append(event)
        return ((inbox, event) for inbox in self.inboxes.values() if isinstance(event, inbox.wants))

    def said(self, kind: type[Event]) -> set[str]:
        """The different events of one class, however often each was published."""
        return {event.model_dump_json() for event in self.published if type(event) is kind}


@pytest.fixture
async def shop(settings: Settings) -> AsyncIterator[Shop]:
    async with AsyncExitStack() as stack:
        opened = (
            await stack.enter_async_context(orders_store.resources(settings)),
            await stack.enter_async_context(payments_store.resources(settings)),
            await stack.enter_async_context(inventory_store.resources(settings, STOCK)),
            await stack.enter_async_context(shipping_store.resources(settings)),
        )
        facts = (OrderPlaced, PaymentCaptured, PaymentDeclined, PaymentRefunded)
        facts_of_goods = (StockReserved, StockRejected, StockReleased, OrderShipped)
        inboxes = {
            "follow": Inbox(orders.follow, opened[0], (*facts, *facts_of_goods)),
            "capture": Inbox(payments.capture, opened[1], (OrderPlaced,)),
            "give_back": Inbox(payments.give_back, opened[1], (StockRejected,)),
            "reserve": Inbox(inventory.reserve, opened[2], (OrderPlaced,)),
            "release": Inbox(inventory.release, opened[2], (PaymentDeclined,)),
            "ship": Inbox(shipping.ship, opened[3], (OrderPlaced, PaymentCaptured, StockReserved)),
        }
        yield Shop(inboxes, *opened)


async def row(database: Database, table: type[T], order_id: UUID) -> T:
    async with database.session() as session:
        return await session.get_one(table, order_id)


async def check_the_end(shop: Shop, placed: OrderPlaced) -> Order:
    """Shipped, paid and taken, or cancelled with nothing kept; said once, and known to all."""
    ended = await row(shop.orders, Order, placed.order_id)
    payment = await row(shop.payments, Payment, placed.order_id)
    reservation = await row(shop.inventory, Reservation, placed.order_id)
    parcel = await row(shop.shipping, Parcel, placed.order_id)
    assert (ended.payment, ended.stock) == (payment.status, reservation.status)
    assert len(shop.said(PaymentCaptured)) <= 1
    if ended.status == "shipped":
        assert (payment.status, reservation.status) == ("captured", "reserved")
        assert parcel.completed_by is not None
        assert (len(shop.said(OrderShipped)), len(shop.said(OrderCancelled))) == (1, 0)
    else:
        assert ended.status == "cancelled"
        assert ended.reason
        assert payment.status in {"declined", "refunded"}
        assert reservation.status in {"rejected", "released"}
        assert parcel.completed_by is None
        assert (len(shop.said(OrderShipped)), len(shop.said(OrderCancelled))) == (0, 1)
    return ended


async def check_the_stock(shop: Shop) -> None:
    """Every article is on its shelf or in a reservation that holds."""
    async with shop.inventory.session() as session:
        held = {article.sku: article.available for article in await session.scalars(select(Article))}
        for reservation in await session.scalars(select(Reservation).where(Reservation.status == "reserved")):
            for sku, quantity in reservation.quantities.items():
                held[sku] += quantity
    assert held == STOCK


DECLINED = "payment declined: over the limit of 1000 EUR"
REJECTED = "out of stock: unicorn"
KINDS = {
    "good": (order, {"shipped"}),
    "declined": (too_expensive, {DECLINED}),
    "rejected": (out_of_stock, {REJECTED}),
    "both": (hopeless, {DECLINED, REJECTED}),
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@hypothesis_settings(
    max_examples=30,
    deadline=None,
    # one set of databases for all examples: each plays another order
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_every_interleaving_with_duplicates_and_crashes_ends_right(
    shop: Shop, kind: str, data: st.DataObject
) -> None:
    place, ends = KINDS[kind]
    trouble = data.draw(st.integers(0, 6), "deliveries that are made again")

    def choose(waiting: int) -> tuple[int, Fate]:
        nonlocal trouble
        fate: Fate = data.draw(st.sampled_from(("once", "again", "crash"))) if trouble else "once"
        trouble -= fate != "once"
        return data.draw(st.integers(0, waiting - 1)), fate

    placed, is_calm = place(), trouble == 0
    if data.draw(st.booleans(), "it came in through the door"):
        async with shop.orders.begin() as session:
            assert await remember(session, placed)
    await shop.play(placed, choose)

    ended = await check_the_end(shop, placed)
    assert (ended.reason or ended.status) in ends
    await check_the_stock(shop)
    if is_calm:
        assert len({type(event) for event in shop.published}) == len(shop.published), "each event is said once"


def all_orders_of(events: Sequence[T], copies: int) -> Iterator[tuple[T, ...]]:
    """Every order in which *events* can arrive, each so many times; equal ones are not told apart."""
    numbers = sorted(list(range(len(events))) * copies)
    return (tuple(events[n] for n in arrival) for arrival in sorted(set(itertools.permutations(numbers))))


async def hear(inboxes: Sequence[Inbox], arrival: Sequence[Event]) -> list[Event]:
    """Deliver *arrival* one after the other, each to the inbox that wants it; what was published in answer."""
    said: list[Event] = []
    for event in arrival:
        for inbox in inboxes:
            if isinstance(event, inbox.wants):
                said.extend(await inbox.deliver(event))
    return said


async def test_payments_answers_once_whenever_it_hears_of_the_stock(shop: Shop) -> None:
    inboxes = [shop.inboxes["capture"], shop.inboxes["give_back"]]
    first = order()
    rejected = StockRejected(order_id=first.order_id, reason="gone")
    for arrival in all_orders_of([first, rejected], copies=2):
        placed = order()
        heard = [again_for(event, placed) for event in arrival]

        said = {type(event) for event in await hear(inboxes, heard)}

        payment = await row(shop.payments, Payment, placed.order_id)
        if isinstance(heard[0], OrderPlaced):
            assert (payment.status, said) == ("refunded", {PaymentCaptured, PaymentRefunded})
        else:
            assert (payment.status, said) == ("declined", {PaymentDeclined})


async def test_inventory_answers_once_whenever_it_hears_of_the_payment(shop: Shop) -> None:
    inboxes = [shop.inboxes["reserve"], shop.inboxes["release"]]
    first = order()
    declined = PaymentDeclined(order_id=first.order_id, amount=first.total, reason="no")
    for arrival in all_orders_of([first, declined], copies=2):
        placed = order()
        heard = [again_for(event, placed) for event in arrival]

        said = {type(event) for event in await hear(inboxes, heard)}

        reservation = await row(shop.inventory, Reservation, placed.order_id)
        if isinstance(heard[0], OrderPlaced):
            assert (reservation.status, said) == ("released", {StockReserved, StockReleased})
        else:
            assert (reservation.status, said) == ("rejected", {StockRejected})
    await check_the_stock(shop)


async def test_shipping_ships_once_whichever_of_the_three_comes_last(shop: Shop) -> None:
    first = order()
    paid = PaymentCaptured(order_id=first.order_id, amount=first.total)
    reserved = StockReserved(order_id=first.order_id, quantities={"mug": 2})
    for arrival in all_orders_of([first, paid, reserved], copies=2):
        placed = order()
        heard = [again_for(event, placed) for event in arrival]

        said = await hear([shop.inboxes["ship"]], heard)

        # the last of the three to come first completed it; its second copy, if it comes later, says the same again
        completing = max(heard.index(kind) for kind in heard)
        assert 1 <= len(said) == heard[completing:].count(heard[completing])
        assert all(event == said[0] and isinstance(event, OrderShipped) for event in said)


@pytest.mark.parametrize(
    ("kinds", "end"),
    [
        ((PaymentCaptured, StockReserved, OrderShipped), ("shipped", "captured", "reserved")),
        ((PaymentDeclined, StockReserved, StockReleased), ("cancelled", "declined", "released")),
        ((PaymentCaptured, StockRejected, PaymentRefunded), ("cancelled", "refunded", "rejected")),
        ((PaymentDeclined, StockRejected), ("cancelled", "declined", "rejected")),
    ],
)
def test_an_orders_row_ends_the_same_in_every_order_of_its_facts(
    kinds: tuple[type[Event], ...], end: tuple[str, str, str]
) -> None:
    placed = order()
    facts: list[Any] = [placed, *(fact(kind, placed) for kind in kinds)]

    for arrival in all_orders_of(facts, copies=2):
        known = Order(placed.order_id, placed.model_dump_json())
        for event in arrival:
            learn(known, event)
        assert (known.status, known.payment, known.stock) == end
        assert (known.cancelled_by is not None) == (known.status == "cancelled")


def fact(kind: type[Event], placed: OrderPlaced) -> Event:
    """An event of *kind* about *placed*."""
    fields = {
        "order_id": placed.order_id,
        "amount": placed.total,
        "quantities": {line.sku: line.quantity for line in placed.lines},
        "reason": f"because of {kind.event_name}",
        "email": placed.email,
        "address": placed.address,
        "tracking": "PX1",
    }
    return kind(**{name: value for name, value in fields.items() if name in kind.model_fields})


def again_for(event: Event, placed: OrderPlaced) -> Event:
    """The same event about another order: one set of databases for all arrivals."""
    return placed if isinstance(event, OrderPlaced) else event.model_copy(update={"order_id": placed.order_id})
