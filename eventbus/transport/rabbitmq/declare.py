"""Sees to it that a topology exists. On throw-away channels: a refusal closes the channel that it came on.

What is shared is looked at first and declared only where it is missing, so that a user without the configure
permission runs once it exists. A service's own queues are declared and bound with every session.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final, assert_never

import aiormq

from eventbus.topology import Binding, Exchange, Queue, Topology
from eventbus.transport.base import Declare
from eventbus.transport.rabbitmq.refusals import Missing, not_allowed
from eventbus.transport.rabbitmq.session import Calling, Lost, Session

MAX_VIEW: Final = 10_000
MENTIONED: Final = 5  # of what is missing

Part = Exchange | Queue | Binding


async def declare(session: Session, topology: Topology, mode: Declare) -> None:
    """Declare (`apply`), only look at (`verify`) or leave alone (`never`) what *topology* says.

    Raises:
        TopologyConflict: the broker holds something else under one of its names.
        SetupError: a permission is missing, or with `verify` a part of the topology.
        Lost: the session died.
    """
    match mode:
        case "apply":
            await _apply(session, topology)
        case "verify":
            await _verify(session, topology)
        case "never":
            pass
        case _:
            assert_never(mode)


async def _apply(session: Session, topology: Topology) -> None:
    missing = await _missing(session, shared_objects(topology))
    parts: list[Part] = []
    if missing:
        bindings = [binding for binding in topology.bindings if binding.is_shared]
        parts += in_safe_order(missing, bindings)
    parts += [queue for queue in topology.queues if not queue.is_shared]
    parts += [binding for binding in topology.bindings if not binding.is_shared]
    await _declare_all(session, parts)


async def _verify(session: Session, topology: Topology) -> None:
    missing = await _missing(session, [*topology.exchanges, *topology.queues])
    if missing:
        raise Missing(f"missing at {session.address}: {some_of(missing)}. Declare it with: eventbus topology apply")


def some_of(parts: Sequence[Exchange | Queue]) -> str:
    """*parts*, in a line that a person can read: on an empty broker there are dozens."""
    names = [f"{type(part).__name__.lower()} '{part.name}'" for part in parts[:MENTIONED]]
    return ", ".join(names) + (f" and {len(parts) - MENTIONED} more" if len(parts) > MENTIONED else "")


def shared_objects(topology: Topology) -> list[Exchange | Queue]:
    return [*topology.exchanges, *(queue for queue in topology.queues if queue.is_shared)]


def in_safe_order(objects: Sequence[Exchange | Queue], bindings: Sequence[Binding]) -> list[Part]:
    """*objects* and *bindings* such that a crash half-way is noticed by the next start.

    Bindings cannot be looked at: they are taken to exist when all objects do. So an object that no binding needs (the
    exchange that events are published to) comes last, when every binding is there.
    """
    bound = {binding.source for binding in bindings} | {binding.destination for binding in bindings}
    return [
        *(part for part in objects if part.name in bound),
        *bindings,
        *(part for part in objects if part.name not in bound),
    ]


async def _missing(session: Session, parts: Sequence[Exchange | Queue]) -> list[Exchange | Queue]:
    """Which of *parts* the broker does not have."""
    if not parts or await _all_exist(session, parts):
        return []
    return [part for part in parts if not await _all_exist(session, [part])]


async def _all_exist(session: Session, parts: Sequence[Exchange | Queue]) -> bool:
    """One round trip: nothing is answered but the last question, or the channel is closed at the first miss."""
    channel = await session.open_probe()
    try:
        async with Calling(session, channel):
            for part in parts[:-1]:
                await _look_at(channel, part, nowait=True)
            await _look_at(channel, parts[-1], nowait=False)
    except Lost as lost:
        match lost.reason:
            case aiormq.ChannelNotFoundEntity():
                return False
            case aiormq.ChannelAccessRefused():
                # 4.2.6 to 4.3.0 show a user without the configure permission nothing: whoever has it declares.
                return len(parts) == 1
            case _:
                raise
    await _close(session, channel)
    return True


async def _look_at(channel: aiormq.Channel, part: Exchange | Queue, *, nowait: bool) -> None:
    if isinstance(part, Exchange):
        await channel.exchange_declare(part.name, exchange_type=part.type, passive=True, nowait=nowait)  # type: ignore[call-overload]
    else:
        await channel.queue_declare(part.name, passive=True, nowait=nowait)  # type: ignore[call-overload]


async def _declare_all(session: Session, parts: Sequence[Part]) -> None:
    if not parts:
        return
    channel = await session.open_probe()
    try:
        async with Calling(session, channel):
            # In order, but one round trip: the broker closes the channel at the first that it refuses, and says why.
            for part in parts[:-1]:
                await _declare(channel, part, nowait=True)
            await _declare(channel, parts[-1], nowait=False)
    except Lost as lost:
        if isinstance(lost.reason, aiormq.ChannelClosed) and session.is_live:
            raise not_allowed(lost.reason, session.address.user) from lost
        raise
    await _close(session, channel)


async def _declare(channel: aiormq.Channel, part: Part, *, nowait: bool) -> None:
    match part:
        case Exchange():
            await channel.exchange_declare(  # type: ignore[call-overload]
                part.name, exchange_type=part.type, durable=True, arguments=dict(part.arguments), nowait=nowait
            )
        case Queue():
            await channel.queue_declare(  # type: ignore[call-overload]
                part.name, durable=True, arguments=dict(part.arguments), nowait=nowait
            )
        case Binding(destination_type="queue"):
            await channel.queue_bind(part.destination, part.source, part.routing_key, nowait=nowait)  # type: ignore[call-overload]
        case Binding():
            await channel.exchange_bind(part.destination, part.source, part.routing_key, nowait=nowait)  # type: ignore[call-overload]
        case _:
            assert_never(part)


async def declare_view(session: Session, exchange: str, pattern: str) -> str:
    """The name of a new private queue, bound to *exchange* by *pattern*. It goes when *session* does.

    Raises:
        Lost: the session died, or the broker refused: `reason` says which.
    """
    name = f"{exchange}.tail.{secrets.token_hex(8)}"
    channel = await session.open_probe()
    async with Calling(session, channel):
        # Nobody waits for a view that lags: the oldest is dropped.
        await channel.queue_declare(name, exclusive=True, auto_delete=True, arguments={"x-max-length": MAX_VIEW})
        await channel.queue_bind(name, exchange, pattern)
        await channel.close()
    return name


async def _close(session: Session, channel: aiormq.Channel) -> None:
    async with Calling(session, channel):
        await channel.close()
