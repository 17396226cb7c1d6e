"""What came of it, and whether that is what had to come of it."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from services.demo.ledger import WANTED, Fact, Ledger
from services.demo.scenario import CUSTOMERS, ORDERS, REFUSED_MAILS, SUPPRESSED, expected_facts, name_of
from services.demo.stage import Shop, given_up


@dataclass(frozen=True, slots=True)
class Figures:
    """The demo in seven numbers.

    `published` is what publishes returned for; `handled` counts an event once for each handler. `duplicates` is told by
    the idempotency store, the one thing that a suppressed duplicate touches; `retried` by the mail server, the one
    thing that fails here.
    """

    published: int
    handled: int
    duplicates: int
    retried: int
    dead_lettered: int
    lost: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Check:
    """One expectation."""

    name: str
    expected: object
    actual: object

    @property
    def holds(self) -> bool:
        return self.expected == self.actual

    def __str__(self) -> str:
        return f"{self.name}: {self.actual}" + ("" if self.holds else f", expected {self.expected}")


async def take(shop: Shop, *, failed_attempts: int, seconds: float) -> tuple[Figures, list[Check], Ledger]:
    """Count, once nothing moves any more. *failed_attempts*: what the bus has logged."""
    letters = await shop.dead_letters()
    ledger = await shop.ledger(letters)
    figures = Figures(
        published=ledger.published.total(),
        handled=ledger.handled,
        duplicates=shop.store.duplicates,
        retried=await shop.refused_mails(),
        dead_lettered=len(letters),
        lost=len(ledger.lost),
        seconds=round(seconds, 2),
    )
    told = sorted(f"{given_up(letter).handler}: {letter.reason}" for letter in letters)
    checks = [
        *figures_expected(figures),
        Check("failed attempts in the log", REFUSED_MAILS, failed_attempts),
        Check("given up", ["payments.capture: rejected"], told),
        Check("done twice", 0, ledger.done_again.total()),
        Check("done without being published", 0, len(ledger.unexplained)),
        Check("events that differ from what was foretold", [], told_facts(ledger.published.keys() ^ expected_facts())),
        Check("mails in the mailbox", expected_mails(), len(await shop.mails())),
        *await orders_expected(shop),
    ]
    return figures, checks, ledger


def told_facts(facts: Iterable[Fact]) -> list[str]:
    return sorted(f"{fact.event} of {name_of(fact.about)}" for fact in facts)


def figures_expected(figures: Figures) -> list[Check]:
    facts = expected_facts()
    repeated, poison = 2, 1
    return [
        Check("published", len(facts) + repeated, figures.published),
        Check("handled", sum(len(WANTED[fact.event]) for fact in facts) - poison, figures.handled),
        Check("duplicates suppressed", SUPPRESSED, figures.duplicates),
        Check("retried", REFUSED_MAILS, figures.retried),
        Check("dead-lettered", poison, figures.dead_lettered),
        Check("lost", 0, figures.lost),
    ]


def expected_mails() -> int:
    """A welcome each, a confirmation each, and a notice of how it ended, which the poison has not."""
    return len(CUSTOMERS) + len(ORDERS) + sum(order.kind != "poison" for order in ORDERS)


async def orders_expected(shop: Shop) -> list[Check]:
    """How the orders ended, as `GET /orders/{id}` tells it."""
    ends = {"shipped": "shipped", "declined": "cancelled", "out of stock": "cancelled", "poison": "placed"}
    wrong = []
    told: Counter[str] = Counter()
    for order in ORDERS:
        status, reason = await shop.status(order.order_id)
        told[status] += 1
        if status != ends[order.kind] or (status == "cancelled" and order.kind not in reason):
            wrong.append(f"{name_of(order.order_id)}: {status} {reason}".strip())
    wanted = Counter(ends[order.kind] for order in ORDERS)
    return [
        *(Check(f"orders {status}", count, told[status]) for status, count in wanted.items()),
        Check("orders with another end than foretold", [], wrong),
    ]
