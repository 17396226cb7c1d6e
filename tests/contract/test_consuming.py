"""What a consumer takes is settled once, or comes back and is counted; its window bounds it and nobody else."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from eventbus.errors import SetupError
from eventbus.transport.base import Consumer, Delivery
from tests.contract.bench import (
    DEADLINE_S,
    Bench,
    Inbox,
    acking,
    content,
    numbered,
    publish,
    publish_by,
    queue_of,
    say,
    say_all,
)


async def test_what_was_acked_never_comes_back(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, inbox = await bench.consume_widely(transport, "q")
    await publish(transport, [say(str(n)) for n in range(20)])
    for delivery in (await inbox.holds(20))[:19]:
        assert delivery.count == 0
        assert delivery.is_live
        delivery.ack()
    await consumer.close()

    (left,) = await content(transport, "q", 1)

    assert left.message.body == inbox.bodies[19]


async def test_consumers_of_one_queue_share_it_and_none_gets_what_the_other_got(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    first, second, together = Inbox(), Inbox(), Inbox()
    for inbox in (first, second):

        def deliver(delivery: Delivery, inbox: Inbox = inbox) -> None:
            delivery.ack()
            inbox(delivery)
            together(delivery)

        await bench.consume(await bench.open(declare="never"), "q", prefetch=10, deliver=deliver)

    await publish(transport, [say(str(n)) for n in range(200)])
    await together.holds(200)

    assert first.bodies
    assert second.bodies
    assert {*together.bodies} == {str(n).encode() for n in range(200)}
    assert len(together.bodies) == 200


async def test_no_more_than_the_prefetch_is_unsettled(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    _, narrow = await bench.consume_widely(transport, "q", prefetch=3)
    await publish(transport, [say(str(n)) for n in range(10)])
    await narrow.holds(3)

    _, other = await bench.consume_and_ack(transport, "q")
    await other.holds(7)

    assert len(narrow.deliveries) == 3
    assert {*narrow.bodies, *other.bodies} == {str(n).encode() for n in range(10)}


async def test_each_ack_makes_room_for_one_more(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say(str(n)) for n in range(5)])
    _, inbox = await bench.consume(transport, "q", prefetch=1)

    for arrived in range(1, 6):
        assert len(await inbox.holds(arrived)) == arrived
        inbox.deliveries[-1].ack()

    assert inbox.bodies == [b"0", b"1", b"2", b"3", b"4"]


async def test_one_consumer_takes_several_queues_each_with_its_own_prefetch(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"), queue_of("p"))
    _, inbox = await bench.consume_widely(transport, "q", "p", prefetch=3)
    await publish(transport, [say(key=key) for key in ("q", "p") for _ in range(3)])

    await inbox.holds(6)

    assert sorted(delivery.queue for delivery in inbox.deliveries) == ["p"] * 3 + ["q"] * 3


async def test_each_time_that_it_comes_back_is_counted(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("kept")])
    counts = []
    for _ in range(6):
        consumer, inbox = await bench.consume(transport, "q")
        (delivery,) = await inbox.holds(1)
        counts.append(delivery.count)
        await consumer.close()
        assert not delivery.is_live
        delivery.ack()

    assert counts == [0, 1, 2, 3, 4, 5]


async def test_a_neighbour_that_was_settled_in_time_is_not_counted(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, inbox = await bench.consume_widely(transport, "q", prefetch=3)
    await publish(transport, say_all(numbered(5)))
    await inbox.holds(3)
    await consumer.pause()
    inbox.deliveries.clear()

    _, elsewhere = await bench.consume_and_ack(transport, "q")
    await elsewhere.holds(5)

    assert {d.message.body: d.count for d in elsewhere.deliveries} == {b"0": 1, b"1": 1, b"2": 1, b"3": 0, b"4": 0}


async def test_a_pause_hands_back_and_resume_takes_again(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    await publish(transport, [say("held")])
    consumer, inbox = await bench.consume(transport, "q")
    (held,) = await inbox.holds(1)

    await consumer.pause()
    assert not held.is_live
    other, elsewhere = await bench.consume(transport, "q")
    assert (await elsewhere.holds(1))[0].count >= 1
    await other.close()
    assert len(inbox.deliveries) == 1

    await consumer.resume()
    again = (await inbox.holds(2))[1]
    assert (again.message.body, again.is_live) == (b"held", True)
    again.ack()


async def test_after_stop_nothing_is_taken_and_what_was_taken_can_be_settled(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, inbox = await bench.consume_widely(transport, "q")
    await publish(transport, [say("held"), say("held, too")])
    first, second = await inbox.holds(2)

    await consumer.stop()
    async with asyncio.timeout(DEADLINE_S):
        await consumer.wait()
    await publish(transport, [say(f"later {n}") for n in range(10)])
    _, elsewhere = await bench.consume_and_ack(transport, "q")
    await elsewhere.holds(10)
    assert (first.is_live, second.is_live) == (True, True)
    first.ack()
    await consumer.close()
    await elsewhere.holds(11)

    assert len(inbox.deliveries) == 2
    assert elsewhere.bodies[10] == second.message.body


async def test_closing_the_publishing_side_leaves_consumers_alone(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    _, inbox = await bench.consume(transport, "q", prefetch=1)
    await transport.close()

    other = await bench.open(declare="never")
    await publish(other, [say("1"), say("2")])
    (await inbox.holds(1))[0].ack()

    await inbox.holds(2)


async def test_a_consumer_of_a_missing_queue_does_not_start(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))

    with pytest.raises(SetupError, match="absent"):
        await bench.consume(transport, "q", "absent")


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_full_window_of_one_queue_stops_no_other_queue(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"), queue_of("p"))
    stuck, others = Inbox(), Inbox()

    def deliver(delivery: Delivery) -> None:
        (stuck if delivery.queue == "q" else acking(others))(delivery)

    await bench.consume(transport, "q", "p", prefetch=3, deliver=deliver)
    bodies = numbered(300)
    await publish(transport, [*say_all(numbered(50)), *say_all(bodies, "p")])

    await others.holds(300)

    assert others.tally == Counter(bodies)
    assert 1 <= len(stuck.deliveries) <= 3


async def test_a_consumer_that_settles_nothing_stops_no_publisher_and_holds_its_window(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    _, stuck = await bench.consume_widely(transport, "q", prefetch=7)
    bodies = numbered(1000)

    await publish_by(20, transport, say_all(bodies))
    await stuck.holds(7)
    assert len(await content(transport, "q", 993)) == 993
    for settled in range(7, 67):  # each settled one makes room for one more, and no more than one
        assert len(await stuck.holds(settled)) <= settled
        stuck.deliveries[settled - 7].ack()
    _, rest = await bench.consume_and_ack(transport, "q")
    await rest.holds(1000 - 67)

    assert stuck.tally + rest.tally == Counter(bodies)


# ── some take long ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("slow", [(9,), (3, 700, 701, 1400, 2100, 4999), tuple(range(9, 5000, 250))])
async def test_those_behind_a_slow_one_are_settled_for_good_and_it_is_too_when_it_ends(
    bench: Bench, slow: tuple[int, ...]
) -> None:
    transport = await bench.open(queue_of("q"))
    bodies = numbered(5000)
    slow_bodies, taken, kept = {bodies[n] for n in slow}, Inbox(), list[Delivery]()

    def deliver(delivery: Delivery) -> None:
        if delivery.message.body in slow_bodies:
            kept.append(delivery)
        else:
            delivery.ack()
        taken(delivery)

    await publish_by(20, transport, say_all(bodies))
    consumer, _ = await bench.consume(transport, "q", prefetch=60, deliver=deliver)
    await taken.has_seen(bodies)
    assert taken.tally == Counter(bodies)
    assert all(delivery.is_live for delivery in kept)

    *ended, endless = kept
    for delivery in ended:
        delivery.ack()
    await consumer.stop()
    await consumer.close()
    (left,) = await content(transport, "q", 1)

    assert left.message.body == endless.message.body


# ── coming and going ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_consumers_join_and_leave_under_load_without_loss_or_repetition(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies, together = numbered(3000), Inbox()
    publishing = asyncio.create_task(publish_by(10, transport, say_all(bodies)))
    at_work: list[Consumer] = []

    async def leave(consumer: Consumer) -> None:
        await consumer.stop()
        await consumer.close()

    for joined in range(1, 16):
        consumer, _ = await bench.consume(transport, "q", prefetch=20, deliver=acking(together))
        at_work.append(consumer)
        await together.holds(joined * 100)  # so that each is there while messages flow
        if len(at_work) > 3:
            await leave(at_work.pop(0))
    await publishing
    await together.has_seen(bodies)

    assert together.tally == Counter(bodies)


async def test_draining_under_load_settles_what_was_taken_and_leaves_the_rest(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, inbox = await bench.consume_widely(transport, "q", prefetch=50)
    bodies = numbered(2000)
    publishing = asyncio.create_task(publish_by(10, transport, say_all(bodies)))
    for settled in range(500):
        (await inbox.holds(settled + 1))[settled].ack()

    await consumer.stop()
    taken = list(inbox.deliveries)
    assert all(delivery.is_live for delivery in taken)
    for delivery in taken[500:]:
        delivery.ack()
    await publishing
    await consumer.close()
    _, rest = await bench.consume_and_ack(transport, "q")
    await rest.holds(2000 - len(taken))

    assert inbox.deliveries == taken
    assert inbox.tally + rest.tally == Counter(bodies)
    # What was on its way when consuming stopped was never handed over, but a broker may have counted it.
    assert sum(delivery.count for delivery in rest.deliveries) <= 50
