"""One delivery from one channel, to be settled once at most."""

from __future__ import annotations

from typing import Protocol

from eventbus.message import Message
from eventbus.transport.rabbitmq.channels import Incoming
from eventbus.transport.rabbitmq.lines import delivery_count
from eventbus.transport.rabbitmq.session import Session


class Origin(Protocol):
    """Where a delivery came from, and where it is settled."""

    @property
    def queue(self) -> str: ...
    @property
    def session(self) -> Session: ...
    def ack(self, delivery: RabbitDelivery) -> None: ...
    def reject(self, delivery: RabbitDelivery) -> None: ...


class RabbitDelivery:
    """The `Delivery` of this transport."""

    __slots__ = ("_is_settled", "_origin", "count", "exchange", "key", "message", "queue", "tag")

    def __init__(self, origin: Origin, incoming: Incoming) -> None:
        self.message: Message = incoming.message
        self.queue: str = origin.queue
        self.exchange: str = incoming.exchange
        self.key: str = incoming.key
        self.tag: int = incoming.tag
        self.count: int = 0
        if incoming.is_redelivered:  # few are, and to ask for each costs as much as to ack it
            self.count = delivery_count(origin.session.server.line, incoming.message.headers, is_redelivered=True)
        self._origin = origin
        self._is_settled = False

    @property
    def is_live(self) -> bool:
        return self._origin.session.is_live

    def ack(self) -> None:
        if self._settles():
            self._origin.ack(self)

    def reject(self) -> None:
        if self._settles():
            self._origin.reject(self)

    def _settles(self) -> bool:
        """Whether it may be settled: a tag that is settled twice would close the channel, with everything on it."""
        is_first, self._is_settled = not self._is_settled, True
        return is_first and self._origin.session.is_live
