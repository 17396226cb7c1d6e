"""Consumes a set of queues, session after session: a feed for each queue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import aiormq

from eventbus.errors import SetupError, TransportError
from eventbus.transport.base import CONNECT_TIMEOUT_S, STEADY_S, Source
from eventbus.transport.rabbitmq.feed import Feed
from eventbus.transport.rabbitmq.refusals import Address, not_allowed
from eventbus.transport.rabbitmq.session import CLOSE_TIMEOUT_S, Backoff, Lost, Session, first, log, rebuild


@dataclass(frozen=True, slots=True)
class _Consuming:
    """A session, what it consumes, and the tasks that do."""

    session: Session
    feeds: Sequence[Feed]
    tasks: Sequence[asyncio.Task[None]]

    def missing(self) -> Mapping[str, str]:
        """The queues that it does not consume, each with why."""
        if not self.session.is_live:
            return {feed.queue: f"the connection was lost ({self.session.reason})" for feed in self.feeds}
        ended = [feed for feed, task in zip(self.feeds, self.tasks, strict=True) if task.done()]
        return {feed.queue: "its task has ended on a live connection" for feed in ended}

    async def close(self) -> None:
        """Tell what is settled, give back the rest, hang up. Harmless the second time."""
        for feed in self.feeds:
            feed.finish()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.session.close()


class RabbitConsumer:
    """The `Consumer` of this transport. *build* makes a session with the topology declared, careful or not."""

    def __init__(
        self, build: Callable[[bool], Awaitable[Session]], address: Address, sources: Sequence[Source]
    ) -> None:
        self._build = build
        self._address = address
        self._sources = sources
        self._consuming: _Consuming | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_over = asyncio.Event()
        self._failure: SetupError | None = None
        self._is_careful = False
        self._backoff = Backoff()
        self._trouble: str | None = None  # what ended the last session, or kept the next one from beginning

    async def start(self, within_s: float = CONNECT_TIMEOUT_S) -> None:
        self._consuming = await first(self._consume, self._address, self._backoff, within_s)
        self._task = asyncio.create_task(self._keep(), name="eventbus consuming")

    async def stop(self) -> None:
        self._is_over.set()
        await self._end_keeping()
        if self._consuming is not None:
            await asyncio.gather(*(feed.stop() for feed in self._consuming.feeds))

    async def pause(self) -> None:
        await self._end_keeping()
        await self._hang_up()
        self._trouble = "consuming pauses"

    async def resume(self) -> None:
        if self._task is None and not self._is_over.is_set():
            self._task = asyncio.create_task(self._keep(), name="eventbus consuming")

    def missing(self) -> Mapping[str, str]:
        consuming = self._consuming
        if self._is_over.is_set():
            return self._all_missing(str(self._failure or "consuming was stopped"))
        if consuming is None:
            return self._all_missing(self._trouble or "consuming has not started")
        steady_s = asyncio.get_running_loop().time() - consuming.session.began_s
        if consuming.session.is_live and self._trouble is not None and steady_s < STEADY_S:
            return self._all_missing(f"consumed again for {steady_s:.1f} s only, after: {self._trouble}")
        return consuming.missing()

    def _all_missing(self, why: str) -> Mapping[str, str]:
        return {source.queue: why for source in self._sources}

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
        if self._consuming is not None:
            await self._consuming.close()
            self._consuming = None

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        """Replace the session whenever it has died; end with what cannot be recovered from."""
        backoff = self._backoff
        try:
            while True:
                if self._consuming is not None:
                    await self._until_lost(self._consuming.session)
                    backoff.after(self._consuming.session)
                    await self._hang_up()
                self._consuming = await rebuild(self._consume_again, _give_up, backoff)
                log.info("consuming: connected again", extra=self._facts())
        except SetupError as error:
            log.error("consuming: cannot go on", extra=self._facts(why=str(error)))
            self._failure = error
            self._is_over.set()

    async def _until_lost(self, session: Session) -> None:
        await session.ended.wait()
        self._trouble = f"the connection was lost ({session.reason})"
        log.warning("consuming: connection lost", extra=self._facts(why=str(session.reason)))
        # A message with headers or a key that the client cannot read ends the connection, and it comes again. Tables
        # in tables, as deep as the broker lets them be, end it with a RecursionError.
        self._is_careful = self._is_careful or isinstance(session.reason, aiormq.InvalidFrameError | RecursionError)

    async def _consume_again(self) -> _Consuming:
        try:
            return await self._consume()
        except (SetupError, TransportError, Lost) as error:
            self._trouble = str(error)
            raise

    async def _consume(self) -> _Consuming:
        """A session that consumes every queue."""
        session = await self._build(self._is_careful)
        feeds = [Feed(session, source) for source in self._sources]
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

    def _facts(self, **more: str) -> dict[str, object]:
        return {"broker": str(self._address), "queues": [source.queue for source in self._sources], **more}


def _give_up(refused: SetupError) -> None:
    raise refused
