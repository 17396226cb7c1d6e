"""An idempotency store in this process: knows duplicates within one process, and forgets with it.

Bounded: when it is full, the older half of the completed keys is forgotten at once. A live claim is never dropped.
"""

from __future__ import annotations

import itertools
from datetime import timedelta
from math import ceil
from zlib import crc32

from eventbus.clock import Clock, SystemClock
from eventbus.errors import StoreError
from eventbus.idempotency.base import Claim, Done, Mine, Theirs

# About 80 bytes a key, however long it is: 7 MB, so that a worker's memory does not grow with its backlog. Halves of
# 40,000 fill a dictionary of 2^16; with a few thousand more it would be twice as large.
DEFAULT_MAX_KEYS = 80_000
_DONE = Done()


# Token, end of the lease, crashes before, print. Not a class of its own: one is made for each event.
_Claimed = tuple[str, float, int, int]


class MemoryStore:
    """Keeps at most *max_keys* keys: the last half as many completed ones, less those that are claimed, and more."""

    def __init__(self, *, max_keys: int = DEFAULT_MAX_KEYS, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._max_keys = max_keys
        self._claims: dict[str, _Claimed] = {}
        # By the key's print, when it may be forgotten. Two halves: to drop a whole dictionary gives its memory back,
        # and one that loses its oldest keys as it gains new ones grows to twice its size.
        self._done: dict[int, int] = {}
        self._done_before: dict[int, int] = {}
        self._forget_s = 0  # the last of those moments: keys of one second share the number
        self._tokens = itertools.count(1)

    async def claim(self, key: str, lease: timedelta) -> Claim:
        now_s = self._clock.monotonic_s()
        print_ = _print(key)
        forget_s = self._done.get(print_) or self._done_before.get(print_)
        if forget_s is not None and forget_s > now_s:
            return _DONE
        crashes = 0
        held = self._claims.get(key)
        if held is not None:
            _, ends_s, crashes, _ = held
            if ends_s > now_s:
                return Theirs(timedelta(seconds=ends_s - now_s))
            crashes += 1
        elif len(self._claims) + len(self._done) + len(self._done_before) >= self._max_keys:
            self._make_room(now_s)
        token = str(next(self._tokens))
        self._claims[key] = token, now_s + lease.total_seconds(), crashes, print_
        return Mine(token, crashes)

    async def renew(self, key: str, token: str, lease: timedelta) -> bool:
        held = self._claims.get(key)
        if held is None or held[0] != token:
            return False
        self._claims[key] = token, self._clock.monotonic_s() + lease.total_seconds(), *held[2:]
        return True

    async def complete(self, key: str, token: str, keep: timedelta) -> bool:
        held = self._claims.get(key)
        if held is None or held[0] != token:
            return False
        del self._claims[key]
        forget_s = ceil(self._clock.monotonic_s() + keep.total_seconds())
        if forget_s != self._forget_s:
            self._forget_s = forget_s
        if len(self._done) >= self._max_keys // 2:
            self._done_before, self._done = self._done, {}
        self._done[held[3]] = self._forget_s
        return True

    async def free(self, key: str, token: str) -> bool:
        held = self._claims.get(key)
        if held is None or held[0] != token:
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
        expired = [key for key, (_, ends_s, _, _) in self._claims.items() if ends_s <= now_s]
        if not expired:
            raise StoreError(f"the memory store is full: {self._max_keys} keys are claimed at once; raise max_keys")
        for key in expired:
            del self._claims[key]


def _print(key: str) -> int:
    """96 bits for a key of any length, which take 40 bytes of memory: SipHash, keyed anew in each process, and CRC-32.

    That one of a hundred thousand keys is taken for another has a chance of 10^-24. A digest of hashlib costs thrice
    as much, for what nobody needs here: that the prints of another process are the same.
    """
    return hash(key) << 32 | crc32(key.encode("utf-8", "surrogatepass"))
