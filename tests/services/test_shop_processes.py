"""`make shop`: every service a process of its own on a real RabbitMQ; and the doors while the broker is away."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from eventbus import Service, Worker
from schemas import UserRegistered
from services.settings import Settings
from services.users.api import create_app
from services.users.store import resources
from tests.servers import BrokerServer
from tests.services.waiting import eventually

START_S = 90.0  # eleven interpreters on a busy machine


@dataclass
class RunningShop:
    """`python -m services.shop` and what it has printed so far."""

    process: asyncio.subprocess.Process
    output: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.output)

    def url(self, name: str) -> str:
        found = re.search(rf"^  {name} +(http://127\.0\.0\.1:\d+)/", self.text, re.MULTILINE)
        assert found, self.text
        return found[1]

    def pid(self, name: str) -> int:
        found = re.search(rf"^ *{name} \| process (\d+)$", self.text, re.MULTILINE)
        assert found, self.text
        return int(found[1])

    async def follow(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.output.append(line.decode().rstrip())

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 60)


@asynccontextmanager
async def running_shop(url: str, folder: Path) -> AsyncIterator[RunningShop]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.shop",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(os.environ) | {"EVENTBUS_URL": url, "SHOP_DATA": str(folder)},
    )
    shop = RunningShop(process)
    following = asyncio.create_task(shop.follow())

    async def is_open() -> bool:
        assert process.returncode is None, shop.text
        return "Ctrl-C ends the shop" in shop.text

    try:
        await eventually(is_open, f"the shop is open:\n{shop.text}", START_S)
        yield shop
    finally:
        if process.returncode is None:
            process.terminate()
        await shop.ended()
        await following


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


NAMES = (
    "mailbox",
    "notifications",
    "marketing",
    "payments",
    "inventory",
    "shipping",
    "audit",
    "users",
    "orders",
)


async def test_an_order_goes_through_all_processes_and_ctrl_c_ends_them(rabbitmq_url: str, tmp_path: Path) -> None:
    order_id = str(uuid4())
    order = {
        "order_id": order_id,
        "email": "ada@example.com",
        "address": "1 Sample Street",
        "lines": [{"sku": "mug", "quantity": 2, "unit_price": "12.30"}],
    }
    async with running_shop(rabbitmq_url, tmp_path) as shop, httpx.AsyncClient(timeout=30) as http:
        pids = {name: shop.pid(name) for name in NAMES}
        user = {"name": "Ada", "email": "ada@example.com"}
        key = {"Idempotency-Key": "1"}
        assert (await http.post(f"{shop.url('users')}/users", json=user, headers=key)).status_code == 201
        assert (await http.post(f"{shop.url('orders')}/orders", json=order)).status_code == 202

        async def is_over() -> bool:
            mails = (await http.get(f"{shop.url('mailbox')}/mails")).json()
            ended = (await http.get(f"{shop.url('orders')}/orders/{order_id}")).json()
            return bool(ended["status"] == "shipped" and len(mails) == 3)

        await eventually(is_over, "the order is shipped and all mails are there")
        shop.process.send_signal(signal.SIGINT)

        assert await shop.ended() == 0, shop.text
        assert [name for name, pid in pids.items() if is_alive(pid)] == []
        assert "Traceback" not in shop.text
        assert "ada@example.com" not in shop.text.split("Ctrl-C ends the shop")[1]


async def test_a_service_that_ends_by_itself_ends_the_shop_with_exit_code_1(rabbitmq_url: str, tmp_path: Path) -> None:
    async with running_shop(rabbitmq_url, tmp_path) as shop:
        pids = {name: shop.pid(name) for name in NAMES}

        os.kill(pids["payments"], signal.SIGKILL)

        assert await shop.ended() == 1, shop.text
        assert [name for name, pid in pids.items() if is_alive(pid)] == []
        assert "error: payments ended with exit code -9" in shop.text


@pytest.mark.parametrize("url", ["", "memory://"])
async def test_without_a_broker_that_processes_can_share_it_says_what_to_do(url: str, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.shop",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=dict(os.environ) | {"EVENTBUS_URL": url, "SHOP_DATA": str(tmp_path)},
    )

    output, _ = await process.communicate()

    assert process.returncode == 1
    assert len(output.splitlines()) == 1
    assert b"`make broker` starts one" in output


async def test_a_door_is_open_while_the_broker_is_away_and_the_event_leaves_later(
    own_broker: BrokerServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, key = {"name": "Ada", "email": "ada@example.com"}, {"Idempotency-Key": "1"}
    url, listener, heard = own_broker.new_vhost(), Service("listener"), list[UserRegistered]()

    @listener.on("user_registered")
    async def hear(event: UserRegistered) -> None:
        heard.append(event)

    async def has_left() -> bool:
        return len(heard) == 1

    monkeypatch.setenv("EVENTBUS_URL", url)
    async with (
        Worker(listener, url=url),
        resources(settings.model_copy(update={"relay": True})) as database,
        httpx.AsyncClient(transport=httpx.ASGITransport(create_app(database)), base_url="http://users") as http,
    ):

        async def is_ready() -> bool:
            return (await http.get("/ready")).status_code == 200

        await eventually(is_ready, "the relay is ready")
        await asyncio.to_thread(own_broker.restart)  # it forgets what was declared within the last second otherwise
        await asyncio.to_thread(own_broker.kill)
        for _ in range(2):
            assert (await http.post("/users", json=user, headers=key)).status_code == 201
        assert (await http.get("/health")).status_code == 200
        assert not await is_ready()

        await asyncio.to_thread(own_broker.start)
        await eventually(has_left, "the event has left")
        await eventually(is_ready, "the relay is ready again")
