"""Ships an order once its address, its payment and its goods are known, in whatever order they are heard of.

What is paid and reserved cannot fail any more (only a missing half cancels an order), so no parcel is ever called back.
"""

from datetime import timedelta
from typing import assert_never

from eventbus import Context, Service
from schemas import CATALOGUE, OrderPlaced, OrderShipped, PaymentCaptured, StockReserved
from services.database import Database, alone
from services.settings import Settings
from services.shipping.store import Parcel, resources

service = Service(
    "shipping", lifespan=lambda _: resources(Settings()), catalogue=CATALOGUE, timeout=timedelta(seconds=10)
)


@service.on("order_placed", "payment_captured", "stock_reserved", idempotency_key="order_id")
async def ship(event: OrderPlaced | PaymentCaptured | StockReserved, context: Context[Database]) -> None:
    """Note what was heard; the event that completes the parcel ships it, and does so again if it runs again."""
    async with context.transaction() as session:
        await alone(session, event.order_id)
        parcel = await session.get(Parcel, event.order_id)
        if parcel is None:
            parcel = Parcel(event.order_id)
            session.add(parcel)
        note(parcel, event)
        if parcel.completed_by == event.event_name:
            await context.publish(shipped(parcel), subject=str(event.order_id))


def note(parcel: Parcel, event: OrderPlaced | PaymentCaptured | StockReserved) -> None:
    match event:
        case OrderPlaced():
            parcel.email, parcel.address = event.email, event.address
        case PaymentCaptured():
            parcel.is_paid = True
        case StockReserved():
            parcel.is_reserved = True
        case _:
            assert_never(event)
    if parcel.address is not None and parcel.is_paid and parcel.is_reserved and parcel.completed_by is None:
        parcel.completed_by = event.event_name


def shipped(parcel: Parcel) -> OrderShipped:
    """The tracking number follows from the order, so that a second run announces the same parcel."""
    assert parcel.email is not None
    assert parcel.address is not None
    tracking = f"PX{parcel.order_id.hex[:12].upper()}"
    return OrderShipped(order_id=parcel.order_id, email=parcel.email, address=parcel.address, tracking=tracking)
