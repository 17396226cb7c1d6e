"""What marketing knows: who is on the mailing list."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from services.database import Database, open_database
from services.settings import Settings


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables of marketing."""


class Subscriber(Base):
    """Somebody who gets the newsletter, once."""

    __tablename__ = "subscribers"

    user_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Database]:
    """Open the database."""
    async with open_database(settings, "marketing") as database:
        yield database
