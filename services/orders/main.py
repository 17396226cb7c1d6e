"""`python -m services.orders.main`: the HTTP door and the handlers, in one process.

`eventbus run services.orders.main:service` runs the handlers alone, for more of them than doors.
"""

from eventbus import Bus, Worker
from services.http import PUBLISH_TIMEOUT, run, serving, until_stopped
from services.orders.api import create_app
from services.orders.handlers import service
from services.orders.store import resources
from services.settings import Settings

__all__ = ["service"]


async def main() -> None:
    settings = Settings()
    async with (
        resources(settings) as sessions,
        Bus(source="/services/orders", publish_timeout=PUBLISH_TIMEOUT) as bus,
        Worker(service) as worker,
        serving(create_app(sessions, bus), settings.http_host, settings.http_port),
    ):
        await until_stopped(worker)


if __name__ == "__main__":
    run(main)
