"""POST /users, over the app itself, real databases, the relay and the embedded broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy import func, select

from schemas import UserRegistered
from services.database import Database
from services.settings import Settings
from services.users.api import create_app
from services.users.store import User, resources
from tests.outboxes import broken_commits
from tests.services.databases import on_each_database
from tests.services.listening import Listener, listening

ADA = {"name": "Ada", "email": "ada@example.com"}

pytestmark = on_each_database


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening() as opened:
        yield opened


@pytest.fixture
async def database(settings: Settings, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    monkeypatch.setenv("EVENTBUS_URL", listener.url)
    async with resources(settings.model_copy(update={"relay": True})) as opened:
        yield opened


@pytest.fixture
async def http(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(database))
    async with httpx.AsyncClient(transport=transport, base_url="http://users") as client:
        yield client


async def register(http: httpx.AsyncClient, key: str, **changes: str) -> httpx.Response:
    return await http.post("/users", json=ADA | changes, headers={"Idempotency-Key": key})


async def test_a_registration_is_an_event(http: httpx.AsyncClient, listener: Listener) -> None:
    answer = await register(http, "key")

    assert answer.status_code == 201
    (envelope,) = await listener.has_heard(1)
    event = envelope.event(UserRegistered)
    assert (event.name, event.email) == ("Ada", "ada@example.com")
    assert answer.json() == {"user_id": str(event.user_id), "event_id": envelope.id}
    assert (envelope.source, envelope.subject) == ("/services/users", str(event.user_id))


async def test_the_clients_retry_is_the_same_registration(
    http: httpx.AsyncClient, listener: Listener, database: Database
) -> None:
    answers = await asyncio.gather(*(register(http, "key") for _ in range(5)))

    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.text for answer in answers}) == 1
    await listener.has_heard(1)
    async with database.session() as session:
        assert await session.scalar(select(func.count()).select_from(User)) == 1


async def test_what_is_not_committed_was_not_promised_and_the_client_may_try_again(
    http: httpx.AsyncClient, listener: Listener, database: Database
) -> None:
    with broken_commits(database.engine):
        first = await register(http, "key")
    second = await register(http, "key")

    assert first.status_code == 503, first.text
    assert first.headers["Retry-After"] == "5"
    assert second.status_code == 201
    await listener.has_heard(1)


async def test_a_key_or_an_address_of_somebody_else_is_a_conflict(http: httpx.AsyncClient, listener: Listener) -> None:
    await register(http, "key")

    another_name = await register(http, "key", name="Bob")
    same_address = await register(http, "another key", email="ADA@example.com")

    assert (another_name.status_code, same_address.status_code) == (409, 409)
    assert "Idempotency-Key" in another_name.json()["detail"]
    assert "address" in same_address.json()["detail"]
    await listener.has_heard(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "A\0da"},
        {"name": "Ada\nBob"},
        {"email": "nobody"},
        {"email": "ada@example.com\0"},
        {"email": "a@b\r\nBcc: c@d"},
        {"email": "ada@example.com, bob@example.com"},
    ],
)
async def test_bad_input_is_refused_and_leaves_no_event(
    http: httpx.AsyncClient, listener: Listener, wrong: dict[str, str]
) -> None:
    assert (await register(http, "key", **wrong)).status_code == 422
    assert (await http.post("/users", json=ADA)).status_code == 422, "without an Idempotency-Key"

    assert listener.heard == []


async def test_it_says_that_it_is_well(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).json() == {"status": "ok"}
