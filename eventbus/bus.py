"""Publishing. A publish returns once the broker has confirmed, or raises what the caller can publish again.

`Sender` is the one place where an envelope becomes a publication; the Bus, a handler's context, retries, dead letters
and replays all go through it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import PurePath
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

from eventbus import garbage
from eventbus.delay import LEVELS, way
from eventbus.envelope import Envelope, check_source, enclose, enclose_anew, headers_of
from eventbus.errors import EnvelopeError, PartlyPublished, PublishError, PublishTimeout, SetupError, Unroutable
from eventbus.event import Event
from eventbus.message import Message
from eventbus.settings import Settings
from eventbus.telemetry import Telemetry, fields
from eventbus.topology import Names, shared
from eventbus.transport import from_url
from eventbus.transport.base import NotPublished, Publication, Transport, Unpublishable

log = logging.getLogger("eventbus.publish")

DEFAULT_PUBLISH_TIMEOUT = timedelta(seconds=30)
# How many of publish_many's events wait for a confirm at a time: enough to hide the round trip.
MANY_AT_A_TIME = 1000
# A routing key is an AMQP short string of 255 bytes; a delayed event's holds 24 words and `publish.` besides its type.
LONGEST_TYPE_BYTES = 255 - 2 * LEVELS - len("publish.")


class Sender:
    """Publishes through one transport: events, delayed events, retries, dead letters and replays."""

    def __init__(
        self,
        transport: Transport,
        names: Names,
        *,
        timeout: timedelta = DEFAULT_PUBLISH_TIMEOUT,
        on_sent: Callable[[Envelope], None] | None = None,
    ) -> None:
        """*on_sent* is called with each event that was confirmed."""
        self.transport = transport
        self.names = names
        self._events = names.events
        self.telemetry = Telemetry(transport.broker, names)
        self.longest_bytes = transport.broker.max_message_bytes
        self._timeout_s = timeout.total_seconds()
        self._on_sent = on_sent
        self._said_unroutable: set[str] = set()

    async def send(
        self, envelope: Envelope, delay: timedelta | None = None, *, require_subscriber: bool = False
    ) -> None:
        """Publish an event.

        Raises:
            PublishError, EnvelopeError: as `Bus.publish` says.
        """
        self.check(envelope)
        headers = headers_of(envelope)
        with self.telemetry.send(envelope, headers):
            message = Message(headers, envelope.data, envelope.datacontenttype)
            publication = self._publication(envelope.type, message, delay)
            try:
                is_routed = await self.transport.publish(publication, timeout_s=self._timeout_s)
            except Unpublishable as error:
                raise EnvelopeError(f"{envelope.type} {envelope.id} cannot be published: {error.why}") from error
            except NotPublished as error:
                raise _publish_error(error, envelope) from error
        if not is_routed:
            self._unroutable(envelope, required=require_subscriber)
        if self._on_sent is not None:
            self._on_sent(envelope)

    def check(self, envelope: Envelope) -> None:
        """Raises:
        EnvelopeError: *envelope* is over a limit, and can never be sent.
        """
        if len(envelope.data) > self.longest_bytes:
            raise EnvelopeError(
                f"{envelope.type} {envelope.id} has {len(envelope.data)} bytes, and the broker takes "
                f"{self.longest_bytes}: keep large things elsewhere and send a reference"
            )
        check_type(envelope.type)

    async def retry(self, service: str, message: Message, delay: timedelta) -> None:
        """Let *message* come to the service's retry queue after *delay*.

        Raises:
            NotPublished: refused, returned or timed out; there is no copy that could be relied on.
        """
        via = way(delay, f"retry.{service}")
        await self._copy(Publication(self.names.delay_level(via.level), via.key, message))

    async def dead_letter(self, service: str, message: Message) -> None:
        """Put *message* to the service's dead letters.

        Raises:
            NotPublished: as for `retry`.
        """
        await self._copy(Publication(self.names.dead_exchange, service, message))

    async def replay(self, service: str, message: Message) -> None:
        """Hand *message* to *service* again, now; to the handler that its header names, if any.

        Raises:
            NotPublished: as for `retry`.
        """
        await self.retry(service, message, timedelta(0))

    async def probe(self) -> str | None:
        """Why the broker confirms no messages; None if it does. What is published for that reaches no queue."""
        # Too short a key for any binding of the delay tree, which every worker must be able to publish to.
        nowhere = Publication(self.names.delay_level(0), "probe", Message({}, b""))
        try:
            await self.transport.publish(nowhere, timeout_s=self._timeout_s)
        except NotPublished as error:
            return error.why
        return None

    async def _copy(self, publication: Publication) -> None:
        if not await self.transport.publish(publication, timeout_s=self._timeout_s):
            # For an event no route is fine. A copy without one is a loss as soon as the original is acked.
            raise NotPublished(
                f"no queue took the copy that was published to {publication.exchange}", maybe_stored=False
            )

    def _publication(self, type_: str, message: Message, delay: timedelta | None) -> Publication:
        if delay is None:
            return Publication(self._events, type_, message)
        via = way(delay, f"publish.{type_}")
        return Publication(self.names.delay_level(via.level), via.key, message)

    def _unroutable(self, envelope: Envelope, *, required: bool) -> None:
        self.telemetry.unroutable(envelope.type)
        if required:
            message = f"no queue is bound for {envelope.type}: start its subscriber, or apply its topology, first"
            raise Unroutable(message, envelope=envelope, maybe_stored=False)
        if envelope.type not in self._said_unroutable:
            self._said_unroutable.add(envelope.type)
            log.warning("nobody subscribes to %s: it was stored nowhere", envelope.type, extra=fields(envelope))


def check_type(type_: str) -> None:
    """Raises:
    EnvelopeError: no event of *type_* could be routed.
    """
    if len(type_.encode()) > LONGEST_TYPE_BYTES:
        raise EnvelopeError(
            f"the type {type_[:60]!r}... is too long for a routing key: at most {LONGEST_TYPE_BYTES} bytes"
        )


def _publish_error(error: NotPublished, envelope: Envelope) -> PublishError:
    kind = PublishTimeout if error.timed_out else PublishError
    stored = "it may have been stored" if error.maybe_stored else "it was not stored"
    message = (
        f"{envelope.type} {envelope.id} was not confirmed ({error.why}); {stored}: publish the same envelope again"
    )
    return kind(message, envelope=envelope, maybe_stored=error.maybe_stored)


class Bus:
    """Publishes events; an async context manager.

    *url*, *source* and *namespace* default to EVENTBUS_URL, EVENTBUS_SOURCE and EVENTBUS_NAMESPACE. *source* says
    where events come from (a URI reference such as `/services/orders`); together with an event's id it identifies it,
    so keep it stable. Without one it is `/programs/<the program's name>`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        source: str | None = None,
        namespace: str | None = None,
        publish_timeout: timedelta = DEFAULT_PUBLISH_TIMEOUT,
    ) -> None:
        if publish_timeout <= timedelta(0):
            raise SetupError(f"publish_timeout={publish_timeout} must be longer than zero")
        self._url, self._namespace, self._given_source = url, namespace, source
        self._publish_timeout = publish_timeout
        self._sender: Sender | None = None
        self._while_connected = ExitStack()
        self._source = ""

    async def __aenter__(self) -> Self:
        """Connect, within 15 s.

        Raises:
            SetupError: it cannot work. TransportError: nobody answered.
        """
        if self._sender is not None:
            raise SetupError("this bus is connected already: enter it once, and share it")
        settings = Settings.load()
        names = Names(self._namespace or settings.namespace)
        self._source = self._given_source or settings.source or source_of_this_program()
        check_source(self._source)
        transport = from_url(
            self._url or settings.url, max_message_bytes=settings.max_message_bytes, has_lane=settings.has_lane
        )
        await open_or_close(transport, names, settings)
        self._sender = Sender(transport, names, timeout=self._publish_timeout)
        self._while_connected.enter_context(garbage.rarely())
        return self

    async def __aexit__(self, t: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            self._while_connected.close()
            await sender.transport.close()

    async def publish(
        self,
        event: Event | Envelope,
        *,
        id: str | None = None,
        subject: str | None = None,
        delay: timedelta | None = None,
        extensions: Mapping[str, str | int | bool] | None = None,
        require_subscriber: bool = False,
    ) -> Envelope:
        """Publish *event* and return its envelope once the broker has confirmed.

        *id* makes a publish recognisable when it is repeated: derive it from your client's own key. *delay* holds it
        back (never less, at most 15 % + 250 ms more on an idle broker, 42 days at most). An event that nobody
        subscribes to is not an error, unless *require_subscriber* says so (which cannot be known of a delayed one).

        Raises:
            PublishTimeout, PublishError: not confirmed; give `.envelope` to `publish` again.
            Unroutable: *require_subscriber*, and no queue took it.
            EnvelopeError: it does not serialise, or is over the broker's limit; nothing was sent.
            ValueError: a delay that is negative or too long.
        """
        if delay is not None and require_subscriber:
            raise ValueError("whether a delayed event will find a subscriber cannot be known when it is published")
        sender = self._connected()
        envelope = enclosed(event, self._source, id=id, subject=subject, extensions=extensions)
        await sender.send(envelope, delay, require_subscriber=require_subscriber)
        return envelope

    async def publish_many(self, events: Iterable[Event | Envelope]) -> list[Envelope]:
        """Publish *events* side by side and return their envelopes in order, once all are confirmed.

        Not atomic, and in no promised order. What does not serialise, or is over the broker's limit, is found before
        anything is sent.

        Raises:
            PartlyPublished: some were not confirmed; `.failed` has an error with the envelope for each.
            EnvelopeError: one of them can never be sent.
        """
        sender = self._connected()
        envelopes = [enclosed(event, self._source) for event in events]
        for envelope in envelopes:
            sender.check(envelope)
        failed: dict[int, PublishError] = {}
        queue = iter(enumerate(envelopes))
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(MANY_AT_A_TIME, len(envelopes))):
                tasks.create_task(_send_from(queue, sender, failed))
        if failed:
            published = [envelope for index, envelope in enumerate(envelopes) if index not in failed]
            message = f"{len(failed)} of {len(envelopes)} events were not confirmed; the first: {failed[min(failed)]}"
            raise PartlyPublished(message, published=published, failed=[failed[i] for i in sorted(failed)])
        return envelopes

    def _connected(self) -> Sender:
        if self._sender is None:
            raise SetupError("the bus is not connected: use it inside `async with Bus(...) as bus:`")
        return self._sender


