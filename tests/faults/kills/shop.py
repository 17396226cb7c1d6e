"""The shop itself: five of its services as processes, orders and customers over HTTP, each service with a database."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from uuid import UUID, uuid5

import httpx

from eventbus.database import create, open_engine
from services.inventory.store import FIRST_STOCK
from services.settings import Settings
from services.tables import make_tables
from services.users.api import USERS
from tests.engines import free_port
from tests.faults.kills.count import Found
from tests.faults.kills.play import Part
from tests.faults.kills.points import BY_INBOX, BY_OUTBOX, Aim
from tests.faults.kills.stage import Databases, Place, Witness

IDS = UUID("8a53f2d6-0d3e-4f11-8c86-4f4b6c1d9a27")
ACCEPTED_S = 240.0  # a door is closed until its program can be started anew, which takes a broker
AT_A_TIME = 20
# Each effect: in whose database it is seen, and by which event others hear of it.
EFFECTS = {
    "user": ("users", "SELECT user_id FROM users", "user_registered.v1"),
    "order": ("orders", "SELECT order_id FROM orders WHERE placed IS NOT NULL", "order_placed.v1"),
    "payment": ("payments", "SELECT order_id FROM payments WHERE status = 'captured'", "payment_captured.v1"),
    "reservation": ("inventory", "SELECT order_id FROM reservations WHERE status = 'reserved'", "stock_reserved.v1"),
    "parcel": ("shipping", "SELECT order_id FROM parcels WHERE completed_by IS NOT NULL", "order_shipped.v1"),
    "happy end": ("orders", "SELECT order_id FROM orders WHERE tracking IS NOT NULL", None),
}
DOORS = ("users", "orders")
SERVICES = {"users": BY_OUTBOX, "orders": BY_INBOX, "payments": BY_INBOX, "inventory": BY_INBOX, "shipping": BY_INBOX}


def outage_aims(before: int, away: int) -> dict[str, list[Aim]]:
    """Where the doors die right after a commit, with *before* orders that ended and *away* while the broker is away.

    Nothing is delivered then, so the doors alone commit: users once for each order, as for those before, and dies at
    its last one; orders once, after five times for each of those before, and dies when two thirds are there.
    """
    orders = 5 * before + away - away // 3
    return {"users": [Aim("after-commit", before + away)], "orders": [Aim("after-commit", orders)]}


class ShopPlay:
    """Every order is for one mug, by a customer of its own; all of them can be paid and shipped."""

    services = ("orders", "payments", "inventory", "shipping")  # users listens to nobody

    def __init__(self, place: Place, databases: Databases, witness: Witness, client: httpx.AsyncClient) -> None:
        self.place, self._databases, self._witness, self._client = place, databases, witness, client
        self._ports = {name: free_port() for name in DOORS}
        self._names: dict[UUID, str] = {}  # by the id of an order or a customer, the order's number
        self._placed: list[str] = []
        self._at_a_time = {door: asyncio.Semaphore(AT_A_TIME) for door in DOORS}  # one may be closed for long
        self.parts: dict[str, Part] = {}

    @classmethod
    @asynccontextmanager
    async def on(cls, place: Place, databases: Databases) -> AsyncIterator[ShopPlay]:
        witness = Witness()
        async with witness.listening(place.url), httpx.AsyncClient(timeout=ACCEPTED_S) as client:
            play = cls(place, databases, witness, client)
            await play._open()
            yield play

    async def _open(self) -> None:
        store = await self._databases.new("store")
        engine = open_engine(store)
        await create(engine)
        await engine.dispose()
        for name, points in SERVICES.items():
            database = "{service}".join((await self._databases.new(name)).rsplit(name, 1))
            await make_tables(Settings(database=database), name)
            settings = {
                "EVENTBUS_URL": self.place.url,
                "EVENTBUS_IDEMPOTENCY": store,
                "SHOP_DATABASE": database,
                "SHOP_HTTP_PORT": str(self._ports.get(name, 0)),
            }
            self.parts[name] = Part([f"services.{name}.main"], points, settings)

    async def order(self, numbers: range) -> None:
        await asyncio.gather(*(self._order(number) for number in numbers))
        self._placed += [str(number) for number in numbers]

    async def _order(self, number: int) -> None:
        key, order_id, email = f"customer {number}", uuid5(IDS, str(number)), f"{number}@example.com"
        self._names |= {uuid5(USERS, key): str(number), order_id: str(number)}
        lines = [{"sku": "mug", "quantity": 1, "unit_price": "12.30"}]
        order = {"order_id": str(order_id), "email": email, "address": f"{number} Sample Street", "lines": lines}
        user = {"name": f"Customer {number}", "email": email}
        await asyncio.gather(self._post("users", user, {"Idempotency-Key": key}), self._post("orders", order, {}))

    async def _post(self, door: str, body: Mapping[str, object], headers: Mapping[str, str]) -> None:
        """Until it is accepted. A door that died in the middle may have committed it, and then does nothing again."""
        url = f"http://127.0.0.1:{self._ports[door]}/{door}"
        async with self._at_a_time[door], asyncio.timeout(ACCEPTED_S):
            while True:
                try:
                    answer = await self._client.post(url, json=body, headers=headers)
                except httpx.TransportError:
                    await asyncio.sleep(0.1)
                    continue
                assert answer.status_code in (201, 202, 503), answer.text
                if answer.status_code != 503:
                    return
                await asyncio.sleep(0.1)

    async def look(self) -> Found:
        effects: dict[str, Counter[str]] = {}
        told: dict[str, Counter[str]] = {}
        for effect, (service, question, event) in EFFECTS.items():
            effects[effect] = Counter(self._name(of) for (of,) in await self._databases.ask(service, question))
            if event is not None:
                told[effect] = self._told(event)
        outboxes = [await self._databases.outbox(name) for name in SERVICES]
        rows, waiting, set_aside = (set[str]().union(*ids) for ids in zip(*outboxes, strict=True))
        return Found(
            placed=self._placed, effects=effects, told=told, rows=rows, waiting=waiting,
            arrived=self._witness.from_sources(*(f"/services/{name}" for name in SERVICES)),
            given_up=set_aside, wrong=await self._wrong_stock(len(effects["reservation"])),
        )  # fmt: skip

    async def _wrong_stock(self, reserved: int) -> set[str]:
        """A reservation's goods are taken off the shelf once: no key keeps a second time out."""
        ((left,),) = await self._databases.ask("inventory", "SELECT sum(available) FROM articles")
        taken = 0 if left is None else sum(FIRST_STOCK.values()) - int(str(left))
        return {f"{taken} mugs were taken for {reserved} orders"} if taken != reserved else set()

    def _told(self, event: str) -> Counter[str]:
        """How many events of a type tell of each order: events, not copies of one."""
        ids = (json.loads(envelope.data) for envelope in self._witness.of_type(event))
        return Counter(self._name(data.get("order_id") or data["user_id"]) for data in ids)

    def _name(self, of: object) -> str:
        return self._names[UUID(str(of))]
