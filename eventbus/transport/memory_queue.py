"""A quorum queue of the embedded broker: what waits, who takes it, and what becomes of what nobody can handle.

The one rule: a message leaves a queue in four ways only: acked, moved to the dead-letter exchange, dropped where there
is none, or lost on purpose by a test. It knows no exchange and no other queue; `memory_broker` finds the way.
"""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal, Protocol

from eventbus.clock import Clock, Timer
from eventbus.message import Message
from eventbus.topology import ArgumentValue, Queue
from eventbus.transport.base import Delivery

# What 4.x does where a quorum queue names no limit.
_DELIVERY_LIMIT_IF_ABSENT = 20
# One turn of the event loop hands out at most this many of a queue, so that a backlog does not freeze everything else.
_DELIVERIES_PER_TURN = 100

DeathReason = Literal["rejected", "expired", "delivery_limit"]


@dataclass(frozen=True, slots=True)
class Death:
    """One line of a message's `x-death`: how often it died in one queue of one reason."""

    queue: str
    reason: DeathReason
    exchange: str
    key: str
    time: datetime
    count: int = 1

    def to_header(self) -> dict[str, object]:
        return {
            "queue": self.queue,
            "reason": self.reason,
            "count": self.count,
            "exchange": self.exchange,
            "routing-keys": [self.key],
            "time": self.time,
        }


@dataclass(frozen=True, slots=True)
class Deaths:
    """What a message died of so far, newest first; a second death in one queue of one reason only counts up."""

    first: Death
    newest_first: tuple[Death, ...]

    @staticmethod
    def after(earlier: Deaths | None, death: Death) -> Deaths:
        if earlier is None:
            return Deaths(death, (death,))
        others = []
        for known in earlier.newest_first:
            if (known.queue, known.reason) == (death.queue, death.reason):
                death = replace(known, count=known.count + 1)
            else:
                others.append(known)
        return Deaths(earlier.first, (death, *others))

    def to_headers(self) -> dict[str, object]:
        first, last = self.first, self.newest_first[0]
        return {
            "x-death": [death.to_header() for death in self.newest_first],
            "x-first-death-queue": first.queue,
            "x-first-death-reason": first.reason,
            "x-first-death-exchange": first.exchange,
            "x-last-death-queue": last.queue,
            "x-last-death-reason": last.reason,
            "x-last-death-exchange": last.exchange,
        }


