"""Inventory: what happened to the goods. Published by `inventory`.

Each order gets one answer, reserved or rejected, for all its lines; a reservation may be released later.
"""

from uuid import UUID

from pydantic import Field

from eventbus import Event


class StockReserved(Event, name="stock_reserved", version=1):
    """Every article of the order is set aside."""

    order_id: UUID
    quantities: dict[str, int] = Field(description="how many of each sku")


class StockRejected(Event, name="stock_rejected", version=1):
    """Nothing is set aside for the order, and nothing will be."""

    order_id: UUID
    reason: str = Field(min_length=1, description="for the customer's eyes")


class StockReleased(Event, name="stock_released", version=1):
    """What was set aside is for sale again."""

    order_id: UUID
    quantities: dict[str, int] = Field(description="how many of each sku")
    reason: str = Field(min_length=1)
