"""Events on a channel, through aiormq's own methods: publish and confirm, deliver and settle.

The slower of the two ways (`way.py`), taken where the lane is off, and by whoever only looks.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiormq
from pamqp.commands import Basic
from pamqp.header import ContentHeader

from eventbus.message import KEPT_PROPERTIES, Message
from eventbus.transport.base import Publication, Unpublishable
from eventbus.transport.rabbitmq.acks import Ack, Settlement
from eventbus.transport.rabbitmq.session import Calling, Session
from eventbus.transport.rabbitmq.wire import UNREADABLE_DELIVERY_MODE

FRAME_OVERHEAD: Final = 8
MAX_NAME_BYTES: Final = 128  # pamqp cuts longer header names, and would say so only in a log
MAX_SHORT_BYTES: Final = 255
FORGOTTEN_S: Final = 0.5  # more than it takes who waited for the dead channel to reach it
INT64: Final = range(-(2**63), 2**63)


class Nacked(Exception):  # a signal between the parts of this adapter
    """A queue refused the message: it is full, or has lost its majority."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A publication as this client can send it, any number of times."""

    exchange: str
    key: str
    body: bytes
    properties: Basic.Properties


@dataclass(slots=True)  # not frozen: made for each delivery
class Incoming:
    """A delivery as the broker sent it."""

    tag: int
    exchange: str
    key: str
    is_redelivered: bool
    message: Message
    # False: the client cannot read its headers, and `message` has none. Only on a careful connection.
    is_readable: bool


