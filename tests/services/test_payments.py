"""Payments alone: its decisions and its database. What it does in every order of events: test_interleavings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal

import pytest
from sqlalchemy import select

from eventbus import Reject
from eventbus.testing import context
from schemas import OrderPlaced, PaymentCaptured, PaymentDeclined, StockRejected
from services.payments.handlers import capture, give_back
from services.payments.store import Payment, Till, resources
from services.settings import Settings
from tests.services.databases import on_each_database
from tests.services.orders_of_every_kind import in_an_unknown_currency, order, too_expensive

pytestmark = on_each_database


@pytest.fixture
async def till(settings: Settings) -> AsyncIterator[Till]:
    async with resources(settings) as opened:
        yield opened


async def payments(till: Till) -> list[Payment]:
    async with till.session() as session:
        return list(await session.scalars(select(Payment)))


async def test_the_total_is_captured_to_the_cent(till: Till) -> None:
    placed = order(quantity=3, unit_price="0.10")
    about = context(placed, state=till)

    await capture(placed, about)

    assert about.published == [PaymentCaptured(order_id=placed.order_id, amount=placed.total)]
    assert [(p.status, p.amount, p.currency) for p in await payments(till)] == [("captured", Decimal("0.30"), "EUR")]


@pytest.mark.parametrize(("unit_price", "answer"), [("1000.00", PaymentCaptured), ("1000.01", PaymentDeclined)])
async def test_a_total_over_the_limit_is_declined(till: Till, unit_price: str, answer: type) -> None:
    placed = order(quantity=1, unit_price=unit_price)
    about = context(placed, state=till)

    await capture(placed, about)

    assert [type(event) for event in about.published] == [answer]


async def test_a_currency_without_an_account_is_rejected_for_good_and_leaves_nothing(till: Till) -> None:
    placed = in_an_unknown_currency()

    with pytest.raises(Reject, match="no account takes XTS: add it to SHOP_ACCOUNTS, then replay"):
        await capture(placed, context(placed, state=till))

    assert await payments(till) == []


async def test_many_captures_of_one_order_at_the_same_time_are_one_payment(till: Till) -> None:
    placed = order()
    about = [context(placed, state=till) for _ in range(20)]

    await asyncio.gather(*(capture(placed, one) for one in about))

    assert len(await payments(till)) == 1
    assert all(one.published == about[0].published for one in about)


async def test_two_processes_on_one_database_make_one_payment(till: Till, settings: Settings) -> None:
    placed = order()
    async with resources(settings) as other:
        states = [till, other] * 10

        await asyncio.gather(*(capture(placed, context(placed, state=state)) for state in states))

    assert len(await payments(till)) == 1


async def test_a_capture_and_a_refund_at_the_same_time_keep_no_money(till: Till, settings: Settings) -> None:
    orders = [order() for _ in range(10)]

    async def both(placed: OrderPlaced, other: Till) -> None:
        rejected = StockRejected(order_id=placed.order_id, reason="gone")
        await asyncio.gather(
            capture(placed, context(placed, state=till)), give_back(rejected, context(rejected, state=other))
        )

    async with resources(settings) as other:
        await asyncio.gather(*(both(placed, other) for placed in orders))

    assert {payment.status for payment in await payments(till)} <= {"refunded", "declined"}
    assert len(await payments(till)) == len(orders)


async def test_a_declined_order_is_not_refunded(till: Till) -> None:
    placed = too_expensive()
    rejected = StockRejected(order_id=placed.order_id, reason="gone")
    about = context(rejected, state=till)

    await capture(placed, context(placed, state=till))
    await give_back(rejected, about)

    assert about.published == []


async def test_what_was_decided_outlives_the_process(settings: Settings) -> None:
    placed = order()
    async with resources(settings) as first:
        await capture(placed, context(placed, state=first))

    # the limit is lower now; the answer stays
    async with resources(settings.model_copy(update={"payment_limit": Decimal(1)})) as second:
        about = context(placed, state=second)
        await capture(placed, about)

    assert [type(event) for event in about.published] == [PaymentCaptured]
