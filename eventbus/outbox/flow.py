"""Rows on their way to the broker: those of one key one after the other, keys side by side.

The one rule: a row is published only when the one before it of the same key is confirmed, and only while its bucket is
this relay's. A row that is not confirmed stops its key for a while, and no other. No database here: what became of rows
is collected, and somebody else writes it down.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from eventbus.errors import EnvelopeError, PublishError
from eventbus.outbox.base import Row

log = logging.getLogger("eventbus.outbox")

# After a row was not confirmed, which takes its time by itself, its key waits for so long; twice as long each time.
FIRST_HOLD_S = 1.0
LONGEST_HOLD_S = 60.0
K = TypeVar("K")


@dataclass(slots=True)
class Ended:
    """What became of rows since it was last asked."""

    published: list[Row] = field(default_factory=list)
    failed: list[tuple[Row, PublishError]] = field(default_factory=list)
    set_aside: list[tuple[Row, str]] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)  # not tried: behind one that failed, or of a bucket that was lost

    def rows(self) -> list[Row]:
        others = [row for row, _ in self.failed] + [row for row, _ in self.set_aside]
        return [*self.published, *others, *self.left]

    def __bool__(self) -> bool:
        return bool(self.published or self.failed or self.set_aside or self.left)


class Flow:
    """Hands rows to *publish*, which raises what `Sender.send` does; *generation* is that of `Leases`."""

    def __init__(self, publish: Callable[[Row], Awaitable[None]], generation: Callable[[int], int | None]) -> None:
        self._publish, self._generation = publish, generation
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = Ended()
        self._busy_keys: Counter[str] = Counter()
        self._busy_ids: set[int] = set()
        self._busy_buckets: Counter[int] = Counter()
        self._held_keys: dict[str, float] = {}  # until when, on the event loop's clock
        self._held_ids: dict[int, float] = {}
        self.has_ended = asyncio.Event()  # set when there is something to collect
        self.is_empty = asyncio.Event()
        self.is_empty.set()

    @property
    def count(self) -> int:
        """How many rows were taken and not let go of yet."""
        return self._busy_buckets.total()

    def is_idle(self, bucket: int) -> bool:
        """Whether nothing of *bucket* is on its way."""
        return not self._busy_buckets[bucket]

    def busy_keys(self) -> set[str]:
        """The keys whose rows are not to be read now."""
        return {*self._busy_keys, *_still_held(self._held_keys)}

    def busy_ids(self) -> set[int]:
        """The rows without a key that are not to be read now."""
        return {*self._busy_ids, *_still_held(self._held_ids)}

    def take(self, rows: Iterable[Row]) -> None:
        """Publish *rows*, which are in order, and of which no key is busy."""
        chains: dict[object, list[Row]] = {}
        for row in rows:
            self._busy_buckets[row.bucket] += 1
            if row.key is None:
                self._busy_ids.add(row.id)
                chains[row.id] = [row]
            else:
                self._busy_keys[row.key] += 1
                chains.setdefault((row.key,), []).append(row)
        for chain in chains.values():
            task = asyncio.get_running_loop().create_task(self._send(chain))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if chains:
            self.is_empty.clear()

    def collect(self) -> Ended:
        """What became of rows since the last time. Give it to `let_go` when it is written down."""
        ended, self._ended = self._ended, Ended()
        self.has_ended.clear()
        return ended

    def let_go(self, rows: Sequence[Row]) -> bool:
        """Rows of these keys may be read again; whether a key has become free by that."""
        has_freed = False
        for row in rows:
            self._busy_buckets[row.bucket] -= 1
            if row.key is None:
                self._busy_ids.discard(row.id)
                has_freed = True
            elif self._busy_keys[row.key] > 1:
                self._busy_keys[row.key] -= 1
            else:
                del self._busy_keys[row.key]
                has_freed = True
        if not self.count:
            self.is_empty.set()
        return has_freed

    async def end(self) -> None:
        """Give up what is still on its way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, chain: list[Row]) -> None:
        generations = {row.bucket: self._generation(row.bucket) for row in chain}
        for at, row in enumerate(chain):
            generation = generations[row.bucket]
            if generation is None or self._generation(row.bucket) != generation:
                self._ended.left.extend(chain[at:])
                self.has_ended.set()
                return
            try:
                await self._publish(row)
            except (EnvelopeError, ValueError) as error:  # the second: a delay that cannot be
                self._ended.set_aside.append((row, str(error)))
            except PublishError as error:
                self._hold(row)
                self._ended.failed.append((row, error))
                self._ended.left.extend(chain[at + 1 :])
                self.has_ended.set()
                return
            except Exception:
                # A bug of ours, or in a hook of the user's telemetry: this key waits, nothing else does.
                log.exception("row %s of the outbox could not be published", row.id)
                self._hold(row)
                self._ended.left.extend(chain[at:])
                self.has_ended.set()
                return
            else:
                self._ended.published.append(row)
            self.has_ended.set()

    def _hold(self, row: Row) -> None:
        until_s = asyncio.get_running_loop().time() + min(FIRST_HOLD_S * 2 ** min(row.attempts, 10), LONGEST_HOLD_S)
        if row.key is None:
            self._held_ids[row.id] = until_s
        else:
            self._held_keys[row.key] = until_s


def _still_held(held: dict[K, float]) -> Iterable[K]:
    if held:
        now_s = asyncio.get_running_loop().time()
        for key in [key for key, until_s in held.items() if until_s <= now_s]:
            del held[key]
    return held
