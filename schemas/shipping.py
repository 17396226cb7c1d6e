"""Shipping: parcels. Published by `shipping`."""

from uuid import UUID

from pydantic import Field

from eventbus import Event


class OrderShipped(Event, name="order_shipped", version=1):
    """The parcel is on its way: the order's good end."""

    order_id: UUID
    email: str
    address: str
    tracking: str = Field(description="the carrier's number of the parcel")
