"""Services under test on an embedded broker whose publishes, sessions and store fail when a test says so.

The harness with faults: everything is real but the moment of the failure.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any

from eventbus import Service, StoreError
from eventbus.idempotency import IdempotencyStore, MemoryStore
from eventbus.idempotency.base import Claim
from eventbus.message import Message
from eventbus.testing import Harness
from eventbus.topology import Topology
from eventbus.transport.base import CONNECT_TIMEOUT_S, Broker, Consumer, Declare, Publication, Source, Transport
from eventbus.worker import Engine

DEADLINE_S = 30.0  # generous: other tests run at the same time


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Return when *condition* holds; an AssertionError after thirty seconds."""
    async with asyncio.timeout(DEADLINE_S) as deadline:
        try:
            while not condition():  # noqa: ASYNC110  # anything can be asked, not only events
                await asyncio.sleep(0.002)
        except asyncio.CancelledError:
            if deadline.expired():
                raise AssertionError(f"it did not happen within {DEADLINE_S:g} s: {what or condition}") from None
            raise


class FaultyConsumer:
    """A consumer whose session can be cut and that can be told to fail for good."""

    def __init__(self, inner: Consumer) -> None:
        self.inner = inner
        self.stops = 0
        self.pauses = 0
        self.resumes = 0
        self.fails_to_resume: Exception | None = None
        self._fatal: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def cut_session(self) -> None:
        """What a lost connection does: everything unsettled goes back, and is delivered anew."""
        await self.inner.pause()
        await self.inner.resume()

    def fail(self, error: Exception) -> None:
        self._fatal.set_exception(error)

    async def start(self, within_s: float = CONNECT_TIMEOUT_S) -> None:
        await self.inner.start(within_s)

    async def stop(self) -> None:
        await self.inner.stop()
        self.stops += 1

    async def pause(self) -> None:
        self.pauses += 1
        await self.inner.pause()

    async def resume(self) -> None:
        self.resumes += 1
        if self.fails_to_resume is not None:
            raise self.fails_to_resume
        await self.inner.resume()

    def missing(self) -> Mapping[str, str]:
        return self.inner.missing()

    async def wait(self) -> None:
        ending = asyncio.ensure_future(self.inner.wait())
        try:
            await asyncio.wait((ending, self._fatal), return_when=asyncio.FIRST_COMPLETED)
            if self._fatal.done():
                self._fatal.result()
        finally:
            ending.cancel()

    async def close(self) -> None:
        await self.inner.close()


class FaultyTransport:
    """The port over *inner*, with a fault in front: it may raise, or say that no queue took the message."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.fault: Callable[[Publication], bool] | None = None  # True: returned by the broker
        self.published: list[Publication] = []
        self.consumers: list[FaultyConsumer] = []

    @property
    def broker(self) -> Broker:
        return self.inner.broker

    async def open(self, topology: Topology, declare: Declare) -> None:
        await self.inner.open(topology, declare)

    async def publish(self, publication: Publication, *, timeout_s: float) -> bool:
        await asyncio.sleep(0)
        if self.fault is not None and self.fault(publication):
            return False
        self.published.append(publication)
        return await self.inner.publish(publication, timeout_s=timeout_s)

    def obstacle(self) -> str | None:
        return self.inner.obstacle()

    def consumer(self, sources: Sequence[Source], topology: Topology, declare: Declare) -> FaultyConsumer:
        self.consumers.append(FaultyConsumer(self.inner.consumer(sources, topology, declare)))
        return self.consumers[-1]

    def browse(self, queue: str) -> AbstractAsyncContextManager[Any]:
        return self.inner.browse(queue)

    def tail(self, exchange: str, pattern: str) -> AbstractAsyncContextManager[Any]:
        return self.inner.tail(exchange, pattern)

    async def close(self) -> None:
        await self.inner.close()


class FlakyStore(MemoryStore):
    """A memory store that does not answer the methods named in `down`, and counts what it was asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.down: set[str] = set()
        self.asked: list[str] = []

    async def claim(self, key: str, lease: timedelta) -> Claim:
        self._ask("claim")
        return await super().claim(key, lease)

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        self._ask("renew")
        return await super().renew(key, token, lease)

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        self._ask("complete")
        return await super().complete(key, token, keep)

    async def free(self, key: str, token: str) -> bool:
        self._ask("free")
        return await super().free(key, token)

    def _ask(self, method: str) -> None:
        self.asked.append(method)
        if method in self.down:
            raise StoreError(f"the store does not {method} at the moment")


class Rig(Harness):
    """A harness with faults. What it holds back is public here."""

    def __init__(self, *services: Service[Any], store: IdempotencyStore | None = None) -> None:
        super().__init__(*services)
        self.transport = FaultyTransport(self._transport)
        self._transport = self.transport
        self.store = FlakyStore(clock=self._clock)
        self._store = self.store if store is None else store

    @property
    def engine(self) -> Engine:
        return self._running()[1]

    @property
    def consumer(self) -> FaultyConsumer:
        """The one that the engine consumes with."""
        return self.transport.consumers[0]

    def depth(self, queue: str) -> int:
        """How many messages wait in *queue*."""
        return self._broker.depth(queue)

    async def raw(self, message: Message, key: str = "raw.v1") -> None:
        """Publish *message* as it is, the way a foreign sender does."""
        await self.transport.inner.publish(Publication("events", key, message), timeout_s=1)

    def copies(self) -> list[Publication]:
        """What was published to take the place of an original: retries and dead letters."""
        return [p for p in self.transport.published if p.exchange != "events"]
