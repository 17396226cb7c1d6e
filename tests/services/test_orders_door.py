"""The whole process of orders: its door tells how its worker is, too."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text

from eventbus import Worker
from services.http import watched
from services.orders.api import create_app
from services.orders.handlers import service
from services.orders.store import resources
from services.settings import Settings
from tests.engines import free_port
from tests.outboxes import new_broker
from tests.services.waiting import eventually
from tests.stores import StoreServer


@asynccontextmanager
async def running_orders(settings: Settings, **environment: str) -> AsyncIterator[httpx.AsyncClient]:
    """`python -m services.orders.main`, on a broker of its own."""
    port = free_port()
    ours = {"EVENTBUS_URL": "memory://", "SHOP_DATA": str(settings.data), "SHOP_HTTP_PORT": str(port)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.orders.main"), env=dict(os.environ) | ours | environment
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            yield http
    finally:
        process.terminate()
        await asyncio.wait_for(process.wait(), 60)


async def problems(http: httpx.AsyncClient) -> list[str]:
    """What /ready tells; its status fits to it."""
    answer = await http.get("/ready")
    told: list[str] = answer.json()["problems"]
    assert answer.status_code == (503 if told else 200)
    return told


async def test_a_worker_whose_store_is_away_is_not_ready_and_the_door_stays_open(
    settings: Settings, own_store: Callable[[str], StoreServer]
) -> None:
    redis = await asyncio.to_thread(own_store, "redis")
    order_id = uuid4()
    line = {"sku": "mug", "quantity": 1, "unit_price": "1.00"}
    order = {"order_id": str(order_id), "email": "ada@example.com", "address": "1 Sample Street", "lines": [line]}

    async with running_orders(settings, EVENTBUS_IDEMPOTENCY=redis.new_url()) as http:

        async def is_ready() -> bool:
            try:
                return await problems(http) == []
            except httpx.ConnectError:  # it is not open yet
                return False

        async def store_is_named() -> bool:
            return any("idempotency store: " in problem for problem in await problems(http))

        async def consuming_pauses() -> bool:
            return any("consuming pauses: the idempotency store" in problem for problem in await problems(http))

        async def is_followed() -> bool:
            return bool((await http.get(f"/orders/{order_id}")).json()["status"] == "placed")

        await eventually(is_ready, "all is well")
        await asyncio.to_thread(redis.kill)
        await eventually(store_is_named, "the store is away, and nothing has come that needs it")
        assert (await http.post("/orders", json=order)).status_code == 202
        await eventually(consuming_pauses, "what the door has published cannot be handled")
        assert (await http.get("/health")).status_code == 200

        await asyncio.to_thread(redis.start)
        await eventually(is_followed, "the worker goes on")
        await eventually(is_ready, "all is well again")


async def test_what_is_wrong_with_the_relay_is_told_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    url = new_broker()
    monkeypatch.setenv("EVENTBUS_URL", url)
    async with (
        resources(settings.model_copy(update={"relay": True})) as database,
        Worker(service.replace(lifespan=lambda _: nullcontext(database)), url=url) as worker,
        watched(worker) as readiness,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(database, readiness)), base_url="http://orders"
        ) as http,
    ):

        async def is_ready() -> bool:
            return await problems(http) == []

        async def is_told() -> bool:
            return any("outbox" in problem for problem in await problems(http))

        await eventually(is_ready, "all is well")
        async with database.begin() as session:
            await session.execute(text("ALTER TABLE eventbus_outbox RENAME TO away"))
        await eventually(is_told, "the outbox is away")

        (told,) = await problems(http)
        assert told.startswith("orders: relay: outbox: ")
        async with database.begin() as session:
            await session.execute(text("ALTER TABLE away RENAME TO eventbus_outbox"))
