"""A bus of a test's own, somebody who listens to all of it, and one whose confirms get lost."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from uuid import uuid4

from eventbus import Bus, Envelope, Event, PublishTimeout, Service, Worker
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


class ForgetfulBus(Bus):
    """Publishes, but the first confirms never arrive: the broker has the event, and the caller cannot know."""

    lost_confirms = 0

    async def publish(
        self,
        event: Event | Envelope,
        *,
        id: str | None = None,
        subject: str | None = None,
        delay: timedelta | None = None,
        extensions: Mapping[str, str | int | bool] | None = None,
        require_subscriber: bool = False,
    ) -> Envelope:
        sent = await super().publish(
            event,
            id=id,
            subject=subject,
            delay=delay,
            extensions=extensions,
            require_subscriber=require_subscriber,
        )
        if self.lost_confirms:
            self.lost_confirms -= 1
            raise PublishTimeout("the confirm was lost", envelope=sent, maybe_stored=True)
        return sent
