"""The socket of one connection, opened as aiormq opens it, and what is read from it on the way.

Kept for what aiormq has no public way to do: wait for room, hang up at once, notice silence, learn why the broker hung
up or takes nothing in, and get past a message whose headers the client cannot read (it would end the connection, again
in every session).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiormq
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from pamqp.commands import Basic, Connection
from pamqp.constants import FRAME_HEADER, FRAME_METHOD
from pamqp.header import ContentHeader
from yarl import URL

from eventbus.transport.rabbitmq.splitter import Splitter, unfit

log = logging.getLogger("eventbus.transport.rabbitmq")

# The specification knows 1 and 2, and brokers before 4.3 refuse anything else: whoever sends it means no good.
UNREADABLE_DELIVERY_MODE: Final = 254
HIGH_WATER: Final = 64 * 1024
_FIXED: Final = 12  # class, weight and body size, before the properties
_BLOCKED: Final = Connection.Blocked.index.to_bytes(4, "big")
_UNBLOCKED: Final = Connection.Unblocked.index.to_bytes(4, "big")
_UNREADABLE: Final = bytes([0x10, 0x00, UNREADABLE_DELIVERY_MODE])  # properties that hold a delivery mode alone
_DELIVER: Final = Basic.Deliver.index.to_bytes(4, "big")
_GET_OK: Final = Basic.GetOk.index.to_bytes(4, "big")
_TAG_AND_FLAG: Final = 9
# Tables nest, and reading them recurses: the client may stand this many calls deeper in its own when it reads.
_CALLS_TO_SPARE: Final = 20


class Wire(aiormq.TransportFactory):
    """*is_careful* costs a second decoding of every header frame, and no message can end the connection.

    *is_publishing*: the broker may say that it takes nothing in, and why; to listen costs a microsecond a frame.
    *is_split*: events take the lane, and only the rest is the client's.
    """

    def __init__(self, *, is_tls: bool, is_careful: bool, is_publishing: bool = False, is_split: bool = False) -> None:
        self._factory = TLSTransportFactory() if is_tls else TCPTransportFactory()
        self._is_careful, self._is_publishing, self._is_split = is_careful, is_publishing, is_split
        self.splitter: Splitter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._frames: _Frames | None = None
        self._has_heard = False

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self._reader, self._writer = await self._factory.create(url, **kwargs)
        if self._is_split and (why := unfit(self._reader, self._writer)) is not None:
            log.warning("the lane is closed: events go through the client, slower", extra={"why": why})
        elif self._is_split:
            self.splitter = Splitter(self._reader, self._writer)
        feed = self._reader.feed_data

        def hear(data: bytes) -> None:
            self._has_heard = True
            feed(data)

        self._reader.feed_data = hear  # type: ignore[method-assign, assignment]
        self._frames = _Frames(self._reader.readexactly, is_careful=self._is_careful)
        self._reader.readexactly = self._frames.readexactly  # type: ignore[method-assign]
        return self._reader, self._writer

    def opened(self) -> None:
        """The handshake is over: from now on, read fast where we may."""
        if self._reader is not None and not (self._is_careful or self._is_publishing):
            del self._reader.readexactly

    @property
    def blocked_by(self) -> str | None:
        """Why the broker takes nothing in on this connection, in its own words; None while it does."""
        return self._frames.blocked_by if self._frames else None

    def close_text(self) -> str | None:
        """The text of the connection.close that ended the handshake, if one did.

        aiormq reports a refused virtual host as a frame that it did not expect, without the text.
        """
        frame = Connection.Close()
        last = self._frames.last if self._frames else b""
        if int.from_bytes(last[:4], "big") != frame.index:
            return None
        frame.unmarshal(last[4:-1])
        return frame.reply_text

    @property
    def is_full(self) -> bool:
        """Whether more is buffered than the event loop wants to hold (its default for high water)."""
        return self._writer is not None and self._writer.transport.get_write_buffer_size() > HIGH_WATER

    async def writable(self) -> None:
        """Return once the socket takes more. A broker under an alarm stops reading: this is what bounds our memory."""
        assert self._writer is not None
        await self._writer.drain()

    def has_heard(self) -> bool:
        """Whether anything has come since this was asked last."""
        has_heard, self._has_heard = self._has_heard, False
        return has_heard

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


class _Frames:
    """The frames as aiormq reads them: one byte of type, six of channel and length, then the payload and its end."""

    def __init__(self, read: Callable[[int], Awaitable[bytes]], *, is_careful: bool) -> None:
        self._read = read
        self._is_careful = is_careful
        self._type = 0
        self._is_spoilt = False  # the delivery that began has a routing key that the client cannot read
        self.last = b""
        self.blocked_by: str | None = None

    async def readexactly(self, n: int) -> bytes:
        read = await self._read(n)
        if n == 1:
            self._type = read[0]
        elif self._type == FRAME_METHOD:
            # No channel and length of a frame look like one of these.
            if read.startswith(_BLOCKED):
                self.blocked_by = _reason(read)
            elif read.startswith(_UNBLOCKED):
                self.blocked_by = None
            elif self._is_careful and read.startswith((_DELIVER, _GET_OK)):
                mended = with_readable_key(read)
                self._is_spoilt = mended != read
                read = mended
        elif self._is_careful and self._type == FRAME_HEADER and n > _FIXED:
            read = (unreadable if self._is_spoilt else readable)(read[:-1]) + read[-1:]
        self.last = read
        return read


def _reason(blocked: bytes) -> str:
    frame = Connection.Blocked()
    frame.unmarshal(blocked[4:-1])
    return frame.reason


def readable(header: bytes) -> bytes:
    """The payload *header* of a header frame; one of the same length and marked, if the client cannot read it."""
    try:
        _read(header, _CALLS_TO_SPARE)
    except Exception:  # noqa: BLE001  # whatever it is, it would end the connection
        return unreadable(header)
    return header


def _read(header: bytes, calls: int) -> None:
    if calls:
        _read(header, calls - 1)
    else:
        ContentHeader().unmarshal(header)


def unreadable(header: bytes) -> bytes:
    """A header of the same length, and of a body of the same size, that says so."""
    properties = _UNREADABLE if len(header) >= _FIXED + len(_UNREADABLE) else b""
    return (header[:_FIXED] + properties).ljust(len(header), b"\0")


def with_readable_key(delivery: bytes) -> bytes:
    """A basic.deliver or get-ok whose exchange and routing key are text; what was none has question marks instead.

    RabbitMQ takes any bytes for a key.
    """
    at = 4 + _TAG_AND_FLAG + (1 + delivery[4] if delivery.startswith(_DELIVER) else 0)
    key_at = at + 1 + delivery[at]
    names_end = key_at + 1 + delivery[key_at]
    exchange, key = delivery[at + 1 : key_at], delivery[key_at + 1 : names_end]
    return b"".join((
        delivery[: at + 1], _as_text(exchange), delivery[key_at : key_at + 1], _as_text(key), delivery[names_end:]
    ))  # fmt: skip


def _as_text(name: bytes) -> bytes:
    try:
        name.decode()
    except UnicodeDecodeError:
        return bytes(byte if byte < 0x80 else ord("?") for byte in name)
    return name
