"""The delay tree's arithmetic."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventbus.delay import LEVELS, LONGEST, MAX_BITS, UNIT, Way, round_up, rounded, way

DELAYS = st.timedeltas(timedelta(0), LONGEST)
TICK = timedelta(microseconds=1)


@given(DELAYS)
@example(timedelta(0))
@example(UNIT)
@example(UNIT + TICK)
@example(LONGEST)
@example(LONGEST - TICK)
def test_never_early_and_at_most_15_percent_and_a_unit_late(delay: timedelta) -> None:
    assert delay <= rounded(delay) <= delay * 1.15 + UNIT


@given(st.integers(1, LONGEST // UNIT))
def test_whole_units_are_late_by_15_percent_at_most(units: int) -> None:
    assert rounded(UNIT * units) <= UNIT * units * 1.15


@given(DELAYS)
@example(LONGEST)
def test_at_most_three_hops(delay: timedelta) -> None:
    assert round_up(delay).bit_count() <= MAX_BITS == 3


@given(DELAYS, DELAYS)
def test_a_longer_delay_is_never_over_sooner(one: timedelta, other: timedelta) -> None:
    shorter, longer = sorted((one, other))

    assert rounded(shorter) <= rounded(longer)


@given(DELAYS)
def test_rounding_up_twice_changes_nothing(delay: timedelta) -> None:
    assert rounded(rounded(delay)) == rounded(delay)


@given(st.integers(0, 2**12))
def test_it_is_the_smallest_number_of_units_that_will_do(units: int) -> None:
    smallest = next(number for number in range(units, 2**13) if number.bit_count() <= MAX_BITS)

    assert round_up(UNIT * units) == smallest


@given(DELAYS, st.sampled_from(["retry.payments", "publish.order_placed.v1"]))
def test_the_key_is_the_units_in_bits_then_the_target(delay: timedelta, target: str) -> None:
    key = way(delay, target).key
    bits, rest = key.split(".")[:LEVELS], key.split(".")[LEVELS:]

    assert int("".join(bits), 2) == round_up(delay)
    assert ".".join(rest) == target


@given(DELAYS)
def test_a_message_enters_at_its_first_set_bit(delay: timedelta) -> None:
    entered = way(delay, "retry.payments")
    bits = entered.key.split(".")[:LEVELS]

    first = bits.index("1") if "1" in bits else None
    assert entered.level == (None if first is None else LEVELS - 1 - first)


@given(DELAYS)
def test_the_queues_on_the_way_hold_it_exactly_that_long(delay: timedelta) -> None:
    entered = way(delay, "retry.payments")
    held = timedelta(0)
    for level, bit in zip(reversed(range(LEVELS)), entered.key.split("."), strict=False):
        if bit == "1":
            assert entered.level is not None
            assert level <= entered.level
            held += UNIT * 2**level

    assert held == rounded(delay)


@pytest.mark.parametrize(
    ("delay", "expected"),
    [
        (timedelta(0), Way(None, "0." * LEVELS + "x")),
        (TICK, Way(0, "0." * (LEVELS - 1) + "1.x")),
        (UNIT, Way(0, "0." * (LEVELS - 1) + "1.x")),
        (timedelta(seconds=1), Way(2, "0." * (LEVELS - 3) + "1.0.0.x")),
        (LONGEST, Way(LEVELS - 1, "1.1.1." + "0." * (LEVELS - 3) + "x")),
    ],
)
def test_some_ways(delay: timedelta, expected: Way) -> None:
    assert way(delay, "x") == expected


def test_forty_two_days_are_possible() -> None:
    assert timedelta(days=42) <= rounded(timedelta(days=42)) <= LONGEST < timedelta(days=43)


@pytest.mark.parametrize("delay", [LONGEST + TICK, timedelta(days=43), timedelta.max])
def test_longer_is_refused(delay: timedelta) -> None:
    with pytest.raises(ValueError, match="too long"):
        way(delay, "x")


@pytest.mark.parametrize("delay", [-TICK, timedelta.min])
def test_the_past_is_refused(delay: timedelta) -> None:
    with pytest.raises(ValueError, match="past"):
        round_up(delay)
