"""Events on a channel of the lane: the same as `channels.py` does through the client, in our own frames.

Publishing: what is the same for every event of a type is encoded once, and a confirm ends the publishes that it means
and touches no other. Consuming: one pass over what arrived, and headers that somebody else encoded are kept as bytes.
"""

from __future__ import annotations

import asyncio
import math
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Final
from uuid import uuid4

import aiormq
from pamqp.encode import encode_table_value

from eventbus.message import KEPT_PROPERTIES, Message
from eventbus.transport.base import Publication, Unpublishable
from eventbus.transport.rabbitmq import frames
from eventbus.transport.rabbitmq.acks import Ack, Settlement
from eventbus.transport.rabbitmq.channels import ConsumerCancelled, Incoming, Nacked
from eventbus.transport.rabbitmq.confirm import Confirm, go_on
from eventbus.transport.rabbitmq.session import Calling, Lost, Session
from eventbus.transport.rabbitmq.shapes import TableReader

_METHOD: Final = struct.Struct(">I")
_MAX_METHODS: Final = 1000  # kept encoded: event types are few, but the delay tree's keys are many
_NOBODY: Final = (None, 0.0)
_NOTHING: Final[Mapping[str, object]] = {}
_ID_BYTES: Final = 33  # a message id with its length


@dataclass(slots=True)
class Encoded:
    """A publication in frames, but for the channel and the message id, which are new each time it is sent."""

    exchange: str
    key: str
    body: bytes
    head: bytes  # properties before the message id
    tail: bytes  # and behind it


def encode(publication: Publication, *, frame_max: int) -> Encoded:
    """*publication* ready to be sent.

    Raises:
        Unpublishable: it would arrive changed, or not at all.
    """
    message = publication.message
    try:
        table = frames.write_plain(message.headers, message.encoded)
        is_delicate = table is None
        if table is None:
            table = _write_delicate(message)
        head, tail = frames.write_properties(message.content_type, table, message.properties)
        if is_delicate or message.properties:
            _check_round_trip(message, head, tail)
        _check_key(publication.key)
    except (TypeError, ValueError, OverflowError, struct.error) as error:
        raise Unpublishable(f"its headers or its key cannot be encoded unchanged: {error}") from error
    size = 12 + len(head) + _ID_BYTES + len(tail)
    if frame_max and size > frame_max - frames.OVERHEAD:
        raise Unpublishable(f"its headers take {size} bytes, and {frame_max - frames.OVERHEAD} fit into one frame")
    return Encoded(publication.exchange, publication.key, message.body, head, tail)


@lru_cache(maxsize=4096)
def _check_key(key: str) -> None:
    frames.write_short("the routing key", key)


def _write_delicate(message: Message) -> bytes:
    """As `frames.write_plain`, with values of every kind that the client can write."""
    encoded = dict(message.encoded)
    for name, value in message.headers.items():
        if name not in encoded:
            encoded[name] = encode_table_value(value)  # type: ignore[arg-type]  # raises for what it cannot write
    table = frames.write_plain(message.headers, encoded)
    assert table is not None
    return table


def _check_round_trip(message: Message, head: bytes, tail: bytes) -> None:
    # The client narrows doubles and cuts seconds from moments: see what would come back.
    content = head + bytes((1,)) + b"-" + tail
    back = frames.read_properties(content, 0, len(content))
    if back.table.values != dict(message.headers):
        raise ValueError("headers would arrive changed")
    for name in KEPT_PROPERTIES:
        if (message.properties.get(name) or None) != (back.others.get(name) or None):
            raise ValueError(f"{name} would arrive changed")


