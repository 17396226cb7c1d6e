"""When the delay tree can hold nothing from before any more, and how the whole wait is bounded."""

from __future__ import annotations

import pytest

from eventbus.delay import LEVELS
from eventbus.transport.rabbitmq.removal import LATE_S, Draining, wait_s


def tree(**levels: int) -> list[int]:
    """How many messages each level holds: `tree(l3=2)`."""
    left = [0] * LEVELS
    for name, count in levels.items():
        left[int(name[1:])] = count
    return left


def test_a_level_is_twice_as_long_as_the_one_below() -> None:
    assert [wait_s(level) for level in (0, 1, 2, 10)] == [0.25, 0.5, 1.0, 256.0]


def test_an_empty_tree_is_believed_at_the_second_look() -> None:
    draining = Draining(0)

    assert not draining.look(tree(), 0)
    assert draining.look(tree(), 1)


def test_what_was_on_its_way_between_two_levels_is_seen_at_the_second_look() -> None:
    draining = Draining(0)

    assert not draining.look(tree(), 0)
    assert not draining.look(tree(l4=1), 1)
    assert not draining.look(tree(), 2)
    assert draining.look(tree(), 3)


def test_a_level_that_other_services_keep_filling_is_clear_when_its_time_has_passed() -> None:
    draining, busy = Draining(0), tree(l5=7)
    draining.look(busy, 0)
    draining.look(busy, 1)
    began = draining.since_s

    assert not draining.look(busy, began + wait_s(5) + LATE_S - 0.1)
    # Those below were empty all the time.
    assert draining.look(busy, began + wait_s(5) + LATE_S)


def test_a_lower_levels_time_begins_when_those_above_are_clear() -> None:
    draining, busy = Draining(0), tree(l5=7, l3=1)
    draining.look(busy, 0)
    draining.look(busy, 1)
    five = 1 + wait_s(5) + LATE_S

    assert not draining.look(busy, five)
    assert draining.level == 3
    assert not draining.look(busy, five + wait_s(3) + LATE_S - 0.1)
    assert draining.look(busy, five + wait_s(3) + LATE_S)


def test_a_level_that_is_filled_again_from_above_is_looked_at_again() -> None:
    draining = Draining(0)
    for now_s, left in enumerate([tree(l5=1), tree(l5=1), tree(l3=1), tree(l3=1)]):
        assert not draining.look(left, now_s)

    assert draining.level == 3


@pytest.mark.parametrize(
    ("left", "longest_s"), [(tree(), LATE_S), (tree(l0=1), 0.25 + LATE_S), (tree(l2=9, l1=1), 1.75 + LATE_S)]
)
def test_the_longest_wait_is_that_of_the_highest_level_and_all_below(left: list[int], longest_s: float) -> None:
    assert Draining(0).longest_s(left) == longest_s
