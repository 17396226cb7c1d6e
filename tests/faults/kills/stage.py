"""What is around the programs of a run: their databases, and what there is to see of their broker."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal  # Any: what a management interface answers

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from eventbus import Envelope, Service, Worker
from eventbus.database import ONLY_READS, OUTBOX, open_engine
from eventbus.dead_letters import DeadLetters
from tests.servers import BrokerServer, vhost_of
from tests.stores import Stores

Store = Literal["sqlite", "postgresql"]


@dataclass(slots=True)
class Witness:
    """A service that hears of every event, on a queue of its own: what came there has reached its queues."""

    heard: dict[tuple[str, str], Envelope] = field(default_factory=dict)  # by source and id

    def from_sources(self, *sources: str) -> set[str]:
        return {event_id for source, event_id in self.heard if source in sources}

    def of_type(self, *types: str) -> list[Envelope]:
        return [envelope for envelope in self.heard.values() if envelope.type in types]

    @asynccontextmanager
    async def listening(self, url: str) -> AsyncIterator[None]:
        service: Service[object] = Service("witness")

        @service.on("#")
        async def hear(envelope: Envelope) -> None:
            self.heard[envelope.source, envelope.id] = envelope

        async with Worker(service, url=url):
            yield


class Databases:
    """One database for each name, of one kind: made with the bus's tables, and looked at while others write to it."""

    def __init__(self, store: Store, stores: Stores, folder: Path) -> None:
        self._store, self._stores, self._folder = store, stores, folder
        self._engines: dict[str, AsyncEngine] = {}

    async def new(self, name: str) -> str:
        """The URL of a new, empty database, whose name ends with *name*."""
        if self._store == "sqlite":
            url = f"sqlite:///{self._folder / name}.db"
        else:
            url = await asyncio.to_thread(self._new_at_server, name)
        self._engines[name] = open_engine(url).execution_options(**{ONLY_READS: True})
        return url

    def _new_at_server(self, name: str) -> str:
        return self._stores.shared("postgresql").new_url(name)

    async def ask(self, name: str, question: str) -> list[tuple[object, ...]]:
        async with self._engines[name].connect() as connection:
            return [tuple(row) for row in await connection.execute(text(question))]

    async def outbox(self, name: str) -> tuple[set[str], set[str], set[str]]:
        """The ids of the events in its outbox: all of them, those that wait, and those that were set aside."""
        o = OUTBOX.c
        async with self._engines[name].connect() as connection:
            rows = (await connection.execute(select(o.event_id, o.published_ms, o.error))).all()
        waiting = {row.event_id for row in rows if row.published_ms is None and row.error is None}
        return {row.event_id for row in rows}, waiting, {row.event_id for row in rows if row.error is not None}

    async def close(self) -> None:
        for engine in self._engines.values():
            await engine.dispose()


@dataclass(frozen=True, slots=True)
class Place:
    """A virtual host of *broker*, for one run."""

    broker: BrokerServer
    url: str

    async def has_queues(self, services: Collection[str]) -> bool:
        """Whether every one of *services* has its queue, bound: what is published from now on reaches them all."""
        bindings = await self._ask("/bindings/VHOST?columns=source,destination")
        bound = {binding["destination"] for binding in bindings if binding["source"] == "events"}
        return {f"events.{service}" for service in services} <= bound

    async def is_empty(self) -> bool:
        """Whether nothing waits in a queue, or is with a handler; up to five seconds old."""
        given_up = (".dead", ".undeliverable")
        queues = await self._ask("/queues/VHOST?columns=name,messages")
        return not any(queue.get("messages", 0) for queue in queues if not queue["name"].endswith(given_up))

    async def _ask(self, path: str) -> list[dict[str, Any]]:
        found = path.replace("VHOST", urllib.parse.quote(vhost_of(self.url), safe=""))
        answer = await asyncio.to_thread(self.broker.api, "GET", found)
        assert isinstance(answer, list)
        return answer

    async def dead_letters(self, services: Collection[str]) -> set[str]:
        """What these services have given up."""
        found: set[str] = set()
        for service in services:
            async with DeadLetters(service, url=self.url) as letters:
                found |= {f"{service} gave up: {letter.error}" async for letter in letters}
        return found
