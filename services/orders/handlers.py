"""Follows what happens to an order, and says so when it comes to nothing. It directs nobody.

Money and goods are given back by those who took them, on the others' events; `order_cancelled` is for the customer.
"""

from datetime import timedelta

from eventbus import Context, Service
from schemas import CATALOGUE, OrderCancelled, OrderPlaced
from services.database import Database, alone
from services.orders.store import Fact, Order, learn, resources
from services.settings import Settings

service = Service(
    "orders", lifespan=lambda _: resources(Settings()), catalogue=CATALOGUE, timeout=timedelta(seconds=10)
)


@service.on(
    "order_placed",
    "payment_captured",
    "payment_declined",
    "payment_refunded",
    "stock_reserved",
    "stock_rejected",
    "stock_released",
    "order_shipped",
    idempotency_key="order_id",
)
async def follow(event: Fact, context: Context[Database]) -> None:
    """Note what was heard; the event that cancels the order says so, and does so again if it runs again."""
    async with context.transaction() as session:
        await alone(session, event.order_id)
        order = await session.get(Order, event.order_id)
        if order is None:  # placed by somebody else than our API, and its own event is still on the way
            order = Order(event.order_id)
            session.add(order)
        learn(order, event)
        if order.cancelled_by == event.event_name:
            await context.publish(cancelled(order), subject=str(event.order_id))


def cancelled(order: Order) -> OrderCancelled:
    assert order.placed is not None
    assert order.reason is not None
    email = OrderPlaced.model_validate_json(order.placed).email
    return OrderCancelled(order_id=order.order_id, email=email, reason=order.reason)
