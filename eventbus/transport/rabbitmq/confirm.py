"""What a publish waits for, and how it goes on.

A future of asyncio's tells the event loop, which has whoever waits go on a turn later: a handle, a place in a queue and
a look at all sockets for each event, which cost as much as to encode it. Here a task goes on at once, when all that the
socket brought has been read: what it publishes next is sent in the same turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any


class Confirm(asyncio.Future[bool]):
    """Whether a queue took a message; `GoingOn` ends it, or any of a future's own methods, with the usual delay."""

    __slots__ = ("waiting",)

    waiting: tuple[Callable[[Confirm], object], Context | None] | None  # the first that waits: a task, nearly always

    def add_done_callback(self, fn: Callable[[Confirm], object], *, context: Context | None = None) -> None:
        if self.waiting is None and not self.done():
            self.waiting = fn, context
        else:
            super().add_done_callback(fn, context=context)

    def remove_done_callback(self, fn: Callable[[Confirm], object], /) -> int:
        if self.waiting is not None and self.waiting[0] == fn:
            self.waiting = None
            return 1 + super().remove_done_callback(fn)
        return super().remove_done_callback(fn)

    def cancel(self, msg: Any = None) -> bool:
        is_cancelled = super().cancel(msg)
        self.go_on_later()
        return is_cancelled

    def set_exception(self, exception: type | BaseException, /) -> None:
        super().set_exception(exception)
        self.go_on_later()

    def go_on_later(self) -> None:
        """As a future's own."""
        if self.waiting is not None and self.done():
            (fn, context), self.waiting = self.waiting, None
            self.get_loop().call_soon(fn, self, context=context)


class GoingOn:
    """Those that were confirmed by what one read brought, in their order."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._confirmed: deque[Confirm] = deque()

    def confirm(self) -> Confirm:
        """A new one."""
        made = Confirm(loop=self._loop)
        made.waiting = None
        return made

    def add(self, confirm: Confirm, *, is_routed: bool) -> bool:
        """End *confirm*, which must not have ended. Whether it is the first since `go_on`, which must be called."""
        confirm.set_result(is_routed)
        self._confirmed.append(confirm)
        return len(self._confirmed) == 1

    def go_on(self) -> None:
        """Let all go on now; within a task, which nobody may interrupt, a turn later."""
        confirmed = self._confirmed
        if asyncio.current_task(self._loop) is not None:
            while confirmed:
                confirmed.popleft().go_on_later()
        try:
            while confirmed:
                confirm = confirmed.popleft()
                if (waiting := confirm.waiting) is not None:
                    confirm.waiting = None
                    fn, context = waiting
                    if context is None:
                        fn(confirm)
                    else:
                        context.run(fn, confirm)
        finally:
            if confirmed:  # SystemExit, or the like, from a task: the others go on all the same
                self._loop.call_soon(self.go_on)
