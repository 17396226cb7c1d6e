"""Notifications against a real SMTP server: what a mail holds, and what becomes of the ones that are not taken."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import uuid4

import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session

from eventbus import Reject
from eventbus.testing import Harness, context
from schemas import OrderCancelled, OrderShipped, UserRegistered
from services.mailbox.server import Mailbox, serving_smtp
from services.notifications.handlers import announce_parcel, confirm_order, explain_cancellation, service, welcome
from services.notifications.smtp import Mail, MailRefused, MailServer, MailServerBusy
from services.notifications.store import PostOffice, resources
from services.settings import Settings
from tests.services.conftest import RunningMailbox
from tests.services.orders_of_every_kind import order


@pytest.fixture
async def office(post: RunningMailbox) -> AsyncIterator[PostOffice]:
    async with resources(post.settings) as opened:
        yield opened


def ada(email: str = "ada@example.com") -> UserRegistered:
    return UserRegistered(user_id=uuid4(), name="Ada Łódź", email=email)


async def test_the_welcome_mail_names_its_event(post: RunningMailbox, office: PostOffice) -> None:
    event = ada()
    about = context(event, state=office)

    await welcome(event, about)

    (mail,) = post.mailbox.mails
    assert (mail.recipients, mail.subject) == (["ada@example.com"], "Welcome to the shop")
    assert "Hello Ada Łódź," in mail.text
    assert mail.event_id == about.envelope.id
    assert mail.message_id.endswith("@shop.example>")


async def test_each_event_of_an_order_has_a_mail_of_its_own(post: RunningMailbox, office: PostOffice) -> None:
    placed = order()
    shipped = OrderShipped(order_id=placed.order_id, email=placed.email, address=placed.address, tracking="PX42")
    cancelled = OrderCancelled(order_id=placed.order_id, email=placed.email, reason="out of stock: mug")

    await confirm_order(placed, context(placed, state=office))
    await announce_parcel(shipped, context(shipped, state=office))
    await explain_cancellation(cancelled, context(cancelled, state=office))

    confirmation, notice, apology = post.mailbox.mails
    assert "2 x mug at 12.30" in confirmation.text
    assert "Total: 24.60 EUR" in confirmation.text
    assert "PX42" in notice.text
    assert "Why: out of stock: mug" in apology.text
    assert len({mail.message_id for mail in post.mailbox.mails}) == 3


async def test_a_mail_is_not_sent_again_by_a_later_process(post: RunningMailbox) -> None:
    event = ada()
    for _ in range(2):  # the bus's own memory of what was handled dies with each
        async with Harness(service.replace(lifespan=lambda _: resources(post.settings))) as harness:
            await harness.publish(event, id="the same")
            await harness.settled()
            assert harness.attempts(welcome) == 1

    assert len(post.mailbox.mails) == 1


async def test_a_busy_server_is_tried_again_until_it_takes_the_mail(post: RunningMailbox) -> None:
    post.mailbox.refuse = 6
    async with Harness(service.replace(lifespan=lambda _: resources(post.settings))) as harness:
        for number in range(4):
            await harness.publish(ada(f"user{number}@example.com"))

        await harness.settled()

        assert harness.attempts(welcome) == 10
    assert sorted(mail.recipients[0] for mail in post.mailbox.mails) == [f"user{n}@example.com" for n in range(4)]
    assert (post.mailbox.refuse, post.mailbox.refused) == (0, 6)


async def test_a_server_that_is_back_after_minutes_costs_no_mail(settings: Settings) -> None:
    async with serving_smtp(Mailbox(), "127.0.0.1", 0) as free:
        pass
    later = settings.model_copy(update={"smtp_port": free})
    async with Harness(service.replace(lifespan=lambda _: resources(later))) as harness:
        await harness.publish(ada())
        await harness.advance(timedelta(minutes=10))
        assert harness.attempts(welcome) > 3
        mailbox = Mailbox()

        async with serving_smtp(mailbox, "127.0.0.1", free):
            await harness.settled()

    assert len(mailbox.mails) == 1


async def test_a_server_that_stays_away_exhausts_the_attempts(settings: Settings) -> None:
    async with Harness(service.replace(lifespan=lambda _: resources(settings))) as harness:
        await harness.publish(ada())

        await harness.settled()

        (letter,) = harness.dead_letters(service)
    assert (letter.reason, letter.attempts) == ("exhausted", 12)
    assert letter.error == "MailServerBusy: the mail server 127.0.0.1:1 is away"


class Refusing(Mailbox):
    """A server that answers as it is told, with the address in its words, at one of the two places to refuse."""

    def __init__(self, code: int, command: str) -> None:
        super().__init__()
        self.answer, self.command = f"{code} no mail for <ada@example.com>", command

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.command == "RCPT":
            return self.answer
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        return self.answer


@pytest.mark.parametrize("command", ["RCPT", "DATA"])
@pytest.mark.parametrize(
    ("code", "verdict", "words"),
    [
        (450, MailServerBusy, "the mail server takes no mail now: 450"),
        (550, MailRefused, "the mail server refuses it for good: 550"),
    ],
)
async def test_only_the_reply_code_of_a_refusal_is_told(
    code: int, verdict: type[Exception], words: str, command: str
) -> None:
    mail = Mail("ada@example.com", "subject", "text")
    async with serving_smtp(Refusing(code, command), "127.0.0.1", 0) as port:
        with pytest.raises(verdict) as caught:
            await MailServer("127.0.0.1", port).send(mail, message_id="<1@shop.example>", event_id="1")

    assert str(caught.value) == words
    assert caught.value.__suppress_context__, "the traceback of a dead letter would show the address"


@pytest.mark.parametrize("email", ["", "nobody", "@", "a@b@c", "a,b@example.com", "x\r\nBcc: all@example.com", "<a@b>"])
async def test_an_address_that_is_none_is_rejected_without_a_retry(
    post: RunningMailbox, office: PostOffice, email: str
) -> None:
    event = ada(email)

    with pytest.raises(Reject, match="the address is none that a mail can be sent to"):
        await welcome(event, context(event, state=office))

    assert not post.mailbox.mails


async def test_an_event_id_with_strange_characters_is_no_trouble(post: RunningMailbox) -> None:
    async with Harness(service.replace(lifespan=lambda _: resources(post.settings))) as harness:
        await harness.publish(ada(), id='ä <b> 1/2 @ "q" ' + "x" * 150)
        await harness.settled()

    assert len(post.mailbox.mails) == 1
