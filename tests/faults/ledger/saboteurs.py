"""Builds of the bus that are wrong on purpose: the ledger must find each of them out, or it proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from eventbus.bus import Sender
from eventbus.consumer import ServiceConsumer
from eventbus.idempotency.base import Claim, Done, Mine
from eventbus.transport.base import Publication
from tests.faults.ledger.books import SharedStore

ANEW = "anew"


def ack_first() -> None:
    """The original is acked, then its copy is published."""
    publish_copy = ServiceConsumer._publish_copy

    async def swapped(self: ServiceConsumer, work: Any, settlement: Any, attempt: int) -> Any:
        work.delivery.ack()
        return await publish_copy(self, work, settlement, attempt)

    ServiceConsumer._publish_copy = swapped  # type: ignore[method-assign]


def returns_are_success() -> None:
    """A copy that the broker returned counts as published."""

    async def copy(self: Sender, publication: Publication) -> None:
        await self.transport.publish(publication, timeout_s=self._timeout_s)

    Sender._copy = copy  # type: ignore[method-assign]


def forget() -> None:
    """The store does not recognise what was done: a redelivery is handled again."""
    claim, complete = SharedStore.claim, SharedStore.complete

    async def never_done(self: SharedStore, key: str, lease: timedelta) -> Claim:
        found = await claim(self, key, lease)
        return Mine(ANEW) if isinstance(found, Done) else found

    async def always(self: SharedStore, key: str, token: str, keep: timedelta) -> bool:
        return token == ANEW or await complete(self, key, token, keep)

    SharedStore.claim = never_done  # type: ignore[method-assign]
    SharedStore.complete = always  # type: ignore[method-assign]


ALL: Mapping[str, Callable[[], None]] = {
    "ack-first": ack_first,
    "returns-are-success": returns_are_success,
    "forget": forget,
}
