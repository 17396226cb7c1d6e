"""What the shop's tests share: settings in a folder of their own, and orders of every kind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.mailbox.server import Mailbox, serving_smtp
from services.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Of a shop whose files are this test's own; its SMTP port is one where nobody listens."""
    return Settings(data=tmp_path / "shop", http_port=0, smtp_port=1)


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
