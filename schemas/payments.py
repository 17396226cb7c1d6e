"""Payments: what happened to the money. Published by `payments`.

Each order gets one answer, captured or declined; a captured payment may be refunded later.
"""

from uuid import UUID

from pydantic import Field

from eventbus import Event
from schemas.values import Money


class PaymentCaptured(Event, name="payment_captured", version=1):
    """The money is ours."""

    order_id: UUID
    amount: Money


class PaymentDeclined(Event, name="payment_declined", version=1):
    """No money was taken, and none will be."""

    order_id: UUID
    amount: Money
    reason: str = Field(min_length=1, description="for the customer's eyes")


class PaymentRefunded(Event, name="payment_refunded", version=1):
    """The money that was captured went back."""

    order_id: UUID
    amount: Money
    reason: str = Field(min_length=1)
