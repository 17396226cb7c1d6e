"""Idempotency stores by URL."""

from __future__ import annotations

from eventbus.clock import Clock
from eventbus.errors import SetupError, hide_password
from eventbus.idempotency.base import IdempotencyStore
from eventbus.idempotency.memory import MemoryStore

__all__ = ["IdempotencyStore", "MemoryStore", "from_url"]


def from_url(url: str, *, clock: Clock | None = None) -> IdempotencyStore:
    """The store that *url* names.

    Raises:
        SetupError: no store of that kind.
    """
    if url == "memory://":
        return MemoryStore(clock=clock)
    raise SetupError(f"no idempotency store for {hide_password(url)!r}: use 'memory://', or pass a store of your own")
