"""The lane where a test is the broker: the real splitter and channels, between a socket and a client's reader."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, cast

from eventbus.message import Message
from eventbus.transport.base import Publication
from eventbus.transport.rabbitmq.channels import Incoming, Nacked
from eventbus.transport.rabbitmq.lane import LaneConsuming, LanePublishing
from eventbus.transport.rabbitmq.session import Lost, Session
from eventbus.transport.rabbitmq.splitter import Splitter
from tests.fuzz.making import CONSUMING, FRAME_MAX, PUBLISHING
from tests.fuzz.reading import Delivered, delivered, split

FAR_S = 1e6


class Pair:
    """A connection of this process with itself: what the lane writes at one end is read at the other."""

    def __init__(self, writer: asyncio.StreamWriter, other: socket.socket) -> None:
        self.writer = writer
        self._other = other

    @classmethod
    async def open(cls) -> Pair:
        one, other = socket.socketpair()
        other.setblocking(False)
        _, writer = await asyncio.open_connection(sock=one)
        return cls(writer, other)

    def received(self) -> bytes:
        """All that was written and not yet read here."""
        parts: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            while part := self._other.recv(1 << 20):
                parts.append(part)
        return b"".join(parts)

    async def close(self) -> None:
        self.writer.close()
        await self.writer.wait_closed()
        self._other.close()


class Channel:
    """What the lane asks of a client's channel, answered at once."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.on_consumer_cancel_callbacks: set[object] = set()

    async def basic_qos(self, *, prefetch_count: int) -> None:
        pass

    async def basic_consume(self, _queue: str, _callback: object) -> SimpleNamespace:
        return SimpleNamespace(consumer_tag="ctag")


class Lanes:
    """Two channels that consume and one that publishes, on one connection. Also their session, without a broker."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._client = asyncio.StreamReader(limit=2**30)
        self.splitter = Splitter(self._client, pair.writer)
        self.server = SimpleNamespace(frame_max=FRAME_MAX)
        self.is_live = True
        self.reason: BaseException | None = None
        self._when_ended: list[Callable[[], None]] = []
        self._numbers: list[int] = []
        self._publishing: LanePublishing | None = None
        self._publishes: list[asyncio.Future[bool]] = []
        self.incoming: list[tuple[int, Incoming]] = []
        self.splitter.begin(frame_max=FRAME_MAX, heartbeat_s=0, fail=self.fail)

    @classmethod
    async def open(cls, pair: Pair) -> Lanes:
        lanes = cls(pair)
        session = cast("Session", lanes)
        lanes._numbers = [*CONSUMING, PUBLISHING]
        for number in CONSUMING:
            await (await LaneConsuming.open(session, 10)).consume("work", lanes._taking(number))
        lanes._publishing = await LanePublishing.open(session)
        return lanes

    @property
    def publishing(self) -> LanePublishing:
        assert self._publishing is not None
        return self._publishing

    def _taking(self, number: int) -> Callable[[Incoming], None]:
        return lambda incoming: self.incoming.append((number, incoming))

    # ── as a session ──────────────────────────────────────────────────────────────────────────────────────────────

    def fail(self, reason: BaseException | None) -> None:
        if self.is_live:
            self.is_live, self.reason = False, reason
            for callback in self._when_ended:
                callback()

    def when_ended(self, callback: Callable[[], None]) -> None:
        self._when_ended.append(callback)

    async def open_channel(self, *, confirms: bool = False) -> Any:
        return Channel(self._numbers.pop(0))

    # ── what a case does ──────────────────────────────────────────────────────────────────────────────────────────

    async def publish(self, messages: Iterable[Message]) -> bytes:
        """What was written for them. Their confirms are still to come."""
        at_once = self.begin(messages)
        await asyncio.sleep(0)
        self.splitter.flush()
        return at_once + self._pair.received()

    def begin(self, messages: Iterable[Message]) -> bytes:
        """What was written for them before the turn of the event loop ends."""
        deadline_s = asyncio.get_running_loop().time() + FAR_S
        for message in messages:
            encoded = self.publishing.encode(Publication("events", "fact.v1", message))
            self._publishes.append(self.publishing.publish(encoded, deadline_s))
        return self._pair.received()

    def feed(self, data: bytes, places: Iterable[int]) -> None:
        """As the socket would bring *data*, cut at *places*."""
        at = 0
        for place in places:
            self.splitter.feed(data[at:place])
            at = place

    def deliveries(self) -> list[Delivered]:
        return [
            delivered(
                number, one.tag, one.is_redelivered, one.exchange, one.key,
                (dict(one.message.headers), one.message.content_type, dict(one.message.properties)), one.message.body,
            )
            for number, one in self.incoming
        ]  # fmt: skip

    async def passed_on(self) -> bytes:
        """What the client was given. Nothing more comes."""
        self._client.feed_eof()
        return await self._client.read()

    async def outcomes(self) -> dict[int, bool | str]:
        """How each publish ended so far, by its tag; those that wait are left out, and end now."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        ended = {tag: task for tag, task in enumerate(self._publishes, 1) if task.done()}
        self.fail(None)
        results = await asyncio.gather(*self._publishes, return_exceptions=True)
        outcomes: dict[int, bool | str] = {}
        for tag in ended:
            match results[tag - 1]:
                case bool() as is_routed:
                    outcomes[tag] = is_routed
                case Nacked():
                    outcomes[tag] = "nacked"
                case Lost():
                    outcomes[tag] = "lost"
                case error:
                    raise error
        return outcomes


def ids_in(written: bytes) -> list[str]:
    """The message ids of what was published, in this order."""
    return [what.properties.message_id for _, _, what in split(written) if hasattr(what, "properties")]