def enclosed(
    event: Event | Envelope,
    source: str,
    *,
    id: str | None = None,
    subject: str | None = None,
    extensions: Mapping[str, str | int | bool] | None = None,
) -> Envelope:
    """The envelope that a publisher at *source*, which was checked, sends for *event*; a random id unless one is given.

    Raises:
        EnvelopeError: it does not serialise, or is no event.
    """
    if isinstance(event, Envelope):
        if id is None and subject is None and extensions is None:
            return event
        return replace(
            event,
            id=event.id if id is None else id,
            subject=event.subject if subject is None else subject,
            extensions={**event.extensions, **(extensions or {})},
        )
    if not isinstance(event, Event):
        raise EnvelopeError(f"{type(event).__name__} is neither an Event nor an Envelope: subclass eventbus.Event")
    if id is None and subject is None and not extensions:
        return enclose_anew(event, id=_new_id(), source=source, time=datetime.now(UTC))
    return enclose(
        event,
        id=id if id is not None else _new_id(),
        source=source,
        time=datetime.now(UTC),
        subject=subject,
        extensions=extensions,
    )


async def _send_from(queue: Iterator[tuple[int, Envelope]], sender: Sender, failed: dict[int, PublishError]) -> None:
    for index, envelope in queue:
        try:
            await sender.send(envelope)
        except PublishError as error:
            failed[index] = error
        except EnvelopeError as error:  # too late to refuse the others
            failed[index] = PublishError(str(error), envelope=envelope, maybe_stored=False)


# The operating system's randomness is asked once, not for each event: that costs as much as the rest of an envelope.
_random = random.Random()
os.register_at_fork(after_in_child=_random.seed)


def _new_id() -> str:
    """A random UUID (version 4)."""
    digits = _random.randbytes(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{_VARIANT[digits[16]]}{digits[17:20]}-{digits[20:]}"


_VARIANT: Final = {digit: "89ab"[int(digit, 16) % 4] for digit in "0123456789abcdef"}  # two bits of a digit are fixed


def source_of_this_program() -> str:
    return f"/programs/{quote(PurePath(sys.argv[0]).stem) or 'python'}"


async def open_or_close(transport: Transport, names: Names, settings: Settings) -> None:
    """Open *transport* for publishing; leave nothing behind if that fails."""
    try:
        await transport.open(shared(names), settings.declare)
    except BaseException:
        await transport.close()
        raise
