"""The embedded broker itself: RabbitMQ's exchanges, bindings and quorum queues, as far as `topology` uses them.

The one rule: what works here works on RabbitMQ. It executes the very topology data that RabbitMQ gets, and refuses an
argument that it would ignore. Nothing here waits; time comes from the clock alone; a delivery always leaves from a
callback of the event loop, never from inside a publish or an ack.

Two things are better than on RabbitMQ, and nobody may lean on them: a returned message goes exactly to where it was,
and a dead letter without a route is tried again as soon as a binding appears (RabbitMQ: every three minutes). Left
out, because nothing in `topology` leads there: dead-letter cycles, priorities, length limits, deleting anything.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal

from eventbus.clock import Clock, SystemClock, Timer
from eventbus.errors import SetupError, TopologyConflict
from eventbus.message import Message
from eventbus.topology import ArgumentValue, Binding, Exchange, Queue, Topology, matches
from eventbus.transport.base import Declare, Delivery

DEFAULT_MAX_MESSAGES = 100_000
# What 4.x does where a quorum queue names no limit.
_DELIVERY_LIMIT_IF_ABSENT = 20
# One turn of the event loop hands out at most this many of a queue, so that a backlog does not freeze everything else.
_DELIVERIES_PER_TURN = 100
# Keys of delayed messages are many; forgetting all of them now and then is cheaper than counting their use.
_MAX_CACHED_ROUTES = 10_000
_EXCHANGE_ARGUMENTS = frozenset({"alternate-exchange"})
_QUEUE_ARGUMENTS = frozenset(
    {
        "x-queue-type",
        "x-delivery-limit",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-dead-letter-strategy",
        "x-overflow",  # without a length limit it never applies, and length limits are refused
        "x-message-ttl",
    }
)

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

    def __init__(self, queue: QuorumQueue, prefetch: int, deliver: Callable[[Delivery], None]) -> None:
        self.queue = queue
        self.prefetch = prefetch
        self.unsettled: dict[int, Stored] = {}
        self.is_live = True
        self._deliver = deliver

    def hand_out(self, stored: Stored) -> None:
        self.unsettled[stored.order] = stored
        self._deliver(MemoryDelivery(self, stored))

    def ack(self, stored: Stored) -> None:
        if self.unsettled.pop(stored.order, None) is not None:
            self.queue.settled()
            self.queue.forget()

    def reject(self, stored: Stored) -> None:
        if self.unsettled.pop(stored.order, None) is not None:
            self.queue.settled()
            self.queue.bury(stored, "rejected")

    def cancel(self) -> None:
        """Take nothing more; what is unsettled can still be settled."""
        self.queue.remove(self)

    def close(self) -> None:
        """End; what is unsettled goes back."""
        self.cancel()
        self.is_live = False
        returned, self.unsettled = self.unsettled, {}
        self.queue.put_back(returned.values())


class QuorumQueue:
    """What waits, who takes it, and what becomes of what nobody can handle."""

    def __init__(self, data: Queue, broker: MemoryBroker) -> None:
        arguments = data.arguments
        self.name = data.name
        self.arguments = dict(arguments)
        self.ready: deque[Stored] = deque()
        self.homeless: deque[Stored] = deque()  # dead letters that no queue took yet
        self.unsettled = 0
        self.to_lose = 0
        self.consumers: deque[QueueConsumer] = deque()
        self._broker = broker
        self._limit = int(arguments.get("x-delivery-limit", _DELIVERY_LIMIT_IF_ABSENT))
        self._ttl_s = int(arguments["x-message-ttl"]) / 1000 if "x-message-ttl" in arguments else None
        self._dead_exchange = _text(arguments, "x-dead-letter-exchange")
        self._dead_key = _text(arguments, "x-dead-letter-routing-key")
        self._keeps_homeless = arguments.get("x-dead-letter-strategy") == "at-least-once"
        self._timer: Timer | None = None
        self._is_awake = False

    def put(self, stored: Stored) -> None:
        self.ready.append(stored)
        if self._ttl_s is not None:
            stored.due_s = self._broker.clock.monotonic_s() + self._ttl_s
            self._set_timer()
        self.wake()

    def put_back(self, returned: Iterable[Stored]) -> None:
        """Return what was not settled to where it was. Each return counts; over the limit it is a dead letter."""
        again: list[Stored] = []
        for stored in returned:
            self.unsettled -= 1
            stored.count += 1
            if stored.count > self._limit:
                self.bury(stored, "delivery_limit")
            else:
                again.append(stored)
        if not again:
            return
        newest = max(stored.order for stored in again)
        while self.ready and self.ready[0].order < newest:
            again.append(self.ready.popleft())
        again.sort(key=lambda stored: stored.order, reverse=True)
        self.ready.extendleft(again)
        self._set_timer()
        self.wake()

    def settled(self) -> None:
        self.unsettled -= 1
        self.wake()

    def forget(self) -> None:
        self._broker.size -= 1

    def bury(self, stored: Stored, reason: DeathReason) -> None:
        """Move *stored* to the dead-letter exchange; without one it is gone, as on RabbitMQ."""
        if self._dead_exchange is None:
            self.forget()
            return
        dead = self._dead(stored, reason, self._dead_exchange)
        if self._move(dead):
            return
        if self._keeps_homeless:
            self.homeless.append(dead)
        else:
            self.forget()

    def house(self) -> None:
        """Try once more to find a queue for the dead letters that had none."""
        for _ in range(len(self.homeless)):
            dead = self.homeless.popleft()
            if not self._move(dead):
                self.homeless.append(dead)

    def add(self, consumer: QueueConsumer) -> None:
        self.consumers.append(consumer)
        self.wake()

    def remove(self, consumer: QueueConsumer) -> None:
        if consumer in self.consumers:
            self.consumers.remove(consumer)

    def wake(self) -> None:
        """Hand out, in the loop's next turn, what waits."""
        if self.ready and self.consumers and not self._is_awake:
            self._is_awake = True
            asyncio.get_running_loop().call_soon(self._hand_out)

    def _hand_out(self) -> None:
        self._is_awake = False
        try:
            for _ in range(_DELIVERIES_PER_TURN):
                consumer = self._next_with_room() if self.ready else None
                if consumer is None:
                    return
                stored = self.ready.popleft()
                if self.to_lose:
                    self.to_lose -= 1
                    self.forget()
                    continue
                self.unsettled += 1
                consumer.hand_out(stored)
        finally:  # also where a consumer raised: the loop reports it, and the others still get theirs
            if self.ready and any(len(c.unsettled) < c.prefetch for c in self.consumers):
                self.wake()

    def _next_with_room(self) -> QueueConsumer | None:
        for _ in range(len(self.consumers)):
            consumer = self.consumers[0]
            self.consumers.rotate(-1)
            if len(consumer.unsettled) < consumer.prefetch:
                return consumer
        return None

    def _set_timer(self) -> None:
        if self._timer is not None or not self.ready or (due_s := self.ready[0].due_s) is None:
            return
        # Weakly: a message that waits for days must not keep a broker alive that nobody holds any more.
        expire = weakref.WeakMethod(self._expire)
        delay_s = max(0.0, due_s - self._broker.clock.monotonic_s())
        self._timer = self._broker.clock.call_later(delay_s, lambda: (call := expire()) and call())

    def _expire(self) -> None:
        self._timer = None
        now_s = self._broker.clock.monotonic_s()
        while self.ready and (due_s := self.ready[0].due_s) is not None and due_s <= now_s:
            self.bury(self.ready.popleft(), "expired")
        self._set_timer()

    def _dead(self, stored: Stored, reason: DeathReason, exchange: str) -> Stored:
        now = self._broker.clock.now().replace(microsecond=0)  # AMQP counts whole seconds
        deaths = Deaths.after(stored.deaths, Death(self.name, reason, stored.exchange, stored.key, now))
        message = replace(stored.message, headers={**stored.message.headers, **deaths.to_headers()})
        key = stored.key if self._dead_key is None else self._dead_key
        return Stored(message, exchange, key, stored.order, deaths=deaths)

    def _move(self, dead: Stored) -> bool:
        queues = self._broker.route(dead.exchange, dead.key)
        if queues:
            self.forget()
            self._broker.put(queues, dead.message, dead.exchange, dead.key, deaths=dead.deaths)
        return bool(queues)


