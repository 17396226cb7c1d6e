"""Transports by URL. An adapter, and the client behind it, is loaded only when an URL asks for it."""

from __future__ import annotations

from eventbus.clock import Clock
from eventbus.errors import SetupError, hide_password
from eventbus.transport.base import Transport


def from_url(
    url: str | None, *, max_message_bytes: int | None = None, has_lane: bool = True, clock: Clock | None = None
) -> Transport:
    """The transport that *url* names.

    Raises:
        SetupError: no URL, or one that names no broker.
    """
    if not url:
        raise SetupError("no broker: pass url=... or set EVENTBUS_URL ('amqp://user:password@host/', or 'memory://')")
    scheme = url.partition("://")[0]
    if scheme == "memory":
        from eventbus.transport.memory import MemoryTransport

        return MemoryTransport(url, clock=clock)
    if scheme in ("amqp", "amqps"):
        from eventbus.transport.rabbitmq import RabbitMQ

        return RabbitMQ(url, max_message_bytes=max_message_bytes, has_lane=has_lane)
    raise SetupError(f"{hide_password(url)!r} names no broker: use amqp://, amqps:// or memory://")
