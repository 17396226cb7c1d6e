"""Who comes to the shop, what they do, and what must have happened when all is done.

Faults are counted, never timed: so the figures are the same on every broker and every machine.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from uuid import UUID, uuid5

from services.demo.ledger import WANTED, Fact, Handling, Ledger
from services.demo.stage import Shop
from services.notifications.handlers import service as notifications
from services.users.api import USERS

NAMES = (
    "Ada", "Bob", "Chidi", "Dilek", "Emil", "Fatou", "Grace", "Hiro", "Ines", "Jomo",
    "Katya", "Linus", "Mei", "Noor", "Olga", "Pablo", "Quinn", "Radia", "Sami", "Tove",
)  # fmt: skip
REFUSED_MAILS = 6
# The pace of a shop that people can watch.
BETWEEN_REGISTRATIONS_S = 0.03
BETWEEN_ORDERS_S = 0.1
LOOK_EVERY_S = 0.1
# Who waits this long in vain waits for something lost: no retry of the scenario takes as long to come back, and no
# delivery when there is nothing to retry.
PATIENCE_S = 5.0
PATIENCE_WITHOUT_RETRIES_S = 3.0

IDS = UUID("0a4b3a9c-5d1e-4c57-9a51-3f2f0c7a9d10")
Kind = Literal["shipped", "declined", "out of stock", "poison"]

# What follows from an order of each kind. The poison is in a currency that payments has no account for.
FOLLOW_UPS: dict[Kind, tuple[str, ...]] = {
    "shipped": ("payment_captured", "stock_reserved", "order_shipped"),
    "declined": ("payment_declined", "stock_reserved", "stock_released", "order_cancelled"),
    "out of stock": ("payment_captured", "stock_rejected", "payment_refunded", "order_cancelled"),
    "poison": ("stock_reserved",),
}
BASKETS: dict[Kind, tuple[str, int, str, str]] = {  # article, quantity, price of one, currency
    "shipped": ("mug", 2, "12.30", "EUR"),
    "declined": ("bicycle", 3, "400.00", "EUR"),
    "out of stock": ("unicorn", 1, "99.00", "EUR"),
    "poison": ("shirt", 1, "19.90", "XTS"),
}
KINDS: dict[int, Kind] = {
    4: "declined",
    9: "out of stock",
    13: "declined",
    17: "poison",
    22: "out of stock",
    26: "declined",
}


@dataclass(frozen=True, slots=True)
class Customer:
    """Somebody who registers."""

    name: str

    @property
    def key(self) -> str:
        return f"demo {self.name}"

    @property
    def user_id(self) -> UUID:
        return uuid5(USERS, self.key)

    @property
    def email(self) -> str:
        return f"{self.name.lower()}@example.com"

    @property
    def event(self) -> tuple[str, Fact]:
        """Its id, and what it says."""
        return f"user-registered-{self.user_id}", Fact("user_registered", self.user_id)

    async def register(self, shop: Shop) -> None:
        await shop.register(self.name, self.email, key=self.key)


@dataclass(frozen=True, slots=True)
class Order:
    """Something that somebody orders."""

    number: int
    customer: Customer
    kind: Kind

    @property
    def order_id(self) -> UUID:
        return uuid5(IDS, f"order {self.number}")

    @property
    def event(self) -> tuple[str, Fact]:
        """Its id, and what it says."""
        return f"order-placed-{self.order_id}", Fact("order_placed", self.order_id)

    async def place(self, shop: Shop) -> None:
        sku, quantity, price, currency = BASKETS[self.kind]
        await shop.order(
            {
                "order_id": str(self.order_id),
                "email": self.customer.email,
                "address": f"{self.number} Sample Street, Example Town",
                "lines": [{"sku": sku, "quantity": quantity, "unit_price": price}],
                "currency": currency,
            }
        )


CUSTOMERS = tuple(Customer(name) for name in NAMES)
ORDERS = tuple(
    Order(number, CUSTOMERS[(number - 1) % len(CUSTOMERS)], KINDS.get(number, "shipped")) for number in range(1, 31)
)
# Whose requests are sent again, under the same key, which is no news; and whose events are published a second time.
IMPATIENT = CUSTOMERS[2]
ORDERED_TWICE = ORDERS[0]
SUPPRESSED = len(WANTED["user_registered"]) + len(WANTED["order_placed"])


async def play(shop: Shop, *, sabotage: str | None, say: Callable[[str], None]) -> None:
    """Let everything happen; returns when it has, or when nothing moves any more."""
    say(f"{len(CUSTOMERS)} people register; the mail server refuses its first {REFUSED_MAILS} deliveries")
    for customer in CUSTOMERS:
        await customer.register(shop)
        if sabotage == "lose" and customer is CUSTOMERS[0]:
            await shop.lose_one(notifications)
            say(f"sabotage: the broker has lost {customer.name}'s registration on its way to notifications")
            await shop.start(notifications)
        await asyncio.sleep(BETWEEN_REGISTRATIONS_S)
    say(f"{len(ORDERS)} orders are placed; order {_number('poison')} is poison")
    for order in ORDERS:
        await order.place(shop)
        await asyncio.sleep(BETWEEN_ORDERS_S)
    missing = (await until_settled(shop, PATIENCE_S)).missing
    if sabotage == "twice":
        shop.store.forget()
        say("sabotage: the idempotency store has forgotten what was handled")
    say(f"{IMPATIENT.name} and order {ORDERED_TWICE.number} come a second time, which is no news")
    await IMPATIENT.register(shop)
    await ORDERED_TWICE.place(shop)
    say("relays die before they have noted that they published these two: the next ones publish them again")
    await shop.publish_again("users", *IMPATIENT.event)
    await shop.publish_again("orders", *ORDERED_TWICE.event)
    await until_settled(shop, PATIENCE_WITHOUT_RETRIES_S, lost=missing, duplicates=SUPPRESSED)


async def until_settled(
    shop: Shop, patience_s: float, *, lost: frozenset[Handling] = frozenset(), duplicates: int = 0
) -> Ledger:
    """Wait until nothing but *lost* is missing and *duplicates* were recognised, or nothing has moved for a while."""
    loop = asyncio.get_running_loop()
    dead = await shop.dead_letters()
    before: object = None
    moved_s = loop.time()
    while True:
        ledger = await shop.ledger(dead)
        if ledger.missing <= lost and not shop.store.at_work and shop.store.duplicates >= duplicates:
            return ledger
        now = (ledger, shop.store.duplicates, shop.store.at_work)
        if now != before:
            before, moved_s = now, loop.time()
        elif loop.time() - moved_s > patience_s:
            return ledger
        else:  # only now: each look at the dead letters is a connection to the broker
            dead = await shop.dead_letters()
        await asyncio.sleep(LOOK_EVERY_S)


def _number(kind: Kind) -> str:
    return ", ".join(str(order.number) for order in ORDERS if order.kind == kind)


def expected_facts() -> set[Fact]:
    """Every event that must have been published."""
    return {
        *(Fact("user_registered", customer.user_id) for customer in CUSTOMERS),
        *(Fact(event, order.order_id) for order in ORDERS for event in ("order_placed", *FOLLOW_UPS[order.kind])),
    }


def name_of(about: UUID) -> str:
    """An order or a customer, as a person would call it."""
    return NAMES_BY_ID.get(about, str(about))


NAMES_BY_ID = {customer.user_id: customer.name for customer in CUSTOMERS} | {
    order.order_id: f"order {order.number} ({order.customer.name})" for order in ORDERS
}
# By the ids of the events that everything else follows from.
LABELS = {customer.event[0]: name_of(customer.user_id) for customer in CUSTOMERS} | {
    order.event[0]: name_of(order.order_id) for order in ORDERS
}
