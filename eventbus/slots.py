"""A bound on how many do something at a time, for the path that every event takes.

`asyncio.Semaphore` does the same, but makes two coroutines for each of them, also where nobody has to wait.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Slots:
    """So many *free* slots, given in the order of asking. Whoever has one must `give` it back."""

    __slots__ = ("_free", "_waiting")

    def __init__(self, free: int) -> None:
        self._free = free  # none while somebody waits: a slot is passed on, not put back
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Take a slot if one is free; else `wait` for one."""
        if self._free:
            self._free -= 1
            return True
        return False

    async def wait(self) -> None:
        """Return with a slot taken; cancelled, with none."""
        passed_on = asyncio.get_running_loop().create_future()
        self._waiting.append(passed_on)
        try:
            await passed_on
        except asyncio.CancelledError:
            if passed_on.done() and not passed_on.cancelled():
                self.give()  # it came in the turn in which we were cancelled
            raise

    def give(self) -> None:
        """Give a slot to whoever has waited longest, or put it back."""
        while self._waiting:
            passed_on = self._waiting.popleft()
            if not passed_on.done():
                passed_on.set_result(None)
                return
        self._free += 1
