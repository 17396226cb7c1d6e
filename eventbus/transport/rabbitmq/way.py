"""The two ways of events through a channel, and the one place that chooses: the lane, or the client's own methods.

Both do the same, in the same words. Whoever publishes or consumes does not know which one it is.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from eventbus.transport.base import Publication
from eventbus.transport.rabbitmq.acks import Settlement
from eventbus.transport.rabbitmq.channels import ConsumingChannel, Incoming, PublishingChannel
from eventbus.transport.rabbitmq.lane import LaneConsuming, LanePublishing
from eventbus.transport.rabbitmq.session import Session


class Encoded(Protocol):
    """A publication as one way can send it, any number of times. Each way has its own, and takes no other."""

    @property
    def exchange(self) -> str: ...
    @property
    def body(self) -> bytes: ...


class Sending(Protocol):
    """A channel in confirm mode."""

    def encode(self, publication: Publication) -> Any:
        """*publication*, `Encoded`.

        Raises:
            Unpublishable: it would arrive changed, or not at all.
        """

    def publish(self, encoded: Any, deadline_s: float) -> Awaitable[bool]:
        """Send once; await after the confirm whether any queue took it. May be cancelled at any moment.

        Raises:
            TimeoutError: no confirm until *deadline_s* of the event loop's clock, or a little later.
            Nacked: a queue refused it.
            Lost: the session died, and nobody knows.
        """


class Receiving(Protocol):
    """A channel with one consumer."""

    async def consume(self, queue: str, deliver: Callable[[Incoming], None]) -> None:
        """Have each delivery given to *deliver*, which must return at once.

        Raises:
            Lost: the session died, or the broker refused: `reason` says which.
        """

    async def cancel(self) -> None:
        """Take nothing more; what was delivered can still be settled. Harmless the second time."""

    async def settle(self, batch: Sequence[Settlement]) -> None:
        """Tell the broker, in this order."""

    async def close(self) -> None:
        """Return once the broker has seen everything; what is unsettled goes back. The session lives on."""


async def open_sending(session: Session) -> Sending:
    """A channel to publish on.

    Raises:
        Lost: the session died.
    """
    return await (PublishingChannel if session.splitter is None else LanePublishing).open(session)


async def open_receiving(session: Session, prefetch: int) -> Receiving:
    """A channel to consume on, that brings at most *prefetch* before they are settled.

    Raises:
        Lost: the session died.
    """
    return await (ConsumingChannel if session.splitter is None else LaneConsuming).open(session, prefetch)
