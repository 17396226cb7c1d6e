"""Publishes, confirmed, until the deadline: over as many sessions as that takes.

What was outstanding when a session died is published again on the next one. Nothing here knows what a message means:
a publish ends as `True`, as `False` (no queue took it) or as `NotPublished`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import aiormq

from eventbus.errors import SetupError
from eventbus.slots import Slots
from eventbus.transport.base import NotPublished, Publication, Unpublishable
from eventbus.transport.rabbitmq.channels import Nacked
from eventbus.transport.rabbitmq.refusals import Address
from eventbus.transport.rabbitmq.session import Backoff, Lost, Session, first, log, rebuild
from eventbus.transport.rabbitmq.way import Encoded, Sending, open_sending

# A channel whose publishes a queue refused is told when there is room again, but not when the policy that bounded the
# queue is lifted (quorum queues on 3.10; found by the ledger): it would be refused for ever. A fresh one is not.
REFUSED_S: Final = 15.0
T = TypeVar("T")
TOO_LARGE: Final = re.compile(r"message size \d+ is larger than .*?(\d+)$")


class _Progress:
    """What one publish has come to so far. Defaults are the class's: nearly every publish needs no others."""

    trouble = "no connection to the broker"
    maybe_stored = False
    missed_exchange = False
    backoff: Backoff | None = None
    refused_by: Session | None = None
    refused_s = 0.0


