"""From what is left in databases and queues to the figures: what became of each order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class Found:
    """What is there: all that the figures are made of."""

    placed: Collection[str] = ()  # the orders
    # By the name of an effect: how often each order has it, and how many events that tell of it reached a queue.
    effects: Mapping[str, Counter[str]] = field(default_factory=dict)
    told: Mapping[str, Counter[str]] = field(default_factory=dict)
    # Committed rows of all outboxes, by the ids of their events, and which of them no relay has written off yet.
    rows: Collection[str] = ()
    waiting: Collection[str] = ()
    arrived: Collection[str] = ()  # the ids of the events that reached a queue, of services that have an outbox
    given_up: Collection[str] = ()  # dead letters, and rows that were set aside
    wrong: Collection[str] = ()  # what does not add up, as a person would say it


@dataclass(frozen=True, slots=True)
class Count:
    """The figures; each thing by what a person would call it."""

    placed: int
    rows: int
    arrived: int
    missing: frozenset[str]  # effects that are not there
    doubled: frozenset[str]  # effects that are there, or told of by different events, more than once
    untold: frozenset[str]  # effects of which no event tells
    unpublished: frozenset[str]  # committed rows whose events reached no queue
    unfounded: frozenset[str]  # events without a committed row
    waiting: int
    given_up: frozenset[str]
    wrong: frozenset[str]

    @property
    def is_settled(self) -> bool:
        """Whether nothing more has to happen."""
        return not (self.missing or self.untold or self.unpublished or self.waiting)

    @property
    def failings(self) -> tuple[str, ...]:
        """What must not be, when all is over."""
        found = {
            "effects missing": self.missing,
            "effects doubled": self.doubled,
            "effects untold": self.untold,
            "committed rows unpublished": self.unpublished,
            "events without a committed row": self.unfounded,
            "given up": self.given_up,
            "sums wrong": self.wrong,
        }
        said = [f"{len(which)} {what} ({_some(which)})" for what, which in found.items() if which]
        return (*said, f"{self.waiting} rows wait") if self.waiting else tuple(said)


def count(found: Found) -> Count:
    """The figures of *found*."""
    orders = set(found.placed)
    return Count(
        placed=len(orders),
        rows=len(found.rows),
        arrived=len(found.arrived),
        missing=_named({name: orders - effects.keys() for name, effects in found.effects.items()}),
        doubled=_doubled(found.effects) | {f"event of {name}" for name in _doubled(found.told)},
        untold=_named({name: found.effects[name].keys() - told.keys() for name, told in found.told.items()}),
        unpublished=frozenset(set(found.rows) - set(found.arrived)),
        unfounded=frozenset(set(found.arrived) - set(found.rows)),
        waiting=len(found.waiting),
        given_up=frozenset(found.given_up),
        wrong=frozenset(found.wrong),
    )


def _doubled(counted: Mapping[str, Counter[str]]) -> frozenset[str]:
    return _named({name: {o for o, n in orders.items() if n > 1} for name, orders in counted.items()})


def _named(orders_by: Mapping[str, Collection[str]]) -> frozenset[str]:
    return frozenset(f"{name} of {order}" for name, orders in orders_by.items() for order in orders)


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (", ..." if len(names) > len(first) else "")
