"""Consumes a set of queues, session after session, one channel for each queue.

Probation: a session begins with one delivery at a time, so that a message that kills the process takes no innocent
neighbours' delivery counts with it; it goes wide once a few came through. Handlers never run here: `deliver` only
takes a delivery in.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import aiormq

from eventbus.errors import SetupError
from eventbus.message import Message
from eventbus.transport.base import Source
from eventbus.transport.rabbitmq.acks import AckBatch
from eventbus.transport.rabbitmq.channels import ConsumingChannel, Incoming
from eventbus.transport.rabbitmq.lines import delivery_count
from eventbus.transport.rabbitmq.refusals import Address, not_allowed
from eventbus.transport.rabbitmq.session import CLOSE_TIMEOUT_S, Lost, Session, first, log, rebuild

PROBATION: Final = 3  # deliveries of a queue that must come through before it goes wide
SUSPICIOUS_COUNT: Final = 3  # handed out this often before: it may be what ended those sessions


class _Delivery:
    """One message from one channel."""

    __slots__ = ("_feed", "_is_settled", "_tag", "count", "exchange", "key", "message", "queue")

    def __init__(self, feed: _Feed, incoming: Incoming, count: int) -> None:
        self.message: Message = incoming.message
        self.queue: str = feed.queue
        self.exchange: str = incoming.exchange
        self.key: str = incoming.key
        self.count: int = count
        self._feed = feed
        self._tag = incoming.tag
        self._is_settled = False

    @property
    def is_live(self) -> bool:
        return self._feed.is_live

    def ack(self) -> None:
        self._settle(self._feed.ack)

    def reject(self) -> None:
        self._settle(self._feed.reject)

    def _settle(self, tell: Callable[[int, int], None]) -> None:
        # A tag that is settled twice would close the channel, and everything on it would come back.
        if self.is_live and not self._is_settled:
            self._is_settled = True
            tell(self._tag, self.count)


class _Feed:
    """One queue in one session. `run` is the only one that talks to the broker; the rest leaves it notes."""

    def __init__(self, session: Session, source: Source) -> None:
        self.queue = source.queue
        self._session = session
        self._source = source
        self._channel: ConsumingChannel | None = None
        self._batch = AckBatch()
        self._wake = asyncio.Event()
        self._is_wide = False
        self._is_turning = False  # between narrow and wide: nothing more is taken from this channel
        self._is_stopping = False
        self._is_closing = False
        self._has_stopped = asyncio.Event()
        self._calm = 0
        self._open = 0
        self._held: deque[_Delivery] = deque()

    @property
    def is_live(self) -> bool:
        return self._session.is_live

    async def begin(self) -> None:
        """Consume, carefully at first.

        Raises:
            Lost: the session died, or the broker refused.
        """
        channel = await ConsumingChannel.open(self._session)
        self._channel = channel
        self._batch = AckBatch()
        self._is_turning = False
        self._calm = 0
        await channel.consume(self.queue, self._source.prefetch if self._is_wide else 1, self._take)

    # ── notes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _take(self, incoming: Incoming) -> None:
        if self._is_stopping or not self.is_live:
            return  # in flight when the consumer was cancelled: not taken, and given back with the channel
        count = delivery_count(
            self._session.server.line, incoming.message.headers, is_redelivered=incoming.is_redelivered
        )
        delivery = _Delivery(self, incoming, count)
        is_suspicious = count >= SUSPICIOUS_COUNT
        if self._is_wide and is_suspicious:
            self._held.append(delivery)
            self._turn()
            return
        if not self._is_wide and not is_suspicious and self._calm >= PROBATION - 1:
            # The last narrow one: nothing may follow it, since its channel is closed behind it.
            self._turn()
        self._hand_over(delivery)

    def _turn(self) -> None:
        self._is_turning = True
        self._wake.set()

    def _hand_over(self, delivery: _Delivery) -> None:
        self._open += 1
        try:
            self._source.deliver(delivery)
        except Exception as error:  # noqa: BLE001  # whatever it is, the message must go back and not hang here
            log.exception("a delivery was not taken in", extra={"queue": self.queue})
            self._session.fail(error)

    def ack(self, tag: int, count: int) -> None:
        self._batch.ack(tag)
        self._settled(count)

    def reject(self, tag: int, count: int) -> None:
        self._batch.reject(tag)
        self._settled(count)

    def _settled(self, count: int) -> None:
        self._open -= 1
        self._calm = 0 if count >= SUSPICIOUS_COUNT else self._calm + 1
        self._wake.set()

    async def stop(self) -> None:
        """Take nothing more; what was delivered can still be settled."""
        self._is_stopping = True
        self._wake.set()
        await self._has_stopped.wait()

    def finish(self) -> None:
        """Have `run` send what is settled, close the channel and return."""
        self._is_stopping = self._is_closing = True
        self._wake.set()

    # ── the one that talks ────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Carry the notes to the broker until the session ends or `finish`."""
        try:
            while not self._is_closing:
                await self._wake.wait()
                self._wake.clear()
                await self._carry()
            await self._close_channel()
        except Lost as lost:
            self._session.fail(lost.reason)
        finally:
            self._has_stopped.set()

    async def _carry(self) -> None:
        assert self._channel is not None
        await self._channel.settle(self._batch.take())
        if not (self._is_stopping or self._is_turning):
            return
        await self._channel.cancel()
        if self._is_stopping:
            self._has_stopped.set()
        elif self._open == 0 and self._held:
            self._hand_over(self._held.popleft())  # alone: nothing else of this queue is unsettled here
        elif self._open == 0:
            await self._close_channel()
            self._is_wide = not self._is_wide
            await self.begin()

    async def _close_channel(self) -> None:
        if self._channel is not None:
            await self._channel.settle(self._batch.take())
            await self._channel.close()


