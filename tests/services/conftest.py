"""What the shop's tests share: settings, with databases that are theirs, and a mailbox."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.mailbox.server import Mailbox, serving_smtp
from services.settings import Settings
from services.tables import TABLES, make_tables
from tests.stores import apart


async def make_all_tables(settings: Settings) -> None:
    for service in TABLES:
        await make_tables(settings, service)


@pytest.fixture(scope="session")
def empty_shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of SQLite files with their tables, made once: a copy costs nothing."""
    folder = tmp_path_factory.mktemp("shop") / "empty"
    apart(make_all_tables(Settings(data=folder)))
    return folder


@pytest.fixture
def settings(request: pytest.FixtureRequest, tmp_path: Path, empty_shop: Path) -> Settings:
    """Of a shop whose files and databases are this test's own; its SMTP port is one where nobody listens.

    On SQLite, or as `on_each_database` says. No relay: most tests have no broker.
    """
    folder = Path(shutil.copytree(empty_shop, tmp_path / "shop"))
    settings = Settings(data=folder, relay=False, http_port=0, smtp_port=1)
    if getattr(request, "param", "sqlite") == "sqlite":
        return settings
    # One for all services: their tables' names differ.
    settings = settings.model_copy(update={"database": request.getfixturevalue("postgresql_url")})
    apart(make_all_tables(settings))
    return settings


@dataclass(frozen=True)
class RunningMailbox:
    """A real SMTP server on a free port, and settings that lead to it."""

    mailbox: Mailbox
    settings: Settings

    def subjects(self) -> list[str]:
        return sorted(mail.subject for mail in self.mailbox.mails)


@asynccontextmanager
async def running_mailbox(settings: Settings, refuse: int = 0) -> AsyncIterator[RunningMailbox]:
    mailbox = Mailbox(refuse)
    async with serving_smtp(mailbox, "127.0.0.1", 0) as port:
        yield RunningMailbox(mailbox, settings.model_copy(update={"smtp_port": port}))


@pytest.fixture
async def post(settings: Settings) -> AsyncIterator[RunningMailbox]:
    async with running_mailbox(settings) as running:
        yield running
