"""An idempotency store in this process: knows duplicates within one process, and forgets with it.

Bounded: when it is full, the older half of the completed keys is forgotten at once. A live claim is never dropped.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from math import ceil

from eventbus.clock import Clock, SystemClock
from eventbus.errors import StoreError
from eventbus.idempotency.base import Claim, Done, Mine, Theirs

# About 80 bytes a key, however long it is: 7 MB, so that a worker's memory does not grow with its backlog. Halves of
# 40,000 fill a dictionary of 2^16; with a few thousand more it would be twice as large.
DEFAULT_MAX_KEYS = 80_000
_DONE = Done()


@dataclass(slots=True)
class _Claimed:
    token: str
    ends_s: float
    crashes: int
    digest: bytes


class MemoryStore:
    """Keeps at most *max_keys* keys: the last half as many completed ones, less those that are claimed, and more."""

    def __init__(self, *, max_keys: int = DEFAULT_MAX_KEYS, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._max_keys = max_keys
        self._claims: dict[str, _Claimed] = {}
        # By the key's digest, when it may be forgotten. Two halves: to drop a whole dictionary gives its memory back,
        # and one that loses its oldest keys as it gains new ones grows to twice its size.
        self._done: dict[bytes, int] = {}
        self._done_before: dict[bytes, int] = {}
        self._forget_s = 0  # the last of those moments: keys of one second share the number
        self._tokens = itertools.count(1)

    async def claim(self, key: str, lease: timedelta) -> Claim:
        now_s = self._clock.monotonic_s()
        digest = _digest(key)
        forget_s = self._done.get(digest) or self._done_before.get(digest)
        if forget_s is not None and forget_s > now_s:
            return _DONE
        held = self._claims.get(key)
        if held is not None and held.ends_s > now_s:
            return Theirs(timedelta(seconds=held.ends_s - now_s))
        if held is None and len(self._claims) + len(self._done) + len(self._done_before) >= self._max_keys:
            self._make_room(now_s)
        crashes = 0 if held is None else held.crashes + 1
        token = str(next(self._tokens))
        self._claims[key] = _Claimed(token, now_s + lease.total_seconds(), crashes, digest)
        return Mine(token, crashes)

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        held = self._claims.get(key)
        if held is None or held.token != token:
            return False
        held.ends_s = self._clock.monotonic_s() + lease.total_seconds()
        return True

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        held = self._claims.get(key)
        if held is None or held.token != token:
            return False
        del self._claims[key]
        forget_s = ceil(self._clock.monotonic_s() + keep.total_seconds())
        if forget_s != self._forget_s:
            self._forget_s = forget_s
        if len(self._done) >= self._max_keys // 2:
            self._done_before, self._done = self._done, {}
        self._done[held.digest] = self._forget_s
        return True

    async def free(self, key: str, token: str) -> bool:
        held = self._claims.get(key)
        if held is None or held.token != token:
            return False
        del self._claims[key]
        return True

    def forget(self) -> None:
        """Forget everything, claims included: a test's way to see what a store is good for."""
        self._claims.clear()
        self._done, self._done_before = {}, {}

    def _make_room(self, now_s: float) -> None:
        if self._done_before:
            self._done_before = {}
            return
        if self._done:
            self._done = {}
            return
        expired = [key for key, held in self._claims.items() if held.ends_s <= now_s]
        if not expired:
            raise StoreError(f"the memory store is full: {self._max_keys} keys are claimed at once; raise max_keys")
        for key in expired:
            del self._claims[key]


def _digest(key: str) -> bytes:
    """Fifteen bytes for a key of any length, which fill 48 of memory; that one of a hundred thousand is taken for
    another has a chance of 10^-31.
    """
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=15).digest()
