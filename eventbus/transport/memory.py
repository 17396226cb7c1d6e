"""The transport of `memory://`: the port over a broker inside the process.

The one rule: a broker belongs to its holders and to one event loop. Brokers are found by name, hold nothing once the
last transport and consumer have let go, and never reach another process.

    memory://                            the process's own broker
    memory://NAME                        another one
    memory://NAME?max_messages=100000    it takes at most this many messages

A publish that finds the broker full waits until there is room. A session cannot end without the process, so `resume`
needs no care and consumes at full prefetch.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import re
import struct
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Self
from urllib.parse import parse_qsl, urlsplit
from weakref import WeakValueDictionary

from eventbus.clock import Clock
from eventbus.errors import SetupError, TransportError, hide_password
from eventbus.message import KEPT_PROPERTIES, Headers, Message
from eventbus.topology import Topology
from eventbus.transport.base import (
    CONNECT_TIMEOUT_S,
    Broker,
    Declare,
    Delivery,
    NotPublished,
    Publication,
    Source,
    Unpublishable,
)
from eventbus.transport.memory_broker import DEFAULT_MAX_MESSAGES, MemoryBroker
from eventbus.transport.memory_queue import QueueConsumer

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # the default of RabbitMQ 4
_MAX_KEY_BYTES = 255  # AMQP 0-9-1, short string
_MAX_HEADER_NAME_BYTES = 128  # AMQP 0-9-1, section 4.2.5.5
_MAX_HEADERS_BYTES = 128 * 1024  # RabbitMQ's default frame: a header frame cannot be split
# A view is no ledger: one that reads this slowly misses the oldest, and never stops a publisher.
_MAX_UNREAD = 10_000
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.001, 0.1

_NAME = re.compile(r"[A-Za-z0-9_.-]*")
_brokers: WeakValueDictionary[str, MemoryBroker] = WeakValueDictionary()


@dataclass(frozen=True, slots=True)
class _Address:
    """What an URL says."""

    name: str
    max_messages: int

    @classmethod
    def of(cls, url: str) -> Self:
        try:
            parts = urlsplit(url)
            options = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
        except ValueError as error:
            raise _malformed(url, str(error)) from error
        if parts.scheme != "memory" or parts.path not in ("", "/") or parts.fragment or "://" not in url:
            raise _malformed(url, "it has other parts than a name and options")
        if not _NAME.fullmatch(parts.netloc):
            raise _malformed(url, "a name is made of letters, digits, '_', '.' and '-'")
        limit = DEFAULT_MAX_MESSAGES
        for position, (option, value) in enumerate(options):
            if option != "max_messages" or position:
                raise _malformed(url, f"{option!r} is no option of it, or given twice")
            if not re.fullmatch(r"[1-9][0-9]{0,11}", value):
                raise _malformed(url, f"max_messages={value!r} is no number above 0")
            limit = int(value)
        return cls(parts.netloc, limit)

    def find(self, clock: Clock | None) -> MemoryBroker:
        """The broker of this name; a fresh one where nobody uses it.

        Raises:
            SetupError: it is in use with another limit or another clock.
        """
        broker = _brokers.get(self.name)
        if broker is None or broker.is_abandoned:
            broker = _brokers[self.name] = MemoryBroker(clock=clock, max_messages=self.max_messages)
        if broker.max_messages != self.max_messages:
            raise SetupError(
                f"the embedded broker memory://{self.name} runs with max_messages={broker.max_messages}, "
                f"not {self.max_messages}: use the same URL everywhere, or another name"
            )
        if clock is not None and broker.clock is not clock:
            raise SetupError(f"the embedded broker memory://{self.name} runs on another clock: use another name")
        return broker


class MemoryTransport:
    """The port, over the embedded broker that *url* names.

    Raises:
        SetupError: *url* is malformed, or has an option that does not exist.
    """

    def __init__(self, url: str, *, clock: Clock | None = None) -> None:
        address = _Address.of(url)
        self._find: Callable[[], MemoryBroker] = lambda: address.find(clock)
        self._broker: MemoryBroker | None = None
        self._tails: set[_Tail] = set()

    @classmethod
    def on_broker(cls, broker: MemoryBroker) -> Self:
        """A transport over *broker*, which has no name: several can share it, and nobody else finds it."""
        transport = cls("memory://")
        transport._find = lambda: broker
        return transport

    @property
    def broker(self) -> Broker:
        if self._broker is None:
            raise RuntimeError("who answers is known only after open()")
        return Broker("embedded", importlib.metadata.version("eventbus"), "memory", None, MAX_MESSAGE_BYTES)

    @property
    def embedded(self) -> MemoryBroker:
        """The broker itself, for its instruments; only after `open`."""
        return self._opened()

    async def open(self, topology: Topology, declare: Declare) -> None:
        broker = self._find()
        broker.hold(self)
        try:
            broker.declare(topology, declare)
        except BaseException:
            if self._broker is None:
                broker.let_go(self)
            raise
        self._broker = broker

    async def publish(self, publication: Publication, *, timeout_s: float) -> bool:
        message = _storable(publication)
        exchange, key = publication.exchange, publication.key
        waits = _Waits(timeout_s)
        while True:
            broker = self._broker
            if broker is None:
                raise NotPublished("the transport is closed, or was never opened", maybe_stored=False)
            if not broker.has_exchange(exchange):
                raise NotPublished(f"there is no exchange {exchange!r}", maybe_stored=False)
            queues = broker.route(exchange, key)
            if not queues or broker.has_room_for(len(queues)):
                break
            await waits.one_more(broker)
        broker.put(queues, message, exchange, key)
        # As with any broker, others run before the confirm is seen: a loop that only publishes starves no consumer.
        await asyncio.sleep(0)
        return bool(queues)

    def obstacle(self) -> str | None:
        broker = self._broker
        if broker is None:
            return "the transport is closed, or was never opened"
        return None if broker.has_room_for(1) else _full(broker)

    def consumer(self, sources: Sequence[Source], topology: Topology, declare: Declare) -> MemoryConsumer:
        return MemoryConsumer(self._find, sources, topology, declare)

    @asynccontextmanager
    async def browse(self, queue: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        taken: list[Delivery] = []
        browser = self._opened().browser(queue, taken.append)
        deliveries = _one_by_one(browser, taken)
        try:
            yield deliveries
        finally:
            await deliveries.aclose()
            browser.close()

    @asynccontextmanager
    async def tail(self, exchange: str, pattern: str) -> AsyncIterator[AsyncIterator[Delivery]]:
        broker = self._opened()
        view = _Tail()
        consumer = broker.tail(exchange, pattern, view.show)
        deliveries = view.deliveries()
        self._tails.add(view)
        try:
            yield deliveries
        finally:
            self._tails.discard(view)
            await deliveries.aclose()
            consumer.close()
            broker.delete(consumer.queue.name)

    async def close(self) -> None:
        while self._tails:
            self._tails.pop().end()
        if self._broker is not None:
            self._broker.let_go(self)
            self._broker = None

    def _opened(self) -> MemoryBroker:
        if self._broker is None:
            raise TransportError("the transport is closed, or was never opened: open it first")
        return self._broker


async def _one_by_one(browser: QueueConsumer, taken: list[Delivery]) -> AsyncGenerator[Delivery, None]:
    while browser.queue.ready:
        browser.queue.give_next(browser)
        while taken:
            yield taken.pop()


class _Tail:
    """What a live view has not read yet."""

    def __init__(self) -> None:
        self._unread: deque[Delivery] = deque(maxlen=_MAX_UNREAD)
        self._has_news = asyncio.Event()
        self._has_ended = False

    def show(self, delivery: Delivery) -> None:
        delivery.ack()
        self._unread.append(delivery)
        self._has_news.set()

    def end(self) -> None:
        self._has_ended = True
        self._has_news.set()

    async def deliveries(self) -> AsyncGenerator[Delivery, None]:
        while True:
            while self._unread:
                yield self._unread.popleft()
            if self._has_ended:
                raise TransportError("the transport was closed, and with it this view")
            self._has_news.clear()
            await self._has_news.wait()


class _Waits:
    """Longer and longer waits for room, up to a deadline. Real time: deadlines guard against real hangs."""

    __slots__ = ("_began_s", "_next_s", "_timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._next_s = _FIRST_WAIT_S
        self._began_s: float | None = None

    async def one_more(self, broker: MemoryBroker) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._began_s is None:
            self._began_s = now_s
        left_s = self._began_s + self._timeout_s - now_s
        if left_s <= 0:
            raise NotPublished(
                f"{_full(broker)} and had no room within {self._timeout_s:g} s: consume faster, or raise it in the URL",
                maybe_stored=False,
                timed_out=True,
            )
        await asyncio.sleep(min(self._next_s, left_s))
        self._next_s = min(self._next_s * 2, _LONGEST_WAIT_S)


def _full(broker: MemoryBroker) -> str:
    return f"the embedded broker is full ({broker.size} messages, max_messages={broker.max_messages})"


class MemoryConsumer:
    """Consumes queues of an embedded broker; the port says the rest."""

    def __init__(
        self, find: Callable[[], MemoryBroker], sources: Sequence[Source], topology: Topology, declare: Declare
    ) -> None:
        self._find = find
        self._sources = tuple(sources)
        self._topology = topology
        self._declare = declare
        self._broker: MemoryBroker | None = None
        self._session: list[QueueConsumer] = []
        self._has_stopped = asyncio.Event()

    async def start(self, within_s: float = CONNECT_TIMEOUT_S) -> None:
        broker = self._find()
        broker.hold(self)
        self._broker = broker
        try:
            self._begin_session(broker)
        except BaseException:
            await self.close()
            raise

    async def stop(self) -> None:
        for consumer in self._session:
            consumer.cancel()
        self._has_stopped.set()

    async def pause(self) -> None:
        for consumer in self._session:
            consumer.close()
        self._session = []

    async def resume(self) -> None:
        if self._broker is not None and not self._session and not self._has_stopped.is_set():
            self._begin_session(self._broker)

    def missing(self) -> Mapping[str, str]:
        if self._has_stopped.is_set():
            why = "consuming was stopped"
        else:
            why = "consuming pauses" if self._broker is not None else "consuming has not started"
        consumed = {consumer.queue.name for consumer in self._session if consumer.is_consuming}
        return {source.queue: why for source in self._sources if source.queue not in consumed}

    async def wait(self) -> None:
        await self._has_stopped.wait()

    async def close(self) -> None:
        await self.stop()
        await self.pause()
        if self._broker is not None:
            self._broker.let_go(self)
            self._broker = None

    def _begin_session(self, broker: MemoryBroker) -> None:
        broker.declare(self._topology, self._declare)
        for source in self._sources:
            self._session.append(broker.consume(source.queue, source.prefetch, source.deliver))


def _storable(publication: Publication) -> Message:
    """The message as the broker keeps it: checked, and shared with nobody.

    Raises:
        Unpublishable: RabbitMQ would get it changed or not at all, so that it would fail on the day the URL changes.
    """
    message = publication.message
    if len(message.body) > MAX_MESSAGE_BYTES:
        raise Unpublishable(f"its body has {len(message.body)} bytes, and the broker takes at most {MAX_MESSAGE_BYTES}")
    _check_text("the routing key", publication.key, _MAX_KEY_BYTES)
    headers = _table(message.headers)
    if _least_size(headers) > _MAX_HEADERS_BYTES:
        raise Unpublishable(f"its headers take more than the {_MAX_HEADERS_BYTES} bytes that fit into one frame")
    properties = {name: value for name, value in message.properties.items() if name in KEPT_PROPERTIES}
    return Message(headers, bytes(message.body), message.content_type, _table(properties))


def _table(headers: Headers) -> dict[str, object]:
    result: dict[str, object] = {}
    for name, value in headers.items():
        _check_text("a header's name", name, _MAX_HEADER_NAME_BYTES)
        result[name] = value if type(value) is str and value.isascii() else _carried(name, value)
    return result


def _carried(name: str, value: object) -> object:
    """A copy of *value*, which a journey through AMQP and its client would not change."""
    match value:
        case None | bool():
            return value
        case str():
            _check_text(f"header {name!r}", value)
            return value
        case int() if -(2**63) <= value < 2**63:
            return value
        case float() if _is_single(value):
            return value
        case Decimal() if _is_amqp_decimal(value):
            return value
        case datetime() if _is_amqp_time(value):
            return value.astimezone(UTC)
        case bytearray():
            return bytearray(value)
        case list():
            return [_carried(name, inner) for inner in value]
        case dict():
            return _table(value)
        case int() | float() | Decimal() | datetime():
            raise Unpublishable(f"header {name!r} is a {type(value).__name__} that AMQP would change: send it as text")
        case _:
            raise Unpublishable(f"header {name!r} is a {type(value).__name__}, which AMQP does not carry: send text")


def _least_size(headers: Headers) -> int:
    return sum(len(name) + (len(value) if isinstance(value, str) else 1) for name, value in headers.items())


def _is_single(value: float) -> bool:
    """Whether 32 bits are enough for *value*: the client writes no more."""
    try:
        return bool(struct.unpack(">f", struct.pack(">f", value))[0] == value)
    except OverflowError:
        return False


def _is_amqp_time(value: datetime) -> bool:
    """Whether *value* is whole seconds since 1970 and before 2106: the client reads larger numbers as milliseconds."""
    return value.tzinfo is not None and not value.microsecond and 0 <= value.timestamp() < 2**32


def _is_amqp_decimal(value: Decimal) -> bool:
    """Whether *value* is a 32 bit integer with at most 255 decimal places."""
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int) or exponent < -255 or exponent > 9:
        return False
    return -(2**31) <= int(value.scaleb(-min(exponent, 0))) < 2**31


def _check_text(what: str, text: object, max_bytes: int | None = None) -> None:
    if not isinstance(text, str):
        raise Unpublishable(f"{what} is a {type(text).__name__}, not a string")
    try:
        length = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        raise Unpublishable(f"{what} holds a character that is no Unicode text: {error.reason}") from error
    if max_bytes is not None and length > max_bytes:
        raise Unpublishable(f"{what} has {length} bytes, and AMQP takes at most {max_bytes}")


def _malformed(url: str, why: str) -> SetupError:
    return SetupError(
        f"{hide_password(url)!r} is no URL of the embedded broker ({why}): "
        f"use memory://, memory://NAME or memory://NAME?max_messages={DEFAULT_MAX_MESSAGES}"
    )
