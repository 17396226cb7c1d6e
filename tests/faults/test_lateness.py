"""A short form of `make lateness`: never early, and complete. And the proof that its figures can fail."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.faults.lateness import WAYS, Sent, at_once, figures_of, measure
from tests.faults.ledger import report
from tests.servers import BrokerServer

SECOND = timedelta(seconds=1)


@pytest.mark.parametrize("what", WAYS)
async def test_a_hundred_of_a_kind_are_never_early_and_complete(every_line: BrokerServer, what: str) -> None:
    found = await measure(every_line.new_vhost(), what, 100, longest=2 * SECOND)

    assert (found.messages, found.early, found.missing) == (100, 0, 0)


def test_what_is_early_or_missing_or_twice_shows() -> None:
    sent = {number: Sent(10.0 + number, SECOND) for number in range(4)}

    found = figures_of(sent, {0: [10.999], 1: [12.25], 2: [13.5, 99.0]})

    assert not found.is_good
    assert (found.early, found.missing, found.twice) == (1, 1, 1)
    assert (found.earliest_s, found.p50_s, found.max_s) == pytest.approx((-0.001, 0.25, 0.5))


def test_lateness_is_after_the_delay_as_the_tree_rounds_it_and_earliest_after_what_was_asked() -> None:
    found = figures_of({0: Sent(0.0, timedelta(milliseconds=260))}, {0: [0.6]})

    assert (found.earliest_s, found.max_s) == pytest.approx((0.34, 0.1))


def test_that_nothing_came_is_told_too() -> None:
    found = figures_of({0: Sent(0.0, SECOND)}, {})

    assert (found.missing, found.earliest_s, found.max_s) == (1, None, None)


def test_what_is_due_at_once_has_delays_that_the_tree_keeps_to_the_letter() -> None:
    delays = at_once(50, 8 * SECOND)

    assert delays == sorted(delays, reverse=True)
    assert len(delays) == 50
    assert all(Sent(0.0, delay).due_s == delay.total_seconds() for delay in delays)
    assert delays[0] == 8 * SECOND
    assert len(set(delays)) > 5


def test_the_ledger_shows_it() -> None:
    row = {"broker": "4.3", "what": "events at once", "messages": 100, "due_within_s": 0.1, "earliest_s": None,
           "p50_s": 0.0625, "p99_s": 1.0, "max_s": 2.0, "early": 0, "missing": 0, "twice": 0,
           "versions": {"rabbitmq": "4.3.6"}, "started": "2026-01-02T03:04:05+00:00"}  # fmt: skip

    shown = report.as_markdown([], [row])

    assert "| 4.3 | events at once | 100 | 0.100 | - | 0.062 | 1.000 | 2.000 | 0 | 0 | 0 |" in shown
    assert "rabbitmq 4.3.6. Run 2026-01-02." in shown
    assert "## The delay tree" not in report.as_markdown([])
