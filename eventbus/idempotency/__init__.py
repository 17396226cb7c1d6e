"""Idempotency stores by URL. A store, and the driver behind it, is loaded only when an URL asks for it."""

from __future__ import annotations

from eventbus.clock import Clock
from eventbus.errors import SetupError, hide_password
from eventbus.idempotency.base import IdempotencyStore
from eventbus.idempotency.memory import MemoryStore
from eventbus.idempotency.shared import Keeper, SharedStore

__all__ = ["IdempotencyStore", "Keeper", "MemoryStore", "SharedStore", "from_url", "keeper_of", "shared_store"]


def from_url(url: str, *, clock: Clock | None = None) -> IdempotencyStore:
    """The store that *url* names. Unless it is `memory://` it is a `SharedStore`, to be opened and closed.

    Raises:
        SetupError: no store of that kind, or its driver is not installed.
    """
    return MemoryStore(clock=clock) if url == "memory://" else shared_store(url)


def shared_store(url: str) -> SharedStore:
    """The store at *url*, which is not `memory://`, to be opened and closed: `async with shared_store(url) as store:`.

    Raises:
        SetupError: no store of that kind, or its driver is not installed.
    """
    return SharedStore(keeper_of(url))


def keeper_of(url: str) -> Keeper:
    """Where the store that *url* names keeps its keys.

    Raises:
        SetupError: no store of that kind, or its driver is not installed.
    """
    match url.partition("://")[0]:
        case "sqlite":
            from eventbus.idempotency.sql import SQLiteKeeper

            return SQLiteKeeper(url)
        case "postgresql":
            from eventbus.idempotency.sql import PostgreSQLKeeper

            return PostgreSQLKeeper(url)
        case "redis" | "rediss":
            from eventbus.idempotency.redis import RedisKeeper

            return RedisKeeper(url)
    raise SetupError(
        f"no idempotency store for {hide_password(url)!r}: use memory://, redis://, rediss://, sqlite:///path or "
        "postgresql://, or pass a store of your own"
    )
