"""The mailbox: real SMTP in, real HTTP out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from email.message import EmailMessage

import aiosmtplib
import httpx
import pytest

from services.http import serving
from services.mailbox.api import create_app
from tests.services.conftest import RunningMailbox


@pytest.fixture
async def http(post: RunningMailbox) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serving(create_app(post.mailbox), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        yield client


async def send(post: RunningMailbox, to: str, event_id: str) -> None:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = "shop@example.com", to, "Grüße"
    message["X-Event-Id"] = event_id
    message.set_content("text")
    await aiosmtplib.send(message, hostname="127.0.0.1", port=post.settings.smtp_port)


async def test_mails_are_listed_in_the_order_of_their_coming(post: RunningMailbox, http: httpx.AsyncClient) -> None:
    await send(post, "ada@example.com", "1")
    await send(post, "bob@example.com", "2")

    mails = (await http.get("/mails")).json()

    assert [(mail["recipients"], mail["event_id"], mail["subject"]) for mail in mails] == [
        (["ada@example.com"], "1", "Grüße"),
        (["bob@example.com"], "2", "Grüße"),
    ]


@pytest.mark.parametrize("query", ["to=bob@example.com", "event_id=2"])
async def test_mails_can_be_asked_for_by_recipient_and_by_event(
    post: RunningMailbox, http: httpx.AsyncClient, query: str
) -> None:
    await send(post, "ada@example.com", "1")
    await send(post, "bob@example.com", "2")

    mails = (await http.get(f"/mails?{query}")).json()

    assert [mail["event_id"] for mail in mails] == ["2"]


async def test_deleted_mails_are_gone(post: RunningMailbox, http: httpx.AsyncClient) -> None:
    await send(post, "ada@example.com", "1")

    assert (await http.delete("/mails")).status_code == 204

    assert (await http.get("/mails")).json() == []


async def test_it_refuses_so_many_deliveries_as_it_was_told(post: RunningMailbox, http: httpx.AsyncClient) -> None:
    assert (await http.post("/refuse", json={"count": 2})).json() == {"count": 2, "refused": 0}

    for _ in range(2):
        with pytest.raises(aiosmtplib.SMTPDataError) as refused:
            await send(post, "ada@example.com", "1")
        assert refused.value.code == 451
    await send(post, "ada@example.com", "1")

    assert (await http.get("/refuse")).json() == {"count": 0, "refused": 2}
    assert len((await http.get("/mails")).json()) == 1


async def test_it_says_that_it_is_well(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ok"}
