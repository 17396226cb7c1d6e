"""From what programs answered to figures: rates, percentiles, medians, ratios. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from benchmarks.plan import (
    FASTSTREAM,
    FOR_ONE,
    MANY_SLOW,
    NO_HEADERS,
    ONE_SLOW,
    OURS,
    C,
    in_outbox,
    in_store,
    relayed,
)

# A program's line of JSON. Its `marks` are (events so far, seconds on the machine's clock, seconds of CPU).
Answer = Mapping[str, Any]
WARM_EVENTS = 1000  # not counted: connections warm up, caches fill
WARM_LATENCIES = 500
PERCENTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}

PUBLISH_WINDOW, PUBLISH_ONE, PUBLISH_MANY, HANDLE = "publish, window", "publish, one by one", "publish_many", "handle"
MEMORY, MEMORY_AT_10000, CPU_PUBLISH, CPU_HANDLE = "memory", "memory after 10,000", "CPU, publish", "CPU, handle"
RELAYED, TRANSACTION, TRANSACTION_WITH_EVENT = "rows relayed", "transaction", "transaction with an event"
UNITS = {
    PUBLISH_WINDOW: "1/s", PUBLISH_ONE: "1/s", PUBLISH_MANY: "1/s", HANDLE: "1/s", MEMORY: "MB", MEMORY_AT_10000: "MB",
    CPU_PUBLISH: "µs", CPU_HANDLE: "µs", "latency p50": "ms", "latency p99": "ms", "latency p99.9": "ms",
    RELAYED: "1/s", TRANSACTION: "ms", TRANSACTION_WITH_EVENT: "ms",
    "embedded": "1/s", "import eventbus": "s", "from eventbus import *": "s", "eventbus --help": "s",
}  # fmt: skip
# Relays publish so many rows a second, or so much of what the bus itself does, whichever is less.
ENOUGH_ROWS, ENOUGH_OF_PUBLISHING = 5000.0, 0.6
# At least (+) or at most (-) so much, in one run.
TARGETS: dict[str, tuple[str, float]] = {
    "publish_window_vs_c": ("+", 0.8),
    "publish_window_vs_faststream": ("+", 3.5),
    "publish_sequential_vs_faststream": ("+", 1.3),
    "handle_vs_c": ("+", 0.5),
    "handle_vs_faststream": ("+", 8.0),
    "latency_p50_vs_faststream": ("-", 0.8),
    "latency_p99_vs_faststream": ("-", 0.8),
    "tracing_on_vs_off": ("+", 0.4),
    "subscriptions_1000_vs_1": ("+", 0.9),
    "memory_million_vs_ten_thousand": ("-", 1.2),
    "slow_handler_vs_none": ("+", 0.9),
    "handle_redis_vs_memory": ("+", 0.5),
    "handle_postgresql_vs_memory": ("+", 0.25),
    "relay_vs_enough": ("+", 1.0),
    "relay_pickup_p50_ms": ("-", 50.0),
    "import_eventbus_s": ("-", 0.25),
    "eventbus_help_s": ("-", 0.5),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one run of one cell."""

    what: str
    value: float


@dataclass(slots=True)
class Figures:
    """All figures of a run: each round's, by what was measured, program and variant."""

    rounds: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)

    def add(self, program: str, variant: str, figure: Figure) -> None:
        self.rounds.setdefault((figure.what, program, variant), []).append(figure.value)

    def median(self, what: str, program: str = OURS, variant: str = "") -> float | None:
        """The rounds' median, or None if that was not measured."""
        values = self.rounds.get((what, program, variant))
        return statistics.median(values) if values else None

    def ratio(self, over: tuple[str, str, str], under: tuple[str, str, str]) -> float | None:
        """The median of the rounds' ratios, or None if either was not measured.

        What a machine does besides changes within minutes: two cells of one round are nearer to one another than two
        medians of the whole run. Those are divided where the rounds are not the same, as one of them failed.
        """
        above, below = self.rounds.get(over), self.rounds.get(under)
        if not above or not below or not all(below):
            return None
        if len(above) != len(below):
            return round(statistics.median(above) / statistics.median(below), 3)
        return round(statistics.median(one / other for one, other in zip(above, below, strict=True)), 3)


def rate_of(answers: Sequence[Answer]) -> float:
    """Events a second, of one process or of several while all of them were at work."""
    tracks = [_warm(answer["marks"]) for answer in answers]
    begin, end = max(track[0][1] for track in tracks), min(track[-1][1] for track in tracks)
    if end <= begin:
        raise ValueError("the processes were not at work at the same time, or measured too little")
    return sum(_count_at(track, end) - _count_at(track, begin) for track in tracks) / (end - begin)


