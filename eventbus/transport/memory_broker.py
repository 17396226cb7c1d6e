"""The embedded broker: RabbitMQ's exchanges, bindings and queues (`memory_queue`), as far as `topology` uses them.

The one rule: what works here works on RabbitMQ. It executes the very topology data that RabbitMQ gets, and refuses an
argument that it would ignore. Nothing here waits; time comes from the clock alone; a delivery always leaves from a
callback of the event loop, never from inside a publish or an ack.

Two things are better than on RabbitMQ, and nobody may lean on them: a returned message goes exactly to where it was,
and a dead letter without a route is tried again as soon as a binding appears (RabbitMQ: every three minutes). Left
out, because nothing in `topology` leads there: dead-letter cycles, priorities, length limits.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from eventbus.clock import Clock, SystemClock
from eventbus.errors import SetupError, TopologyConflict
from eventbus.message import Message, matches
from eventbus.topology import ArgumentValue, Binding, Exchange, Queue, Topology
from eventbus.transport.base import Declare, Delivery
from eventbus.transport.memory_queue import Deaths, MemoryQueue, QueueConsumer, Stored, Waiting, isolated, text_argument

DEFAULT_MAX_MESSAGES = 100_000
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
        self._queues: dict[str, MemoryQueue] = {}
        self._routes: dict[tuple[str, str], tuple[MemoryQueue, ...]] = {}
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
            _check_same("queue", wanted.name, existing.data.arguments, wanted.arguments)
        elif may_create:
            self._queues[wanted.name] = MemoryQueue(wanted, self)
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

    def route(self, exchange: str, key: str) -> tuple[MemoryQueue, ...]:
        """The queues that *key* leads to from *exchange*, each once."""
        found = self._routes.get((exchange, key))
        if found is None:
            if len(self._routes) >= _MAX_CACHED_ROUTES:
                self._routes.clear()
            found = self._routes[exchange, key] = self._find_route(exchange, key)
        return found

    def _find_route(self, exchange: str, key: str) -> tuple[MemoryQueue, ...]:
        if exchange == "":  # the default exchange: the key is a queue's name
            return (self._queues[key],) if key in self._queues else ()
        queues: dict[str, MemoryQueue] = {}
        to_visit, seen = [exchange], {exchange}
        while to_visit:
            here = self._exchanges.get(to_visit.pop())
            if here is None:
                continue  # an alternate or dead-letter exchange may be named before it exists
            bindings = here.matching(key)
            reached = {b.destination for b in bindings if b.destination_type == "exchange"}
            queues |= {b.destination: self._queues[b.destination] for b in bindings if b.destination_type == "queue"}
            # As on RabbitMQ, a binding to an exchange that leads nowhere counts as a route here.
            alternate = text_argument(here.data.arguments, "alternate-exchange")
            if not bindings and alternate is not None:
                reached = {alternate}
            to_visit.extend(reached - seen)
            seen |= reached
        return tuple(queues.values())

    def has_room_for(self, copies: int) -> bool:
        return self.size + copies <= self.max_messages

    def put(
        self,
        queues: Iterable[MemoryQueue],
        message: Message,
        exchange: str,
        key: str,
        deaths: Deaths | None = None,
    ) -> None:
        """Store *message* in each of *queues*; it belongs to the broker from now on."""
        for queue in queues:
            self.size += 1
            queue.put(Stored(message, exchange, key, next(self._order), deaths=deaths))

    def take_over(self, dead: Stored) -> bool:
        queues = self.route(dead.exchange, dead.key)
        if queues:
            self.forget()
            self.put(queues, dead.message, dead.exchange, dead.key, deaths=dead.deaths)
        return bool(queues)

    def forget(self) -> None:
        self.size -= 1

    def consume(self, queue: str, prefetch: int, deliver: Callable[[Delivery], None]) -> QueueConsumer:
        consumer = QueueConsumer(self._queue(queue), prefetch, deliver)
        consumer.queue.add(consumer)
        return consumer

    def browser(self, queue: str, deliver: Callable[[Delivery], None]) -> QueueConsumer:
        """A consumer that is handed nothing by itself: `queue.give_next` hands it what it asks for."""
        return QueueConsumer(self._queue(queue), 0, deliver)

    def tail(self, exchange: str, pattern: str, deliver: Callable[[Delivery], None]) -> QueueConsumer:
        """A consumer of a new private queue, to be ended with `delete(consumer.queue.name)`."""
        if exchange not in self._exchanges:
            raise _missing(f"exchange {exchange!r}")
        name = f"{exchange}.tail.{secrets.token_hex(8)}"
        own = Topology((), (Queue(name, {}),), (Binding(exchange, name, "queue", pattern),))
        self.declare(own, "apply")
        return self.consume(name, 1, deliver)

    def delete(self, queue: str) -> None:
        """Remove *queue*, its bindings and what waits in it."""
        gone = self._queues.pop(queue)
        self.size -= len(gone.ready)
        for exchange in self._exchanges.values():
            for binding in [b for b in exchange.bindings if (b.destination_type, b.destination) == ("queue", queue)]:
                del exchange.bindings[binding]
        self._routes.clear()

    # ── instruments ──────────────────────────────────────────────────────────────────────────────

    def is_idle(self) -> bool:
        """Whether nothing happens before somebody publishes, settles or lets time pass."""
        return not any(queue.unsettled or (queue.ready and queue.consumers) for queue in self._queues.values())

    @property
    def queues(self) -> tuple[str, ...]:
        """The names of all queues."""
        return tuple(self._queues)

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
        self._queue(queue).lose_next()

    def _queue(self, name: str) -> MemoryQueue:
        if name not in self._queues:
            raise _missing(f"queue {name!r}")
        return self._queues[name]


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
