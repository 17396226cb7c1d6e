"""An SMTP server that keeps what it is given, in memory, and can refuse by count: the same faults on every machine."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY

from aiosmtpd.smtp import SMTP, Envelope, Session
from pydantic import BaseModel, ConfigDict

# Enough for any demo and test; without an end, a forgotten mailbox would eat its machine.
KEPT = 10_000


class Mail(BaseModel):
    """A mail that was taken."""

    model_config = ConfigDict(frozen=True)

    received: datetime
    sender: str
    recipients: list[str]
    subject: str
    message_id: str
    event_id: str
    text: str


class Mailbox:
    """What was taken, oldest first, and how many deliveries are still to be refused."""

    def __init__(self, refuse: int = 0) -> None:
        self.mails: deque[Mail] = deque(maxlen=KEPT)
        self.refuse = refuse
        self.refused = 0

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802  # aiosmtpd's name
        """aiosmtpd's hook at the end of a delivery; what it returns is the answer to the client."""
        if self.refuse > 0:
            self.refuse -= 1
            self.refused += 1
            return "451 4.3.2 not now"
        self.mails.append(_read(envelope))
        return "250 2.0.0 kept"


def _read(envelope: Envelope) -> Mail:
    content = envelope.content or b""
    message = message_from_bytes(content.encode() if isinstance(content, str) else content, policy=SMTP_POLICY)
    assert isinstance(message, EmailMessage)
    body = message.get_body(("plain",))
    return Mail(
        received=datetime.now(UTC),
        sender=envelope.mail_from or "",
        recipients=envelope.rcpt_tos,
        subject=message.get("Subject", ""),
        message_id=message.get("Message-ID", ""),
        event_id=message.get("X-Event-Id", ""),
        text=body.get_content() if body is not None else "",
    )


@asynccontextmanager
async def serving_smtp(mailbox: Mailbox, host: str, port: int) -> AsyncIterator[int]:
    """Take mails into *mailbox* until the block ends; gives the port (of 0: the free one)."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(mailbox, hostname="mailbox.shop.example", enable_SMTPUTF8=True, loop=loop), host, port
    )
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
