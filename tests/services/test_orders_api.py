"""POST /orders and GET /orders/{id}, over the app itself, real databases, the relay and the embedded broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import nullcontext
from decimal import Decimal
from typing import Any
from uuid import uuid4

import httpx
import pytest

from eventbus import Bus, Service, Worker
from schemas import Money, OrderPlaced, PaymentDeclined
from services.database import Database
from services.orders.api import create_app
from services.orders.handlers import service
from services.orders.store import resources
from services.settings import Settings
from tests.outboxes import broken_commits
from tests.services.databases import on_each_database
from tests.services.listening import Listener, listening
from tests.services.waiting import eventually

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
    async with httpx.AsyncClient(transport=transport, base_url="http://orders") as client:
        yield client


def wanted(**changes: object) -> dict[str, Any]:
    """What a client sends."""
    return {
        "order_id": str(uuid4()),
        "email": "Ada@Example.com",
        "address": "1 Sample Street",
        "lines": [
            {"sku": "mug", "quantity": 3, "unit_price": "0.10"},
            {"sku": "shirt", "quantity": 1, "unit_price": "19.90"},
        ],
    } | changes


async def test_an_order_is_an_event_that_says_all(http: httpx.AsyncClient, listener: Listener) -> None:
    body = wanted()

    answer = await http.post("/orders", json=body)

    assert answer.status_code == 202
    assert answer.headers["Location"] == f"/orders/{body['order_id']}"
    (envelope,) = await listener.has_heard(1)
    event = envelope.event(OrderPlaced)
    assert answer.json() == {"order_id": str(event.order_id), "event_id": envelope.id}
    assert event.total == Money(amount=Decimal("20.20"), currency="EUR")
    assert (event.email, event.address) == ("ada@example.com", "1 Sample Street")
    assert [(line.sku, line.quantity) for line in event.lines] == [("mug", 3), ("shirt", 1)]
    assert (envelope.source, envelope.subject) == ("/services/orders", str(event.order_id))


async def test_the_answer_waits_for_nobody_downstream(http: httpx.AsyncClient, listener: Listener) -> None:
    slow, may_end, began = Service("slow"), asyncio.Event(), asyncio.Event()

    @slow.on("order_placed")
    async def work(event: OrderPlaced) -> None:
        began.set()
        await may_end.wait()

    async with Worker(slow, url=listener.url):
        answer = await http.post("/orders", json=wanted())

        assert answer.status_code == 202
        await asyncio.wait_for(began.wait(), 10)
        may_end.set()


async def test_the_clients_retry_is_the_same_order(http: httpx.AsyncClient, listener: Listener) -> None:
    body = wanted()

    answers = await asyncio.gather(*(http.post("/orders", json=body) for _ in range(5)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.text for answer in answers}) == 1
    await listener.has_heard(1)


async def test_what_is_not_committed_was_not_promised_and_the_client_may_try_again(
    http: httpx.AsyncClient, listener: Listener, database: Database
) -> None:
    body = wanted()

    with broken_commits(database.engine):
        first = await http.post("/orders", json=body)
    shown = await http.get(f"/orders/{body['order_id']}")
    second = await http.post("/orders", json=body)

    assert first.status_code == 503, first.text
    assert first.headers["Retry-After"] == "5"
    assert shown.status_code == 404
    assert second.status_code == 202
    await listener.has_heard(1)


async def test_another_order_under_the_same_id_is_a_conflict(http: httpx.AsyncClient, listener: Listener) -> None:
    body = wanted()
    await http.post("/orders", json=body)

    another = await http.post("/orders", json=body | {"address": "2 Sample Street"})

    assert another.status_code == 409
    await listener.has_heard(1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"order_id": "1"},
        {"email": "nobody"},
        {"address": ""},
        {"address": "1 Sample Street\0"},
        {"address": "1 Sample Street\r\nBcc: bob@example.com"},
        {"address": "\x9b31m"},
        {"lines": [{"sku": "mug\0", "quantity": 1, "unit_price": "1"}]},
        {"lines": []},
        {"lines": [{"sku": "mug", "quantity": 0, "unit_price": "1"}]},
        {"lines": [{"sku": "mug", "quantity": 1, "unit_price": "-1"}]},
        {"lines": [{"sku": "mug", "quantity": 1, "unit_price": "NaN"}]},
        {"lines": [{"sku": "mug", "quantity": 1, "unit_price": "0.001"}]},
        {"currency": "euro"},
        {"currency": "EUR\n"},
        {"discount": 100},
    ],
)
async def test_bad_input_is_refused_and_leaves_no_event(
    http: httpx.AsyncClient, listener: Listener, wrong: dict[str, object]
) -> None:
    assert (await http.post("/orders", json=wanted(**wrong))).status_code == 422

    assert listener.heard == []


async def test_the_largest_order_that_is_let_in_can_be_published(http: httpx.AsyncClient, listener: Listener) -> None:
    lines = [{"sku": f"{n}".rjust(64, "x"), "quantity": 1000, "unit_price": "999999.99"} for n in range(100)]

    answer = await http.post("/orders", json=wanted(lines=lines, address="x" * 500))

    assert answer.status_code == 202
    await listener.has_heard(1)


async def test_an_unknown_order_is_not_found(http: httpx.AsyncClient) -> None:
    assert (await http.get(f"/orders/{uuid4()}")).status_code == 404


async def test_an_order_shows_what_became_of_it(
    http: httpx.AsyncClient, listener: Listener, database: Database
) -> None:
    body = wanted()
    path = f"/orders/{body['order_id']}"
    amount = Money(amount=Decimal("20.20"), currency="EUR")
    async with (
        Worker(service.replace(lifespan=lambda _: nullcontext(database)), url=listener.url),
        Bus(listener.url, source="/services/payments") as bus,
    ):

        async def is_cancelled() -> bool:
            return bool((await http.get(path)).json()["status"] == "cancelled")

        await http.post("/orders", json=body)
        await bus.publish(PaymentDeclined(order_id=body["order_id"], amount=amount, reason="payment declined: no"))
        await eventually(is_cancelled, "the order is cancelled")

    shown = (await http.get(path)).json()
    assert (shown["payment"], shown["stock"], shown["reason"]) == ("declined", "pending", "payment declined: no")
    assert shown["total"] == {"amount": "20.20", "currency": "EUR"}
    heard = await listener.has_heard(3)
    assert [envelope.type for envelope in heard].count("order_cancelled.v1") == 1


async def test_it_says_that_it_is_well(http: httpx.AsyncClient) -> None:
    async def is_ready() -> bool:
        return bool((await http.get("/ready")).json() == {"status": "ready", "problems": []})

    assert (await http.get("/health")).json() == {"status": "ok"}
    await eventually(is_ready, "the relay has looked at the outbox")
