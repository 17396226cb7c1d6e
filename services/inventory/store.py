"""What inventory knows: what is for sale, and one row per order, whatever happens."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Literal
from uuid import UUID

from sqlalchemy import JSON, CheckConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from services.database import Database, alone, open_database
from services.settings import Settings

# What a new shop has on its shelves. The unicorn is listed, and never there: who orders it meets the sad path.
FIRST_STOCK: Mapping[str, int] = {"mug": 10_000, "shirt": 10_000, "bicycle": 10_000, "unicorn": 0}


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables of inventory."""


class Article(Base):
    """How many of an article are for sale."""

    __tablename__ = "articles"
    __table_args__ = (CheckConstraint("available >= 0"),)

    sku: Mapped[str] = mapped_column(primary_key=True)
    available: Mapped[int]


class Reservation(Base):
    """The answer to one order. The primary key is what makes a second one impossible.

    `unwanted` (the order failed before its goods were asked for) -> `rejected`; `reserved` -> `released`.
    """

    __tablename__ = "reservations"

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    status: Mapped[Literal["unwanted", "rejected", "reserved", "released"]]
    reason: Mapped[str] = mapped_column(default="")
    quantities: Mapped[dict[str, int]] = mapped_column(JSON, default_factory=dict)


@asynccontextmanager
async def resources(settings: Settings, stock: Mapping[str, int] = FIRST_STOCK) -> AsyncIterator[Database]:
    """Open the database; *stock* fills in the articles that it has never heard of."""
    async with open_database(settings, "inventory", has_outbox=True) as database:
        async with database.begin() as session:
            await alone(session, "shelves")
            for sku, available in stock.items():
                if await session.get(Article, sku) is None:
                    session.add(Article(sku, available))
        yield database