def encode(publication: Publication, *, frame_max: int) -> Encoded:
    """*publication* ready to be sent.

    Raises:
        Unpublishable: it would arrive changed, or not at all.
    """
    message = publication.message
    try:
        properties = _properties(message)
        if message.properties or not _is_plain(message):
            _check_round_trip(properties)
        if _size_at_most(message) > frame_max - FRAME_OVERHEAD:
            _check_size(properties, frame_max)
        _check_text("the routing key", publication.key, MAX_SHORT_BYTES)
        _check_text("the content type", message.content_type or "", MAX_SHORT_BYTES)
    except (TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
        raise Unpublishable(f"its headers or its key cannot be encoded unchanged: {error}") from error
    return Encoded(publication.exchange, publication.key, message.body, properties)


def _properties(message: Message) -> Basic.Properties:
    # What the client cannot encode of these values raises when it is tried.
    headers: Any = message.headers if type(message.headers) is dict else dict(message.headers)
    foreign: Any = {name: value for name, value in message.properties.items() if name in KEPT_PROPERTIES}
    return Basic.Properties(content_type=message.content_type, headers=headers, delivery_mode=2, **foreign)


def _is_plain(message: Message) -> bool:
    """Whether every header is of a kind that AMQP and this client certainly carry unchanged."""
    for name, value in message.headers.items():
        _check_text("a header's name", name, MAX_NAME_BYTES)
        if type(value) is str:
            _check_text(f"the header {name}", value)
        elif type(value) is not bool and not (type(value) is int and value in INT64):
            return False
    return True


def _check_text(what: str, text: str, max_bytes: int = 2**31) -> None:
    # Half a surrogate pair is a str, but no text.
    size = len(text) if text.isascii() else len(text.encode())
    if size > max_bytes:
        raise ValueError(f"{what} takes {size} bytes, and {max_bytes} fit")


def _check_round_trip(properties: Basic.Properties) -> None:
    # The client narrows doubles and cannot write what it reads of some foreign tables: see what would come back.
    back = ContentHeader()
    back.unmarshal(ContentHeader(properties=properties).marshal())
    for name in ("headers", "content_type", *KEPT_PROPERTIES):
        if (getattr(properties, name) or None) != (getattr(back.properties, name) or None):
            raise ValueError(f"{name} would arrive changed")


def _size_at_most(message: Message) -> int:
    """An upper bound of the header frame's size, cheap for plain headers; huge for others."""
    size = 1024
    for name, value in message.headers.items():
        size += 4 * len(name) + (4 * len(value) if isinstance(value, str) else 16 if isinstance(value, int) else 2**31)
    return size


def _check_size(properties: Basic.Properties, frame_max: int) -> None:
    size = len(ContentHeader(properties=properties).marshal())
    if frame_max and size > frame_max - FRAME_OVERHEAD:
        raise Unpublishable(f"its headers take {size} bytes, and {frame_max - FRAME_OVERHEAD} fit into one frame")


class PublishingChannel:
    """A channel in confirm mode, through the client."""

    def __init__(self, session: Session, channel: aiormq.Channel) -> None:
        self._session = session
        self._channel = channel

    @classmethod
    async def open(cls, session: Session) -> PublishingChannel:
        publishing = cls(session, await session.open_channel(confirms=True))
        session.when_ended(publishing._end)
        return publishing

    def _end(self) -> None:
        asyncio.get_running_loop().call_later(FORGOTTEN_S, self._fail_forgotten)

    def _fail_forgotten(self) -> None:
        """The client fails who waits for a confirm when a channel dies. Who was waiting to send then waits for ever."""
        for confirm in list(self._channel.confirmations.values()):
            if not confirm.done():
                confirm.set_exception(ConnectionError("the channel had died before it was sent"))

    def encode(self, publication: Publication) -> Encoded:
        return encode(publication, frame_max=self._session.server.frame_max)

    async def publish(self, encoded: Encoded, deadline_s: float) -> bool:
        """As `way.Sending` promises."""
        # Fresh every time: the client matches returned messages by it.
        encoded.properties.message_id = f"{random.getrandbits(128):032x}"
        async with asyncio.timeout_at(deadline_s), Calling(self._session, self._channel):
            try:
                answer = await self._channel.basic_publish(
                    encoded.body,
                    exchange=encoded.exchange,
                    routing_key=encoded.key,
                    properties=encoded.properties,
                    mandatory=True,
                    wait=False,  # for the drain; the confirm is waited for
                )
            except aiormq.DeliveryError as nack:
                raise Nacked from nack
        return isinstance(answer, Basic.Ack)


class ConsumingChannel:
    """A channel with one consumer."""

    def __init__(self, session: Session, channel: aiormq.Channel) -> None:
        self._session = session
        self._channel = channel
        self._consumer_tag: str | None = None

    @classmethod
    async def open(cls, session: Session, prefetch: int) -> ConsumingChannel:
        """One that brings at most *prefetch* before they are settled; what `get` brings is not counted."""
        channel = await session.open_channel()
        channel.on_consumer_cancel_callbacks.add(
            lambda frame: session.fail(ConsumerCancelled(f"the broker cancelled the consumer {frame.consumer_tag}"))
        )
        async with Calling(session, channel):
            await channel.basic_qos(prefetch_count=prefetch)
        return cls(session, channel)

    async def consume(self, queue: str, deliver: Callable[[Incoming], None]) -> None:
        """Have each delivery given to *deliver*, which must return at once.

        Raises:
            Lost: the session died, or the broker refused: `reason` says which.
        """

        async def on_message(message: aiormq.abc.DeliveredMessage) -> None:
            deliver(_decoded(message))

        async with Calling(self._session, self._channel):
            answer = await self._channel.basic_consume(queue, on_message)
        self._consumer_tag = answer.consumer_tag

    async def get(self, queue: str) -> Incoming | None:
        """The next message of *queue*, or None where it ends.

        Raises:
            Lost: the session died, or the broker refused: `reason` says which.
        """
        async with Calling(self._session, self._channel):
            message = await self._channel.basic_get(queue)
        return None if isinstance(message.delivery, Basic.GetEmpty) else _decoded(message)

    async def count(self, queue: str) -> int:
        """How many messages of *queue* wait for a consumer.

        Raises:
            Lost: the session died, or the broker refused: `reason` says which.
        """
        async with Calling(self._session, self._channel):
            return (await self._channel.queue_declare(queue, passive=True)).message_count or 0

    async def cancel(self) -> None:
        """Take nothing more; what was delivered can still be settled. Harmless the second time."""
        if self._consumer_tag is not None:
            tag, self._consumer_tag = self._consumer_tag, None
            async with Calling(self._session, self._channel):
                await self._channel.basic_cancel(tag)

    async def settle(self, batch: Sequence[Settlement]) -> None:
        """Tell the broker, in this order."""
        async with Calling(self._session, self._channel):
            for settlement in batch:
                if isinstance(settlement, Ack):
                    await self._channel.basic_ack(settlement.tag, multiple=settlement.is_multiple, wait=False)
                else:
                    await self._channel.basic_reject(settlement.tag, requeue=False, wait=False)

    async def give_back(self, tags: Iterable[int]) -> None:
        """Let the broker put these back, in this order."""
        async with Calling(self._session, self._channel):
            for tag in tags:
                await self._channel.basic_nack(tag, requeue=True, wait=False)

    async def close(self) -> None:
        """Return once the broker has seen everything; what is unsettled goes back. The session lives on."""
        self._session.release(self._channel)
        async with Calling(self._session, self._channel):
            await self._channel.close()


class ConsumerCancelled(Exception):  # what ended the session, for the log
    """The queue was deleted, or on 4.3 an ack timed out."""


def _decoded(message: aiormq.abc.DeliveredMessage) -> Incoming:
    delivery, properties = message.delivery, message.header.properties
    assert isinstance(delivery, Basic.Deliver | Basic.GetOk)
    return Incoming(
        tag=delivery.delivery_tag or 0,
        exchange=delivery.exchange or "",
        key=delivery.routing_key or "",
        is_redelivered=bool(delivery.redelivered),
        message=decode(properties, message.body),
        is_readable=properties.delivery_mode != UNREADABLE_DELIVERY_MODE,
    )


def decode(properties: Basic.Properties, body: bytes) -> Message:
    """The message as its sender meant it, with the broker's headers among its own."""
    kept = {name: value for name in KEPT_PROPERTIES if (value := getattr(properties, name)) is not None}
    return Message(properties.headers or {}, body, properties.content_type, kept)
