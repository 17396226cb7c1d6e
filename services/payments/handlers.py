"""Takes the money of an order once, and gives it back when there is no stock.

Nobody waits for anybody: money is taken before or after the stock is known. That there is no stock may even be heard
before the order itself; then nothing is taken.

The shop's poison: an order in a currency without an account. It is not the customer's fault, so it is not declined,
and no retry helps; it is a dead letter until somebody opens the account (`SHOP_ACCOUNTS`) and replays it.
"""

from datetime import timedelta
from decimal import Decimal

from eventbus import Context, Reject, Service
from schemas import CATALOGUE, OrderPlaced, PaymentCaptured, PaymentDeclined, PaymentRefunded, StockRejected
from services.database import alone
from services.payments.store import Payment, Till, resources
from services.settings import Settings

service = Service(
    "payments", lifespan=lambda _: resources(Settings()), catalogue=CATALOGUE, timeout=timedelta(seconds=10)
)


@service.on("order_placed", idempotency_key="order_id")
async def capture(event: OrderPlaced, context: Context[Till]) -> None:
    """Take the money, or decline, and say so; an order that was answered before gets the same answer again."""
    till = context.state
    if event.total.currency not in till.accounts:
        raise Reject(f"no account takes {event.total.currency}: add it to SHOP_ACCOUNTS, then replay")
    async with context.transaction() as session:
        await alone(session, event.order_id)
        payment = await session.get(Payment, event.order_id)
        if payment is None or payment.status == "unwanted":
            payment = await session.merge(decide(event, payment, till.limit))
        await context.publish(answer(payment), subject=str(event.order_id))


@service.on("stock_rejected", idempotency_key="order_id")
async def give_back(event: StockRejected, context: Context[Till]) -> None:
    """Refund what was captured; when the order is still unknown, remember that nothing is to be taken."""
    async with context.transaction() as session:
        await alone(session, event.order_id)
        payment = await session.get(Payment, event.order_id)
        if payment is None:
            session.add(Payment(event.order_id, "unwanted", event.reason))
        elif payment.status == "captured":
            payment.status, payment.reason = "refunded", event.reason
        if payment is not None and payment.status == "refunded":
            refunded = PaymentRefunded(order_id=event.order_id, amount=payment.money, reason=payment.reason)
            await context.publish(refunded, subject=str(event.order_id))


def decide(event: OrderPlaced, unwanted: Payment | None, limit: Decimal) -> Payment:
    """What to do about the money: visible in the data, so that everybody can foretell it."""
    amount, currency = event.total.amount, event.total.currency
    if unwanted is not None:
        return Payment(event.order_id, "declined", unwanted.reason, amount, currency)
    if amount > limit:
        return Payment(
            event.order_id, "declined", f"payment declined: over the limit of {limit} {currency}", amount, currency
        )
    return Payment(event.order_id, "captured", amount=amount, currency=currency)


def answer(payment: Payment) -> PaymentCaptured | PaymentDeclined:
    """What is said about *payment*: of a refunded one first that it was captured, when that is asked again."""
    if payment.status == "declined":
        return PaymentDeclined(order_id=payment.order_id, amount=payment.money, reason=payment.reason)
    return PaymentCaptured(order_id=payment.order_id, amount=payment.money)
