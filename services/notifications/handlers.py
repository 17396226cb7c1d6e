"""Writes to customers: one mail per event, over SMTP.

While the mail server is away, mails are tried again; what it refuses for good is a dead letter. A crash between the
server's answer and our note of it sends a mail twice, under the same Message-ID: SMTP offers no more.
"""

from datetime import timedelta
from uuid import NAMESPACE_URL, uuid5

from eventbus import Context, Envelope, Reject, Retry, Service
from schemas import CATALOGUE, OrderCancelled, OrderPlaced, OrderShipped, UserRegistered
from services.notifications import mails
from services.notifications.smtp import Mail, MailRefused
from services.notifications.store import PostOffice, SentMail, resources
from services.settings import Settings

service = Service(
    "notifications",
    lifespan=lambda _: resources(Settings()),
    catalogue=CATALOGUE,
    timeout=timedelta(seconds=30),
    retry=Retry(attempts=12, delay=timedelta(milliseconds=500), max_delay=timedelta(minutes=10)),
    concurrency=10,  # each is a connection to the mail server
)


@service.on("user_registered", idempotency_key="user_id")
async def welcome(event: UserRegistered, context: Context[PostOffice]) -> None:
    await send_once(mails.welcome(event), context)


@service.on("order_placed", idempotency_key="order_id")
async def confirm_order(event: OrderPlaced, context: Context[PostOffice]) -> None:
    await send_once(mails.confirmation(event), context)


@service.on("order_shipped", idempotency_key="order_id")
async def announce_parcel(event: OrderShipped, context: Context[PostOffice]) -> None:
    await send_once(mails.shipping_notice(event), context)


@service.on("order_cancelled", idempotency_key="order_id")
async def explain_cancellation(event: OrderCancelled, context: Context[PostOffice]) -> None:
    await send_once(mails.cancellation(event), context)


async def send_once(mail: Mail, context: Context[PostOffice]) -> None:
    """Send *mail*, unless this event's mail was sent before, also by an earlier process."""
    office, message_id = context.state, message_id_of(context.envelope, context.handler)
    async with office.database.session() as session:
        if await session.get(SentMail, message_id) is not None:
            return
    try:
        await office.server.send(mail, message_id=message_id, event_id=context.envelope.id)
    except MailRefused as error:
        raise Reject(str(error)) from None
    async with office.database.begin() as session:
        await session.merge(SentMail(message_id, context.envelope.id))


def message_id_of(envelope: Envelope, handler: str) -> str:
    """The same for the same event, whoever delivers it and however often; safe in a header, whatever the id holds."""
    return f"<{uuid5(NAMESPACE_URL, f'{envelope.source} {envelope.id} {handler}')}@shop.example>"