@dataclass(slots=True)
class _Exchange:
    data: Exchange
    bindings: dict[Binding, None] = field(default_factory=dict)

    def matching(self, key: str) -> list[Binding]:
        if self.data.type == "fanout":
            return list(self.bindings)
        return [binding for binding in self.bindings if matches(binding.routing_key, key)]


class MemoryBroker:
    """Exchanges, queues and what they hold; at most *max_messages* of it is taken from publishers.

    A message counts once in each queue. Dead letters move without being counted again, so a full broker still drains.
    """

    def __init__(self, *, clock: Clock | None = None, max_messages: int = DEFAULT_MAX_MESSAGES) -> None:
        self.clock: Clock = clock or SystemClock()
        self.max_messages = max_messages
        self.size = 0
        self._exchanges: dict[str, _Exchange] = {}
        self._queues: dict[str, QuorumQueue] = {}
        self._routes: dict[tuple[str, str], tuple[QuorumQueue, ...]] = {}
        self._order = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._holders: weakref.WeakSet[object] = weakref.WeakSet()

    # ── who uses it ──────────────────────────────────────────────────────────────────────────────

    @property
    def is_abandoned(self) -> bool:
        """Whether nobody uses it any more: all have let go, or their event loop is closed."""
        return not self._holders or (self._loop is not None and self._loop.is_closed())

    def hold(self, holder: object) -> None:
        """Use it from the running event loop until `let_go`.

        Raises:
            SetupError: another event loop uses it; callbacks of two loops would run in each other's threads.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop and not self.is_abandoned:
            raise SetupError(
                "another event loop of this process uses this embedded broker: close it there first, "
                "or take a broker of your own with a name, for example memory://mine"
            )
        self._loop = loop
        self._holders.add(holder)

    def let_go(self, holder: object) -> None:
        self._holders.discard(holder)

    # ── topology ─────────────────────────────────────────────────────────────────────────────────

    def declare(self, topology: Topology, mode: Declare) -> None:
        """See to it that *topology* exists, or only look whether it does.

        Raises:
            TopologyConflict: something of this name exists with other arguments.
            SetupError: something is missing (`verify`), or cannot be done by this broker.
        """
        if mode == "never":
            return
        may_create = mode == "apply"
        for exchange in topology.exchanges:
            self._declare_exchange(exchange, may_create)
        for queue in topology.queues:
            self._declare_queue(queue, may_create)
        # A service binds the same again with each session: only news may cost the cached routes.
        if sum([self._bind(binding, may_create) for binding in topology.bindings]):
            self._routes.clear()
            for known in self._queues.values():
                known.house()

    def _declare_exchange(self, wanted: Exchange, may_create: bool) -> None:
        _check_arguments("exchange", wanted.name, wanted.arguments, _EXCHANGE_ARGUMENTS)
        existing = self._exchanges.get(wanted.name)
        if existing is not None:
            have = {"type": existing.data.type, **existing.data.arguments}
            _check_same("exchange", wanted.name, have, {"type": wanted.type, **wanted.arguments})
        elif may_create:
            self._exchanges[wanted.name] = _Exchange(wanted)
        else:
            raise _missing(f"exchange {wanted.name!r}")

    def _declare_queue(self, wanted: Queue, may_create: bool) -> None:
        _check_arguments("queue", wanted.name, wanted.arguments, _QUEUE_ARGUMENTS)
        existing = self._queues.get(wanted.name)
        if existing is not None:
            _check_same("queue", wanted.name, existing.arguments, wanted.arguments)
        elif may_create:
            self._queues[wanted.name] = QuorumQueue(wanted, self)
            self._routes.clear()
        else:
            raise _missing(f"queue {wanted.name!r}")

    def _bind(self, binding: Binding, may_create: bool) -> bool:
        """Whether it is new."""
        source = self._exchanges.get(binding.source)
        destinations = self._queues if binding.destination_type == "queue" else self._exchanges
        if source is None or binding.destination not in destinations:
            absent = binding.source if source is None else binding.destination
            raise SetupError(f"cannot bind {binding.destination!r} to {binding.source!r}: {absent!r} does not exist")
        if binding in source.bindings:
            return False
        if not may_create:
            raise _missing(f"binding {binding.routing_key!r} of {binding.destination!r} to {binding.source!r}")
        source.bindings[binding] = None
        return True

    # ── messages ─────────────────────────────────────────────────────────────────────────────────

    def has_exchange(self, name: str) -> bool:
        return name == "" or name in self._exchanges

    def route(self, exchange: str, key: str) -> tuple[QuorumQueue, ...]:
        """The queues that *key* leads to from *exchange*, each once."""
        found = self._routes.get((exchange, key))
        if found is None:
            if len(self._routes) >= _MAX_CACHED_ROUTES:
                self._routes.clear()
            found = self._routes[exchange, key] = self._find_route(exchange, key)
        return found

    def _find_route(self, exchange: str, key: str) -> tuple[QuorumQueue, ...]:
        if exchange == "":  # the default exchange: the key is a queue's name
            return (self._queues[key],) if key in self._queues else ()
        queues: dict[str, QuorumQueue] = {}
        to_visit, seen = [exchange], {exchange}
        while to_visit:
            here = self._exchanges.get(to_visit.pop())
            if here is None:
                continue  # an alternate or dead-letter exchange may be named before it exists
            bindings = here.matching(key)
            reached = {b.destination for b in bindings if b.destination_type == "exchange"}
            queues |= {b.destination: self._queues[b.destination] for b in bindings if b.destination_type == "queue"}
            # As on RabbitMQ, a binding to an exchange that leads nowhere counts as a route here.
            alternate = _text(here.data.arguments, "alternate-exchange")
            if not bindings and alternate is not None:
                reached = {alternate}
            to_visit.extend(reached - seen)
            seen |= reached
        return tuple(queues.values())

    def has_room_for(self, copies: int) -> bool:
        return self.size + copies <= self.max_messages

    def put(
        self,
        queues: Iterable[QuorumQueue],
        message: Message,
        exchange: str,
        key: str,
        deaths: Deaths | None = None,
    ) -> None:
        """Store *message* in each of *queues*; it belongs to the broker from now on."""
        for queue in queues:
            self.size += 1
            queue.put(Stored(message, exchange, key, next(self._order), deaths=deaths))

    def consume(self, queue: str, prefetch: int, deliver: Callable[[Delivery], None]) -> QueueConsumer:
        consumer = QueueConsumer(self._queue(queue), prefetch, deliver)
        consumer.queue.add(consumer)
        return consumer

    # ── instruments ──────────────────────────────────────────────────────────────────────────────

    def is_idle(self) -> bool:
        """Whether nothing happens before somebody publishes, settles or lets time pass."""
        return not any(queue.unsettled or (queue.ready and queue.consumers) for queue in self._queues.values())

    def depth(self, queue: str) -> int:
        """How many messages wait in *queue*; what is handed out does not count."""
        return len(self._queue(queue).ready)

    def peek(self, queue: str) -> list[Waiting]:
        """What waits in *queue*, oldest first, and stays there uncounted."""
        return [
            Waiting(isolated(stored.message), queue, stored.exchange, stored.key, stored.count)
            for stored in self._queue(queue).ready
        ]

    def lose_next(self, queue: str) -> None:
        """Drop the next delivery of *queue* as if it had been acked. A test instrument: it shows that losses show."""
        self._queue(queue).to_lose += 1

    def _queue(self, name: str) -> QuorumQueue:
        if name not in self._queues:
            raise _missing(f"queue {name!r}")
        return self._queues[name]


def isolated(message: Message) -> Message:
    """A copy of *message* that may be written to without anybody else seeing it."""
    return Message(
        {name: _copy(value) if type(value) in (dict, list) else value for name, value in message.headers.items()},
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
        case _:
            return value


def _text(arguments: Mapping[str, ArgumentValue], name: str) -> str | None:
    return str(arguments[name]) if name in arguments else None


def _missing(what: str) -> SetupError:
    return SetupError(
        f"the embedded broker has no {what}: declare it (EVENTBUS_DECLARE=apply), or correct the name; "
        "this broker lives in one process and starts empty"
    )


def _check_arguments(kind: str, name: str, arguments: Mapping[str, ArgumentValue], known: frozenset[str]) -> None:
    for argument, value in arguments.items():
        if argument not in known or (argument == "x-queue-type" and value != "quorum"):
            raise SetupError(f"the embedded broker cannot do {argument}={value!r}, which {kind} {name!r} asks for")


def _check_same(kind: str, name: str, have: Mapping[str, object], want: Mapping[str, object]) -> None:
    names = sorted({*have, *want})
    different = [n for n in names if have.get(n) != want.get(n)]
    if different:
        raise TopologyConflict(
            f"{kind} {name!r} exists with {_shown(have, different)}, and this program declares "
            f"{_shown(want, different)}: give it another name, use another namespace (EVENTBUS_NAMESPACE), "
            "or delete it first"
        )


def _shown(arguments: Mapping[str, object], names: list[str]) -> str:
    return ", ".join(f"{name}={arguments[name]!r}" if name in arguments else f"no {name}" for name in names)
