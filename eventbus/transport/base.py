"""The port to a broker: what the bus needs of it, and what an adapter promises.

An adapter moves messages. It knows no event, no handler and no policy. Its promises are tested by one suite over every
adapter (`tests/contract/test_transport.py`):

* `publish` returns only when the broker has confirmed, and says whether any queue took the message.
* A delivery that is neither acked nor rejected comes back, to this worker or another one.
* Reconnecting is the adapter's business; what it cannot recover from ends `Consumer.wait` with a `SetupError`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from eventbus.message import Message
from eventbus.topology import Topology

Declare = Literal["apply", "verify", "never"]
CONNECT_TIMEOUT_S = 15.0
# Longer than a session that dies at once takes to be built again, and than whoever watches looks away.
STEADY_S = 5.0


class NotPublished(Exception):  # the port's own signal; the bus turns it into a PublishError with the envelope
    """The broker did not confirm. `maybe_stored` is False where it certainly holds no copy."""

    def __init__(self, why: str, *, maybe_stored: bool, timed_out: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.maybe_stored = maybe_stored
        self.timed_out = timed_out


class Unpublishable(NotPublished):
    """This message can never be published by this client: its headers do not encode, or it is over a limit."""

    def __init__(self, why: str) -> None:
        super().__init__(why, maybe_stored=False)


@dataclass(slots=True)  # one for each event: `Final` costs nothing, freezing does
class Publication:
    """A message and where it goes. Always mandatory and persistent."""

    exchange: Final[str]
    key: Final[str]
    message: Final[Message]


@dataclass(frozen=True, slots=True)
class Broker:
    """Who answered: for people (`run` prints it) and for spans."""

    product: str
    version: str
    host: str
    port: int | None
    max_message_bytes: int


class Delivery(Protocol):
    """One message handed to a consumer. Settle it once, with `ack` or `reject`, or not at all."""

    @property
    def message(self) -> Message: ...
    @property
    def queue(self) -> str: ...
    @property
    def exchange(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def count(self) -> int:
        """How often the broker has handed it out before, as far as it counts; 0 the first time."""

    @property
    def is_live(self) -> bool:
        """Whether the session that brought it lives: on a dead one nothing may be published for it."""

    def ack(self) -> None:
        """Done: the broker forgets it. A no-op on a dead session, where the broker delivers it again."""

    def reject(self) -> None:
        """Given up: the broker moves it, untouched, to the queue's dead-letter exchange."""


@dataclass(frozen=True, slots=True)
class Source:
    """A queue to consume: at most *prefetch* deliveries are unsettled at a time, and some more behind slow handlers:
    RabbitMQ's a quarter, and twice as many for a moment.
    """

    queue: str
    prefetch: int
    deliver: Callable[[Delivery], None]


class Consumer(Protocol):
    """Consumes a set of queues, over as many sessions as it takes."""

    async def start(self, within_s: float = CONNECT_TIMEOUT_S) -> None:
        """Return once every queue is consumed.

        Raises:
            SetupError, TransportError: within *within_s*; nothing is consumed.
        """

    async def stop(self) -> None:
        """Take nothing more. What was delivered can still be settled."""

    async def pause(self) -> None:
        """Hand back whatever is unsettled and take nothing until `resume`."""

    async def resume(self) -> None:
        """Consume again, carefully at first."""

    def missing(self) -> Mapping[str, str]:
        """The queues that should be consumed now and are not, each with why. Asked now and then, never waits.

        One that was lost is missing until it has been consumed again for `STEADY_S`: it may be lost at once.
        """

    async def wait(self) -> None:
        """Return when stopped; raise what cannot be recovered from."""

    async def close(self) -> None:
        """End. Whatever is unsettled goes back to its queue."""


class Transport(Protocol):
    """One broker, reached by URL. Publishing and consuming do not share a connection."""

    @property
    def broker(self) -> Broker:
        """Who answered; only after `open`."""

    async def open(self, topology: Topology, declare: Declare) -> None:
        """Connect for publishing and see to it that *topology* exists.

        Raises:
            SetupError: it cannot work: credentials, permissions, a conflict, a broker too old.
            TransportError: nobody answered within `CONNECT_TIMEOUT_S`.
        """

    async def publish(self, publication: Publication, *, timeout_s: float) -> bool:
        """Store the message in every queue that its key leads to; return whether there was one.

        Raises:
            NotPublished: not confirmed within *timeout_s*.
            Unpublishable: it never can be; nothing was sent.
        """

    def obstacle(self) -> str | None:
        """What is known to stand in the way of publishing; None if nothing is. Asked now and then, never waits.

        A broker under an alarm tells it only to who publishes.
        """

    def consumer(self, sources: Sequence[Source], topology: Topology, declare: Declare) -> Consumer:
        """A consumer of *sources* that declares *topology* anew with each session."""

    def browse(self, queue: str) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """What is in *queue* now, oldest first, taken one at a time and held until the block is left.

        Whatever was not acked by then goes back to its place. The iteration ends where the queue does. A missing
        queue is a SetupError. (RabbitMQ: basic.get on a channel of its own, closed at the end; never a reject.)
        """

    def tail(self, exchange: str, pattern: str) -> AbstractAsyncContextManager[AsyncIterator[Delivery]]:
        """Whatever *exchange* routes to *pattern* from now on, through a private, exclusive, auto-delete queue
        `<exchange>.tail.<random>`, acked by itself. It ends with a TransportError when the connection does.
        """

    async def close(self) -> None:
        """Disconnect; outstanding publishes fail."""
