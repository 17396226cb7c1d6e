"""What orders knows: one row per order. What happened is kept as facts, and the status follows from them.

Facts only grow. So whatever order they arrive in, and however often, the row ends the same.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, assert_never
from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from schemas import (
    OrderPlaced,
    OrderShipped,
    PaymentCaptured,
    PaymentDeclined,
    PaymentRefunded,
    StockRejected,
    StockReleased,
    StockReserved,
)
from services.database import Database, open_database
from services.settings import Settings

Fact = (
    OrderPlaced
    | PaymentCaptured
    | PaymentDeclined
    | PaymentRefunded
    | StockReserved
    | StockRejected
    | StockReleased
    | OrderShipped
)
Status = Literal["received", "placed", "shipped", "cancelled"]


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables of orders."""


class Order(Base):
    """What was asked for, and what is known to have happened since."""

    __tablename__ = "orders"

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    placed: Mapped[str | None] = mapped_column(default=None)  # the event order_placed as JSON
    is_announced: Mapped[bool] = mapped_column(default=False)  # order_placed came back from the bus
    is_captured: Mapped[bool] = mapped_column(default=False)
    is_refunded: Mapped[bool] = mapped_column(default=False)
    is_reserved: Mapped[bool] = mapped_column(default=False)
    is_released: Mapped[bool] = mapped_column(default=False)
    is_declined: Mapped[bool] = mapped_column(default=False)
    is_rejected: Mapped[bool] = mapped_column(default=False)
    tracking: Mapped[str | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)  # the failure that was heard of first
    cancelled_by: Mapped[str | None] = mapped_column(default=None)  # the event that published order_cancelled

    @property
    def status(self) -> Status:
        if self.tracking is not None:
            return "shipped"
        if self.reason is not None:
            return "cancelled"
        return "placed" if self.is_announced else "received"

    @property
    def payment(self) -> Literal["pending", "declined", "captured", "refunded"]:
        if self.is_declined:
            return "declined"
        return "refunded" if self.is_refunded else "captured" if self.is_captured else "pending"

    @property
    def stock(self) -> Literal["pending", "rejected", "reserved", "released"]:
        if self.is_rejected:
            return "rejected"
        return "released" if self.is_released else "reserved" if self.is_reserved else "pending"


def learn(order: Order, fact: Fact) -> None:
    """Add *fact* to what is known of *order*."""
    match fact:
        case OrderPlaced():
            order.is_announced = True
            order.placed = order.placed or fact.model_dump_json()
        case PaymentCaptured():
            order.is_captured = True
        case PaymentDeclined():
            order.is_declined = True
            order.reason = order.reason or fact.reason
        case PaymentRefunded():
            order.is_refunded = True
        case StockReserved():
            order.is_reserved = True
        case StockRejected():
            order.is_rejected = True
            order.reason = order.reason or fact.reason
        case StockReleased():
            order.is_released = True
        case OrderShipped():
            order.tracking = fact.tracking
        case _:
            assert_never(fact)
    if order.reason is not None and order.placed is not None and order.cancelled_by is None:
        order.cancelled_by = fact.event_name


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Database]:
    """Open the database."""
    async with open_database(settings, "orders", has_outbox=True) as database:
        yield database
