"""What a run is about: whose programs, how an order is placed, and what is found of it afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from eventbus import Bus
from tests.faults.kills import small
from tests.faults.kills.count import Found
from tests.faults.kills.points import BY_INBOX, BY_KEY
from tests.faults.kills.stage import Databases, Place, Witness


@dataclass(frozen=True, slots=True)
class Part:
    """A program: what it is started as, what its environment says, and at which steps it can be killed."""

    command: Sequence[str]
    points: Sequence[str]
    settings: Mapping[str, str] = field(default_factory=dict)


class Play(Protocol):
    """Whose programs run, and what orders become there."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """The programs by their names."""

    @property
    def place(self) -> Place:
        """Where they meet."""

    @property
    def services(self) -> Collection[str]:
        """Who has a queue there."""

    async def order(self, numbers: range) -> None:
        """Place these orders, and return when all are accepted."""

    async def look(self) -> Found:
        """What there is by now."""


class SmallPlay:
    """The two services of `small`, each with a database, and one store that they share."""

    services = ("payments", "inventory")

    def __init__(self, place: Place, databases: Databases, witness: Witness, bus: Bus) -> None:
        self.place, self._databases, self._witness, self._bus = place, databases, witness, bus
        self._placed: list[str] = []
        self.parts: dict[str, Part] = {}

    @classmethod
    @asynccontextmanager
    async def on(cls, place: Place, databases: Databases, *, fail_first: bool = False) -> AsyncIterator[SmallPlay]:
        """*fail_first*: each first attempt of payments fails at its end."""
        witness = Witness()
        async with witness.listening(place.url), Bus(place.url, source="/orders") as bus:
            play = cls(place, databases, witness, bus)
            await play._open(fail_first)
            yield play

    async def _open(self, fail_first: bool) -> None:
        urls = {name: await self._databases.new(name) for name in ("payments", "inventory", "store")}
        for database in urls.values():
            await small.make_tables(database)
        settings = {"EVENTBUS_URL": self.place.url, "EVENTBUS_IDEMPOTENCY": urls["store"]}
        words = {name: ["tests.faults.kills.small", name, urls[name]] for name in self.services}
        if fail_first:
            words["payments"].append("--fail-first")
        self.parts["payments"] = Part(words["payments"], BY_INBOX, settings)
        self.parts["inventory"] = Part(words["inventory"], BY_KEY, settings)

    async def order(self, numbers: range) -> None:
        sent = await self._bus.publish_many(small.Placed(order_id=number) for number in numbers)
        assert len(sent) == len(numbers)
        self._placed += [str(number) for number in numbers]

    async def look(self) -> Found:
        rows, waiting, set_aside = await self._databases.outbox("payments")
        return Found(
            placed=self._placed,
            effects={
                "payment": await self._effects("payments", "payments"),
                "reservation": await self._effects("inventory", "reservations"),
            },
            told={"payment": self._told(small.Captured), "reservation": self._told(small.Reserved)},
            rows=rows,
            waiting=waiting,
            arrived=self._witness.from_sources("/services/payments"),
            given_up=set_aside,
        )

    async def _effects(self, database: str, table: str) -> Counter[str]:
        return Counter(str(order) for (order,) in await self._databases.ask(database, f"SELECT order_id FROM {table}"))

    def _told(self, event: type[small.Captured | small.Reserved]) -> Counter[str]:
        return Counter(str(e.event(event).order_id) for e in self._witness.of_type(event.event_type))
