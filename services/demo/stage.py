"""The whole shop in one process: real HTTP, real SMTP, one worker per service, files in a folder that goes away.

It lives in a namespace of its own, so that it meets nobody else's events on the broker that it is given, and removes
every queue and exchange of that namespace when it ends.
"""

import logging
import os
import secrets
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import httpx
from aio_pika.exceptions import AMQPError
from pydantic import TypeAdapter
from sqlalchemy import update

from eventbus import Service, Worker
from eventbus.database import OUTBOX, open_engine
from eventbus.dead_letters import DeadLetter, DeadLetters
from eventbus.idempotency import MemoryStore
from eventbus.idempotency.base import Claim, Done, Mine
from eventbus.service import check_all
from eventbus.topology import Names, Topology
from eventbus.transport import from_url
from eventbus.worker import topology_of
from services.audit.handlers import service as audit
from services.demo.ledger import Fact, Handling, Ledger, read
from services.http import serving
from services.inventory.handlers import service as inventory
from services.mailbox.api import create_app as create_mailbox
from services.mailbox.server import Mail, Mailbox, serving_smtp
from services.marketing.handlers import service as marketing
from services.notifications.handlers import service as notifications
from services.orders.api import create_app as create_orders
from services.orders.handlers import service as orders
from services.orders.store import resources as open_orders
from services.payments.handlers import service as payments
from services.settings import Settings
from services.shipping.handlers import service as shipping
from services.tables import TABLES, make_tables
from services.users.api import create_app as create_users
from services.users.store import resources as open_users

log = logging.getLogger(__name__)

LISTENERS: tuple[Service[Any], ...] = (audit, inventory, marketing, notifications, orders, payments, shipping)
HOST = "127.0.0.1"
GRACE = timedelta(seconds=5)
CLEAN_UP_S = 20.0
# What the environment says to other programs must not change what happens here.
FOREIGN_SETTINGS = ("EVENTBUS_", "SHOP_", "OTEL_")


class CountingStore:
    """An idempotency store that counts its answers: it alone knows how often it was asked for the same thing again."""

    def __init__(self) -> None:
        self.duplicates = 0
        self.at_work = 0  # claims that are held now
        self._store = MemoryStore()

    async def claim(self, key: str, lease: timedelta) -> Claim:
        claim = await self._store.claim(key, lease)
        self.duplicates += isinstance(claim, Done)
        self.at_work += isinstance(claim, Mine)
        return claim

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        return await self._store.renew(key, token, lease)

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        completed = await self._store.complete(key, token, keep)
        self.at_work -= completed
        return completed

    async def free(self, key: str, token: str) -> bool:
        freed = await self._store.free(key, token)
        self.at_work -= freed
        return freed

    def forget(self) -> None:
        """Sabotage: what was handled is handled again."""
        self._store.forget()


@dataclass(frozen=True, slots=True)
class Doors:
    """Where the shop is reached."""

    users: str
    orders: str
    mailbox: str
    smtp: str


@dataclass
class Shop:
    """A running shop, and what is asked of it from outside. `accepted`: the events that its APIs have answered for.

    A request that comes again is the same event, and so is accepted once; `publish_again` counts besides.
    """

    url: str
    names: Names
    folder: Path
    store: CountingStore
    doors: Doors
    client: httpx.AsyncClient
    workers: AsyncExitStack
    accepted: list[Fact] = field(default_factory=list)

    async def register(self, name: str, email: str, key: str) -> None:
        user = {"name": name, "email": email}
        answer = await self.client.post(f"{self.doors.users}/users", json=user, headers={"Idempotency-Key": key})
        answer.raise_for_status()
        self._accept(Fact("user_registered", UUID(answer.json()["user_id"])))

    async def order(self, order: dict[str, object]) -> None:
        answer = await self.client.post(f"{self.doors.orders}/orders", json=order)
        answer.raise_for_status()
        self._accept(Fact("order_placed", UUID(answer.json()["order_id"])))

    def _accept(self, fact: Fact) -> None:
        if fact not in self.accepted:
            self.accepted.append(fact)

    async def publish_again(self, service: str, event_id: str, fact: Fact) -> None:
        """Take the relay's mark off an event of *service*, as if the relay had died before it made that."""
        engine = open_engine(Settings().database_of(service))
        async with engine.begin() as connection:
            await connection.execute(update(OUTBOX).where(OUTBOX.c.event_id == event_id).values(published_ms=None))
        await engine.dispose()
        self.accepted.append(fact)

    async def status(self, order_id: UUID) -> tuple[str, str]:
        """Of an order: its status, and why."""
        answer = (await self.client.get(f"{self.doors.orders}/orders/{order_id}")).raise_for_status().json()
        return answer["status"], answer["reason"] or ""

    async def mails(self) -> list[Mail]:
        answer = (await self.client.get(f"{self.doors.mailbox}/mails")).raise_for_status()
        return TypeAdapter(list[Mail]).validate_json(answer.content)

    async def refused_mails(self) -> int:
        """How many deliveries the mail server has refused."""
        refused: int = (await self.client.get(f"{self.doors.mailbox}/refuse")).raise_for_status().json()["refused"]
        return refused

    async def dead_letters(self) -> list[DeadLetter]:
        letters: list[DeadLetter] = []
        for service in LISTENERS:
            async with DeadLetters(service.name, url=self.url, namespace=self.names.namespace) as dead:
                letters += [letter async for letter in dead]
        return letters

    async def ledger(self, dead: list[DeadLetter]) -> Ledger:
        return read(self.folder, list(self.accepted), await self.mails(), [given_up(letter) for letter in dead])

    async def start(self, *services: Service[Any]) -> None:
        """Start a worker for each of *services*."""
        for service in services:
            worker = Worker(service, url=self.url, namespace=self.names.namespace, idempotency=self.store, grace=GRACE)
            await self.workers.enter_async_context(worker)

    async def lose_one(self, service: Service[Any]) -> None:
        """Take one delivery from the queue of *service*, which is not running, as if it had been handled."""
        transport = from_url(self.url)
        await transport.open(topology_of(self.names, check_all((service,))), "apply")
        try:
            async with transport.browse(self.names.queue(service.name)) as deliveries:
                (await anext(deliveries)).ack()
        finally:
            await transport.close()


