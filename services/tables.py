"""`python -m services.tables [SERVICE ...]`: the tables of the shop's services, made where they are missing.

Before their first start, and by nobody else: a service that finds none says so and ends. What is there already stays as
it is.
"""

import asyncio
import sys
from collections.abc import Mapping

from sqlalchemy import MetaData
from sqlalchemy.exc import SQLAlchemyError

from eventbus import EventBusError
from eventbus.database import create, error_of, open_engine, shown
from services.inventory.store import Base as Inventory
from services.marketing.store import Base as Marketing
from services.notifications.store import Base as Notifications
from services.orders.store import Base as Orders
from services.payments.store import Base as Payments
from services.settings import Settings
from services.shipping.store import Base as Shipping
from services.users.store import Base as Users

# Who has a database.
TABLES: Mapping[str, MetaData] = {
    "users": Users.metadata,
    "orders": Orders.metadata,
    "payments": Payments.metadata,
    "inventory": Inventory.metadata,
    "shipping": Shipping.metadata,
    "marketing": Marketing.metadata,
    "notifications": Notifications.metadata,
}


async def make_tables(settings: Settings, service: str) -> str:
    """Make the tables of *service* and the bus's beside them; where, for people.

    Raises:
        SetupError: the bus's tables there are of another version, or making them is not allowed.
        StoreError: the database did not answer.
    """
    url = settings.database_of(service)
    if url.startswith("sqlite:"):
        settings.data.mkdir(parents=True, exist_ok=True)
    engine = open_engine(url)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(TABLES[service].create_all)
        await create(engine)
    except (SQLAlchemyError, OSError) as error:
        raise error_of(error, engine) from error
    finally:
        await engine.dispose()
    return shown(engine)


async def main(services: list[str]) -> None:
    settings = Settings()
    for service in services:
        print(f"{await make_tables(settings, service)} has the tables of {service}", flush=True)  # noqa: T201


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(TABLES)
    if unknown := set(wanted) - set(TABLES):
        sys.exit(f"error: no tables of {', '.join(sorted(unknown))}: there are those of {', '.join(TABLES)}")
    try:
        asyncio.run(main(wanted))
    except EventBusError as error:
        sys.exit(f"error: {error}")
