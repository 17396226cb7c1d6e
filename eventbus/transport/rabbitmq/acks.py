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
        self._prefix = 0  # how many of the contiguous prefix are to be acked, ...
        self._last = 0  # ... and the last of them: the broker must still know the tag that it is given
        self._behind: set[int] = set()  # settled, behind a gap
        self._acks: list[int] = []  # of those
        self._rejects: list[int] = []
        self._gap = 0  # what was the lowest open one as something was last settled behind it
        self._waited = 0

    @property
    def waited(self) -> int:
        """How long the lowest open one has been that: so many were settled behind it meanwhile, each acked singly."""
        return self._waited if self._gap == self._lowest_open else 0

    def ack(self, tag: int) -> None:
        if tag == self._lowest_open:
            self._prefix += 1
            self._last = tag
            self._close_gap()
        else:
            self._settled_behind(tag)
            self._acks.append(tag)

    def reject(self, tag: int) -> None:
        self._rejects.append(tag)
        if tag == self._lowest_open:
            self._close_gap()
        else:
            self._settled_behind(tag)

    def _settled_behind(self, tag: int) -> None:
        self._behind.add(tag)
        if self._gap != self._lowest_open:
            self._gap, self._waited = self._lowest_open, 0
        self._waited += 1

    def _close_gap(self) -> None:
        self._lowest_open += 1
        while self._behind and self._lowest_open in self._behind:
            self._behind.remove(self._lowest_open)
            self._lowest_open += 1

    def take(self) -> list[Settlement]:
        """What to send now, in this order."""
        if self._acks:
            closed = [tag for tag in self._acks if tag < self._lowest_open]
            self._prefix += len(closed)
            self._last = max([self._last, *closed])
        # Rejects first: a `multiple` ack that overtook one would ack it, and the dead letter would be lost.
        batch: list[Settlement] = [Reject(tag) for tag in self._rejects]
        if self._prefix:
            batch.append(Ack(self._last, is_multiple=self._prefix > 1))
        batch += [Ack(tag) for tag in self._acks if tag > self._lowest_open]
        self._prefix, self._acks, self._rejects = 0, [], []
        return batch
