"""Which deliveries of one channel the broker is told about next. Pure: tags in, frames to send out.

Collected per turn of the event loop: the contiguous prefix of what is settled goes out as one `multiple` ack, what is
settled behind a gap singly. (The prefix alone stalls at the prefetch behind one slow handler; tried.)
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ack:
    """basic.ack of *tag*, or of everything unsettled up to it."""

    tag: int
    is_multiple: bool = False


@dataclass(frozen=True, slots=True)
class Reject:
    """basic.reject of *tag*, without requeue."""

    tag: int


Settlement = Ack | Reject


class AckBatch:
    """The settlements of one channel since the last `take`. Delivery tags count from 1 without gaps."""

    def __init__(self) -> None:
        self._lowest_open = 1
        self._settled: set[int] = set()
        self._acks: list[int] = []
        self._rejects: list[int] = []

    def ack(self, tag: int) -> None:
        self._settled.add(tag)
        self._acks.append(tag)

    def reject(self, tag: int) -> None:
        self._settled.add(tag)
        self._rejects.append(tag)

    def take(self) -> list[Settlement]:
        """What to send now, in this order."""
        while self._lowest_open in self._settled:
            self._settled.remove(self._lowest_open)
            self._lowest_open += 1
        # Rejects first: a `multiple` ack that overtook one would ack it, and the dead letter would be lost.
        batch: list[Settlement] = [Reject(tag) for tag in self._rejects]
        prefix = [tag for tag in self._acks if tag < self._lowest_open]
        if prefix:
            # The broker must still know the tag that it is given, so it is one of these, not merely the prefix's end.
            batch.append(Ack(max(prefix), is_multiple=len(prefix) > 1))
        batch += [Ack(tag) for tag in self._acks if tag > self._lowest_open]
        self._acks, self._rejects = [], []
        return batch
