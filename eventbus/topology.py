"""Exchanges, queues, bindings and their names, as data: printed, diffed and tested without a broker.

The arguments are the same on every broker line, so that a broker can be upgraded in place: a changed argument is a
406 for ever. Nothing here talks to a broker; adapters declare what this module says.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from eventbus.delay import LEVELS, UNIT
from eventbus.errors import SetupError
from eventbus.service import check_service_name

DEFAULT_NAMESPACE = "events"
DELIVERY_LIMIT = 100
# "No limit" is a number here: -1 drops at the first return on 3.10, and absent means 20 on 4.x, which eats dead
# letters that somebody only looked at.
NO_DELIVERY_LIMIT = 1_000_000_000

# Short enough for the names made of it: a queue's has 255 bytes, and so has a retry's routing key.
_NAMESPACE = re.compile(r"[a-z][a-z0-9_-]{0,99}")
_STARS = ".".join("*" * LEVELS)

ArgumentValue = str | int | bool


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: Literal["topic", "fanout"]
    arguments: Mapping[str, ArgumentValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable quorum queue. `is_shared`: several services rely on it, so it is declared only where it is missing."""

    name: str
    arguments: Mapping[str, ArgumentValue]
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Binding:
    """What reaches *destination* from the exchange *source*."""

    source: str
    destination: str
    destination_type: Literal["queue", "exchange"]
    routing_key: str
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Topology:
    """What must exist before anything is published or consumed, in the order in which it can be declared."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...] = ()
    bindings: tuple[Binding, ...] = ()

    def to_json(self) -> dict[str, list[dict[str, object]]]:
        """For scripts: lists of `exchanges`, `queues` and `bindings`, with the names that RabbitMQ's tools use."""
        return {
            "exchanges": [{**asdict(exchange), "durable": True} for exchange in self.exchanges],
            "queues": [
                {"name": queue.name, "type": "quorum", "durable": True, "arguments": dict(queue.arguments)}
                for queue in self.queues
            ],
            "bindings": [
                {
                    "source": binding.source,
                    "destination": binding.destination,
                    "destination_type": binding.destination_type,
                    "routing_key": binding.routing_key,
                }
                for binding in self.bindings
            ],
        }


@dataclass(frozen=True, slots=True)
class Names:
    """The names of everything in one namespace."""

    namespace: str = DEFAULT_NAMESPACE

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise SetupError(
                f"{self.namespace!r} is no namespace: use lower-case letters, digits, '_' and '-', a letter first, "
                "100 at most, for example 'events'"
            )

    @property
    def events(self) -> str:
        return self.namespace

    @property
    def dead_exchange(self) -> str:
        return f"{self.namespace}.dead"

    @property
    def undeliverable(self) -> str:
        return f"{self.namespace}.undeliverable"

    @property
    def delay_end(self) -> str:
        return f"{self.namespace}.delay.v1.end"

    def delay_level(self, level: int | None) -> str:
        """Exchange and queue of one level of the delay tree; the end for None."""
        return self.delay_end if level is None else f"{self.namespace}.delay.v1.{level:02d}"

    def is_delay(self, exchange: str) -> bool:
        """Whether *exchange* is a part of the delay tree: what it hands on was published somewhere else."""
        return exchange.startswith(f"{self.namespace}.delay.v1.")

    def queue(self, service: str) -> str:
        return f"{self.namespace}.{service}"

    def retry_queue(self, service: str) -> str:
        return f"{self.namespace}.{service}.retry"

    def dead_queue(self, service: str) -> str:
        return f"{self.namespace}.{service}.dead"


def quorum(arguments: Mapping[str, ArgumentValue] | None = None, *, dead_letter_to: str | None = None,
           delivery_limit: int = NO_DELIVERY_LIMIT) -> dict[str, ArgumentValue]:  # fmt: skip
    """A quorum queue's arguments. Dead-lettering is at-least-once, which needs `reject-publish`."""
    result: dict[str, ArgumentValue] = {"x-queue-type": "quorum", "x-delivery-limit": delivery_limit}
    if dead_letter_to is not None:
        result |= {
            "x-dead-letter-exchange": dead_letter_to,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        }
    return result | dict(arguments or {})


def shared(names: Names) -> Topology:
    """What every process of a namespace relies on: the exchanges, the delay tree, the parking place."""
    exchanges = [
        Exchange(names.undeliverable, "fanout"),
        Exchange(names.events, "topic"),
        Exchange(names.dead_exchange, "topic", {"alternate-exchange": names.undeliverable}),
        Exchange(names.delay_end, "topic", {"alternate-exchange": names.undeliverable}),
    ]
    queues = [Queue(names.undeliverable, quorum(), is_shared=True)]
    bindings = [Binding(names.undeliverable, names.undeliverable, "queue", "", is_shared=True)]
    for level in range(LEVELS):
        here, below = names.delay_level(level), names.delay_level(level - 1 if level else None)
        exchanges.append(Exchange(here, "topic"))
        ttl = {"x-message-ttl": (UNIT * 2**level).total_seconds() * 1000}
        queues.append(Queue(here, quorum({k: int(v) for k, v in ttl.items()}, dead_letter_to=below), is_shared=True))
        before = "*." * (LEVELS - 1 - level)
        bindings.append(Binding(here, here, "queue", f"{before}1.#", is_shared=True))
        bindings.append(Binding(here, below, "exchange", f"{before}0.#", is_shared=True))
    return Topology(tuple(exchanges), tuple(queues), tuple(bindings))


def of_service(names: Names, service: str, patterns: Iterable[str]) -> Topology:
    """One service's own queues, and the bindings of its subscriptions' *patterns*."""
    check_service_name(service)
    queue, retry, dead = names.queue(service), names.retry_queue(service), names.dead_queue(service)
    arguments = quorum(
        {"x-dead-letter-routing-key": service}, dead_letter_to=names.dead_exchange, delivery_limit=DELIVERY_LIMIT
    )
    queues = (
        Queue(dead, quorum(dead_letter_to=names.undeliverable)),
        Queue(retry, arguments),
        Queue(queue, arguments),
    )
    # The dead queue is bound before anything can be dead-lettered, the retry queue before anything can be retried.
    bindings = [
        Binding(names.dead_exchange, dead, "queue", service),
        Binding(names.delay_end, retry, "queue", f"{_STARS}.retry.{service}"),
    ]
    for pattern in sorted(set(patterns)):
        bindings.append(Binding(names.events, queue, "queue", pattern))
        bindings.append(Binding(names.delay_end, queue, "queue", f"{_STARS}.publish.{pattern}"))
    return Topology((), queues, tuple(bindings))


def merge(topologies: Iterable[Topology]) -> Topology:
    """All of *topologies*, each part once, in order."""
    parts = list(topologies)
    return Topology(
        tuple({e.name: e for t in parts for e in t.exchanges}.values()),
        tuple({q.name: q for t in parts for q in t.queues}.values()),
        tuple(dict.fromkeys(b for t in parts for b in t.bindings)),
    )
