"""Takes a service off a broker: unbind, wait until the delay tree holds nothing for it, delete.

Deleting a queue into which messages still flow can stop the delay tree for every service. So its bindings to fresh
events go first, and its retry queue stays bound until what waits in the tree for it has come down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from eventbus.delay import LEVELS, UNIT
from eventbus.errors import SetupError, TransportError
from eventbus.topology import Names
from eventbus.transport.rabbitmq.asking import Asking
from eventbus.transport.rabbitmq.management import Management
from eventbus.transport.rabbitmq.verify import Standing

LOOK_EVERY_S: Final = 1.0
# How much later than due a busy broker may hand a message on: 6 s were seen with 40,000 due at once.
LATE_S: Final = 15.0


class StillInUse(SetupError):
    """The service is at work, or there is none of that name."""


class NotDrained(TransportError):
    """The delay tree may still hold something for the service."""


@dataclass(frozen=True, slots=True)
class Removed:
    """What became of the service's queues. `discarded`: how many messages went with those that were deleted."""

    deleted: tuple[str, ...]
    kept: tuple[str, ...]
    discarded: int


@dataclass(slots=True)
class Draining:
    """Which levels of the delay tree may still hold what was in it when the draining began. Pure.

    No broker tells whose messages wait in a queue. But they only ever fall: a level holds none from the beginning any
    more once those above it hold none and it was seen empty, or its time has passed. Other services' messages, which
    keep coming, delay nothing beyond that.
    """

    since_s: float
    level: int = LEVELS - 1  # the highest that may still hold some; -1: none does
    _was_empty: list[bool] = field(default_factory=lambda: [False] * LEVELS)

    def look(self, left: Sequence[int], now_s: float) -> bool:
        """Take note of how many messages each level holds now, and say whether nothing can be left.

        A message on its way from one level to the next is in neither: empty is what was so twice, one look apart.
        """
        while self.level >= 0 and self._is_clear(left[self.level], now_s):
            self.since_s = now_s  # from here on none comes down any more, and the next level's time runs
            self.level -= 1
        self._was_empty = [not count for count in left]
        return self.level < 0

    def _is_clear(self, left: int, now_s: float) -> bool:
        if not left:
            return self._was_empty[self.level]
        return now_s >= self.since_s + wait_s(self.level) + LATE_S

    def longest_s(self, left: Sequence[int]) -> float:
        """About how long it may take from here on, at most."""
        highest = max((level for level in range(self.level + 1) if left[level]), default=-1)
        return sum(wait_s(level) for level in range(highest + 1)) + LATE_S


def wait_s(level: int) -> float:
    """How long a message waits in *level*."""
    return float((UNIT * 2**level).total_seconds())


@dataclass(frozen=True, slots=True)
class Removal:
    """The removal of *service*; each step can be repeated after a crash."""

    names: Names
    service: str
    asking: Asking
    management: Management

    async def look(self) -> Mapping[str, Standing]:
        """The service's queues, as they stand.

        Raises:
            StillInUse: one is consumed, or there are none.
        """
        names = self.names
        mine = (names.queue(self.service), names.retry_queue(self.service), names.dead_queue(self.service))
        found = await self.asking.queues(mine)
        if not found:
            raise StillInUse(
                f"there is no service '{self.service}' in namespace {names.namespace}: the broker has no {mine[0]}"
            )
        for name, standing in found.items():
            if standing.consumers:
                raise StillInUse(f"{name} has {standing.consumers} consumer(s): stop the service's workers first")
        return found

    async def unbind(self) -> int:
        """Let no fresh event reach the service any more, and return how many bindings that took."""
        queue = self.names.queue(self.service)
        bindings = [b for b in await asyncio.to_thread(self.management.bindings) if b.destination == queue]
        await asyncio.to_thread(self.management.unbind, bindings)
        return len(bindings)

    async def drain(self, within_s: float, say: Callable[[str], None]) -> None:
        """Return once the delay tree holds nothing for the service.

        Raises:
            NotDrained: not *within_s*. The service gets no fresh events any more; removing it can be tried again.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + within_s
        draining, said = Draining(loop.time()), -1
        while not draining.look(left := await self._left(), loop.time()):
            if loop.time() >= deadline_s and any(left):
                raise NotDrained(
                    f"the delay tree may hold retries of {self.service} for about {draining.longest_s(left):,.0f} s "
                    f"more; it gets no fresh events any more. Remove it again later, or give --wait SECONDS"
                )
            if any(left) and said != draining.level:
                said = draining.level
                say(f"waiting for the delay tree: about {draining.longest_s(left):,.0f} s at most")
            await asyncio.sleep(LOOK_EVERY_S)

    async def _left(self) -> list[int]:
        """How many messages each level holds: those that wait, now, and those that leave it, as of some seconds ago."""
        names = [self.names.delay_level(level) for level in range(LEVELS)]
        seen = await asyncio.to_thread(self.management.queues)
        # From the highest level down, as they fall: none can slip past the look.
        ready = {name: await self.asking.queue(name) for name in reversed(names)}
        return [
            (standing.ready if (standing := ready[name]) else 0) + (seen[name].dlx if name in seen else 0)
            for name in names
        ]

    async def delete(self, *, dead_letters: bool) -> Removed:
        """Delete the queues; the one of the dead letters only if it is empty, or with *dead_letters*.

        Raises:
            StillInUse: a worker was started meanwhile.
        """
        standing = await self.look()
        seen = await asyncio.to_thread(self.management.queues)
        deleted, kept, discarded = [], [], 0
        for name, stands in standing.items():
            # What somebody looks at just now is not ready, and must not be taken for absent.
            held = max(stands.ready, seen[name].messages if name in seen else 0)
            if name == self.names.dead_queue(self.service) and held and not dead_letters:
                kept.append(name)
                continue
            await asyncio.to_thread(self.management.delete_queue, name)
            deleted.append(name)
            discarded += stands.ready
        return Removed(tuple(deleted), tuple(kept), discarded)