@dataclass(frozen=True, slots=True)
class _Consuming:
    """A session and what it consumes."""

    session: Session
    feeds: Sequence[_Feed]
    tasks: Sequence[asyncio.Task[None]]

    async def close(self) -> None:
        """Send what is settled, hand back the rest, hang up."""
        for feed in self.feeds:
            feed.finish()
        if self.tasks:
            _, late = await asyncio.wait(self.tasks, timeout=CLOSE_TIMEOUT_S if self.session.is_live else 0)
            self.session.fail(None)
            for task in late:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.session.close()


class RabbitConsumer:
    """The `Consumer` of this transport."""

    def __init__(self, build: Callable[[], Awaitable[Session]], address: Address, sources: Sequence[Source]) -> None:
        self._build = build
        self._address = address
        self._sources = sources
        self._consuming: _Consuming | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_over = asyncio.Event()
        self._failure: SetupError | None = None

    async def start(self) -> None:
        consuming = await first(self._consume, self._address)
        self._keep_from(consuming)

    async def stop(self) -> None:
        self._is_over.set()
        await self._end_keeping()
        if self._consuming is not None:
            await asyncio.gather(*(feed.stop() for feed in self._consuming.feeds))

    async def pause(self) -> None:
        await self._end_keeping()
        await self._hang_up()

    async def resume(self) -> None:
        if self._task is None and not self._is_over.is_set():
            self._task = asyncio.create_task(self._keep(None), name="eventbus consumer")

    async def wait(self) -> None:
        await self._is_over.wait()
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        self._is_over.set()
        await self._end_keeping()
        await self._hang_up()

    async def _end_keeping(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _hang_up(self) -> None:
        consuming, self._consuming = self._consuming, None
        if consuming is not None:
            await consuming.close()

    def _keep_from(self, consuming: _Consuming) -> None:
        self._consuming = consuming
        self._task = asyncio.create_task(self._keep(consuming), name="eventbus consumer")

    async def _keep(self, consuming: _Consuming | None) -> None:
        """Replace the session whenever it has died; end with what cannot be recovered from."""
        try:
            while True:
                lived_s = 0.0
                if consuming is not None:
                    lived_s = await self._until_lost(consuming)
                consuming = self._consuming = await rebuild(self._consume, self._give_up, lived_s=lived_s)
                log.info("consuming: connected again", extra=self._facts())
        except SetupError as error:
            log.error("consuming: cannot go on", extra=self._facts(why=str(error)))
            self._failure = error
            self._is_over.set()

    async def _until_lost(self, consuming: _Consuming) -> float:
        await consuming.session.ended.wait()
        lived_s = asyncio.get_running_loop().time() - consuming.session.began_s
        log.warning("consuming: connection lost", extra=self._facts(why=str(consuming.session.reason)))
        await self._hang_up()
        return lived_s

    def _give_up(self, refused: SetupError) -> None:
        raise refused

    def _facts(self, **more: str) -> dict[str, object]:
        return {"broker": str(self._address), "queues": [source.queue for source in self._sources], **more}

    async def _consume(self) -> _Consuming:
        """A session that consumes every queue."""
        session = await self._build()
        feeds = [_Feed(session, source) for source in self._sources]
        try:
            for feed in feeds:
                await feed.begin()
        except BaseException as error:
            await session.close()
            if isinstance(error, Lost) and isinstance(error.reason, aiormq.ChannelClosed):
                raise not_allowed(error.reason, session.address.user) from error
            raise
        tasks = [asyncio.create_task(feed.run(), name=f"eventbus feed {feed.queue}") for feed in feeds]
        return _Consuming(session, feeds, tasks)