class Publisher:
    """The publishing half of the transport: one session at a time, a bounded window of unconfirmed messages."""

    def __init__(
        self, build: Callable[[], Awaitable[Session]], address: Address, *, max_message_bytes: int | None, window: int
    ) -> None:
        self._build = build
        self._address = address
        self._configured_max_bytes = max_message_bytes
        self._window = Slots(window)
        self._backoff = Backoff()
        self._current: tuple[Session, Sending] | None = None
        self._changed = asyncio.Event()  # set when there is a session, or a reason to wait for none
        self._refused: SetupError | None = None
        self.is_closed = False
        self._task: asyncio.Task[None] | None = None
        self._sent_to: Counter[str] = Counter()
        self.max_message_bytes = 0
        self._refused_bytes: int | None = None  # the limit that the broker itself stated

    async def open(self) -> Session:
        """Connect for the first time.

        Raises:
            SetupError, TransportError: why that cannot be.
        """
        session, channel = await first(self._open_session, self._address, self._backoff)
        self._use(session, channel)
        self._task = asyncio.create_task(self._keep(session), name="eventbus publishing")
        return session

    async def close(self) -> None:
        """Disconnect; outstanding publishes fail."""
        self.is_closed = True
        self._changed.set()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._current is not None:
            await self._current[0].close()

    def obstacle(self) -> str | None:
        """As `Transport.obstacle` promises."""
        if self.is_closed or self._current is None:
            return "the transport is closed"
        if self._refused is not None:
            return str(self._refused)
        session, _ = self._current
        if not session.is_live:
            return f"no connection to the broker ({session.reason})"
        return self._blockage()

    def _blockage(self) -> str | None:
        session = self._current[0] if self._current else None
        if session is None or not session.is_live or session.blocked_by is None:
            return None
        return f"the broker takes nothing in and has blocked the connection, under an alarm: {session.blocked_by}"

    # ── one message ───────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, publication: Publication, *, timeout_s: float) -> bool:
        """As `Transport.publish` promises."""
        progress = _Progress()
        if self.is_closed or self._current is None:
            raise _closed(progress)
        if (size := len(publication.message.body)) > self.max_message_bytes:
            raise _too_large(size, self.max_message_bytes)
        encoded: Encoded = self._current[1].encode(publication)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            if not self._window.take():
                await _within(deadline_s, self._window.wait())
            try:
                # One coroutine for all tries: one more that waits for another costs each event what its headers do.
                while True:
                    current = self._live()
                    if current is None:
                        current = await _within(deadline_s, self._next_session(progress))
                    session, channel = current
                    sent_before, mine = progress.maybe_stored, None
                    try:
                        if session.is_full:
                            progress.trouble = "the broker takes nothing in (is it under a memory or disk alarm?)"
                            await _within(deadline_s, session.writable())
                        mine = self._sent_to[encoded.exchange] = self._sent_to[encoded.exchange] + 1
                        progress.maybe_stored, progress.trouble = True, "no confirm came"
                        return await channel.publish(encoded, deadline_s)
                    except Nacked:
                        await self._after_refusal(session, progress, deadline_s)
                    except Lost as lost:
                        if mine is not None and _is_about(lost.reason, encoded):
                            # The broker refuses the first one that it may not take, and ignores what follows on that
                            # channel. So the last one sent there was certainly not stored; those before may have been.
                            progress.maybe_stored = sent_before or self._sent_to[encoded.exchange] != mine
                            self._judge(lost.reason, encoded, progress)
                        progress.trouble = f"the connection was lost ({lost})"
                        session.fail(lost.reason)
            finally:
                self._window.give()
        except TimeoutError:
            raise NotPublished(
                f"not confirmed within {timeout_s:g} s: {self._blockage() or progress.trouble}",
                maybe_stored=progress.maybe_stored,
                timed_out=True,
            ) from None

    async def _after_refusal(self, session: Session, progress: _Progress, deadline_s: float) -> None:
        """Return when it is time for the next try."""
        # Another queue may have stored it: a nack says only that one did not.
        progress.trouble = "a queue refuses it (it is full, or lost its majority)"
        now_s = asyncio.get_running_loop().time()
        progress.backoff = progress.backoff or Backoff()
        if progress.refused_by is not session:
            progress.refused_by, progress.refused_s = session, now_s
        elif now_s - progress.refused_s > REFUSED_S:
            session.fail(Nacked(f"a queue has refused publishes for {REFUSED_S:g} s"))
        await _within(deadline_s, asyncio.sleep(progress.backoff.next_s()))

    def _judge(self, reason: BaseException | None, encoded: Encoded, progress: _Progress) -> None:
        """Raise if trying again is no use."""
        text = str(reason)
        if too_large := TOO_LARGE.search(text):
            self.max_message_bytes = self._refused_bytes = int(too_large[1])
            raise _too_large(len(encoded.body), self.max_message_bytes)
        if isinstance(reason, aiormq.ChannelAccessRefused) or progress.missed_exchange:
            raise NotPublished(text, maybe_stored=progress.maybe_stored)
        # The exchange is gone. The next session declares it again, if that is its business: once more, then.
        progress.missed_exchange = True

    async def _next_session(self, progress: _Progress) -> tuple[Session, Sending]:
        while True:
            if self.is_closed:
                raise _closed(progress)
            if live := self._live():
                return live
            if self._refused is not None:
                raise NotPublished(str(self._refused), maybe_stored=progress.maybe_stored)
            self._changed.clear()
            await self._changed.wait()

    def _live(self) -> tuple[Session, Sending] | None:
        current = self._current
        return current if current is not None and current[0].is_live and not self.is_closed else None

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _open_session(self) -> tuple[Session, Sending]:
        session = await self._build()
        try:
            return session, await open_sending(session)
        except BaseException:
            await session.close()
            raise

    def _use(self, session: Session, channel: Sending) -> None:
        usual = self._configured_max_bytes or session.server.line.max_message_bytes
        self.max_message_bytes = min(usual, self._refused_bytes or usual)
        self._current, self._refused = (session, channel), None
        self._changed.set()

    async def _keep(self, session: Session) -> None:
        """Replace the session whenever it has died."""
        backoff = self._backoff
        while True:
            await session.ended.wait()
            log.warning("publishing: connection lost", extra={"broker": str(self._address), "why": str(session.reason)})
            backoff.after(session)
            await session.close()
            session, channel = await rebuild(self._open_session, self._note, backoff)
            self._use(session, channel)
            log.info("publishing: connected again", extra={"broker": str(self._address)})

    def _note(self, refused: SetupError) -> None:
        """Until it is over, publishes fail with *refused*; somebody may put it right, so the tries go on."""
        if self._refused is None:
            log.error("publishing: refused", extra={"broker": str(self._address), "why": str(refused)})
        self._refused = refused
        self._changed.set()


async def _within(deadline_s: float, waiting: Awaitable[T]) -> T:
    """What *waiting* returns; TimeoutError where the event loop's clock reaches *deadline_s* before."""
    async with asyncio.timeout_at(deadline_s):
        return await waiting


def _closed(progress: _Progress) -> NotPublished:
    return NotPublished("the transport is closed", maybe_stored=progress.maybe_stored)


def _too_large(size: int, limit: int) -> Unpublishable:
    return Unpublishable(f"its body takes {size} bytes, and the broker accepts {limit}")


def _is_about(reason: BaseException | None, encoded: Encoded) -> bool:
    """Whether the broker closed the channel for a message like this one."""
    text = str(reason)
    match reason:
        case aiormq.ChannelPreconditionFailed():
            limit = TOO_LARGE.search(text)
            return limit is not None and len(encoded.body) > int(limit[1])
        case aiormq.ChannelAccessRefused() | aiormq.ChannelNotFoundEntity():
            return f"exchange '{encoded.exchange or 'amq.default'}'" in text
        case _:
            return False