@dataclass(slots=True, eq=False)
class Stored:
    """One message in one queue. Several queues share `message`, so nothing may write to it."""

    message: Message
    exchange: str
    key: str
    order: int
    count: int = 0
    due_s: float | None = None
    deaths: Deaths | None = None


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message that waits in a queue, looked at without taking it."""

    message: Message
    queue: str
    exchange: str
    key: str
    count: int


class MemoryDelivery:
    """One message handed to a consumer; the port says the rest."""

    __slots__ = ("_consumer", "_stored", "count", "exchange", "key", "message", "queue")

    def __init__(self, consumer: QueueConsumer, stored: Stored) -> None:
        self._consumer = consumer
        self._stored = stored
        self.message = isolated(stored.message)
        self.queue = consumer.queue.name
        self.exchange = stored.exchange
        self.key = stored.key
        self.count = stored.count

    @property
    def is_live(self) -> bool:
        return self._consumer.is_live

    def ack(self) -> None:
        self._consumer.ack(self._stored)

    def reject(self) -> None:
        self._consumer.reject(self._stored)


class QueueConsumer:
    """One consumer of one queue, as AMQP means it: at most *prefetch* messages are handed out and unsettled."""

    __slots__ = ("_deliver", "is_live", "prefetch", "queue", "unsettled")

    def __init__(self, queue: MemoryQueue, prefetch: int, deliver: Callable[[Delivery], None]) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.unsettled: dict[int, Stored] = {}
        self.is_live = True
        self._deliver = deliver

    @property
    def is_consuming(self) -> bool:
        """Whether its queue hands it what comes."""
        return self in self.queue.consumers

    @property
    def has_room(self) -> bool:
        return len(self.unsettled) < self.prefetch

    def hand_out(self, stored: Stored) -> None:
        self.unsettled[stored.order] = stored
        self._deliver(MemoryDelivery(self, stored))

    def ack(self, stored: Stored) -> None:
        if self.unsettled.pop(stored.order, None) is not None:
            self.queue.settle(stored)

    def reject(self, stored: Stored) -> None:
        if self.unsettled.pop(stored.order, None) is not None:
            self.queue.settle(stored, "rejected")

    def cancel(self) -> None:
        """Take nothing more; what is unsettled can still be settled."""
        self.queue.remove(self)

    def close(self) -> None:
        """End; what is unsettled goes back."""
        self.cancel()
        self.is_live = False
        returned, self.unsettled = self.unsettled, {}
        self.queue.put_back(returned.values())


class Surroundings(Protocol):
    """What a queue needs of the broker around it."""

    clock: Clock

    def forget(self) -> None:
        """One message is gone for good."""

    def take_over(self, dead: Stored) -> bool:
        """Store *dead*, which already has its new exchange and key, in another queue; False if none takes it."""


class MemoryQueue:
    """One queue. What it was declared with is in `data`."""

    def __init__(self, data: Queue, around: Surroundings) -> None:
        arguments = data.arguments
        self.data = data
        self.ready: deque[Stored] = deque()
        self.unsettled = 0
        self.consumers: deque[QueueConsumer] = deque()
        self._around = around
        self._limit = int(arguments.get("x-delivery-limit", _DELIVERY_LIMIT_IF_ABSENT))
        self._ttl_s = int(arguments["x-message-ttl"]) / 1000 if "x-message-ttl" in arguments else None
        self._dead_exchange = text_argument(arguments, "x-dead-letter-exchange")
        self._dead_key = text_argument(arguments, "x-dead-letter-routing-key")
        self._keeps_homeless = arguments.get("x-dead-letter-strategy") == "at-least-once"
        self._homeless: deque[Stored] = deque()  # dead letters that no queue took yet
        self._to_lose = 0
        self._timer: Timer | None = None
        self._is_awake = False

    @property
    def name(self) -> str:
        return self.data.name

    # ── in ───────────────────────────────────────────────────────────────────────────────────────

    def put(self, stored: Stored) -> None:
        self.ready.append(stored)
        if self._ttl_s is not None:
            stored.due_s = self._around.clock.monotonic_s() + self._ttl_s
            self._set_timer()
        self.wake()

    def put_back(self, returned: Iterable[Stored]) -> None:
        """Return what was not settled to where it was. Each return counts; over the limit it is a dead letter."""
        again: list[Stored] = []
        for stored in returned:
            self.unsettled -= 1
            stored.count += 1
            if stored.count > self._limit:
                self._bury(stored, "delivery_limit")
            else:
                again.append(stored)
        if not again:
            return
        newest = max(stored.order for stored in again)
        while self.ready and self.ready[0].order < newest:
            again.append(self.ready.popleft())
        again.sort(key=lambda stored: stored.order, reverse=True)
        self.ready.extendleft(again)
        if self._timer is not None:  # it is set for what was the oldest until now
            self._timer.cancel()
            self._timer = None
        self._set_timer()
        self.wake()

    # ── out ──────────────────────────────────────────────────────────────────────────────────────

    def add(self, consumer: QueueConsumer) -> None:
        self.consumers.append(consumer)
        self.wake()

    def remove(self, consumer: QueueConsumer) -> None:
        if consumer in self.consumers:
            self.consumers.remove(consumer)

    def wake(self) -> None:
        """Hand out what waits, in the event loop's next turn."""
        if self.ready and self.consumers and not self._is_awake:
            self._is_awake = True
            asyncio.get_running_loop().call_soon(self._hand_out)

    def give_next(self, consumer: QueueConsumer) -> None:
        """Hand the oldest message to *consumer* now."""
        stored = self.ready.popleft()
        if self._to_lose:
            self._to_lose -= 1
            self._around.forget()
        else:
            self.unsettled += 1
            consumer.hand_out(stored)

    def settle(self, stored: Stored, reason: DeathReason | None = None) -> None:
        """Forget *stored*, which was handed out, or bury it for *reason*."""
        self.unsettled -= 1
        if reason is None:
            self._around.forget()
        else:
            self._bury(stored, reason)
        self.wake()

    def lose_next(self) -> None:
        self._to_lose += 1

    def _hand_out(self) -> None:
        self._is_awake = False
        try:
            for _ in range(_DELIVERIES_PER_TURN):
                consumer = self._next_with_room() if self.ready else None
                if consumer is None:
                    return
                self.give_next(consumer)
        finally:  # also where a consumer raised: the loop reports it, and the others still get theirs
            if self.ready and any(consumer.has_room for consumer in self.consumers):
                self.wake()

    def _next_with_room(self) -> QueueConsumer | None:
        for _ in range(len(self.consumers)):
            consumer = self.consumers[0]
            self.consumers.rotate(-1)
            if consumer.has_room:
                return consumer
        return None

    # ── dead letters ─────────────────────────────────────────────────────────────────────────────

    def house(self) -> None:
        """Try once more to find a queue for the dead letters that had none."""
        for _ in range(len(self._homeless)):
            dead = self._homeless.popleft()
            if not self._around.take_over(dead):
                self._homeless.append(dead)

    def _bury(self, stored: Stored, reason: DeathReason) -> None:
        """Move *stored* to the dead-letter exchange; without one it is gone, as on RabbitMQ."""
        if self._dead_exchange is None:
            self._around.forget()
            return
        now = self._around.clock.now().replace(microsecond=0)  # AMQP counts whole seconds
        deaths = Deaths.after(stored.deaths, Death(self.name, reason, stored.exchange, stored.key, now))
        message = replace(stored.message, headers={**stored.message.headers, **deaths.to_headers()})
        key = stored.key if self._dead_key is None else self._dead_key
        dead = Stored(message, self._dead_exchange, key, stored.order, deaths=deaths)
        if self._around.take_over(dead):
            return
        if self._keeps_homeless:
            self._homeless.append(dead)
        else:
            self._around.forget()

    def _set_timer(self) -> None:
        if self._timer is not None or not self.ready or (due_s := self.ready[0].due_s) is None:
            return
        # Weakly: a message that waits for days must not keep a broker alive that nobody holds any more.
        expire = weakref.WeakMethod(self._expire)
        delay_s = max(0.0, due_s - self._around.clock.monotonic_s())
        self._timer = self._around.clock.call_later(delay_s, lambda: (call := expire()) and call())

    def _expire(self) -> None:
        self._timer = None
        now_s = self._around.clock.monotonic_s()
        due: list[Stored] = []  # first all, then buried: a dead-letter exchange may lead back here
        while self.ready and (due_s := self.ready[0].due_s) is not None and due_s <= now_s:
            due.append(self.ready.popleft())
        for stored in due:
            self._bury(stored, "expired")
        self._set_timer()


def isolated(message: Message) -> Message:
    """A copy of *message* that may be written to without anybody else seeing it."""
    return Message(
        {
            name: _copy(value) if type(value) in (dict, list, bytearray) else value
            for name, value in message.headers.items()
        },
        message.body,
        message.content_type,
        dict(message.properties) if message.properties else {},
    )


def _copy(value: object) -> object:
    match value:
        case dict():
            return {name: _copy(inner) for name, inner in value.items()}
        case list():
            return [_copy(inner) for inner in value]
        case bytearray():
            return bytearray(value)
        case _:
            return value


def text_argument(arguments: Mapping[str, ArgumentValue], name: str) -> str | None:
    """The argument *name* as text; None where there is none."""
    return str(arguments[name]) if name in arguments else None
