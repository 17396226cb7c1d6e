"""One connection's frames, split: those for a channel of ours go to it, all others on to the client, untouched.

The client opens, authenticates and declares, and hears of closing, cancelling, alarms and answers to its calls in the
order in which they came. The frames that carry events are read where they arrive, and what we send is written once per
turn of the event loop.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol

from eventbus.transport.rabbitmq import frames

_FRAME: Final = struct.Struct(">BHI")
_HEARTBEAT: Final = 8
_MAX_GREETING: Final = 2**20  # no frame of a handshake is bigger
_READ_BYTES: Final = 64 * 1024
_UNBOUNDED: Final = 2**32


class Inbox(Protocol):
    """A channel of ours: takes the frames that are for it, and leaves the others to the client."""

    def take(self, kind: int, data: bytes, at: int, end: int) -> bool:
        """Whether the frame was one of ours. Its payload is `data[at:end]`."""


class Splitter:
    """Sits between the socket and the client's reader."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.frame_max = 0
        self._room = _MAX_GREETING
        self._has_begun = False
        self._pass_on = reader.feed_data
        self._transport: asyncio.Transport = writer.transport  # type: ignore[assignment]  # a StreamWriter's is one
        self._loop = asyncio.get_running_loop()
        self._inboxes: dict[int, Inbox] = {}
        self._rest: list[bytes] = []  # of a frame that is not here as a whole: so much is missing at least
        self._missing = 0
        self._is_broken = False
        self._fail: Callable[[BaseException], None] = lambda _error: writer.transport.abort()
        self._beat_s = 0.0
        self._beaten_s = self._loop.time()
        self._out: list[bytes] = []
        self._then: deque[Callable[[], None]] = deque()
        # asyncio's own loop reads so much at a time (others, and TLS, do as they like). With little, what was read
        # is handled and acknowledged while the broker sends more; with much, broker and worker wait for one another.
        with suppress(AttributeError):
            self._transport.max_size = _READ_BYTES  # type: ignore[attr-defined]  # not in its stub
        # From the first byte on, or we would not know where a frame begins.
        reader.feed_data = self.feed  # type: ignore[method-assign, assignment]

    def begin(self, *, frame_max: int, heartbeat_s: float, fail: Callable[[BaseException], None]) -> None:
        """The handshake is over."""
        self._has_begun = True
        self.frame_max = frame_max
        self._room = frame_max - frames.OVERHEAD if frame_max else _UNBOUNDED
        self._beat_s = heartbeat_s / 2
        self._fail = fail

    def enter(self, number: int, inbox: Inbox) -> None:
        self._inboxes[number] = inbox

    def leave(self, number: int, inbox: Inbox) -> None:
        """*inbox* takes no more. Its number may be another one's by now: the client gives it away again at once."""
        if self._inboxes.get(number) is inbox:
            del self._inboxes[number]

    # ── in ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def feed(self, data: bytes) -> None:
        """Take what the socket brought. Raises nothing: it would reach nobody but the event loop."""
        if self._is_broken:
            if not self._has_begun:
                self._pass_on(data)
            return
        self._rest.append(data)
        self._missing -= len(data)
        if self._missing <= 0:
            whole = b"".join(self._rest) if len(self._rest) > 1 else bytes(data)
            self._rest.clear()
            self._split(whole)
            if self._then:
                self._go_on()
        if self._beat_s and (now_s := self._loop.time()) - self._beaten_s > self._beat_s:
            # The client takes a connection for dead on which it reads nothing, and of all this it reads nothing.
            self._beaten_s = now_s
            self._pass_on(frames.HEARTBEAT)

    def when_read(self, then: Callable[[], None]) -> None:
        """Call *then* once, when all frames that the socket has brought are read, and send at once what it writes."""
        self._then.append(then)

    def _go_on(self) -> None:
        while self._then:
            self._then.popleft()()
        self.flush()

    def _split(self, data: bytes) -> None:
        at, end = 0, len(data)
        inboxes, unpack, room = self._inboxes, _FRAME.unpack_from, self._room
        missing = frames.OVERHEAD
        while end - at >= frames.OVERHEAD:
            kind, channel, size = unpack(data, at)
            if size > room or not (0 < kind < 4 or kind == _HEARTBEAT):
                self._break(data[at:], f"a frame of type {kind} and {size} bytes, where {room} fit")
                return
            stop = at + 7 + size
            if stop >= end:
                missing = stop + 1 - at
                break
            if data[stop] != frames.END:
                self._break(data[at:], "a frame does not end where it says")
                return
            inbox = inboxes.get(channel)
            try:
                is_taken = inbox is not None and kind != _HEARTBEAT and inbox.take(kind, data, at + 7, stop)
            except Exception as error:  # noqa: BLE001  # whatever it is: what follows is split for a last goodbye
                self._fail(error)
                is_taken = True
            if not is_taken:
                self._pass_on(data[at : stop + 1])
            at = stop + 1
        self._missing = missing - (end - at)
        if at < end:
            self._rest.append(data[at:])

    def _break(self, data: bytes, why: str) -> None:
        """From *data* on these are no frames: nobody knows any more where one begins."""
        self._is_broken = True
        if self._has_begun:
            self._fail(frames.Malformed(why))
            self._transport.abort()  # without a goodbye, whose answer nobody could read (AMQP 0-9-1, section 4.2.3)
        else:
            self._pass_on(data)  # whoever answers is no broker of ours: the client knows how to say so

    # ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def write(self, *pieces: bytes) -> None:
        """Send whole frames at the end of this turn of the event loop, with all others of it."""
        if not self._out:
            self._loop.call_soon(self.flush)
        self._out += pieces

    def write_now(self, *pieces: bytes) -> None:
        """Send whole frames, behind those that wait for the end of the turn."""
        self._out += pieces
        self.flush()

    def flush(self) -> None:
        """Send now what waits for the end of the turn: before something of the client's that must come after it."""
        if self._out:
            out, self._out = self._out, []
            if not self._transport.is_closing():
                self._transport.write(b"".join(out))


def unfit(reader: Any, writer: Any) -> str | None:
    """Why what the client opened cannot be split; None if it can."""
    if not isinstance(reader, asyncio.StreamReader):
        return f"it reads with a {type(reader).__name__}"
    if not isinstance(writer, asyncio.StreamWriter):
        return f"it writes with a {type(writer).__name__}"
    return None
