"""What shipping knows: one row per order, filled in by whatever is heard of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from services.database import Database, open_database
from services.settings import Settings


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables of shipping."""


class Parcel(Base):
    """What is known of an order's parcel; `completed_by` names the event that completed it, and so shipped it."""

    __tablename__ = "parcels"

    order_id: Mapped[UUID] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column(default=None)
    address: Mapped[str | None] = mapped_column(default=None)
    is_paid: Mapped[bool] = mapped_column(default=False)
    is_reserved: Mapped[bool] = mapped_column(default=False)
    completed_by: Mapped[str | None] = mapped_column(default=None)


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Database]:
    """Open the database."""
    async with open_database(settings, "shipping", has_outbox=True) as database:
        yield database