def given_up(letter: DeadLetter) -> Handling:
    """Which handler's part of which event *letter* is."""
    envelope = letter.envelope
    if envelope is None or envelope.subject is None:
        raise ValueError(f"dead letter {letter.id} of {letter.service} is no event of the shop")
    return Handling(
        Fact(envelope.type.rpartition(".v")[0], UUID(envelope.subject)), f"{letter.service}.{letter.handler}"
    )


@asynccontextmanager
async def open_shop(url: str, *, refuse: int, late: tuple[Service[Any], ...] = ()) -> AsyncIterator[Shop]:
    """Run the shop on the broker at *url*; those who come *late* have their queues, and are not started.

    Its mail server refuses the first *refuse* deliveries.

    Raises:
        SetupError, TransportError: the broker cannot be used, or does not answer.
    """
    names = Names(f"demo-{secrets.token_hex(4)}")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eventbus-demo-")))
        mailbox = Mailbox(refuse)
        smtp_port = await stack.enter_async_context(serving_smtp(mailbox, HOST, 0))
        settle_environment(
            {
                "EVENTBUS_URL": url,  # where relays publish
                "EVENTBUS_NAMESPACE": names.namespace,
                "SHOP_DATA": str(folder),
                "SHOP_SMTP_HOST": HOST,
                "SHOP_SMTP_PORT": str(smtp_port),
            }
        )
        for service in TABLES:
            await make_tables(Settings(), service)
        await stack.enter_async_context(namespace(url, names))
        store, workers = CountingStore(), await stack.enter_async_context(AsyncExitStack())
        doors = await open_doors(stack, mailbox, smtp_port)
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=30.0, trust_env=False))
        shop = Shop(url, names, folder, store, doors, client, workers)
        await shop.start(*(service for service in LISTENERS if service not in late))
        yield shop


async def open_doors(stack: AsyncExitStack, mailbox: Mailbox, smtp_port: int) -> Doors:
    """Everything that speaks HTTP. The relay of orders is the one that its worker has."""
    settings, ports = Settings(), {}
    users_db = await stack.enter_async_context(open_users(settings))
    orders_db = await stack.enter_async_context(open_orders(settings.model_copy(update={"relay": False})))
    apps = {
        "mailbox": create_mailbox(mailbox),
        "users": create_users(users_db),
        "orders": create_orders(orders_db),
    }
    for name, app in apps.items():
        ports[name] = await stack.enter_async_context(serving(app, HOST, 0))
    return Doors(**{name: f"http://{HOST}:{port}" for name, port in ports.items()}, smtp=f"{HOST}:{smtp_port}")


def settle_environment(ours: dict[str, str]) -> None:
    """The services read their settings from the environment as ever: let it say *ours*, and nothing else to them."""
    for name in list(os.environ):
        if name.startswith(FOREIGN_SETTINGS):
            del os.environ[name]
    os.environ.update(ours)


# ── the namespace ───────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def namespace(url: str, names: Names) -> AsyncIterator[None]:
    """Declare everything that the shop needs before anybody publishes, and remove it at the end."""
    topology = topology_of(names, check_all(LISTENERS))
    transport = from_url(url)
    await transport.open(topology, "apply")
    try:
        yield
    finally:
        await transport.close()
        if not url.startswith("memory:"):  # that broker goes with its last holder
            try:
                await remove(url, topology)
            except (AMQPError, OSError) as error:
                log.warning("the queues %s.* could not be removed from the broker: %s", names.namespace, error)


async def remove(url: str, topology: Topology) -> None:
    """Delete every queue and exchange of *topology*, which nobody uses any more."""
    connection = await aio_pika.connect(url, timeout=CLEAN_UP_S)
    async with connection, connection.channel() as channel:
        for queue in topology.queues:
            await channel.queue_delete(queue.name, timeout=CLEAN_UP_S)
        for exchange in topology.exchanges:
            await channel.exchange_delete(exchange.name, timeout=CLEAN_UP_S)
