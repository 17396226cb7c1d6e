"""What payments knows: one row per order, whatever happens."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal
from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from schemas import Money
from services.database import Exact, Sessions, open_database
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


@dataclass(frozen=True, slots=True)
class Till:
    """What the handlers work with: the database, the currencies that are taken, the largest total."""

    sessions: Sessions
    accounts: frozenset[str]
    limit: Decimal


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Till]:
    """Open what the handlers work with."""
    async with open_database(settings.data / "payments.db", Base) as sessions:
        yield Till(sessions, settings.accounts, settings.payment_limit)
