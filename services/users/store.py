"""What users knows: who has registered."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from services.database import Database, open_database
from services.settings import Settings


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables of users."""


class User(Base):
    """Somebody who registered; an address registers once."""

    __tablename__ = "users"

    user_id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str] = mapped_column(unique=True)


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[Database]:
    """Open the database."""
    async with open_database(settings, "users", has_outbox=True) as database:
        yield database
