"""What happened, as told by everybody but the bus: HTTP answers, the services' files, the mailbox, the dead letters.

An event is known by its name and by what it is about, since the shop publishes each of them once per order or user. It
was published when an API answered, or when a service's row says that it was decided. It was handled when a row, a line
of the audit log or a mail is there that only its handler leaves. What was published, is wanted, and has left neither
such a trace nor a dead letter, is lost.
"""

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from services.mailbox.server import Mail


class Fact(NamedTuple):
    """An event: its name, and the order or user that it is about."""

    event: str
    about: UUID


class Handling(NamedTuple):
    """One handler's part of an event."""

    fact: Fact
    handler: str


class Row(NamedTuple):
    """Where a service writes about an event: which ids have such a row."""

    event: str
    service: str
    query: str


# What the services have decided to publish: the row is committed before the event leaves.
DECIDED = (
    Row("payment_captured", "payments", "SELECT order_id FROM payments WHERE status IN ('captured', 'refunded')"),
    Row("payment_declined", "payments", "SELECT order_id FROM payments WHERE status = 'declined'"),
    Row("payment_refunded", "payments", "SELECT order_id FROM payments WHERE status = 'refunded'"),
    Row("stock_reserved", "inventory", "SELECT order_id FROM reservations WHERE status IN ('reserved', 'released')"),
    Row("stock_rejected", "inventory", "SELECT order_id FROM reservations WHERE status = 'rejected'"),
    Row("stock_released", "inventory", "SELECT order_id FROM reservations WHERE status = 'released'"),
    Row("order_shipped", "shipping", "SELECT order_id FROM parcels WHERE completed_by IS NOT NULL"),
    Row("order_cancelled", "orders", "SELECT order_id FROM orders WHERE cancelled_by IS NOT NULL"),
)

# What each handler leaves behind when it has handled an event.
EFFECTS: Mapping[str, tuple[Row, ...]] = {
    "marketing.subscribe": (Row("user_registered", "marketing", "SELECT user_id FROM subscribers"),),
    "payments.capture": (Row("order_placed", "payments", "SELECT order_id FROM payments WHERE status <> 'unwanted'"),),
    "payments.give_back": (
        Row("stock_rejected", "payments", "SELECT order_id FROM payments WHERE status IN ('refunded', 'unwanted')"),
    ),
    "inventory.reserve": (
        Row("order_placed", "inventory", "SELECT order_id FROM reservations WHERE status <> 'unwanted'"),
    ),
    "inventory.release": (
        Row(
            "payment_declined",
            "inventory",
            "SELECT order_id FROM reservations WHERE status IN ('released', 'unwanted')",
        ),
    ),
    "shipping.ship": (
        Row("order_placed", "shipping", "SELECT order_id FROM parcels WHERE address IS NOT NULL"),
        Row("payment_captured", "shipping", "SELECT order_id FROM parcels WHERE is_paid"),
        Row("stock_reserved", "shipping", "SELECT order_id FROM parcels WHERE is_reserved"),
    ),
    "orders.follow": (
        Row("order_placed", "orders", "SELECT order_id FROM orders WHERE is_announced"),
        Row("payment_captured", "orders", "SELECT order_id FROM orders WHERE is_captured"),
        Row("payment_declined", "orders", "SELECT order_id FROM orders WHERE is_declined"),
        Row("payment_refunded", "orders", "SELECT order_id FROM orders WHERE is_refunded"),
        Row("stock_reserved", "orders", "SELECT order_id FROM orders WHERE is_reserved"),
        Row("stock_rejected", "orders", "SELECT order_id FROM orders WHERE is_rejected"),
        Row("stock_released", "orders", "SELECT order_id FROM orders WHERE is_released"),
        Row("order_shipped", "orders", "SELECT order_id FROM orders WHERE tracking IS NOT NULL"),
    ),
}

# Mails by their subject: which event each is about, and who writes it.
MAILS: Mapping[str, tuple[str, str]] = {
    "Welcome to the shop": ("user_registered", "notifications.welcome"),
    "We have your order": ("order_placed", "notifications.confirm_order"),
    "Your order is on its way": ("order_shipped", "notifications.announce_parcel"),
    "Your order is cancelled": ("order_cancelled", "notifications.explain_cancellation"),
}
UUID_IN_TEXT = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def _wanted() -> dict[str, tuple[str, ...]]:
    wanted: dict[str, list[str]] = {}
    for handler, rows in EFFECTS.items():
        for row in rows:
            wanted.setdefault(row.event, []).append(handler)
    for event, handler in MAILS.values():
        wanted.setdefault(event, []).append(handler)
    return {event: ("audit.write_down", *sorted(handlers)) for event, handlers in wanted.items()}


