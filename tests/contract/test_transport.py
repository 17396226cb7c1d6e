"""The port's promises, kept by every adapter: one suite, on the embedded broker and on each RabbitMQ that is here.

This file holds what Watermill asks of every backend (`pubsub/tests/test_pubsub.go`), carried over to this port: a
subscription is a queue and its consumers, a nack is a delivery that was not settled when its session ended. Watermill
forgives duplicates everywhere; here they are counted, and without a fault there are none.

    1   publish, then subscribe         test_what_was_published_before_anybody_consumed_arrives
    2   concurrent subscribe            test_fifty_publishers_and_fifty_consumers_lose_nothing_and_repeat_nothing
    3   many topics at a time           test_twenty_queues_at_a_time_each_get_their_own
    4   resend on error                 test_what_a_consumer_could_not_handle_is_handed_out_again
    5   no ack, no next                 test_with_a_prefetch_of_one_nothing_comes_before_the_ack
    6   continue after close            test_consumers_that_come_and_go_in_the_middle_lose_nothing
    7   concurrent close                test_consumers_opened_and_closed_at_a_time_leave_nothing_behind
    8   continue after errors           test_three_consumers_that_fail_again_and_again_lose_nothing
    9   in order                        test_one_consumer_sees_the_order_in_which_each_publisher_published,
                                        test_competing_consumers_see_each_publishers_order (needs ORDER)
    10  publisher close                 test_closing_among_publishes_tells_of_each_what_became_of_it
    11  topic                           test_two_keys_do_not_mix
    12  message context                 test_a_delivery_says_whether_its_session_lives
    13  subscribe context               test_a_consumer_that_is_cancelled_takes_nothing_with_it
    14  old messages                    a log's, HISTORY: no adapter has it. test_what_was_acked_never_comes_back
    15  reconnect                       test_what_was_confirmed_is_delivered_across_an_outage_of_the_broker
    16  consumer groups                 test_two_services_each_get_all

What it leaves out:

    confirms                            test_what_was_confirmed_is_in_its_queue
    unroutable                          test_a_message_that_no_queue_took_is_reported,
                                        test_of_many_publishes_at_once_each_gets_its_own_answer
    a channel error                     test_a_publish_that_breaks_the_channel_takes_no_other_with_it
    poison, undecodable                 test_garbage_among_good_ones_is_given_up_to_the_byte,
                                        test_a_message_with_headers_that_cannot_be_read_does_not_stop_its_queue
    poison, deadly                      test_over_the_delivery_limit_a_message_is_a_dead_letter,
                                        test_a_poison_takes_no_innocent_neighbours_with_it
    dead-letter headers and bytes       test_a_rejected_message_is_in_the_dead_queue_untouched,
                                        test_whatever_it_died_of_a_message_keeps_its_bytes_and_headers
    redelivery counting                 test_each_time_that_it_comes_back_is_counted, one for each message
    delays, accuracy                    test_a_delayed_message_is_never_early_and_arrives
    delays, order of due times          test_what_is_due_first_arrives_first
    delays, head-of-line blocking       test_ten_thousand_mixed_delays_are_never_early_and_none_blocks_another
    prefetch                            test_no_more_than_the_prefetch_is_unsettled,
                                        test_a_full_window_of_one_queue_stops_no_other_queue
    back-pressure                       test_a_consumer_that_settles_nothing_stops_no_publisher_and_holds_its_window
    a full queue, reject-publish        test_a_full_queue_refuses_publishes_until_there_is_room,
                                        test_a_publish_goes_on_once_the_policy_that_bounded_its_queue_is_lifted
    header round trips                  test_what_is_sent_arrives, test_headers_of_any_scalars_arrive_as_they_were
    keys of 255 bytes                   test_a_key_of_the_greatest_length_arrives_as_it_was
    bodies up to the limit              test_a_body_of_the_greatest_size_arrives_and_one_byte_more_is_refused,
                                        test_a_body_over_the_brokers_own_limit_fails_alone
    consumer cancelled by the broker    test_a_queue_deleted_under_a_consumer_costs_its_other_queues_nothing
    queue deleted and created again     test_a_queue_that_was_deleted_is_declared_again,
                                        test_a_queue_that_somebody_created_again_at_once_is_consumed_on
                                        (needs SEES_A_NEW_QUEUE),
                                        test_a_queue_created_again_with_other_arguments_ends_its_consumer
    competing consumers under load      test_consumers_join_and_leave_under_load_without_loss_or_repetition
    graceful drain                      test_draining_under_load_settles_what_was_taken_and_leaves_the_rest,
                                        test_after_stop_nothing_is_taken_and_what_was_taken_can_be_settled
    unclean death                       test_what_a_consumer_held_that_vanished_goes_to_another_one,
                                        test_connections_cut_again_and_again_lose_nothing_that_was_confirmed
    duplicates budget                   zero in every case here without a fault; with faults
                                        test_connections_cut_again_and_again_lose_nothing_that_was_confirmed
    slow-consumer ack timeout           test_a_delivery_whose_ack_comes_too_late_is_delivered_again
    blocked-connection alarm            test_a_broker_under_an_alarm_holds_publishes_up_to_their_deadline
    expected against actual consumers   test_what_is_not_consumed_is_named

What is not in this folder needs a broker of its own to stop or to change, and is in `tests/faults/test_sessions.py`.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from pathlib import Path

import pytest

from eventbus.message import Message
from eventbus.topology import merge, of_service, shared
from eventbus.transport.base import Delivery, NotPublished, Publication
from tests.contract.bench import (
    DEADLINE_S,
    NAMES,
    ORDER,
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


def test_each_case_that_is_named_here_exists() -> None:
    folder = Path(__file__).parent
    files = [*folder.glob("test_*.py"), folder.parent / "faults" / "test_sessions.py"]
    defined = {name for file in files for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.M)}
    assert __doc__ is not None
    named = set(re.findall(r"\btest_\w{20,}", __doc__))

    assert len(named) > 40
    assert named <= defined


# ── 1 to 4 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_published_before_anybody_consumed_arrives(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    sent = {body: Message({"number": n}, body, "text/plain") for n, body in enumerate(numbered(100))}
    assert all(await publish(transport, [Publication("x", "q", message) for message in sent.values()]))

    consumer, inbox = await bench.consume_and_ack(transport, "q")
    for delivery in await inbox.holds(100):
        message = sent[delivery.message.body]
        assert (delivery.message.headers, delivery.message.content_type) == (message.headers, "text/plain")
    assert inbox.tally == Counter(list(sent))

    await consumer.close()
    await publish(transport, [say("after the end")])
    assert [found.message.body for found in await content(transport, "q", 1)] == [b"after the end"]
    assert len(inbox.deliveries) == 100


async def test_fifty_publishers_and_fifty_consumers_lose_nothing_and_repeat_nothing(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies, together = numbered(5000), Inbox()
    consumers = [bench.consumer(transport, "q", deliver=acking(together), prefetch=20) for _ in range(50)]
    await asyncio.gather(*[consumer.start() for consumer in consumers])

    await publish_by(50, transport, say_all(bodies))
    await together.has_seen(bodies)

    assert together.tally == Counter(bodies)


async def test_twenty_queues_at_a_time_each_get_their_own(bench: Bench) -> None:
    queues = [f"q{number}" for number in range(20)]
    transport = await bench.open(*[queue_of(queue) for queue in queues])
    together = Inbox()
    await bench.consume(transport, *queues, deliver=acking(together))
    bodies = {queue: numbered(100, f"{queue}-") for queue in queues}

    await asyncio.gather(*[publish(transport, say_all(bodies[queue], queue)) for queue in queues])
    await together.holds(2000)

    got = {queue: Counter[bytes]() for queue in queues}
    for delivery in together.deliveries:
        got[delivery.queue][delivery.message.body] += 1
    assert got == {queue: Counter(bodies[queue]) for queue in queues}


async def test_what_a_consumer_could_not_handle_is_handed_out_again(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies, refused, acked = numbered(100), Inbox(), Inbox()

    def deliver(delivery: Delivery) -> None:
        if delivery.message.body in bodies[:2] and delivery.count == 0:
            refused(delivery)
        else:
            acking(acked)(delivery)

    consumer, _ = await bench.consume(transport, "q", deliver=deliver)
    await publish(transport, say_all(bodies))
    for held in range(2):  # an adapter that begins carefully hands out the second one only after the first came back
        await refused.holds(held + 1)
        await consumer.pause()
        await consumer.resume()
    await acked.has_seen(bodies)

    assert acked.tally == Counter(bodies)
    assert refused.tally == Counter(bodies[:2])


# ── 5 to 8 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_with_a_prefetch_of_one_nothing_comes_before_the_ack(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    _, first = await bench.consume(transport, "q", prefetch=1)
    bodies = numbered(50)
    await publish(transport, say_all(bodies))
    (held,) = await first.holds(1)

    other, elsewhere = await bench.consume_and_ack(transport, "q")
    await elsewhere.holds(49)  # it could have had any of them, and was given none
    assert first.deliveries == [held]
    await other.close()

    held.ack()
    await publish(transport, [say("the next")])
    await first.holds(2)
    assert elsewhere.tally + first.tally == Counter([*bodies, b"the next"])


async def test_consumers_that_come_and_go_in_the_middle_lose_nothing(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies, acked = numbered(2000), Counter[bytes]()
    await publish(transport, say_all(bodies))

    while acked.total() < len(bodies):
        inbox, at_work = Inbox(), acked.total()

        def deliver(delivery: Delivery, inbox: Inbox = inbox, until: int = at_work + 400) -> None:
            inbox(delivery)
            if acked.total() < until:
                acked[delivery.message.body] += 1
                delivery.ack()

        consumer, _ = await bench.consume(transport, "q", prefetch=50, deliver=deliver)
        # One more than it acks: it is closed with something in hand, but for the last one.
        await inbox.holds(min(401, len(bodies) - at_work))
        await consumer.close()

    assert acked == Counter(bodies)
    assert await content(transport, "q", 0) == []


async def test_consumers_opened_and_closed_at_a_time_leave_nothing_behind(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies, early = numbered(50), Inbox()

    async def come_and_go() -> None:
        consumer = bench.consumer(transport, "q", deliver=early)
        await consumer.start()
        await consumer.close()

    await asyncio.gather(*[come_and_go() for _ in range(10)])
    await publish(transport, say_all(bodies))
    _, inbox = await bench.consume_and_ack(transport, "q")
    await inbox.holds(50)

    assert inbox.tally == Counter(bodies)
    assert early.bodies == []
    assert {delivery.count for delivery in inbox.deliveries} == {0}


async def test_three_consumers_that_fail_again_and_again_lose_nothing(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies = numbered(50)
    await publish(transport, say_all(bodies))

    async def fail_again_and_again() -> None:
        consumer, inbox = await bench.consume(transport, "q", prefetch=10)
        for _ in range(5):
            await inbox.holds(1)
            await consumer.pause()
            inbox.deliveries.clear()
            await consumer.resume()
        await consumer.close()

    await asyncio.gather(*[fail_again_and_again() for _ in range(3)])
    _, inbox = await bench.consume_and_ack(transport, "q")
    await inbox.holds(50)

    assert inbox.tally == Counter(bodies)


# ── 9 to 12 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_publisher(bodies: list[bytes]) -> dict[int, list[int]]:
    """The numbers that each publisher's messages have, in the order of their coming."""
    result: dict[int, list[int]] = {}
    for body in bodies:
        publisher, number = body.split(b"-")
        result.setdefault(int(publisher), []).append(int(number))
    return result


