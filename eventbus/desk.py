"""A queue that people look into: read where it lies, and published again on request.

Looking never removes. What is published again is confirmed first and removed then: a crash in between leaves both, and
the event is recognised as a duplicate where it was handled. What the letters mean, and where each goes: `dead_letters`
and `undeliverable`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from eventbus.bus import Sender, open_or_close
from eventbus.envelope import Envelope, decode
from eventbus.errors import EnvelopeError, SetupError, TransportError
from eventbus.message import Message
from eventbus.settings import Settings
from eventbus.topology import Names
from eventbus.transport import from_url
from eventbus.transport.base import Delivery, NotPublished


class Letter(Protocol):
    """What a desk reads. `id` is the same each time it is looked at."""

    @property
    def id(self) -> str: ...


L = TypeVar("L", bound=Letter)


@dataclass(slots=True)
class Desk:
    """The desk at one queue; *whose* is what its user must open, for the error that says so."""

    whose: str
    url: str | None
    namespace: str | None
    _sender: Sender | None = None

    async def open(self) -> None:
        """Connect, within 15 s.

        Raises:
            SetupError: it cannot work. TransportError: nobody answered.
        """
        settings = Settings.load()
        names = Names(self.namespace or settings.namespace)
        transport = from_url(
            self.url or settings.url, max_message_bytes=settings.max_message_bytes, has_lane=settings.has_lane
        )
        await open_or_close(transport, names, settings)
        self._sender = Sender(transport, names)

    async def close(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            await sender.transport.close()

    @property
    def sender(self) -> Sender:
        if self._sender is None:
            raise SetupError(f"the desk is not open: use it inside `async with {self.whose}(...) as desk:`")
        return self._sender

    async def look(self, queue: str, read: Callable[[Delivery], L]) -> list[L]:
        """What is in *queue* now, oldest first; all is back in its place when this returns."""
        async with self.sender.transport.browse(queue) as deliveries:
            return [read(delivery) async for delivery in deliveries]

    async def replay(
        self,
        queue: str,
        read: Callable[[Delivery], L],
        which: Callable[[L], bool],
        publish: Callable[[L, Message], Awaitable[bool]],
    ) -> int:
        """Have those that *which* picks published again, and return how many were; *publish* says whether it did.

        Raises:
            TransportError: one was not confirmed; it and those behind it stay.
        """
        replayed = 0
        async with self.sender.transport.browse(queue) as deliveries:
            # All are picked before the first is published: what is given up again comes back to this very queue.
            picked = [(delivery, letter) async for delivery in deliveries if which(letter := read(delivery))]
            for delivery, letter in picked:
                try:
                    is_published = await publish(letter, delivery.message)
                except NotPublished as error:
                    raise TransportError(f"{letter.id} could not be replayed ({error.why}); {replayed} were") from error
                if is_published:
                    delivery.ack()
                    replayed += 1
        return replayed


def id_of(message: Message) -> str:
    """The same each time it is looked at: not of the broker's counters, which looking changes."""
    lasting = {name: repr(value) for name, value in message.headers.items() if not name.endswith("-count")}
    digest = hashlib.sha256(json.dumps(lasting, sort_keys=True).encode(errors="replace"))
    digest.update(message.body)
    return digest.hexdigest()[:12]


def envelope_of(message: Message, received: datetime) -> Envelope | None:
    """None where *message* is no CloudEvent."""
    try:
        return decode(message, now=lambda: received)
    except EnvelopeError:
        return None
