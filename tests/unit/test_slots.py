"""Slots: as many at a time, in order, and none lost however its owner ends."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from eventbus.slots import Slots


async def test_there_are_as_many_as_were_made_and_what_is_given_back_can_be_taken_again() -> None:
    slots = Slots(2)

    assert [slots.take(), slots.take(), slots.take()] == [True, True, False]
    slots.give()
    assert [slots.take(), slots.take()] == [True, False]


async def test_who_waits_gets_one_in_the_order_of_asking_and_before_who_comes_later() -> None:
    slots = Slots(1)
    assert slots.take()
    served: list[str] = []

    async def ask(name: str) -> None:
        await slots.wait()
        served.append(name)

    waiting = [asyncio.create_task(ask(name)) for name in "abc"]
    await asyncio.sleep(0)
    slots.give()
    assert not slots.take()  # it is passed on already
    slots.give()
    slots.give()
    await asyncio.gather(*waiting)

    assert served == ["a", "b", "c"]


async def test_who_is_cancelled_while_waiting_takes_none() -> None:
    slots = Slots(1)
    assert slots.take()
    waiting = asyncio.create_task(slots.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting

    slots.give()
    assert slots.take()


async def test_who_is_cancelled_in_the_turn_in_which_a_slot_comes_gives_it_back() -> None:
    slots = Slots(1)
    assert slots.take()
    waiting = asyncio.create_task(slots.wait())
    await asyncio.sleep(0)
    slots.give()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting

    assert slots.take()


@given(free=st.integers(1, 3), cancelled=st.lists(st.booleans(), max_size=12))
def test_never_more_at_a_time_than_there_are_and_all_are_free_in_the_end(free: int, cancelled: list[bool]) -> None:
    async def run() -> None:
        slots, at_work, most = Slots(free), 0, 0

        async def work() -> None:
            nonlocal at_work, most
            if not slots.take():
                await slots.wait()
            at_work += 1
            most = max(most, at_work)
            try:
                await asyncio.sleep(0)
            finally:
                at_work -= 1
                slots.give()

        tasks = [asyncio.create_task(work()) for _ in cancelled]
        await asyncio.sleep(0)
        for task, is_cancelled in zip(tasks, cancelled, strict=True):
            if is_cancelled:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert most <= free
        assert [slots.take() for _ in range(free + 1)] == [True] * free + [False]

    asyncio.run(run())
