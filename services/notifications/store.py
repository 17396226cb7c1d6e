"""What notifications knows: which mails it has sent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from services.database import Database, open_database
from services.notifications.smtp import MailServer
from services.settings import Settings


class Base(MappedAsDataclass, DeclarativeBase):
    """The tables of notifications."""


class SentMail(Base):
    """A mail that the mail server has taken. It outlives the bus's own memory of what was handled."""

    __tablename__ = "sent_mails"

    message_id: Mapped[str] = mapped_column(primary_key=True)
    event_id: Mapped[str]


@dataclass(frozen=True, slots=True)
class PostOffice:
    """What the handlers work with: the database and the mail server."""

    database: Database
    server: MailServer


@asynccontextmanager
async def resources(settings: Settings) -> AsyncIterator[PostOffice]:
    """Open what the handlers work with. The mail server is not called yet: it may be away when we start."""
    async with open_database(settings, "notifications") as database:
        yield PostOffice(database, MailServer(settings.smtp_host, settings.smtp_port))
