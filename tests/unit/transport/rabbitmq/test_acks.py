"""What is settled is told once, in an order that loses nothing, and nothing else is told."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus.transport.rabbitmq.acks import Ack, AckBatch, Reject, Settlement


@pytest.mark.parametrize(
    ("acks", "rejects", "told"),
    [
        ([], [], []),
        ([1], [], [Ack(1)]),
        ([3, 1, 2], [], [Ack(3, is_multiple=True)]),
        ([2, 3], [], [Ack(2), Ack(3)]),
        ([1, 2, 4], [], [Ack(2, is_multiple=True), Ack(4)]),
        ([1, 3], [2], [Reject(2), Ack(3, is_multiple=True)]),
        ([1, 2], [3], [Reject(3), Ack(2, is_multiple=True)]),
        ([], [1], [Reject(1)]),
    ],
)
def test_a_batch(acks: list[int], rejects: list[int], told: list[Settlement]) -> None:
    batch = AckBatch()
    for tag in acks:
        batch.ack(tag)
    for tag in rejects:
        batch.reject(tag)

    assert batch.take() == told
    assert batch.take() == []


def test_the_prefix_goes_on_where_it_ended() -> None:
    batch = AckBatch()
    batch.ack(2)
    assert batch.take() == [Ack(2)]

    batch.ack(1)
    batch.ack(3)

    assert batch.take() == [Ack(3, is_multiple=True)]


@pytest.mark.parametrize(
    ("settled", "waited"),
    [
        ([], 0),
        ([1, 2], 0),
        ([2, 3], 2),
        ([3, 2], 2),
        ([2, 3, 1], 0),
        ([3, 4, 1], 0),  # 2 is the lowest now, and nothing was settled since
        ([3, 4, 1, 5], 1),
    ],
)
def test_how_long_the_lowest_open_one_has_been_that(settled: list[int], waited: int) -> None:
    batch = AckBatch()
    for tag in settled:
        (batch.reject if tag % 2 else batch.ack)(tag)

    assert batch.waited == waited
    batch.take()
    assert batch.waited == waited


class StrictBroker:
    """Knows what basic.ack and basic.reject mean, and closes the channel where RabbitMQ would."""

    def __init__(self, delivered: int) -> None:
        self.unsettled = list(range(1, delivered + 1))
        self.acked: set[int] = set()
        self.rejected: set[int] = set()

    def hear(self, settlement: Settlement) -> None:
        assert settlement.tag in self.unsettled, f"unknown delivery tag {settlement.tag}"
        match settlement:
            case Reject(tag):
                self.rejected.add(tag)
                self.unsettled.remove(tag)
            case Ack(tag, is_multiple):
                told = [open_tag for open_tag in self.unsettled if open_tag == tag or (is_multiple and open_tag < tag)]
                self.acked |= set(told)
                self.unsettled = [open_tag for open_tag in self.unsettled if open_tag not in told]


@given(st.data())
def test_the_broker_hears_exactly_what_was_settled_and_never_of_an_unknown_tag(data: st.DataObject) -> None:
    delivered = data.draw(st.integers(1, 40))
    order = data.draw(st.permutations(range(1, delivered + 1)))
    settled = order[: data.draw(st.integers(0, delivered))]
    rejected = set(data.draw(st.lists(st.sampled_from(order), max_size=delivered))) & set(settled)
    batch, broker = AckBatch(), StrictBroker(delivered)

    for tag in settled:
        (batch.reject if tag in rejected else batch.ack)(tag)
        if data.draw(st.booleans()):
            for settlement in batch.take():
                broker.hear(settlement)
    for settlement in batch.take():
        broker.hear(settlement)

    assert broker.rejected == rejected
    assert broker.acked == set(settled) - rejected
