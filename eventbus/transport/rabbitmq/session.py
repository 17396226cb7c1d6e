"""One connection and all that hangs on it. It dies as a whole, and another one is built from the topology's data.

No part of a session is ever repaired: a lost connection, a closed channel, a cancelled consumer each end all of it
(`fail`). What the client's own recovery restores and forgets is too much to know.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

import aio_pika
import aiormq
from aio_pika.abc import ConnectionParameter
from yarl import URL

from eventbus.errors import SetupError, TransportError
from eventbus.transport.base import CONNECT_TIMEOUT_S
from eventbus.transport.rabbitmq.lines import Line, line_of
from eventbus.transport.rabbitmq.refusals import Address, LoginRefused, Missing, Unreachable, not_connected
from eventbus.transport.rabbitmq.wire import Wire

log = logging.getLogger("eventbus.transport.rabbitmq")

# Silence ends a connection: the broker gives up after twice this, so a handler may block the event loop for half a
# minute; we, after one and a half times. A broker that has just sent something may stay silent for nearly one time.
HEARTBEAT_S: Final = 20
LISTENS_PER_HEARTBEAT: Final = 4
SILENT_LISTENS: Final = 6
CLOSE_TIMEOUT_S: Final = 5.0
CLOSE_REASON_S: Final = 1.0
# A broker that is starting may not know its users yet; a queue that is gone may be declared by somebody else.
GRACE_S: Final = 60.0
FIRST_BACKOFF_S: Final = 0.5
LEAST_TRY_S: Final = 5.0
PATIENT_AFTER: Final = 4
MAX_BACKOFF_S: Final = 10.0
STABLE_S: Final = 10.0

T = TypeVar("T")


class Lost(Exception):  # a signal between the parts of this adapter
    """The session died under a call. `reason` is what ended it."""

    def __init__(self, reason: BaseException | None) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Server:
    """Who answered."""

    product: str
    version: str
    line: Line
    frame_max: int
    cluster: str  # what it calls itself, to know it again elsewhere


class _Connection(aio_pika.Connection):
    """aio-pika's plain connection, which passes a transport factory on to aiormq."""

    PARAMETERS = (
        *aio_pika.Connection.PARAMETERS,
        ConnectionParameter(name="transport_factory", parser=lambda factory: factory, is_kwarg=True),
    )


class Session:
    """A live connection, until `fail` or `close`."""

    def __init__(self, connection: _Connection, wire: Wire, server: Server, address: Address) -> None:
        self.server = server
        self.address = address
        self.is_live = True
        self.reason: BaseException | None = None
        self.ended = asyncio.Event()
        self.began_s = asyncio.get_running_loop().time()
        self._connection = connection
        self._wire = wire
        self.splitter = wire.splitter
        if self.splitter is not None:
            beat_s = self._underlay.connection_tune.heartbeat
            self.splitter.begin(frame_max=server.frame_max, heartbeat_s=beat_s, fail=self.fail)
        self._watched: set[aiormq.Channel] = set()
        self._when_ended: list[Callable[[], None]] = []
        self._underlay.closing.add_done_callback(self._on_connection_closed)
        self._silent = 0
        self._listening: asyncio.TimerHandle | None = None
        self._listen_s = self._underlay.connection_tune.heartbeat / LISTENS_PER_HEARTBEAT
        self._listen_again()

    @property
    def _underlay(self) -> aiormq.abc.AbstractConnection:
        assert self._connection.transport is not None
        return self._connection.transport.connection

    async def open_channel(self, *, confirms: bool = False) -> aiormq.Channel:
        """A channel whose end is the session's end.

        Raises:
            Lost: the session died.
        """
        channel = await self.open_probe(confirms=confirms)
        self._watched.add(channel)

        def on_closed(closing: asyncio.Future[Any]) -> None:
            if channel in self._watched:
                self.fail(_exception_of(closing))

        channel.closing.add_done_callback(on_closed)
        return channel

    async def open_probe(self, *, confirms: bool = False) -> aiormq.Channel:
        """A throw-away channel, which may die alone.

        Raises:
            Lost: the session died.
        """
        if not self.is_live:
            raise Lost(self.reason)
        async with Calling(self):
            channel = await self._underlay.channel(publisher_confirms=confirms, on_return_raises=False)
        assert isinstance(channel, aiormq.Channel)
        return channel

    @property
    def blocked_by(self) -> str | None:
        """Why the broker takes no more messages on this connection, in its own words; None while it does.

        Only of a session that publishes: the broker tells no other.
        """
        return self._wire.blocked_by

    def release(self, channel: aiormq.Channel) -> None:
        """From now on *channel* may end alone."""
        self._watched.discard(channel)

    @property
    def is_full(self) -> bool:
        """Whether who writes must wait until it is `writable`."""
        return self._wire.is_full

    async def writable(self) -> None:
        """Return once there is room to write.

        Raises:
            Lost: the session died.
        """
        async with Calling(self):
            await self._wire.writable()

    def fail(self, reason: BaseException | None) -> None:
        """End of the session; the first reason counts."""
        if self.is_live:
            self.is_live = False
            self.reason = reason
            if self._listening is not None:
                self._listening.cancel()
            self.ended.set()
            for callback in self._when_ended:
                callback()

    def _listen_again(self) -> None:
        if self._listen_s:  # 0: no heartbeat was asked for
            self._listening = asyncio.get_running_loop().call_later(self._listen_s, self._listen)

    def _listen(self) -> None:
        """Count how often nothing was heard. (Not seconds: an event loop that was blocked hears nothing either.)"""
        self._silent = 0 if self._wire.has_heard() else self._silent + 1
        if self._silent < SILENT_LISTENS:
            self._listen_again()
            return
        self.fail(ConnectionError(f"the broker has been silent for {self._silent * self._listen_s:g} s"))
        self._wire.abort()  # a goodbye would wait for an answer

    def when_ended(self, callback: Callable[[], None]) -> None:
        """Have *callback* called at the end, from wherever that is noticed."""
        self._when_ended.append(callback)

    def _on_connection_closed(self, closing: asyncio.Future[Any]) -> None:
        self.fail(_exception_of(closing))

    async def close(self) -> None:
        """Hang up, politely if the broker still answers."""
        self.fail(None)
        # A timeout would not do: aiormq, cancelled, waits for the socket to be flushed to a broker that reads nothing.
        impatience = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self._wire.abort)
        try:
            await self._connection.close()
        except (aiormq.AMQPError, OSError):
            log.debug("not closed in order", extra={"broker": str(self.address)})
        finally:
            impatience.cancel()
            self._wire.abort()


