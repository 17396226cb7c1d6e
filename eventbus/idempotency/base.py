"""The port to an idempotency store: which events a handler has handled, and which it is handling now.

A key is claimed before a handler runs, completed after it succeeded and freed after it did not. A claim carries a
token: renewing, completing and freeing work only with the token of the claim that holds the key now, so that a worker
that stalled past its lease cannot overwrite the one that took over. Claims are atomic: of two callers one gets `Mine`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Final, Protocol, TypeVar

from eventbus.errors import StoreError

T = TypeVar("T")

# Long enough to outlive a slow loop turn, short enough that a crashed worker's events do not wait for long. A longer
# handler's claim is renewed.
LEASE = timedelta(seconds=30)
KEEP_DONE = timedelta(days=7)
# A store that is silent for longer is down.
ANSWER_TIMEOUT_S = 10.0


@dataclass(slots=True)  # one for each event: `Final` costs nothing, freezing does
class Mine:
    """The key is this caller's until the lease ends. *crashes* claims before it expired without being freed."""

    token: Final[str]
    crashes: Final[int] = 0


@dataclass(frozen=True, slots=True)
class Theirs:
    """Somebody else's claim holds the key for *lease_left* more, unless renewed."""

    lease_left: timedelta


@dataclass(frozen=True, slots=True)
class Done:
    """It was completed, and that is still remembered."""


Claim = Mine | Theirs | Done


class IdempotencyStore(Protocol):
    """Remembers keys. Every method raises StoreError when the store does not answer; then nothing was changed."""

    async def claim(self, key: str, lease: timedelta) -> Claim:
        """Claim *key* until *lease* ends. A crash frees it then."""

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        """Begin the lease anew; False if the claim is no longer this token's."""

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        """Remember for *keep* that it is done; False if the claim is no longer this token's."""

    async def free(self, key: str, token: str) -> bool:
        """Give the key back, as if it had never been claimed; False if the claim is no longer this token's."""


class OnlyStoreErrors:
    """A store of anybody's, held to the port: whatever it raises is a StoreError, and so is a long silence."""

    def __init__(self, store: IdempotencyStore) -> None:
        self._store = store

    async def claim(self, key: str, lease: timedelta) -> Claim:
        return await self._answer(self._store.claim(key, lease))

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        return await self._answer(self._store.renew(key, token, lease))

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        return await self._answer(self._store.complete(key, token, keep))

    async def free(self, key: str, token: str) -> bool:
        return await self._answer(self._store.free(key, token))

    async def _answer(self, asked: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await asked
        except StoreError:
            raise
        except Exception as error:
            # Its kind only: a driver's text may quote the key, which may be made of an event's data.
            raise StoreError(f"{type(self._store).__name__} raised {type(error).__name__}") from error


def digest(key: str) -> str:
    """What a database keeps of a key: 32 hexadecimal digits, however long it is and whatever of an event's data is in
    it.
    """
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