PUBLISHERS, EACH = 16, 60
IN_ORDER = {publisher: list(range(EACH)) for publisher in range(PUBLISHERS)}
# `publish_by` deals them out in turn: each publisher gets its own.
ORDERED = [b"%d-%d" % (publisher, number) for number in range(EACH) for publisher in range(PUBLISHERS)]


async def test_one_consumer_sees_the_order_in_which_each_publisher_published(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    _, inbox = await bench.consume_and_ack(transport, "q", prefetch=50)

    await publish_by(PUBLISHERS, transport, say_all(ORDERED))
    await inbox.holds(len(ORDERED))

    assert by_publisher(inbox.bodies) == IN_ORDER


@pytest.mark.needs(ORDER)
async def test_competing_consumers_see_each_publishers_order(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    together = Inbox()
    for _ in range(10):
        await bench.consume(transport, "q", deliver=acking(together))

    await publish_by(PUBLISHERS, transport, say_all(ORDERED))
    await together.holds(len(ORDERED))

    assert by_publisher(together.bodies) == IN_ORDER


async def test_closing_among_publishes_tells_of_each_what_became_of_it(bench: Bench) -> None:
    observer = await bench.open(queue_of("q"))
    transport = await bench.open(declare="never")
    confirmed, not_stored, unknown = set[bytes](), set[bytes](), set[bytes]()
    is_half_done = asyncio.Event()

    async def work(bodies: list[bytes]) -> None:
        for body in bodies:
            try:
                assert await transport.publish(say(body), timeout_s=DEADLINE_S)
                confirmed.add(body)
            except NotPublished as why:
                (unknown if why.maybe_stored else not_stored).add(body)
            if len(confirmed) >= 2000:
                is_half_done.set()

    async with asyncio.TaskGroup() as publishers:
        for publisher in range(20):
            publishers.create_task(work(numbered(200, f"{publisher}-")))
        await is_half_done.wait()
        await transport.close()
    _, inbox = await bench.consume_and_ack(observer, "q")
    await inbox.has_seen(confirmed)

    assert len(confirmed) + len(not_stored) + len(unknown) == 4000
    assert len(not_stored) > 1000
    assert len(unknown) <= 20  # one for each publisher that waited for its confirm
    assert set(inbox.bodies) <= confirmed | unknown
    assert set(inbox.tally.values()) == {1}


async def test_two_keys_do_not_mix(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"), queue_of("p"))
    await publish(transport, [say("for p", "p"), say("for q", "q")])

    for queue in ("q", "p"):
        assert [found.message.body for found in await content(transport, queue, 1)] == [f"for {queue}".encode()]


async def test_a_delivery_says_whether_its_session_lives(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    consumer, inbox = await bench.consume_widely(transport, "q")
    await publish(transport, say_all(numbered(3)))
    acked, paused, stopped = await inbox.holds(3)
    acked.ack()
    assert [delivery.is_live for delivery in (acked, paused, stopped)] == [True, True, True]

    await consumer.pause()
    assert [delivery.is_live for delivery in (acked, paused, stopped)] == [False, False, False]
    paused.ack()  # too late, and harmless
    paused.reject()
    await consumer.resume()
    again = (await inbox.holds(4))[3]
    await consumer.stop()
    assert again.is_live
    await consumer.close()
    assert not again.is_live

    left = [found.message.body for found in await content(transport, "q", 2)]
    assert sorted(left) == sorted([paused.message.body, stopped.message.body])


# ── 13 to 16 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_consumer_that_is_cancelled_takes_nothing_with_it(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"))
    bodies, cancelled = numbered(20), Inbox()
    await publish(transport, say_all(bodies))

    for moment_s in (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1):  # in the middle of whatever it does to start
        consumer = bench.consumer(transport, "q", deliver=cancelled)
        starting = asyncio.create_task(consumer.start())
        await asyncio.sleep(moment_s)
        starting.cancel()
        await asyncio.wait([starting])
        assert starting.cancelled() or starting.exception() is None
        await consumer.close()
    _, inbox = await bench.consume_and_ack(transport, "q")
    await inbox.has_seen(bodies)

    assert inbox.tally == Counter(bodies)


async def test_two_services_each_get_all(bench: Bench) -> None:
    services = ["mail", "audit"]
    transport = await bench.open(
        merge([shared(NAMES), *[of_service(NAMES, service, ["order_placed.*"]) for service in services]])
    )
    inboxes = [(await bench.consume_and_ack(transport, NAMES.queue(service)))[1] for service in services]
    bodies = numbered(50)

    await publish(transport, [say(body, "order_placed.v1", NAMES.events) for body in bodies])

    for inbox in inboxes:
        await inbox.holds(50)
    await transport.close()
    assert [inbox.tally for inbox in inboxes] == [Counter(bodies)] * 2


# ── what consumes ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_not_consumed_is_named(bench: Bench) -> None:
    transport = await bench.open(queue_of("q"), queue_of("p"))
    consumer = bench.consumer(transport, "q", "p", deliver=Inbox())
    assert {*consumer.missing()} == {"q", "p"}

    await consumer.start()
    assert consumer.missing() == {}
    await consumer.pause()
    assert {*consumer.missing()} == {"q", "p"}
    await consumer.resume()
    async with asyncio.timeout(DEADLINE_S):
        while consumer.missing():  # noqa: ASYNC110  # asked now and then, as health does
            await asyncio.sleep(0.02)

    await consumer.stop()
    assert {*consumer.missing()} == {"q", "p"}
    assert all(consumer.missing().values())