class Calling:
    """Around calls of the client: what it raises because its channel or connection died becomes `Lost`."""

    __slots__ = ("_cancels", "_channel", "_session", "_task")

    def __init__(self, session: Session, channel: aiormq.Channel | None = None) -> None:
        self._session = session
        self._channel = channel

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._cancels = self._task.cancelling() if self._task else 0

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, asyncio.CancelledError):
            # aiormq ends what waits on a closed channel with a CancelledError; nobody has cancelled this task then.
            if self._task is None or self._task.cancelling() > self._cancels:
                return
            raise Lost(await self._reason(None)) from None
        died = aiormq.AMQPError | aiormq.ChannelInvalidStateError | ConnectionError | RuntimeError
        # A bare Exception is what aiormq ends an outstanding confirm with where we have closed in order.
        if isinstance(error, died) or type(error) is Exception:
            raise Lost(await self._reason(error)) from error

    async def _reason(self, error: BaseException | None) -> BaseException | None:
        """What ended it. Who calls while the channel is closing is told only that it is closed."""
        if isinstance(error, aiormq.ChannelClosed | aiormq.ConnectionClosed):
            return error
        if self._channel is not None:
            closing = self._channel.closing
            await asyncio.wait([closing], timeout=CLOSE_REASON_S)
            if closing.done() and isinstance(reason := _exception_of(closing), aiormq.AMQPError):
                return reason
        return self._session.reason or error


def _exception_of(closing: asyncio.Future[Any]) -> BaseException | None:
    return None if closing.cancelled() else closing.exception()


async def connect(
    url: URL, purpose: str, *, is_careful: bool = False, is_publishing: bool = False, has_lane: bool = False
) -> Session:
    """A new session for *purpose*, which the broker's own tools will show.

    On a careful one no message can end the connection, however broken its headers are; it reads slower.

    Raises:
        SetupError, TransportError: why there is none.
    """
    _quiet_the_client()
    connecting = asyncio.current_task()
    assert connecting is not None
    cancels = connecting.cancelling()
    address = Address.of(url)
    wire = Wire(
        is_tls=address.is_tls,
        is_careful=is_careful,
        is_publishing=is_publishing,
        is_split=has_lane and not is_careful,
    )
    connection = _Connection(
        url if "heartbeat" in url.query else url.update_query(heartbeat=HEARTBEAT_S),
        client_properties={"connection_name": f"{_program()}: {purpose}", "product": "eventbus"},
        transport_factory=wire,
    )
    try:
        await connection.connect()
        wire.opened()
        server = _server(connection)
    except BaseException as error:
        wire.abort()
        await connection.close()
        # aiormq, cancelled while the connection breaks, says only that it broke: we would try again, for ever.
        if connecting.cancelling() > cancels:
            raise asyncio.CancelledError from error
        if isinstance(error, Exception) and not isinstance(error, SetupError):
            raise not_connected(error, address, wire.close_text()) from error
        raise
    return Session(connection, wire, server, address)


