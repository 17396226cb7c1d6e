"""The HTTP door of orders: POST /orders, GET /orders/{id}, GET /health.

POST answers once the broker has the event, before anybody has worked on it. The order's id comes from the client and
makes the event's id, so that the client's retry, after a 503 or no answer at all, is the same order. Before the 202
nothing is promised: an order that nobody asks for again stays `received`, and is never worked on unless the bus had it.
"""

from decimal import Decimal
from typing import Literal
from uuid import UUID

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field

from eventbus import Bus
from schemas import Money, OrderLine, OrderPlaced
from services.database import Sessions
from services.http import Email, answer_health, answer_when_the_bus_is_away
from services.orders.store import Order, Status


class NewLine(BaseModel):
    """So many of one article, at the price that the customer saw."""

    sku: str = Field(min_length=1, max_length=64)
    quantity: int = Field(ge=1, le=1000)
    unit_price: Decimal = Field(ge=0, max_digits=8, decimal_places=2)


class NewOrder(BaseModel):
    """What a client sends. `order_id` is its own: the same id is the same order."""

    model_config = ConfigDict(extra="forbid")

    order_id: UUID
    email: Email
    address: str = Field(min_length=1, max_length=500)
    lines: list[NewLine] = Field(min_length=1, max_length=100)
    currency: str = Field(default="EUR", pattern="^[A-Z]{3}$")

    def event(self) -> OrderPlaced:
        lines = tuple(OrderLine(**line.model_dump()) for line in self.lines)
        total = sum((line.quantity * line.unit_price for line in lines), Decimal("0.00"))
        money = Money(amount=total, currency=self.currency)
        return OrderPlaced(order_id=self.order_id, email=self.email, address=self.address, lines=lines, total=money)


class Accepted(BaseModel):
    """The bus has the order; `GET /orders/{order_id}` tells what becomes of it."""

    order_id: UUID
    event_id: str


class OrderView(BaseModel):
    """What is known of an order now. `received`: the bus has not confirmed it yet."""

    order_id: UUID
    status: Status
    reason: str | None
    payment: Literal["pending", "declined", "captured", "refunded"]
    stock: Literal["pending", "rejected", "reserved", "released"]
    tracking: str | None
    total: Money
    lines: tuple[OrderLine, ...]


def create_app(sessions: Sessions, bus: Bus) -> FastAPI:
    """The app, on a database and a bus that somebody else opens and closes."""
    app = FastAPI(title="orders")
    answer_when_the_bus_is_away(app)
    answer_health(app, sessions)

    @app.post("/orders", status_code=202)
    async def place(order: NewOrder, response: Response) -> Accepted:
        event = order.event()
        await remember(sessions, event)
        sent = await bus.publish(event, id=f"order-placed-{order.order_id}", subject=str(order.order_id))
        response.headers["Location"] = f"/orders/{order.order_id}"
        return Accepted(order_id=order.order_id, event_id=sent.id)

    @app.get("/orders/{order_id}")
    async def show(order_id: UUID) -> OrderView:
        async with sessions() as session:
            order = await session.get(Order, order_id)
        if order is None or order.placed is None:
            raise HTTPException(404, f"no order {order_id}")
        return view(order, OrderPlaced.model_validate_json(order.placed))

    return app


async def remember(sessions: Sessions, event: OrderPlaced) -> None:
    """Keep the order before its event leaves, so that it is here when the first answer to it arrives."""
    async with sessions.begin() as session:
        order = await session.get(Order, event.order_id)
        if order is None:
            order = Order(event.order_id)
            session.add(order)
        if order.placed is None:
            order.placed = event.model_dump_json()
        if OrderPlaced.model_validate_json(order.placed) != event:
            raise HTTPException(409, f"order {event.order_id} exists, and is another one: choose a new order_id")


def view(order: Order, placed: OrderPlaced) -> OrderView:
    return OrderView(
        order_id=order.order_id,
        status=order.status,
        reason=order.reason,
        payment=order.payment,
        stock=order.stock,
        tracking=order.tracking,
        total=placed.total,
        lines=placed.lines,
    )
