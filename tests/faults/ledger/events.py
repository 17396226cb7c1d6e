"""The events of the ledger, and what each one does to its handler."""

from __future__ import annotations

from typing import Literal
from uuid import UUID, uuid5

from eventbus import Event

# What happens at the first run of a handler with the event; every further one works. A poison never works.
Kind = Literal[
    "works", "fails", "slow", "hangs", "raises-base-exception", "exits", "blocks", "publishes-and-exits", "poison"
]
_IDS = UUID("5a1cf2ab-95a8-4b44-a26f-bd0ea09a4f1b")


class Counted(Event, name="counted"):
    number: int
    kind: Kind


class Followed(Event, name="followed"):
    """What the handler of a `publishes-and-exits` publishes."""

    number: int


def specials(events: int, every: int, share: float) -> frozenset[int]:
    """Which of *events* are of a cell's kind: one in *every*, none behind the first *share*, and one at least.

    Behind them events flow on, so that recovery can be measured.
    """
    last = max(1, int(events * share))
    step = min(every, last)
    return frozenset(range(step // 2, last, step))


def id_of(seed: int, number: int) -> str:
    """The event's id: the same when a publisher that was killed starts anew."""
    return str(uuid5(_IDS, f"{seed}/{number}"))
