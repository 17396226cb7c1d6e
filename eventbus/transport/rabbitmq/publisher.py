"""Publishes, confirmed, until the deadline: over as many sessions as that takes.

What was outstanding when a session died is published again on the next one. Nothing here decides what a message means:
a publish ends as `True`, `False` (no queue took it) or `NotPublished`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import aiormq

from eventbus.errors import SetupError
from eventbus.transport.base import NotPublished, Publication, Unpublishable
from eventbus.transport.rabbitmq.channels import Encoded, Nacked, PublishingChannel, encode
from eventbus.transport.rabbitmq.refusals import Address
from eventbus.transport.rabbitmq.session import Lost, Session, backoff, first, log, rebuild

TOO_LARGE: Final = re.compile(r"message size .* larger than .*?(\d+)$")


@dataclass(slots=True)
class _Attempts:
    """What one publish has come to so far."""

    maybe_stored: bool = False
    refusals: int = 0
    last_trouble: str = "no connection to the broker"


class Publisher:
    """The publishing half of the transport: one session at a time, a bounded window of unconfirmed messages."""

    def __init__(
        self, build: Callable[[], Awaitable[Session]], address: Address, *, max_message_bytes: int | None, window: int
    ) -> None:
        self._build = build
        self._address = address
        self._asked_max_bytes = max_message_bytes
        self._window = asyncio.Semaphore(window)
        self._session: Session | None = None
        self._channel: PublishingChannel | None = None
        self._changed = asyncio.Event()  # set while there is a session, or a reason to stop waiting for one
        self._refused: SetupError | None = None
        self._is_closed = False
        self._task: asyncio.Task[None] | None = None
        self._learned_max_bytes: int | None = None

    async def open(self) -> Session:
        """Connect for the first time.

        Raises:
            SetupError, TransportError: why that cannot be.
        """
        session, channel = await first(self._open_session, self._address)
        self._use(session, channel)
        self._task = asyncio.create_task(self._keep(session), name="eventbus publisher")
        return session

    async def close(self) -> None:
        """Disconnect; outstanding publishes fail."""
        self._is_closed = True
        self._changed.set()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._session is not None:
            await self._session.close()

    @property
    def max_message_bytes(self) -> int:
        """The largest body that the broker takes."""
        assert self._session is not None or self._learned_max_bytes is not None
        limits = [limit for limit in (self._asked_max_bytes, self._learned_max_bytes) if limit is not None]
        return min(limits)

    async def publish(self, publication: Publication, *, timeout_s: float) -> bool:
        """As `Transport.publish` promises."""
        self._check_open(maybe_stored=False)
        attempts = _Attempts()
        try:
            async with asyncio.timeout(timeout_s), self._window:
                return await self._until_confirmed(publication, attempts)
        except TimeoutError:
            raise NotPublished(
                f"not confirmed within {timeout_s:g} s: {attempts.last_trouble}",
                maybe_stored=attempts.maybe_stored,
                timed_out=True,
            ) from None

    async def _until_confirmed(self, publication: Publication, attempts: _Attempts) -> bool:
        delays = backoff()
        encoded: Encoded | None = None
        while True:
            session, channel = await self._next_session(attempts)
            encoded = encoded or self._encode(publication, session)
            try:
                attempts.last_trouble = "the broker takes no more bytes (is it under a memory or disk alarm?)"
                await session.writable()
                attempts.last_trouble = "no confirm came"
                return await self._send(channel, encoded, attempts)
            except Nacked:
                attempts.last_trouble = "a queue refuses it (full, or without a majority)"
                await asyncio.sleep(next(delays))
            except Lost as lost:
                attempts.last_trouble = "the connection was lost"
                session.fail(lost.reason)
                self._judge(lost.reason, publication, attempts)

    async def _send(self, channel: PublishingChannel, encoded: Encoded, attempts: _Attempts) -> bool:
        before = attempts.maybe_stored
        attempts.maybe_stored = True
        was_taken = await channel.publish(encoded)
        attempts.maybe_stored = before
        return was_taken

    def _encode(self, publication: Publication, session: Session) -> Encoded:
        size, limit = len(publication.message.body), self.max_message_bytes
        if size > limit:
            raise Unpublishable(f"its body takes {size} bytes, and the broker accepts {limit}")
        return encode(publication, frame_max=session.server.frame_max)

    def _judge(self, reason: BaseException | None, publication: Publication, attempts: _Attempts) -> None:
        """Raise if this publication is what the broker closed the channel for; else it is published again."""
        text = str(reason)
        match reason:
            case aiormq.ChannelPreconditionFailed() if found := re.search(
                r"message size .*larger than .*?(\d+)$", text
            ):
                self._learned_max_bytes = int(found[1])
                if len(publication.message.body) > self._learned_max_bytes:
                    raise Unpublishable(
                        f"its body takes {len(publication.message.body)} bytes, and the broker accepts {found[1]}"
                    )
            case aiormq.ChannelAccessRefused() if f"exchange '{publication.exchange}'" in text:
                raise NotPublished(text, maybe_stored=False)
            case aiormq.ChannelNotFoundEntity() if f"exchange '{publication.exchange}'" in text:
                # The next session declares it again, where that is its business.
                attempts.refusals += 1
                if attempts.refusals > 1:
                    raise NotPublished(text, maybe_stored=False)
            case _:
                pass

    async def _next_session(self, attempts: _Attempts) -> tuple[Session, PublishingChannel]:
        while True:
            self._check_open(attempts.maybe_stored)
            if self._session is not None and self._channel is not None and self._session.is_live:
                return self._session, self._channel
            if self._refused is not None:
                raise NotPublished(str(self._refused), maybe_stored=attempts.maybe_stored)
            self._changed.clear()
            await self._changed.wait()

    def _check_open(self, maybe_stored: bool) -> None:
        if self._is_closed:
            raise NotPublished("the connection for publishing is closed", maybe_stored=maybe_stored)

    async def _open_session(self) -> tuple[Session, PublishingChannel]:
        session = await self._build()
        try:
            return session, await PublishingChannel.open(session)
        except BaseException:
            await session.close()
            raise

    def _use(self, session: Session, channel: PublishingChannel) -> None:
        if self._learned_max_bytes is None:
            self._learned_max_bytes = self._asked_max_bytes or session.server.line.max_message_bytes
        self._session, self._channel, self._refused = session, channel, None
        self._changed.set()

    async def _keep(self, session: Session) -> None:
        """Replace the session whenever it has died."""
        while True:
            await session.ended.wait()
            now_s = asyncio.get_running_loop().time()
            log.warning("publishing: connection lost", extra={"broker": str(self._address), "why": str(session.reason)})
            await session.close()
            session, channel = await rebuild(self._open_session, self._note, lived_s=now_s - session.began_s)
            self._use(session, channel)
            log.info("publishing: connected again", extra={"broker": str(self._address)})

    def _note(self, refused: SetupError) -> None:
        if self._refused is None:
            log.error("publishing: refused", extra={"broker": str(self._address), "why": str(refused)})
        self._refused = refused
        self._changed.set()
