"""Inventory alone: its decisions and its database. What it does in every order of events: test_interleavings."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from uuid import uuid4

import pytest
from sqlalchemy import select

from eventbus.testing import context
from schemas import Money, OrderLine, OrderPlaced, StockRejected, StockReserved
from services.database import Database
from services.inventory.handlers import reserve
from services.inventory.store import Article, resources
from services.settings import Settings
from tests.services.databases import on_each_database
from tests.services.orders_of_every_kind import order

pytestmark = on_each_database


def order_of(**quantities: int) -> OrderPlaced:
    lines = tuple(OrderLine(sku=sku, quantity=n, unit_price=Decimal(1)) for sku, n in quantities.items())
    return order().model_copy(update={"lines": lines})


async def on_shelves(database: Database) -> dict[str, int]:
    async with database.session() as session:
        return {article.sku: article.available for article in await session.scalars(select(Article))}


async def test_what_is_there_is_set_aside(settings: Settings) -> None:
    placed = order_of(mug=2, shirt=1)
    async with resources(settings, {"mug": 3, "shirt": 1}) as database:
        about = context(placed, state=database)

        await reserve(placed, about)

        assert about.published == [StockReserved(order_id=placed.order_id, quantities={"mug": 2, "shirt": 1})]
        assert await on_shelves(database) == {"mug": 1, "shirt": 0}


@pytest.mark.parametrize(
    ("wanted", "short"),
    [({"mug": 1, "shirt": 2}, "shirt"), ({"mug": 4, "shirt": 2}, "mug, shirt"), ({"mug": 1, "hat": 1}, "hat")],
)
async def test_one_article_that_is_short_or_unknown_rejects_the_whole_order(
    settings: Settings, wanted: dict[str, int], short: str
) -> None:
    placed = order_of(**wanted)
    async with resources(settings, {"mug": 3, "shirt": 1}) as database:
        about = context(placed, state=database)

        await reserve(placed, about)

        assert about.published == [StockRejected(order_id=placed.order_id, reason=f"out of stock: {short}")]
        assert await on_shelves(database) == {"mug": 3, "shirt": 1}


async def test_lines_of_the_same_article_are_counted_together(settings: Settings) -> None:
    line = OrderLine(sku="mug", quantity=2, unit_price=Decimal(1))
    placed = order().model_copy(update={"lines": (line, line)})
    async with resources(settings, {"mug": 3}) as database:
        about = context(placed, state=database)

        await reserve(placed, about)

        assert [type(event) for event in about.published] == [StockRejected]


async def test_the_last_article_goes_to_one_of_those_who_want_it_at_once(settings: Settings) -> None:
    wishes = [order_of(mug=1) for _ in range(10)]
    async with resources(settings, {"mug": 3}) as one, resources(settings, {"mug": 3}) as other:
        about = [context(placed, state=(one, other)[n % 2]) for n, placed in enumerate(wishes)]

        await asyncio.gather(*(reserve(placed, mine) for placed, mine in zip(wishes, about, strict=True)))

        answers = [type(mine.published[0]) for mine in about]
        assert (answers.count(StockReserved), answers.count(StockRejected)) == (3, 7)
        assert await on_shelves(one) == {"mug": 0}


async def test_a_restart_does_not_fill_the_shelves_again(settings: Settings) -> None:
    placed = OrderPlaced(
        order_id=uuid4(),
        email="ada@example.com",
        address="here",
        lines=(OrderLine(sku="mug", quantity=2, unit_price=Decimal(1)),),
        total=Money(amount=Decimal(2), currency="EUR"),
    )
    async with resources(settings, {"mug": 3}) as database:
        await reserve(placed, context(placed, state=database))

    async with resources(settings, {"mug": 3, "hat": 1}) as database:
        assert await on_shelves(database) == {"mug": 1, "hat": 1}