def _server(connection: _Connection) -> Server:
    assert connection.transport is not None
    underlay = connection.transport.connection
    stated = underlay.server_properties or {}
    product, version = str(stated.get("product", "something unnamed")), str(stated.get("version", ""))
    cluster = str(stated.get("cluster_name", ""))
    return Server(product, version, line_of(product, version), underlay.connection_tune.frame_max, cluster)


def _program() -> str:
    started = Path(sys.argv[0] if sys.argv else "")
    name = started.parent.name if started.stem == "__main__" else started.stem
    return f"{name or 'python'} ({os.getpid()})"


def _quiet_the_client() -> None:
    # What the client logs at ERROR, partly with a traceback, is raised or logged once by this adapter as well.
    for name in ("aiormq", "aio_pika"):
        if logging.getLogger(name).level == logging.NOTSET:
            logging.getLogger(name).setLevel(logging.CRITICAL)


class Backoff:
    """How long to wait before each further try: not long at first, with jitter, never more than 10 s.

    And how long to wait for a try to succeed. One that began where the broker has no majority hangs after that is
    healed, too (4.3; found by the ledger), so a try has a few times what the slowest took that succeeded; and more
    after several that had too little, for the broker may have become slow.
    """

    def __init__(self) -> None:
        self._step_s = FIRST_BACKOFF_S
        self._slowest_s: float | None = None
        self._timed_out = 0  # tries in a row

    async def tried(self, build: Callable[[], Awaitable[T]]) -> T:
        """What *build* makes, in time.

        Raises:
            TimeoutError: not in time; and whatever *build* raises.
        """
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        usual_s = CONNECT_TIMEOUT_S if self._slowest_s is None else max(LEAST_TRY_S, 4 * self._slowest_s)
        try:
            async with asyncio.timeout(min(CONNECT_TIMEOUT_S, usual_s * (1 + self._timed_out // PATIENT_AFTER))):
                made = await build()
        except TimeoutError:
            self._timed_out += 1
            self._step_s = FIRST_BACKOFF_S  # it was waited for long enough
            raise
        self._timed_out = 0
        self._slowest_s = max(self._slowest_s or 0.0, loop.time() - began_s)
        return made

    def next_s(self) -> float:
        step_s, self._step_s = self._step_s, min(MAX_BACKOFF_S, self._step_s * 2)
        return random.uniform(0.2, 1.0) * step_s

    def after(self, session: Session) -> None:
        """*session* has ended: begin anew, unless it was one of a row that died young."""
        if asyncio.get_running_loop().time() - session.began_s > STABLE_S:
            self._step_s = FIRST_BACKOFF_S


async def first(
    build: Callable[[], Awaitable[T]],
    address: Address,
    backoff: Backoff | None = None,
    within_s: float | None = None,
) -> T:
    """What *build* makes; a broker that is not there yet is waited for, for *within_s* or `CONNECT_TIMEOUT_S` in all.

    Raises:
        SetupError, TransportError: what *build* raised, or that nobody answered.
    """
    why = "no answer"
    backoff = backoff or Backoff()
    within_s = CONNECT_TIMEOUT_S if within_s is None else within_s
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    return await backoff.tried(build)
                except (Unreachable, Lost) as error:
                    why = str(error)
                await asyncio.sleep(backoff.next_s())
    except TimeoutError:
        raise TransportError(
            f"no RabbitMQ answered at {address} within {within_s:.0f} s ({why}): is it running, and is the URL right?"
        ) from None


async def rebuild(build: Callable[[], Awaitable[T]], refused: Callable[[SetupError], None], backoff: Backoff) -> T:
    """What *build* makes, tried for ever. *refused* is told of each SetupError, and may raise it to give up."""
    began_s = asyncio.get_running_loop().time()
    while True:
        await asyncio.sleep(backoff.next_s())
        try:
            return await backoff.tried(build)
        except (LoginRefused, Missing) as error:
            if asyncio.get_running_loop().time() - began_s > GRACE_S:
                refused(error)
        except SetupError as error:
            refused(error)
        except (TransportError, Lost, TimeoutError) as error:
            log.debug("no session yet", extra={"why": str(error)})
