"""One cell at work: its broker, its programs, its books. What a fault may lay hands on."""

from __future__ import annotations

import asyncio
import sqlite3
import time
import urllib.parse
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from eventbus.dead_letters import DeadLetters
from tests.faults.ledger.processes import Program
from tests.faults.ledger.proxy import Proxy
from tests.servers import BrokerServer, vhost_of

STEP_S = 120.0  # no step of a fault takes longer, on a busy computer either


@dataclass
class Stage:
    """What a fault may lay hands on."""

    broker: BrokerServer
    url: str
    proxy: Proxy
    books: sqlite3.Connection
    events: int
    services: tuple[str, ...]
    publisher: Program
    workers: list[Program]
    specials: frozenset[int]  # the numbers of the events that are of the cell's kind
    seed: int
    fault_ended: float | None = None
    destroyed: set[str] = field(default_factory=set)

    def over(self) -> None:
        """The fault has ended: from here on recovery is measured."""
        self.fault_ended = time.time()

    # ── looking ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(STEP_S):
                while not condition():  # noqa: ASYNC110  # other processes bring it about
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not within {STEP_S:.0f} s: {what}") from None

    async def published(self, share: float) -> None:
        """Until this *share* of the events is confirmed."""
        await self.until(lambda: self.confirmed() >= share * self.events, f"{share:.0%} published")

    def confirmed(self) -> int:
        return self.number("select count(*) from published where confirmed not null")

    def said(self, words: str) -> int:
        """How many lines of all programs' logs hold *words*."""
        return sum(program.said(words) for program in [self.publisher, *self.workers])

    async def stands_still(self, figure: Callable[[], int], seconds: float) -> None:
        """Until *figure* has not grown for so long: what was to be broken is broken."""
        seen, since = figure(), time.monotonic()

        def has_rested() -> bool:
            nonlocal seen, since
            if (now := figure()) != seen:
                seen, since = now, time.monotonic()
            return time.monotonic() - since >= seconds

        await self.until(has_rested, "nothing goes on")

    async def gone(self, links: frozenset[object]) -> None:
        """Until none of the connections *links* is left."""
        assert links, "nobody was connected"
        await self.until(lambda: not links & self.proxy.links, "all connections have ended")

    def handled(self) -> int:
        """How many effects there are, of all services."""
        return self.number("select count(*) from effects")

    def runs(self) -> int:
        return self.number("select count(*) from runs")

    def number(self, question: str, *values: object) -> int:
        number: int = self.books.execute(question, values).fetchone()[0]
        return number

    def is_declared(self) -> bool:
        """Whether every service's queue is there, and bound: a queue is declared first and bound then."""
        answer = self.broker.api("GET", self._path("/bindings/VHOST?columns=source,destination"))
        assert isinstance(answer, list)
        bound = {binding["destination"] for binding in answer if binding["source"] == "events"}
        return {f"events.{service}" for service in self.services} <= bound

    async def dead_letters(self) -> set[str]:
        """The ids of the events that any service has given up."""
        found: set[str] = set()
        for service in self.services:
            async with DeadLetters(service, url=self.url) as letters:
                found |= {letter.envelope.id async for letter in letters if letter.envelope is not None}
        return found

    # ── acting ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def ctl(self, *words: str) -> str:
        return await asyncio.to_thread(self.broker.ctl, *words)

    async def close_connections(self, why: str) -> None:
        """Have the broker close all of this cell's; without a virtual host it would close those of `/` only."""
        await self.ctl("close_all_connections", "-p", vhost_of(self.url), why)

    async def api(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        """Ask the management API; `VHOST` in *path* is this cell's."""
        return await asyncio.to_thread(self.broker.api, method, self._path(path), body)

    def _path(self, path: str) -> str:
        return path.replace("VHOST", urllib.parse.quote(vhost_of(self.url), safe=""))

    async def depths(self) -> dict[str, int]:
        """How many messages each queue has, unacked ones included; up to five seconds old."""
        queues = await self.api("GET", "/queues/VHOST?columns=name,messages")
        return {queue["name"]: queue.get("messages", 0) for queue in queues}

    async def paused(self, act: Callable[[], Awaitable[None]]) -> None:
        """*act* while the publisher has nothing under way."""
        await self.pause()
        await act()
        await self.resume()

    async def pause(self) -> None:
        """Return when the publisher has nothing under way; it may have ended, too."""
        if self.publisher.is_running:
            await self.publisher.ask("pause", "paused")

    async def resume(self) -> None:
        if self.publisher.is_running:
            await self.publisher.ask("resume")
