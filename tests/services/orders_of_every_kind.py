"""Orders as customers place them. Each call is another order."""

from __future__ import annotations

from decimal import Decimal
from uuid import uuid4

from schemas import Money, OrderLine, OrderPlaced


def order(sku: str = "mug", quantity: int = 2, unit_price: str = "12.30", currency: str = "EUR") -> OrderPlaced:
    """By default one that can be paid and is in stock."""
    line = OrderLine(sku=sku, quantity=quantity, unit_price=Decimal(unit_price))
    return OrderPlaced(
        order_id=uuid4(),
        email="ada@example.com",
        address="1 Sample Street, Example Town",
        lines=(line,),
        total=Money(amount=line.quantity * line.unit_price, currency=currency),
    )


def too_expensive() -> OrderPlaced:
    """Payments declines it."""
    return order("bicycle", quantity=3, unit_price="400.00")


def out_of_stock() -> OrderPlaced:
    """Inventory rejects it."""
    return order("unicorn", quantity=1)


def hopeless() -> OrderPlaced:
    """Declined and rejected."""
    return order("unicorn", quantity=3, unit_price="400.00")


def in_an_unknown_currency() -> OrderPlaced:
    """The poison: payments has no account for it."""
    return order(currency="XTS")
