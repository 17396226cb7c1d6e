"""The socket of one connection, opened as aiormq opens it, and what is read from it on the way.

Kept for what aiormq has no public way to do: wait for room, hang up at once, learn why the broker hung up, and get past
a message whose headers the client cannot read (it would end the connection, again in every session).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import aiormq
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from pamqp.commands import Connection
from pamqp.constants import FRAME_HEADER
from pamqp.header import ContentHeader
from yarl import URL

from eventbus.transport.rabbitmq.splitter import Splitter, unfit

log = logging.getLogger("eventbus.transport.rabbitmq")

# No sender sets it: the specification knows 1 and 2.
UNREADABLE_DELIVERY_MODE: Final = 254
HIGH_WATER: Final = 64 * 1024
_FIXED: Final = 12  # class, weight and body size, before the properties
_UNREADABLE: Final = bytes([0x10, 0x00, UNREADABLE_DELIVERY_MODE])  # properties that hold a delivery mode alone


class Wire(aiormq.TransportFactory):
    """*is_careful* costs a second decoding of every header frame, and no message can end the connection.

    *is_split*: events take the lane, and only the rest is the client's.
    """

    def __init__(self, *, is_tls: bool, is_careful: bool, is_split: bool) -> None:
        self._factory = TLSTransportFactory() if is_tls else TCPTransportFactory()
        self._is_careful = is_careful
        self._is_split = is_split
        self.splitter: Splitter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._frames: _Frames | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self._reader, self._writer = await self._factory.create(url, **kwargs)
        if self._is_split and (why := unfit(self._reader, self._writer)) is not None:
            log.warning("the lane is closed: events go through the client, slower", extra={"why": why})
        elif self._is_split:
            self.splitter = Splitter(self._reader, self._writer)
        self._frames = _Frames(self._reader.readexactly)
        self._reader.readexactly = self._frames.readexactly  # type: ignore[method-assign]
        return self._reader, self._writer

    def opened(self) -> None:
        """The handshake is over: from now on, read fast where we may."""
        if self._reader is not None and not self._is_careful:
            del self._reader.readexactly

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

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.transport.abort()


class _Frames:
    """The frames as aiormq reads them: one byte of type, six of channel and length, then the payload and its end."""

    def __init__(self, read: Callable[[int], Awaitable[bytes]]) -> None:
        self._read = read
        self._type = 0
        self.last = b""

    async def readexactly(self, n: int) -> bytes:
        read = await self._read(n)
        if n == 1:
            self._type = read[0]
        elif self._type == FRAME_HEADER and n > _FIXED:
            read = readable(read[:-1]) + read[-1:]
        self.last = read
        return read


def readable(header: bytes) -> bytes:
    """The payload *header* of a header frame; one of the same length and marked, if the client cannot read it."""
    try:
        ContentHeader().unmarshal(header)
    except Exception:  # noqa: BLE001  # whatever it is, it would end the connection
        properties = _UNREADABLE if len(header) >= _FIXED + len(_UNREADABLE) else b""
        return (header[:_FIXED] + properties).ljust(len(header), b"\0")
    return header
