"""Rows on their way: in order per key, side by side otherwise, and no key waits for another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from eventbus import Envelope, EnvelopeError, PublishError
from eventbus.outbox import flow as flow_module
from eventbus.outbox.base import Row
from eventbus.outbox.flow import Ended, Flow
from tests.rig import until


def row(id: int, key: str | None = None, bucket: int = 0) -> Row:
    return Row(id=id, bucket=bucket, key=key, attempts=0, size=0, values={})


def not_confirmed() -> PublishError:
    envelope = Envelope(id="1", source="/s", type="t.v1", time=datetime.now(UTC))
    return PublishError("not confirmed", envelope=envelope, maybe_stored=False)


class Broker:
    """Confirms what it is told to, in the order of the test."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.raises: dict[int, Exception] = {}
        self._confirms: dict[int, asyncio.Event] = {}
        self.generations: dict[int, int | None] = {0: 1, 1: 1}

    def _confirm(self, id: int) -> asyncio.Event:
        return self._confirms.setdefault(id, asyncio.Event())

    def confirm(self, *ids: int) -> None:
        for id_ in ids:
            self._confirm(id_).set()

    async def publish(self, row: Row) -> None:
        self.asked.append(row.id)
        await self._confirm(row.id).wait()
        if row.id in self.raises:
            raise self.raises[row.id]


@pytest.fixture
def broker() -> Broker:
    return Broker()


@pytest.fixture
async def flow(broker: Broker) -> AsyncIterator[Flow]:
    flow = Flow(broker.publish, broker.generations.get)
    yield flow
    await flow.end()


async def ended_of(flow: Flow, count: int) -> Ended:
    """What became of *count* rows, let go of."""
    all_of_it = Ended()
    while len(all_of_it.rows()) < count:
        async with asyncio.timeout(30):
            await flow.has_ended.wait()
        ended = flow.collect()
        flow.let_go(ended.rows())
        all_of_it.published += ended.published
        all_of_it.failed += ended.failed
        all_of_it.set_aside += ended.set_aside
        all_of_it.left += ended.left
    return all_of_it


async def test_a_row_waits_for_the_confirm_of_the_one_before_it_of_its_key(flow: Flow, broker: Broker) -> None:
    flow.take([row(1, "a"), row(2, "b"), row(3, "a"), row(4), row(5)])
    await until(lambda: len(broker.asked) == 4)
    assert broker.asked == [1, 2, 4, 5]

    broker.confirm(1)
    await until(lambda: broker.asked == [1, 2, 4, 5, 3])


async def test_a_row_that_is_not_confirmed_stops_its_key_and_no_other(flow: Flow, broker: Broker) -> None:
    broker.raises[1] = not_confirmed()
    broker.confirm(1, 2, 3, 4)
    flow.take([row(1, "a"), row(2, "a"), row(3, "b"), row(4, "b")])

    ended = await ended_of(flow, 4)

    assert [r.id for r in ended.published] == [3, 4]
    assert [r.id for r, _ in ended.failed] == [1]
    assert [r.id for r in ended.left] == [2]
    assert flow.busy_keys() == {"a"}
    assert flow.is_empty.is_set()


async def test_a_key_that_was_stopped_is_read_again_after_a_while(
    flow: Flow, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_module, "FIRST_HOLD_S", 0.05)
    broker.raises |= {1: not_confirmed(), 2: not_confirmed()}
    broker.confirm(1, 2)
    flow.take([row(1, "a"), row(2)])

    await ended_of(flow, 2)

    assert (flow.busy_keys(), flow.busy_ids()) == ({"a"}, {2})
    await until(lambda: not flow.busy_keys() and not flow.busy_ids())


async def test_a_row_that_can_never_be_published_lets_its_key_go_on(flow: Flow, broker: Broker) -> None:
    broker.raises |= {1: EnvelopeError("too large"), 2: ValueError("too far away")}
    broker.confirm(1, 2, 3)
    flow.take([row(1, "a"), row(2, "a"), row(3, "a")])

    ended = await ended_of(flow, 3)

    assert [(r.id, why) for r, why in ended.set_aside] == [(1, "too large"), (2, "too far away")]
    assert [r.id for r in ended.published] == [3]
    assert flow.busy_keys() == set()


async def test_nothing_more_of_a_bucket_is_published_once_it_is_lost(flow: Flow, broker: Broker) -> None:
    flow.take([row(1, "a"), row(2, "a"), row(3, "b", bucket=1), row(4, "b", bucket=1)])
    await until(lambda: broker.asked == [1, 3])

    broker.generations[0] = 2  # taken over by another relay, and back again
    broker.confirm(1, 3, 4)
    ended = await ended_of(flow, 4)

    assert sorted(r.id for r in ended.published) == [1, 3, 4]
    assert [r.id for r in ended.left] == [2]
    assert 2 not in broker.asked


async def test_a_bug_in_publishing_stops_one_key(flow: Flow, broker: Broker, caplog: pytest.LogCaptureFixture) -> None:
    broker.raises[1] = RuntimeError("a bug")
    broker.confirm(1, 2)
    flow.take([row(1, "a"), row(2, "b")])

    ended = await ended_of(flow, 2)

    assert [r.id for r in ended.published] == [2]
    assert [r.id for r in ended.left] == [1]
    assert "row 1 of the outbox could not be published" in caplog.text


async def test_a_bucket_is_idle_once_what_became_of_its_rows_is_written_down(flow: Flow, broker: Broker) -> None:
    flow.take([row(1, "a")])
    broker.confirm(1)
    async with asyncio.timeout(30):
        await flow.has_ended.wait()
    ended = flow.collect()

    assert not flow.is_idle(0)
    assert flow.is_idle(1)
    assert flow.let_go(ended.rows())
    assert flow.is_idle(0)
    assert flow.count == 0