# Who wants which event.
WANTED: Mapping[str, tuple[str, ...]] = _wanted()
SERVICES = ("audit", "inventory", "marketing", "notifications", "orders", "payments", "shipping")
PUBLISHERS: Mapping[str, str] = {
    "user_registered": "users",
    "order_placed": "orders",
    **{row.event: row.service for row in DECIDED},
}


@dataclass(frozen=True)
class Ledger:
    """What was published, what was done about it, what was given up; each with how often."""

    published: Counter[Fact] = field(default_factory=Counter)
    done: Counter[Handling] = field(default_factory=Counter)
    given_up: Counter[Handling] = field(default_factory=Counter)

    @cached_property
    def wanted(self) -> frozenset[Handling]:
        return frozenset(Handling(fact, handler) for fact in self.published for handler in WANTED[fact.event])

    @property
    def handled(self) -> int:
        """Handlings that are wanted and done, each once."""
        return len(self.wanted & self.done.keys())

    @property
    def missing(self) -> frozenset[Handling]:
        """Wanted, and neither done nor given up."""
        return self.wanted - self.done.keys() - self.given_up.keys()

    @property
    def lost(self) -> frozenset[Fact]:
        """Events that somebody who wants them has never handled, nor given up."""
        return frozenset(handling.fact for handling in self.missing)

    @property
    def done_again(self) -> Counter[Handling]:
        """What was done more than once, with how often too often."""
        return Counter({handling: count - 1 for handling, count in self.done.items() if count > 1})

    @property
    def unexplained(self) -> frozenset[Handling]:
        """What was done about events that nobody has published."""
        return frozenset(self.done.keys() - self.wanted)


def read(folder: Path, accepted: Iterable[Fact], mails: Iterable[Mail], given_up: Iterable[Handling]) -> Ledger:
    """The ledger as of now: *folder* has the services' files, *accepted* is what the APIs have answered for."""
    tables = _Tables(folder)
    mails = list(mails)
    # Deeds before decisions: what happens in between is missing for a moment, and never looks as if it were complete.
    done = Counter(
        [
            *(Handling(fact, "audit.write_down") for fact in _audited(folder / "audit.jsonl")),
            *(
                Handling(Fact(row.event, about), handler)
                for handler, rows in EFFECTS.items()
                for row in rows
                for about in tables.ids(row)
            ),
            *_mailed(mails, tables.users()),
        ]
    )
    decided = [Fact(row.event, about) for row in DECIDED for about in tables.ids(row)]
    tables.close()
    return Ledger(Counter([*accepted, *decided]), done, Counter(given_up))


class _Tables:
    """The services' databases, opened for reading by somebody who knows nothing of the services' code."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, sqlite3.Connection] = {}

    def ids(self, row: Row) -> list[UUID]:
        return [UUID(about) for (about,) in self._rows(row.service, row.query)]

    def users(self) -> dict[str, UUID]:
        """User ids by address."""
        return {email: UUID(user) for user, email in self._rows("users", "SELECT user_id, email FROM users")}

    def _rows(self, service: str, query: str) -> list[tuple[str, ...]]:
        if service not in self._open:
            file = self._folder / f"{service}.db"
            self._open[service] = sqlite3.connect(f"file:{file}?mode=ro", uri=True, timeout=10.0)
        with closing(self._open[service].execute(query)) as cursor:
            return cursor.fetchall()

    def close(self) -> None:
        for connection in self._open.values():
            connection.close()


def _audited(log: Path) -> Iterator[Fact]:
    for line in log.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # another one is being written at this moment
            event = json.loads(line)
            yield Fact(event["type"].rpartition(".v")[0], UUID(event["subject"]))


def _mailed(mails: Iterable[Mail], users: Mapping[str, UUID]) -> Iterator[Handling]:
    for mail in mails:
        event, handler = MAILS[mail.subject]
        named = UUID_IN_TEXT.search(mail.text)
        about = users[mail.recipients[0]] if event == "user_registered" else UUID(named.group() if named else "")
        yield Handling(Fact(event, about), handler)
