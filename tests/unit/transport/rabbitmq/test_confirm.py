"""A confirm is a future like any other, but that the task which waits for it goes on at once."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from pamqp import frame
from pamqp.commands import Basic

from eventbus.message import Message
from eventbus.transport.base import Publication
from eventbus.transport.rabbitmq.confirm import Confirm, go_on
from tests.fuzz.lanes import FAR_S, Lanes, Pair, ids_in
from tests.fuzz.making import PUBLISHING

user = contextvars.ContextVar("user", default="nobody")


def confirm() -> Confirm:
    made = Confirm(loop=asyncio.get_running_loop())
    made.waiting = None
    return made


async def turn() -> None:
    await asyncio.sleep(0)


async def in_a_callback(call: Callable[[], object]) -> None:
    """Where no task runs, as it is when a socket is read."""
    asyncio.get_running_loop().call_soon(call)
    await turn()


def end(*confirms: Confirm) -> None:
    for each in confirms:
        each.set_result(True)
    go_on(deque(confirms), asyncio.get_event_loop())


async def test_who_waits_goes_on_at_once_in_its_own_task_and_context() -> None:
    seen: list[object] = []

    async def waiting(name: str, one: Confirm) -> None:
        user.set(name)
        seen.append((name, await one, user.get(), asyncio.current_task() is tasks[name]))

    confirms = [confirm(), confirm()]
    tasks = {name: asyncio.create_task(waiting(name, one)) for name, one in zip("ab", confirms, strict=True)}
    await turn()
    at_once: list[object] = []

    def read() -> None:
        end(*reversed(confirms))
        at_once.extend([*seen, asyncio.current_task()])

    await in_a_callback(read)

    assert at_once == [("b", True, "b", True), ("a", True, "a", True), None]
    assert user.get() == "nobody"


async def test_within_a_task_nobody_is_interrupted() -> None:
    one, seen = confirm(), list[str]()

    async def waiting() -> None:
        await one
        seen.append("went on")

    task = asyncio.create_task(waiting())
    await turn()
    end(one)
    assert seen == []
    await task
    assert seen == ["went on"]


async def test_one_that_has_ended_is_not_waited_for() -> None:
    one = confirm()
    end(one)
    assert await one is True
    assert await one is True


async def test_a_wait_that_is_cancelled_ends() -> None:
    one = confirm()
    task = asyncio.ensure_future(asyncio.wait_for(one, 10))
    await turn()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one.cancelled()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await confirm()


async def test_who_is_cancelled_after_the_end_and_before_going_on_is_cancelled() -> None:
    one = confirm()

    async def waiting() -> None:
        await one

    task = asyncio.create_task(waiting())
    await turn()

    def read() -> None:
        one.set_result(True)
        task.cancel()
        go_on(deque([one]), asyncio.get_event_loop())

    await in_a_callback(read)
    assert task.cancelled()


async def test_a_failure_is_told_a_turn_later() -> None:
    one, seen = confirm(), list[BaseException]()

    async def waiting() -> None:
        try:
            await one
        except ConnectionError as error:
            seen.append(error)

    task = asyncio.create_task(waiting())
    await turn()
    one.set_exception(ConnectionError("gone"))
    assert seen == []
    await task
    assert [str(error) for error in seen] == ["gone"]


@pytest.mark.parametrize(
    ("wait", "result"),
    [
        (lambda one: asyncio.wait_for(one, 10), True),
        (lambda one: asyncio.shield(one), True),
        (lambda one: asyncio.gather(one, one), [True, True]),
        (lambda one: asyncio.wait_for(asyncio.shield(one), 10), True),
    ],
)
async def test_it_can_be_waited_for_as_a_future_can(
    wait: Callable[[Confirm], Awaitable[object]], result: object
) -> None:
    async def waiting(one: Confirm) -> object:
        return await wait(one)

    one = confirm()
    many = [asyncio.create_task(waiting(one)) for _ in range(3)]
    await turn()
    await in_a_callback(lambda: end(one))
    async with asyncio.timeout(10):
        assert await asyncio.gather(*many) == [result] * 3


async def test_a_callback_that_was_taken_back_is_not_called() -> None:
    one, called = confirm(), list[object]()
    context = contextvars.copy_context()
    for _ in range(3):
        one.add_done_callback(called.append, context=context)
    assert one.remove_done_callback(called.append) == 3
    assert one.remove_done_callback(called.append) == 0
    end(one)
    await turn()
    assert called == []
    one.add_done_callback(called.append)  # it has ended
    await turn()
    assert called == [one]


def test_a_task_that_ends_the_program_does_not_keep_the_others_from_going_on() -> None:
    seen: list[str] = []

    async def ending(one: Confirm) -> None:
        await one
        raise SystemExit(3)

    async def waiting(one: Confirm) -> None:
        await one
        seen.append("went on")

    async def main() -> None:
        confirms = [confirm(), confirm()]
        tasks.append(asyncio.create_task(ending(confirms[0])))
        tasks.append(asyncio.create_task(waiting(confirms[1])))
        await turn()
        asyncio.get_running_loop().call_soon(read, *confirms)
        await asyncio.sleep(10)

    def read(*confirms: Confirm) -> None:
        raised.append(True)
        end(*confirms)
        raised[-1] = False

    raised: list[bool] = []
    tasks: list[asyncio.Task[None]] = []
    loop = asyncio.new_event_loop()
    running = loop.create_task(main())
    with pytest.raises(SystemExit):
        loop.run_until_complete(running)
    assert raised == [False]  # it left by a handle of the loop's
    assert seen == []
    loop.run_until_complete(asyncio.wait([tasks[1]], timeout=10))
    assert seen == ["went on"]
    running.cancel()
    loop.run_until_complete(asyncio.wait([running]))
    assert tasks[0].exception() is not None
    loop.close()


# ── on the lane ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_published_next_is_sent_in_the_turn_in_which_the_last_was_confirmed() -> None:
    pair = await Pair.open()
    lanes = await Lanes.open(pair)
    lane = lanes.publishing
    confirmed: list[int] = []

    async def publisher(number: int) -> None:
        for _ in range(3):
            await lane.publish(lane.encode(Publication("events", "fact.v1", Message({}, b""))), FAR_S)
            confirmed.append(number)

    publishers = [asyncio.create_task(publisher(number)) for number in range(3)]
    await turn()
    await turn()
    sent_at_once = [len(ids_in(pair.received()))]

    def read(last: int) -> None:
        data = frame.marshal(Basic.Ack(last, True), PUBLISHING)
        lanes.feed(data, range(1, len(data) + 1))
        sent_at_once.append(len(ids_in(pair.received())))

    for last in (2, 3, 6, 9):
        await in_a_callback(partial(read, last))

    assert sent_at_once == [3, 2, 1, 3, 0]
    assert confirmed == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    await asyncio.gather(*publishers)
    await pair.close()
