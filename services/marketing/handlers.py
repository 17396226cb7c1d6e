"""Puts everybody who registers on the mailing list."""

from datetime import timedelta

from eventbus import Context, Service
from schemas import CATALOGUE, UserRegistered
from services.database import Database
from services.marketing.store import Subscriber, resources
from services.settings import Settings

service = Service(
    "marketing", lifespan=lambda _: resources(Settings()), catalogue=CATALOGUE, timeout=timedelta(seconds=10)
)


@service.on("user_registered", idempotency_key="user_id")
async def subscribe(event: UserRegistered, context: Context[Database]) -> None:
    """Merge: the row of a second run is the first one's."""
    async with context.state.begin() as session:
        await session.merge(Subscriber(event.user_id, event.name, event.email))
