"""Orders: what customers asked for, and that it came to nothing. Published by `orders`."""

from decimal import Decimal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from eventbus import Event
from schemas.values import Money


class OrderLine(BaseModel):
    """So many of one article, in the order's currency."""

    model_config = ConfigDict(frozen=True)

    sku: str = Field(description="the article's number: stock keeping unit")
    quantity: int = Field(ge=1)
    unit_price: Decimal = Field(ge=0, max_digits=12, decimal_places=2)


class OrderPlaced(Event, name="order_placed", version=1):
    """A customer placed an order. It holds what payment, stock, parcel and mails need, so that nobody has to ask."""

    order_id: UUID = Field(description="the client's own key: its retry is the same order")
    email: str = Field(description="where mails about this order go")
    address: str = Field(description="where the parcel goes")
    lines: tuple[OrderLine, ...] = Field(min_length=1)
    total: Money


class OrderCancelled(Event, name="order_cancelled", version=1):
    """The order will not be shipped; what was taken for it is given back by whoever took it."""

    order_id: UUID
    email: str
    reason: str = Field(min_length=1, description="the first failure that was heard of, in the words of who met it")