class LanePublishing:
    """A channel in confirm mode: what was sent, until its confirm."""

    def __init__(self, session: Session, channel: aiormq.Channel) -> None:
        assert session.splitter is not None
        self._session = session
        self._splitter = session.splitter
        self._number = channel.number
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[int, tuple[Confirm, float]] = {}  # by tag, each with its deadline
        self._confirmed: deque[Confirm] = deque()  # whose tasks have not gone on yet
        self._look: asyncio.TimerHandle | None = None
        self._next_look_s = math.inf
        self._sent = 0  # the last tag
        self._returned: set[int] = set()
        self._is_returning = False
        self._returning = 0  # bytes of a returned body that are still to come
        self._prefix = uuid4().hex[:16].encode()
        self._methods: dict[tuple[str, str], bytes] = {}

    @classmethod
    async def open(cls, session: Session) -> LanePublishing:
        channel = await session.open_channel(confirms=True)
        lane = cls(session, channel)
        lane._splitter.enter(lane._number, lane)
        session.when_ended(lane._fail)
        return lane

    def encode(self, publication: Publication) -> Encoded:
        return encode(publication, frame_max=self._session.server.frame_max)

    def publish(self, encoded: Encoded, deadline_s: float) -> Confirm:
        """As `way.Sending` promises."""
        if not self._session.is_live:
            raise Lost(self._session.reason)
        confirm = Confirm(loop=self._loop)
        confirm.waiting = None
        place = (encoded.exchange, encoded.key)
        method = self._methods.get(place)
        if method is None:
            if len(self._methods) >= _MAX_METHODS:
                self._methods.clear()
            method = self._methods[place] = frames.publish_frame(self._number, *place)
        self._sent += 1
        self._waiting[self._sent] = confirm, deadline_s
        if deadline_s < self._next_look_s:
            self._look_at(deadline_s)
        # Fresh every time: a message that no queue took is known again by it, as its return has no tag.
        message_id = b"%s%016x" % (self._prefix, self._sent)
        content = frames.content_frames(
            self._number, encoded.head, message_id, encoded.tail, encoded.body, self._splitter.frame_max
        )
        if len(self._waiting) > 1:
            self._splitter.write(method, content)
        else:  # alone on its way: nothing is there to join it with, and until the turn ends costs a look at all sockets
            self._splitter.write_now(method, content)
        return confirm

    # One timer for all: publishes are many, and few of them end by their deadline.

    def _look_at(self, when_s: float) -> None:
        if self._look is not None:
            self._look.cancel()
        # Deadlines rarely pass: rather look once too often than set a timer for each publish.
        self._next_look_s = max(when_s, self._loop.time())
        self._look = self._loop.call_at(self._next_look_s, self._end_overdue)

    def _end_overdue(self) -> None:
        now_s, self._look, self._next_look_s = self._loop.time(), None, math.inf
        for future, deadline_s in self._waiting.values():
            if deadline_s <= now_s and not future.done():
                future.set_exception(TimeoutError())
                future.exception()
        open_s = [deadline_s for future, deadline_s in self._waiting.values() if not future.done()]
        if open_s:
            self._look_at(min(open_s))

    def _fail(self) -> None:
        """The session is over: nobody knows what became of what waits."""
        waiting, self._waiting = self._waiting, {}
        if self._look is not None:
            self._look.cancel()
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(Lost(self._session.reason))
                future.exception()  # seen: whoever waited may be gone

    # ── what arrives ──────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, kind: int, data: bytes, at: int, end: int) -> bool:
        """As `splitter.Inbox` promises."""
        if kind == frames.METHOD:
            if end - at < _METHOD.size:
                return False  # a frame without a method: the client says what is wrong with it
            (method,) = _METHOD.unpack_from(data, at)
            if method == frames.ACK:
                self._confirm(*frames.read_confirm(data, at + 4, end), is_stored=True)
            elif method == frames.NACK:
                self._confirm(*frames.read_confirm(data, at + 4, end), is_stored=False)
            elif method == frames.RETURN:
                self._is_returning = True
            else:
                return False
            return True
        if not self._is_returning:
            return False
        if kind == frames.HEADER:
            self._returning = frames.read_body_size(data, at, end)
            message_id = frames.read_message_id(data, at + 12, end).encode()
            if message_id.startswith(self._prefix):
                self._returned.add(int(message_id[len(self._prefix) :], 16))
        else:
            self._returning -= end - at
        self._is_returning = self._returning > 0
        return True

    def _go_on(self) -> None:
        go_on(self._confirmed, self._loop)

    def _confirm(self, tag: int, is_multiple: bool, *, is_stored: bool) -> None:
        if not is_multiple:
            self._confirm_one(tag, is_stored=is_stored)
            return
        last = tag or self._sent  # 0 means all
        # They wait in the order of their tags: no more than these are touched, however many came singly before.
        for each in list(takewhile(last.__ge__, self._waiting)):
            self._confirm_one(each, is_stored=is_stored)

    def _confirm_one(self, tag: int, *, is_stored: bool) -> None:
        future, _ = self._waiting.pop(tag, _NOBODY)
        is_routed = True
        if self._returned and tag in self._returned:
            self._returned.discard(tag)
            is_routed = False
        if future is None or future.done():
            return
        if is_stored:
            future.set_result(is_routed)
            if not self._confirmed:
                self._splitter.when_read(self._go_on)
            self._confirmed.append(future)
        else:
            future.set_exception(Nacked())
            future.exception()


