"""`python -m services.users.main`: the HTTP door. Users publishes, and listens to nobody."""

from services.http import run, serving, until_stopped
from services.settings import Settings
from services.users.api import create_app
from services.users.store import resources


async def main() -> None:
    settings = Settings()
    async with (
        resources(settings) as database,
        serving(create_app(database), settings.http_host, settings.http_port),
    ):
        await until_stopped()


if __name__ == "__main__":
    run(main)
