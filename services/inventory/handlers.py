"""Sets the goods of an order aside, all or nothing, and puts them back when the payment is declined.

Nobody waits for anybody: goods are set aside before or after the payment is known. That the payment is declined may
even be heard before the order itself; then nothing is set aside.
"""

from collections import Counter
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncSession

from eventbus import Context, Service
from schemas import CATALOGUE, OrderPlaced, PaymentDeclined, StockRejected, StockReleased, StockReserved
from services.database import Database, alone
from services.inventory.store import Article, Reservation, resources
from services.settings import Settings

service = Service(
    "inventory", lifespan=lambda _: resources(Settings()), catalogue=CATALOGUE, timeout=timedelta(seconds=10)
)


@service.on("order_placed", idempotency_key="order_id")
async def reserve(event: OrderPlaced, context: Context[Database]) -> None:
    """Set everything aside, or reject, and say so; an order that was answered before gets the same answer again."""
    async with context.transaction() as session:
        await alone(session, event.order_id)
        reservation = await session.get(Reservation, event.order_id)
        if reservation is None:
            reservation = await take_from_shelves(event, session)
            session.add(reservation)
        elif reservation.status == "unwanted":
            reservation.status = "rejected"
        await context.publish(answer(reservation), subject=str(event.order_id))


@service.on("payment_declined", idempotency_key="order_id")
async def release(event: PaymentDeclined, context: Context[Database]) -> None:
    """Put back what was set aside; when the order is still unknown, remember that nothing is to be."""
    async with context.transaction() as session:
        await alone(session, event.order_id)
        reservation = await session.get(Reservation, event.order_id)
        if reservation is None:
            session.add(Reservation(event.order_id, "unwanted", event.reason))
        elif reservation.status == "reserved":
            await put_back(reservation, session)
            reservation.status, reservation.reason = "released", event.reason
        if reservation is not None and reservation.status == "released":
            await context.publish(released(reservation), subject=str(event.order_id))


async def take_from_shelves(event: OrderPlaced, session: AsyncSession) -> Reservation:
    """All lines, or none of them: an article that is short rejects the order."""
    wanted: Counter[str] = Counter()
    for line in event.lines:
        wanted[line.sku] += line.quantity
    # In the order of their names, here and in `put_back`: two orders that each hold what the other one wants would wait
    # for ever.
    articles = {sku: await session.get(Article, sku, with_for_update=True) for sku in sorted(wanted)}
    short = sorted(sku for sku, article in articles.items() if article is None or article.available < wanted[sku])
    if short:
        return Reservation(event.order_id, "rejected", f"out of stock: {', '.join(short)}")
    for sku, article in articles.items():
        assert article is not None
        article.available -= wanted[sku]
    return Reservation(event.order_id, "reserved", quantities=dict(wanted))


async def put_back(reservation: Reservation, session: AsyncSession) -> None:
    for sku, quantity in sorted(reservation.quantities.items()):
        article = await session.get_one(Article, sku, with_for_update=True)
        article.available += quantity


def answer(reservation: Reservation) -> StockReserved | StockRejected:
    """What is said about *reservation*: of a released one first that it was reserved, when that is asked again."""
    if reservation.status == "rejected":
        return StockRejected(order_id=reservation.order_id, reason=reservation.reason)
    return StockReserved(order_id=reservation.order_id, quantities=reservation.quantities)


def released(reservation: Reservation) -> StockReleased:
    return StockReleased(order_id=reservation.order_id, quantities=reservation.quantities, reason=reservation.reason)
