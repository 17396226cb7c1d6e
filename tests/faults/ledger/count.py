"""From the books to the figures: what became of each event."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tests.faults.ledger.books import FOLLOWS, key_of


@dataclass(frozen=True, slots=True)
class Count:
    """One cell's figures; sets are of event ids."""

    published: int
    confirmed: int
    handled: frozenset[str]  # by every service
    handled_by: Mapping[str, int]
    effects: int
    runs_beyond_one: int
    suppressed: int
    dead_lettered: frozenset[str]
    destroyed: frozenset[str]
    lost: frozenset[str]
    done_twice: frozenset[str]

    @property
    def duplicates(self) -> int:
        """How often an event came to a handler, or to its store, when its effect was there already."""
        return self.runs_beyond_one + self.suppressed


def count(
    books: sqlite3.Connection,
    services: Sequence[str],
    dead: Collection[str],
    destroyed: Collection[str],
    publishing: Collection[int] = (),
) -> Count:
    """The figures so far. *dead*, *destroyed*: the events that may be missing because of that.

    *publishing*: the numbers of events whose handlers publish another one, which has its effect, too.
    """
    confirmed = {row[0] for row in books.execute("select event from published where confirmed not null")}
    by = {name: _column(books, "select event from effects where service = ?", name) for name in services}
    missing = {event for handled in by.values() for event in confirmed - handled}
    gone = missing & set(destroyed)
    given_up = (missing - gone) & set(dead)
    return Count(
        published=_number(books, "select count(*) from published"),
        confirmed=len(confirmed),
        handled=frozenset.intersection(*by.values()),
        handled_by={name: len(handled) for name, handled in by.items()},
        effects=_number(books, "select count(*) from effects"),
        runs_beyond_one=_number(books, "select coalesce(sum(count - 1), 0) from effects"),
        suppressed=_number(books, "select count(*) from suppressed"),
        dead_lettered=frozenset(dead),
        destroyed=frozenset(gone),
        lost=frozenset(missing - gone - given_up) | _lost_follow_ups(books, services, publishing),
        done_twice=_done_twice(books),
    )


def _lost_follow_ups(books: sqlite3.Connection, services: Sequence[str], publishing: Collection[int]) -> frozenset[str]:
    """What handlers published, which was confirmed since they came to their end, and has no effect."""
    numbers = "select number from effects where service = ?"
    return frozenset(
        f"what {service} published for {number}"
        for service in services
        for (number,) in set(books.execute(numbers, (service,))) - set(books.execute(numbers, (service + FOLLOWS,)))
        if number in publishing
    )


def _done_twice(books: sqlite3.Connection) -> frozenset[str]:
    """Events that a handler was given after its work on them was recorded as done, and facts with two effects.

    A handler that ran again because the first run was never recorded is no such thing: its effect is one row by its
    key. (A crash between the two is what keys are for.)
    """
    done = dict(books.execute("select key, done from claims where done not null"))
    again = {
        event
        for service, event, began in books.execute("select service, event, began from runs")
        if began > done.get(key_of(service, event), began)
    }
    several = "select event from effects group by service, number having count(*) > 1"
    return frozenset(again | _column(books, several))


def all_handle_again(
    books: sqlite3.Connection, services: Sequence[str], moment: float, *, new: bool = True
) -> float | None:
    """When the last of *services* had handled the first event that came to its handler after *moment*.

    Where events were published after *moment*, one of those, if it must be a *new* one. None where there was nothing
    left to handle.
    """
    firsts = [_first_after(books, service, moment, new=new) for service in services]
    return max((at for at in firsts if at is not None), default=None)


def _first_after(books: sqlite3.Connection, service: str, moment: float, *, new: bool) -> float | None:
    came = "from effects join runs using (service, event) where service = ?1 and began >= ?2 and at >= began"
    of_new = f"{came} and event in (select event from published where began >= ?2)"
    later: float | None = books.execute(f"select min(at) {of_new}", (service, moment)).fetchone()[0]
    earliest: float | None = books.execute(f"select min(at) {came}", (service, moment)).fetchone()[0]
    return earliest if later is None or not new else later


def _column(books: sqlite3.Connection, question: str, *values: object) -> frozenset[str]:
    return frozenset(row[0] for row in books.execute(question, values))


def _number(books: sqlite3.Connection, question: str) -> int:
    number: int = books.execute(question).fetchone()[0]
    return number