class LaneConsuming:
    """A channel with one consumer."""

    def __init__(self, session: Session, channel: aiormq.Channel) -> None:
        assert session.splitter is not None
        self._session = session
        self._channel = channel
        self._splitter = session.splitter
        self._number = channel.number
        self._consumer_tag: str | None = None
        self._deliver: Callable[[Incoming], None] = lambda _incoming: None
        self._begun: tuple[int, bool, str, str] | None = None
        self._message: Message | None = None
        self._properties: frames.Properties | None = None
        self._read_table = TableReader().read
        self._missing = -1  # of the body; before the header came, nobody knows
        self._parts: list[bytes] = []

    @classmethod
    async def open(cls, session: Session, prefetch: int) -> LaneConsuming:
        """One that brings at most *prefetch* before they are settled."""
        channel = await session.open_channel()
        channel.on_consumer_cancel_callbacks.add(
            lambda frame: session.fail(ConsumerCancelled(f"the broker cancelled the consumer {frame.consumer_tag}"))
        )
        lane = cls(session, channel)
        lane._splitter.enter(lane._number, lane)
        async with Calling(session, channel):
            await channel.basic_qos(prefetch_count=prefetch)
        return lane

    async def consume(self, queue: str, deliver: Callable[[Incoming], None]) -> None:
        """Have each delivery given to *deliver*, which must return at once.

        Raises:
            Lost: the session died, or the broker refused: `reason` says which.
        """
        self._deliver = deliver
        async with Calling(self._session, self._channel):
            answer = await self._channel.basic_consume(queue, _never)
        self._consumer_tag = answer.consumer_tag

    async def cancel(self) -> None:
        """Take nothing more; what was delivered can still be settled. Harmless the second time."""
        if self._consumer_tag is not None:
            tag, self._consumer_tag = self._consumer_tag, None
            self._splitter.flush()
            async with Calling(self._session, self._channel):
                await self._channel.basic_cancel(tag)

    async def settle(self, batch: Sequence[Settlement]) -> None:
        """Tell the broker, in this order."""
        if not batch:
            return
        self._check_live()
        self._splitter.write(*(
            frames.ack_frame(self._number, each.tag, is_multiple=each.is_multiple)
            if isinstance(each, Ack)
            else frames.reject_frame(self._number, each.tag, is_requeued=False)
            for each in batch
        ))  # fmt: skip

    async def give_back(self, tags: Iterable[int]) -> None:
        """Let the broker put these back, in this order."""
        self._check_live()
        self._splitter.write(*(frames.nack_frame(self._number, tag, is_requeued=True) for tag in tags))

    async def close(self) -> None:
        """Return once the broker has seen everything; what is unsettled goes back. The session lives on."""
        self._session.release(self._channel)
        self._splitter.flush()
        async with Calling(self._session, self._channel):
            await self._channel.close()
        self._splitter.leave(self._number, self)

    def _check_live(self) -> None:
        if not self._session.is_live:
            raise Lost(self._session.reason)

    # ── what arrives ──────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, kind: int, data: bytes, at: int, end: int) -> bool:
        """As `splitter.Inbox` promises."""
        if kind == frames.METHOD:
            if end - at < _METHOD.size:
                return False  # a frame without a method: the client says what is wrong with it
            (method,) = _METHOD.unpack_from(data, at)
            if method != frames.DELIVER:
                return False
            if self._begun is not None:
                raise frames.Malformed("a delivery before the end of another")
            self._begun = frames.read_deliver(data, at + 4, end)
            self._missing = -1
            return True
        if self._begun is None:
            return False
        if kind == frames.HEADER:
            if self._missing >= 0:
                raise frames.Malformed("a delivery with two headers")
            self._missing = frames.read_body_size(data, at, end)
            try:
                self._properties = frames.read_properties(data, at + 12, end, self._read_table)
            except frames.Malformed:
                self._properties = None
            if not self._missing:
                self._complete(b"")
            return True
        if end - at > self._missing:
            raise frames.Malformed("a body before its header, or longer than that says")
        self._missing -= end - at
        if self._missing or self._parts:
            self._parts.append(data[at:end])
            if not self._missing:
                self._complete(b"".join(self._parts))
        else:
            self._complete(data[at:end])
        return True

    def _complete(self, body: bytes) -> None:
        assert self._begun is not None
        tag, is_redelivered, exchange, key = self._begun
        properties = self._properties
        self._begun = None
        self._parts = []
        if properties is None:
            message = Message({}, body)
        else:
            table, others = properties.table, properties.others
            kept = _NOTHING if others is frames.ONLY_PERSISTENT else _kept(others)
            message = Message(table.values, body, properties.content_type, kept, table.foreign)
        is_readable = properties is not None and (key.isascii() or _is_text(key))
        self._deliver(Incoming(tag, exchange, key, is_redelivered, message, is_readable))


def _is_text(key: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in key)


def _kept(others: Mapping[str, object]) -> Mapping[str, object]:
    return {name: others[name] for name in KEPT_PROPERTIES if name in others}


async def _never(_message: aiormq.abc.DeliveredMessage) -> None:
    """The client's own way: no delivery comes there."""