def _warm(marks: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    if not marks:
        raise ValueError("a process saw nothing")
    warm = min(WARM_EVENTS, marks[-1][0] / 10)
    return [mark for mark in marks if mark[0] >= warm]


def _count_at(marks: Sequence[Sequence[float]], moment: float) -> float:
    for (count, at, *_), (next_count, next_at, *_) in pairwise(marks):
        if at <= moment <= next_at and next_at > at:
            return count + (next_count - count) * (moment - at) / (next_at - at)
    return marks[-1][0] if moment >= marks[-1][1] else marks[0][0]


def latencies_of(answer: Answer) -> list[Figure]:
    """Percentiles in milliseconds."""
    taken = sorted(answer["latencies_us"][min(WARM_LATENCIES, len(answer["latencies_us"]) // 5) :])
    return [
        Figure(f"latency {name}", taken[min(len(taken) - 1, int(share * len(taken)))] / 1000)
        for name, share in PERCENTILES.items()
    ]


def cpu_us(answers: Sequence[Answer]) -> float:
    """The processes' CPU time per event, after the warm-up."""
    tracks = [_warm(answer["marks"]) for answer in answers]
    events = sum(track[-1][0] - track[0][0] for track in tracks)
    return 1e6 * sum(track[-1][2] - track[0][2] for track in tracks) / max(1, events)


def median_ms(taken_us: Sequence[int]) -> float:
    """In milliseconds."""
    return statistics.median(taken_us) / 1000


def ratios_of(figures: Figures) -> dict[str, float]:
    """What the targets are about. What was not measured is not there."""

    def versus(what: str, program: str) -> float | None:
        return figures.ratio((what, OURS, ""), (what, program, ""))

    def variant(what: str, name: str) -> float | None:
        return figures.ratio((what, OURS, name), (what, OURS, ""))

    tracing = [ratio for what in (PUBLISH_WINDOW, HANDLE) if (ratio := variant(what, "with tracing")) is not None]
    found = {
        "publish_window_vs_c": versus(PUBLISH_WINDOW, C),
        "publish_window_vs_c_without_headers": figures.ratio(
            (PUBLISH_WINDOW, OURS, ""), (PUBLISH_WINDOW, C, NO_HEADERS)
        ),
        "publish_window_vs_faststream": versus(PUBLISH_WINDOW, FASTSTREAM),
        "publish_sequential_vs_faststream": figures.ratio(
            (PUBLISH_ONE, OURS, "one by one"), (PUBLISH_ONE, FASTSTREAM, "one by one")
        ),
        "handle_vs_c": versus(HANDLE, C),
        "handle_vs_c_without_headers": figures.ratio((HANDLE, OURS, ""), (HANDLE, C, NO_HEADERS)),
        "handle_vs_faststream": versus(HANDLE, FASTSTREAM),
        "latency_p50_vs_faststream": figures.ratio(
            ("latency p50", OURS, "latency"), ("latency p50", FASTSTREAM, "latency")
        ),
        "latency_p99_vs_faststream": figures.ratio(
            ("latency p99", OURS, "latency"), ("latency p99", FASTSTREAM, "latency")
        ),
        "tracing_on_vs_off": min(tracing, default=None),  # the worse of publishing and handling
        "subscriptions_1000_vs_1": variant(HANDLE, "1000 subscriptions"),
        "subscriptions_1000_events_for_one_vs_1": variant(HANDLE, FOR_ONE),
        "memory_million_vs_ten_thousand": figures.ratio(
            (MEMORY, OURS, "a backlog of 1,000,000"), (MEMORY, OURS, "a backlog of 10,000")
        ),
        "slow_handler_vs_none": variant(HANDLE, ONE_SLOW),
        "slow_one_in_5000_vs_none": variant(HANDLE, MANY_SLOW),
        "handle_redis_vs_memory": variant(HANDLE, in_store("redis")),
        "handle_postgresql_vs_memory": variant(HANDLE, in_store("postgresql")),
        "relay_vs_enough": _relay_vs_enough(figures),
        "relay_pickup_p50_ms": figures.median("latency p50", OURS, in_outbox("postgresql")),
        "import_eventbus_s": figures.median("import eventbus", OURS, "start"),
        "eventbus_help_s": figures.median("eventbus --help", OURS, "start"),
    }
    return {name: round(ratio, 3) for name, ratio in found.items() if ratio is not None}


def _relay_vs_enough(figures: Figures) -> float | None:
    rows, published = figures.median(RELAYED, OURS, relayed("postgresql", 2)), figures.median(PUBLISH_WINDOW)
    if rows is None or published is None:
        return None
    return rows / min(ENOUGH_ROWS, ENOUGH_OF_PUBLISHING * published)


def is_met(name: str, ratio: float) -> bool:
    """Whether *ratio* is what its target asks."""
    sense, target = TARGETS[name]
    return ratio >= target if sense == "+" else ratio <= target
