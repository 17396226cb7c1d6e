"""A bus of a test's own, and somebody who listens to all of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import uuid4

from eventbus import Envelope, Service, Worker
from tests.services.waiting import eventually


@dataclass
class Listener:
    """What was published, each event once, however often it came."""

    url: str
    heard: list[Envelope] = field(default_factory=list)

    async def has_heard(self, count: int) -> list[Envelope]:
        async def enough() -> bool:
            return len(self.heard) >= count

        await eventually(enough, f"{count} events heard")
        assert len(self.heard) == count
        return self.heard


@asynccontextmanager
async def listening() -> AsyncIterator[Listener]:
    """An embedded broker of its own, and a service that hears every event on it."""
    listener = Listener(f"memory://{uuid4().hex}")
    service = Service("listener")

    @service.on("#")
    async def hear(envelope: Envelope) -> None:
        listener.heard.append(envelope)

    async with Worker(service, url=listener.url):
        yield listener
