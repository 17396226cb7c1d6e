"""What payments knows: one row per order, whatever happens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal
from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from schemas import Money
from services.database import Database, Exact, open_database
from services.settings import Settings


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables of payments."""


class Payment(Base):
    """The answer to one order. The primary key is what makes a second capture impossible.

    `unwanted` (the order failed before its payment was asked for) -> `declined`; `captured` -> `refunded`.
    """

    __tablename__ = "payments"

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    status: Mapped[Literal["unwanted", "declined", "captured", "refunded"]]
    reason: Mapped[str] = mapped_column(default="")
    amount: Mapped[Decimal] = mapped_column(Exact, default=Decimal(0))
    currency: Mapped[str] = mapped_column(default="")

    @property
    def money(self) -> Money:
        return Money(amount=self.amount, currency=self.currency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Till(Database):
    """What the handlers work with: the database, the currencies that are taken, the largest total."""

    accounts: frozenset[str]
    limit: Decimal


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Till]:
    """Open what the handlers work with."""
    async with open_database(settings, "payments", has_outbox=True) as database:
        yield Till(database.engine, database.relay, accounts=settings.accounts, limit=settings.payment_limit)
