"""`python -m services.orders.main`: the HTTP door and the handlers, in one process, on one engine.

`eventbus run services.orders.main:service` runs the handlers alone, for more of them than doors.
"""

from contextlib import nullcontext

from eventbus import Worker
from services.http import run, serving, until_stopped, watched
from services.orders.api import create_app
from services.orders.handlers import service
from services.orders.store import resources
from services.settings import Settings

__all__ = ["service"]


async def main() -> None:
    settings = Settings()
    async with (
        resources(settings) as database,
        Worker(service.replace(lifespan=lambda _: nullcontext(database))) as worker,
        watched(worker) as readiness,
        serving(create_app(database, readiness), settings.http_host, settings.http_port),
    ):
        await until_stopped(worker)


if __name__ == "__main__":
    run(main)
