"""`python -m services.mailbox.main`: SMTP on SHOP_SMTP_PORT, what came in on SHOP_HTTP_PORT.

It needs no bus. `SHOP_REFUSE=6` refuses the first six deliveries.
"""

import logging

from services.http import run, serving, until_stopped
from services.mailbox.api import create_app
from services.mailbox.server import Mailbox, serving_smtp
from services.settings import Settings


async def main() -> None:
    settings = Settings()
    logging.getLogger("mail.log").setLevel(logging.WARNING)  # aiosmtpd's: at info it tells every address
    mailbox = Mailbox(settings.refuse)
    async with (
        serving_smtp(mailbox, settings.smtp_host, settings.smtp_port),
        serving(create_app(mailbox), settings.http_host, settings.http_port),
    ):
        await until_stopped()


if __name__ == "__main__":
    run(main)
