"""The HTTP door of orders: POST /orders, GET /orders/{id}, GET /health, GET /ready.

POST answers once the order and its event are committed, before the broker or anybody else has heard of it. The order's
id comes from the client and makes the event's id, so that the client's retry, after a 503 or no answer at all, is the
same order. An order that is there will be worked on, and one that is not was never promised.
"""

from decimal import Decimal
from typing import Literal
from uuid import UUID

from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from eventbus.health import Readiness
from eventbus.outbox import Outbox
from schemas import Money, OrderLine, OrderPlaced
from services.database import Database, alone
from services.http import Email, Text, Transaction, put_on
from services.orders.store import Order, Status


class NewLine(BaseModel):
    """So many of one article, at the price that the customer saw."""

    sku: Text = Field(min_length=1, max_length=64)
    quantity: int = Field(ge=1, le=1000)
    unit_price: Decimal = Field(ge=0, max_digits=8, decimal_places=2)


class NewOrder(BaseModel):
    """What a client sends. `order_id` is its own: the same id is the same order."""

    model_config = ConfigDict(extra="forbid")

    order_id: UUID
    email: Email
    address: Text = Field(min_length=1, max_length=500)
    lines: list[NewLine] = Field(min_length=1, max_length=100)
    currency: str = Field(default="EUR", pattern="^[A-Z]{3}$")

    def event(self) -> OrderPlaced:
        lines = tuple(OrderLine(**line.model_dump()) for line in self.lines)
        total = sum((line.quantity * line.unit_price for line in lines), Decimal("0.00"))
        money = Money(amount=total, currency=self.currency)
        return OrderPlaced(order_id=self.order_id, email=self.email, address=self.address, lines=lines, total=money)


class Accepted(BaseModel):
    """The order is committed; `GET /orders/{order_id}` tells what becomes of it."""

    order_id: UUID
    event_id: str


class OrderView(BaseModel):
    """What is known of an order now. `received`: its event has not come back from the bus yet."""

    order_id: UUID
    status: Status
    reason: str | None
    payment: Literal["pending", "declined", "captured", "refunded"]
    stock: Literal["pending", "rejected", "reserved", "released"]
    tracking: str | None
    total: Money
    lines: tuple[OrderLine, ...]


def create_app(database: Database, worker: Readiness | None = None) -> FastAPI:
    """The app, on a database that somebody else opens and closes; `/ready` tells of the *worker* beside it, too."""
    app = FastAPI(title="orders")
    put_on(app, database, worker)
    outbox = Outbox(source="/services/orders")

    @app.post("/orders", status_code=202)
    async def place(order: NewOrder, response: Response, session: Transaction) -> Accepted:
        event, event_id = order.event(), f"order-placed-{order.order_id}"
        if await remember(session, event):
            await outbox.publish(session, event, id=event_id, subject=str(order.order_id))
        response.headers["Location"] = f"/orders/{order.order_id}"
        return Accepted(order_id=order.order_id, event_id=event_id)

    @app.get("/orders/{order_id}")
    async def show(order_id: UUID) -> OrderView:
        async with database.session() as session:
            order = await session.get(Order, order_id)
        if order is None or order.placed is None:
            raise HTTPException(404, f"no order {order_id}")
        return view(order, OrderPlaced.model_validate_json(order.placed))

    return app


async def remember(session: AsyncSession, event: OrderPlaced) -> bool:
    """Keep the order; whether it is a new one. A retry finds itself, another order under the same id is a conflict."""
    await alone(session, event.order_id)
    order = await session.get(Order, event.order_id)
    if order is None:
        order = Order(event.order_id)
        session.add(order)
    is_new = order.placed is None
    if order.placed is None:
        order.placed = event.model_dump_json()
    if OrderPlaced.model_validate_json(order.placed) != event:
        raise HTTPException(409, f"order {event.order_id} exists, and is another one: choose a new order_id")
    return is_new


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
