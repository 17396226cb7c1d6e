"""What a publish waits for, and how its task goes on.

A future of asyncio's asks the event loop to let whoever waits go on a turn later: for each event a handle, a place in a
queue and, for one that is alone, a look at all sockets. Here the tasks go on as soon as all that the socket has brought
is read, and what they publish next is sent in the same turn: a twentieth of the time of one publish after another
(PERFORMANCE.md).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any


class Confirm(asyncio.Future[bool]):
    """Whether a queue took a message. `go_on` lets the task that waits go on at once; all else is a future's own."""

    __slots__ = ("context", "waiting")

    context: Context  # of what waits
    waiting: Callable[[Confirm], object] | None  # a task's step; whoever makes a confirm sets it to None

    def add_done_callback(self, fn: Callable[[Confirm], object], *, context: Context | None = None) -> None:
        if self.waiting is None and context is not None and not self.done():
            self.waiting, self.context = fn, context  # as a task does that awaits it
        else:
            super().add_done_callback(fn, context=context)

    def remove_done_callback(self, fn: Callable[[Confirm], object], /) -> int:
        removed = super().remove_done_callback(fn)
        if self.waiting == fn:
            self.waiting, removed = None, removed + 1
        return removed

    def cancel(self, msg: Any = None) -> bool:
        is_cancelled = super().cancel(msg)
        if is_cancelled:
            self.go_on_later()
        return is_cancelled

    def set_exception(self, exception: type | BaseException, /) -> None:
        super().set_exception(exception)
        self.go_on_later()

    def go_on_later(self) -> None:
        """In the event loop's next turn, if it has ended."""
        if self.waiting is not None and self.done():
            waiting, self.waiting = self.waiting, None
            self.get_loop().call_soon(waiting, self, context=self.context)


def go_on(ended: deque[Confirm], loop: asyncio.AbstractEventLoop) -> None:
    """Let the tasks that wait for *ended* go on, in this order, and empty it."""
    if asyncio.current_task(loop) is not None:  # nobody may interrupt it
        while ended:
            ended.popleft().go_on_later()
    try:
        while ended:
            confirm = ended.popleft()
            if (waiting := confirm.waiting) is not None:
                confirm.waiting = None
                confirm.context.run(waiting, confirm)
    except (SystemExit, KeyboardInterrupt) as error:
        # A task ends the program: from a handle of the loop's, as from any task. Whoever reads a socket would take it
        # for the connection's failure (uvloop does). The others go on all the same.
        loop.call_soon(_end_program, error)
        loop.call_soon(go_on, ended, loop)


def _end_program(error: BaseException) -> None:
    raise error
