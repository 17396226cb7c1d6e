"""`python -m services.users.main`: the HTTP door. Users publishes, and listens to nobody."""

from eventbus import Bus
from services.http import PUBLISH_TIMEOUT, run, serving, until_stopped
from services.settings import Settings
from services.users.api import create_app
from services.users.store import resources


async def main() -> None:
    settings = Settings()
    async with (
        resources(settings) as sessions,
        Bus(source="/services/users", publish_timeout=PUBLISH_TIMEOUT) as bus,
        serving(create_app(sessions, bus), settings.http_host, settings.http_port),
    ):
        await until_stopped()


if __name__ == "__main__":
    run(main)
