"""Waiting for a condition with a deadline, never for a duration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

PAUSE_S = 0.02


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, deadline_s: float = 60.0) -> None:
    """Return once *condition* holds; *what* says in the failure what was waited for."""
    try:
        async with asyncio.timeout(deadline_s):
            while not await condition():  # noqa: ASYNC110  # what is waited for is in another process or a file
                await asyncio.sleep(PAUSE_S)
    except TimeoutError:
        raise AssertionError(f"not within {deadline_s:g} s: {what}") from None
