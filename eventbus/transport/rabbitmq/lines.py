"""What differs between the broker lines, in one table; which line answers is read from its server properties.

Behaviour only. Arguments of queues and exchanges are the same on every line (`eventbus.topology`), so that a broker can
be upgraded in place. What no code asks for stands here since rules rest on it: a pause closes the channel, a copy loses
what the broker wrote. `tests/faults/test_lines.py` asks each line whether it does as the table says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from eventbus.errors import SetupError

MIB: Final = 1024 * 1024
OLDEST: Final = (3, 10)  # quorum queues learned message TTL and at-least-once dead-lettering there


@dataclass(frozen=True, slots=True)
class Line:
    """How the brokers from version *since* on behave, up to the next line."""

    since: tuple[int, int]
    # The default of `max_message_size`; a broker may be configured otherwise, and says so in its 406.
    max_message_bytes: int
    # The headers that say how often a message was handed out before, the most truthful first.
    count_headers: tuple[str, ...]
    # After 30 minutes unacked: the channel is closed, with all it holds, or only this consumer is cancelled.
    ack_timeout_closes_channel: bool
    # Whether giving a message back counts against `x-delivery-limit`, by nack and by reject. A lost or closed channel
    # counts on every line.
    nack_counts: bool
    reject_counts: bool
    # Whether an `x-death` that a client sent is taken for the broker's own: it looks like a dead-letter cycle, then.
    believes_sent_x_death: bool


LINES: Final = (
    Line((3, 10), 128 * MIB, ("x-delivery-count",), ack_timeout_closes_channel=True,
         nack_counts=True, reject_counts=True, believes_sent_x_death=True),
    Line((4, 0), 16 * MIB, ("x-delivery-count",), ack_timeout_closes_channel=True,
         nack_counts=True, reject_counts=True, believes_sent_x_death=False),
    # From here on `x-delivery-count` leaves out what was given back on purpose or after an ack timeout.
    Line((4, 3), 16 * MIB, ("x-acquired-count", "x-delivery-count"), ack_timeout_closes_channel=False,
         nack_counts=False, reject_counts=True, believes_sent_x_death=False),
)  # fmt: skip


def line_of(product: str, version: str) -> Line:
    """The line of a broker that calls itself *product* *version*.

    Raises:
        SetupError: it is no RabbitMQ, or too old to keep what the bus promises.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if "RabbitMQ" not in product or numbers is None:
        raise SetupError(f"{product} {version} answered: the bus needs RabbitMQ 3.10 or newer".replace("  ", " "))
    stated = int(numbers[1]), int(numbers[2])
    if stated < OLDEST:
        raise SetupError(
            f"RabbitMQ {version} is too old: its quorum queues cannot delay messages or dead-letter them safely. "
            "Upgrade it to 3.10 or newer"
        )
    return next(line for line in reversed(LINES) if line.since <= stated)


def delivery_count(line: Line, headers: Mapping[str, object], *, is_redelivered: bool) -> int:
    """How often the broker handed a message out before, as far as it counts.

    The flag goes before the headers: on a first delivery they can only be a sender's or an earlier queue's.
    """
    if not is_redelivered:
        return 0
    for name in line.count_headers:
        count = headers.get(name)
        if isinstance(count, int) and not isinstance(count, bool):
            return max(1, count)
    return 1
