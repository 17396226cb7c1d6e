"""The delay tree's arithmetic: how long a delay becomes, and which way through the tree it takes.

The tree is LEVELS quorum queues; what enters level *n* stays 2^n units and then falls towards the end. A routing key
carries the delay as LEVELS words, `1` where the message waits, highest level first, and behind them its target. A
message enters at its first set bit. Pure: the exchanges and queues themselves are in `topology`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

UNIT = timedelta(milliseconds=250)
LEVELS = 24
# Each set bit is one hop through a queue. Three keep the rounding under 15 % (worst: 1001 -> 1010 after the third bit).
MAX_BITS = 3
LONGEST = UNIT * sum(1 << (LEVELS - 1 - bit) for bit in range(MAX_BITS))


@dataclass(frozen=True, slots=True)
class Way:
    """A way through the tree: the level to enter at (None: straight to the end) and the routing key to take it with."""

    level: int | None
    key: str


def round_up(delay: timedelta) -> int:
    """The smallest number of units that is not under *delay* and has at most `MAX_BITS` bits set.

    Raises:
        ValueError: *delay* is negative, or longer than `LONGEST` (42 days).
    """
    if delay < timedelta(0):
        raise ValueError(f"a delay of {delay} lies in the past: give zero or more")
    if delay > LONGEST:
        raise ValueError(f"a delay of {delay} is too long: at most {LONGEST}; keep longer plans in a database")
    units = -(-delay // UNIT)
    while units.bit_count() > MAX_BITS:
        units += units & -units  # carry the lowest bit upwards: the next number with fewer low bits
    return units


def way(delay: timedelta, target: str) -> Way:
    """How a message for *target* (`retry.<service>` or `publish.<type>`) is published to wait at least *delay*."""
    units = round_up(delay)
    bits = ".".join(f"{units:0{LEVELS}b}")
    return Way(level=units.bit_length() - 1 if units else None, key=f"{bits}.{target}")


def rounded(delay: timedelta) -> timedelta:
    """How long *delay* really becomes on an idle broker: at most 15 % and one unit more."""
    return round_up(delay) * UNIT
