"""What time it is, and how to wait for it. Delays, leases and expiry ask here, so that a test can make time pass.

Handler timeouts and publish deadlines do not: those guard against real hangs, in tests too.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Timer(Protocol):
    """Something that was asked to happen later."""

    def cancel(self) -> None:
        """It will not happen; harmless when it already has."""


class Clock(Protocol):
    """Seconds that never go back, the date, and a way to be called later."""

    def monotonic_s(self) -> float:
        """Seconds since some fixed moment."""

    def now(self) -> datetime:
        """The date and time, in UTC."""

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        """Call *callback* once, *delay_s* seconds from now, from the event loop."""


class SystemClock:
    """The computer's own clock."""

    monotonic_s = staticmethod(time.monotonic)

    def now(self) -> datetime:
        return datetime.now(UTC)

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay_s, callback)


class _VirtualTimer:
    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """Time that stands still until `ring_next` or `set_to` moves it."""

    def __init__(self) -> None:
        self._elapsed_s = 0.0
        self._began = datetime.now(UTC)
        self._order = itertools.count()
        self._timers: list[tuple[float, int, _VirtualTimer]] = []

    def monotonic_s(self) -> float:
        return self._elapsed_s

    def now(self) -> datetime:
        return self._began + timedelta(seconds=self._elapsed_s)

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        timer = _VirtualTimer(callback)
        heapq.heappush(self._timers, (self._elapsed_s + max(0.0, delay_s), next(self._order), timer))
        return timer

    def next_due_s(self) -> float | None:
        """When the next timer rings, on `monotonic_s`'s scale; None if none is set."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def ring_next(self) -> None:
        """Move to the next timer and ring it (nothing if none is set)."""
        if self.next_due_s() is None:
            return
        due_s, _, timer = heapq.heappop(self._timers)
        self._elapsed_s = max(self._elapsed_s, due_s)
        callback, timer.callback = timer.callback, None
        if callback is not None:
            callback()

    def set_to(self, elapsed_s: float) -> None:
        """Move forward to *elapsed_s*, where no timer is due before it."""
        self._elapsed_s = max(self._elapsed_s, elapsed_s)


async def sleep(clock: Clock, delay_s: float) -> None:
    """Wait *delay_s* seconds of *clock*."""
    woken = asyncio.Event()
    timer = clock.call_later(delay_s, woken.set)
    try:
        await woken.wait()
    finally:
        timer.cancel()
