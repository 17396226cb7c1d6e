"""Hands mails to an SMTP server, and tells what may work later from what never will.

What a server says about a refused mail may hold the address. So only its reply code leaves this module: the text of an
error ends in logs and dead letters.
"""

from dataclasses import dataclass
from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage

import aiosmtplib
from aiosmtplib.errors import (
    SMTPException,
    SMTPNotSupported,
    SMTPRecipientsRefused,
    SMTPResponseException,
    SMTPTimeoutError,
)

SENDER = Address("The shop", addr_spec="hello@shop.example")
TIMEOUT_S = 10.0


class MailServerBusy(ConnectionError):
    """The mail server is away, or takes no mail now: the same mail may be taken later."""


class MailRefused(Exception):
    """The mail server, or mail itself, can never take this one."""


@dataclass(frozen=True, slots=True)
class Mail:
    """What a customer reads."""

    to: str
    subject: str
    text: str


@dataclass(frozen=True, slots=True)
class MailServer:
    """Where mails are handed over, one connection each."""

    host: str
    port: int

    async def send(self, mail: Mail, *, message_id: str, event_id: str) -> None:
        """Return when the server has taken responsibility for the mail.

        Raises:
            MailServerBusy: away, or an answer 4xx; it was not taken.
            MailRefused: an answer 5xx, or an address that no mail can be sent to.
        """
        message = compose(mail, message_id=message_id, event_id=event_id)
        try:
            await aiosmtplib.send(message, hostname=self.host, port=self.port, timeout=TIMEOUT_S)
        except SMTPRecipientsRefused as error:
            raise _verdict(max(refused.code for refused in error.recipients)) from None
        except SMTPResponseException as error:
            raise _verdict(error.code) from None
        except SMTPNotSupported:
            raise MailRefused("the mail server cannot write to such an address") from None
        except (SMTPException, OSError) as error:
            what = "does not answer" if isinstance(error, SMTPTimeoutError) else "is away"
            raise MailServerBusy(f"the mail server {self.host}:{self.port} {what}") from None


def compose(mail: Mail, *, message_id: str, event_id: str) -> EmailMessage:
    """The mail as it is sent. A server that gets it twice can tell by the Message-ID."""
    message = EmailMessage()
    message["From"] = SENDER
    try:
        message["To"] = Address(addr_spec=mail.to)
    except (ValueError, IndexError, MessageError):  # the standard library's parser raises each of them on nonsense
        raise MailRefused("the address is none that a mail can be sent to") from None
    message["Subject"] = mail.subject
    message["Message-ID"] = message_id
    message["X-Event-Id"] = event_id
    message.set_content(mail.text)
    return message


def _verdict(code: int) -> MailServerBusy | MailRefused:
    """RFC 5321 4.2.1: 4yz is for now, 5yz for good."""
    if code >= 500:
        return MailRefused(f"the mail server refuses it for good: {code}")
    return MailServerBusy(f"the mail server takes no mail now: {code}")
