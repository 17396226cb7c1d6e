"""Services under test: on an embedded broker of their own, in virtual time, without jitter.

Virtual are delays, leases and expiry: a retry that is due in ten minutes is `advance(timedelta(minutes=10))` away.
Handlers run for real, and so do their timeouts. Nothing here reads the environment or reaches another process.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar
from uuid import uuid4

from eventbus.bus import Sender
from eventbus.clock import VirtualClock
from eventbus.context import Context, Unit
from eventbus.dead_letters import DeadLetter, read
from eventbus.delay import LONGEST, way
from eventbus.envelope import Envelope, enclose
from eventbus.errors import SetupError
from eventbus.event import Event
from eventbus.idempotency import IdempotencyStore, MemoryStore
from eventbus.service import Handler, Service
from eventbus.topology import Names, shared
from eventbus.transport.base import Transport
from eventbus.transport.memory import MemoryTransport
from eventbus.transport.memory_broker import MemoryBroker
from eventbus.worker import Engine

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

__all__ = ["Harness", "RecordedContext", "context"]

E_ = TypeVar("E_", bound=Event)
S_ = TypeVar("S_")

SOURCE = "/tests"
# Of handlers, without time passing: more is a circle of events.
MOST_ATTEMPTS_AT_ONCE = 100_000


class _NoEvent(Event, name="no_event"):
    """What a context without an event is about."""


class RecordedContext(Context[S_], Generic[S_]):
    """A context for calling a handler directly; `published` lists what it published, in order."""

    published: list[Event]

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        before = len(self.published)
        try:
            async with super().transaction() as session:
                yield session
        except BaseException:
            del self.published[before:]  # they were rolled back
            raise

    async def publish(
        self,
        event: Event | Envelope,
        *,
        id: str | None = None,
        subject: str | None = None,
        delay: timedelta | None = None,
        extensions: Mapping[str, str | int | bool] | None = None,
    ) -> Envelope:
        envelope = await super().publish(event, id=id, subject=subject, delay=delay, extensions=extensions)
        if isinstance(event, Event):
            self.published.append(event)
        return envelope


async def _nowhere(envelope: Envelope, delay: timedelta | None) -> None:
    """A recorded context publishes nothing, but refuses the delays that a real one refuses."""
    if delay is not None:
        way(delay, f"publish.{envelope.type}")


def _open_unit(state: object, key: str) -> AbstractAsyncContextManager[Unit]:
    from eventbus.outbox.inbox import open_unit

    return open_unit(state, key, check=lambda _: None)


def context(event: Event | None = None, *, state: S_ = None, attempt: int = 1) -> RecordedContext[S_]:  # type: ignore[assignment]  # no state: None
    """A context for a unit test of a handler: `ctx = context(event, state=...); await handler(event, ctx)`.

    A handler that uses `context.transaction()` gets a real one: give `state=` an engine on a fresh SQLite file that
    `await eventbus.database.create(engine)` has put the tables into. What is rolled back is not in `published`.
    """
    caused_by = event if event is not None else _NoEvent()
    envelope = enclose(caused_by, id=str(uuid4()), source=SOURCE, time=datetime.now(UTC))
    recorded = RecordedContext(
        envelope, attempt=attempt, identity=("test", "test", SOURCE), state=state, publish=_nowhere,
        inbox=(_open_unit, f"test {envelope.id}"),
    )  # fmt: skip
    recorded.published = []
    return recorded


class Harness:
    """Runs *services* on an embedded broker of their own; an async context manager.

    Leaving it raises an AssertionError, with the handler's traceback, if there is a dead letter that `dead_letters`
    was never asked for.
    """

    def __init__(self, *services: Service[Any]) -> None:
        self._services = services
        self._clock = VirtualClock()
        self._broker = MemoryBroker(clock=self._clock)
        self._transport: Transport = MemoryTransport.on_broker(self._broker)
        self._store: IdempotencyStore = MemoryStore(clock=self._clock)
        self._names = Names()
        self._published: list[Envelope] = []
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._seen: set[str] = set()
        self._relaying = asyncio.Lock()  # one at a time, so that nothing is published twice
        self._sender: Sender | None = None
        self._engine: Engine | None = None

    async def __aenter__(self) -> Self:
        """Check the services, enter their lifespans, consume.

        Raises:
            SetupError: mistakes of all services, one a line.
        """
        await self._transport.open(shared(self._names), "apply")
        self._sender = Sender(self._transport, self._names, on_sent=self._published.append)
        try:
            self._engine = Engine(
                self._services, self._sender, self._store,
                clock=self._clock, jitter=lambda: 0.0, on_committed=self._relay,
            )  # fmt: skip
            for consumer in self._engine.consumers:
                consumer.on_attempt = self._count
            await self._engine.start()
        except BaseException:
            await self._transport.close()
            raise
        return self

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        _, engine = self._running()
        try:
            await engine.stop(grace_s=0.0 if e is not None else 30.0, hurry=asyncio.Event())
        finally:
            await self._transport.close()
        if e is None:
            self._complain_of_unseen()

    async def publish(self, event: Event, *, id: str | None = None, delay: timedelta | None = None) -> Envelope:
        """Publish *event* from `/tests` and return its envelope; nothing has been handled yet."""
        sender, _ = self._running()
        envelope = enclose(event, id=id or str(uuid4()), source=SOURCE, time=self._clock.now())
        await sender.send(envelope, delay)
        return envelope

    async def settled(self) -> None:
        """Wait until every event has come to its end, retries and delayed events included: time runs as far as needed.

        Raises:
            AssertionError: it never ends (42 days and more, or 100,000 attempts at once): something publishes itself
                again and again.
        """
        give_up_s = self._clock.monotonic_s() + 2 * LONGEST.total_seconds()
        await self._quiet()
        while self._is_anything_waiting():
            due_s = self._clock.next_due_s()
            if due_s is None or due_s > give_up_s:
                raise AssertionError("not settled after twice 42 days: does a handler publish its own event again?")
            self._clock.ring_next()
            await self._quiet()

    async def advance(self, by: timedelta) -> None:
        """Let *by* pass: what is due by then has been handled when this returns, in the order in which it was due."""
        if by < timedelta(0):
            raise ValueError(f"advance({by!r}) lies in the past: give a time of zero or more")
        until_s = self._clock.monotonic_s() + by.total_seconds()
        await self._quiet()
        while (due_s := self._clock.next_due_s()) is not None and due_s <= until_s:
            self._clock.ring_next()
            await self._quiet()
        self._clock.set_to(until_s)

    def published(self, event: type[E_]) -> list[E_]:
        """What was published of this class and version, by the test and by handlers, in order.

        Each event once, by source and id: a handler that ran again published the same one again.
        """
        events = {(e.source, e.id): e for e in reversed(self._published) if e.type == event.event_type}
        return [envelope.event(event) for envelope in reversed(events.values())]

    def attempts(self, handler: Handler) -> int:
        """How often *handler* has been run."""
        _, engine = self._running()
        known = [
            (service, subscription.handler)
            for service, subscriptions in engine.subscriptions.items()
            for subscription in subscriptions
            if subscription.function is handler
        ]
        if not known:
            raise SetupError(f"{handler!r} is no handler of these services")
        return sum(self._attempts[key] for key in known)

    def dead_letters(self, service: Service[Any]) -> list[DeadLetter]:
        """What *service* has given up so far, oldest first."""
        if service.name not in {known.name for known in self._services}:
            raise SetupError(f"{service!r} is not run by this harness: give it to Harness(...)")
        letters = self._dead(service.name)
        self._seen.update(letter.id for letter in letters)
        return letters

    def _dead(self, service: str) -> list[DeadLetter]:
        return [read(waiting.message, service) for waiting in self._broker.peek(self._names.dead_queue(service))]

    def _count(self, service: str, handler: str) -> None:
        self._attempts[service, handler] += 1

    async def _relay(self, engine: AsyncEngine) -> None:
        """What a handler's transaction wrote to the outbox leaves at once: no relay runs beside a harness."""
        from eventbus.outbox.relay import relay_now

        sender, _ = self._running()
        async with self._relaying:
            await relay_now(engine, sender)

    def _is_anything_waiting(self) -> bool:
        kept = {self._names.undeliverable, *(self._names.dead_queue(service.name) for service in self._services)}
        return any(self._broker.depth(queue) for queue in self._broker.queues if queue not in kept)

    async def _quiet(self) -> None:
        """Until nothing can go on without time passing. Handlers may wait for real things, so this polls."""
        _, engine = self._running()
        calm = 0
        give_up_at = self._attempts.total() + MOST_ATTEMPTS_AT_ONCE
        while calm < 3:  # a delivery takes a loop turn from the broker to its consumer
            if self._attempts.total() > give_up_at:
                raise AssertionError(
                    f"not settled after {MOST_ATTEMPTS_AT_ONCE} attempts: does a handler publish its own event again?"
                )
            await asyncio.sleep(0)
            is_calm = self._broker.is_idle() and all(consumer.is_idle for consumer in engine.consumers)
            calm = calm + 1 if is_calm else 0
            if not is_calm:
                await asyncio.sleep(0.0005)

    def _running(self) -> tuple[Sender, Engine]:
        if self._sender is None or self._engine is None:
            raise SetupError("the harness is not running: use it inside `async with Harness(...) as harness:`")
        return self._sender, self._engine

    def _complain_of_unseen(self) -> None:
        unseen = [
            letter for service in self._services for letter in self._dead(service.name) if letter.id not in self._seen
        ]
        if unseen:
            told = "\n\n".join(
                f"{letter.service}.{letter.handler or '?'} gave up "
                f"{letter.envelope.type if letter.envelope else 'a message'} ({letter.reason}): {letter.error}"
                + (f"\n{letter.trace}" if letter.trace else "")
                for letter in unseen
            )
            raise AssertionError(f"{len(unseen)} dead letters that the test did not look at:\n\n{told}")
