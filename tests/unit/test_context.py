"""What a handler publishes: ids that a second run repeats, and who caused what."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventbus import Context, Envelope, EnvelopeError, Event


class Captured(Event):
    order_id: int


class Declined(Event):
    order_id: int


class Sent:
    """Where a context publishes to."""

    def __init__(self) -> None:
        self.envelopes: list[Envelope] = []
        self.delays: list[timedelta | None] = []

    async def __call__(self, envelope: Envelope, delay: timedelta | None) -> None:
        self.envelopes.append(envelope)
        self.delays.append(delay)


def cause(id: str = "1", source: str = "/shop", **more: Any) -> Envelope:
    return Envelope(id=id, source=source, type="order_placed.v1", time=datetime.now(UTC), **more)


def context(
    envelope: Envelope | None = None, *, service: str = "payments", handler: str = "capture", sent: Sent | None = None
) -> Context[str]:
    return Context(
        envelope or cause(),
        attempt=2,
        identity=(service, handler, f"/services/{service}"),
        state="state",
        publish=sent or Sent(),
    )


async def ids(of: Context[Any], *events: Event) -> list[str]:
    return [(await of.publish(event)).id for event in events]


ONE, TWO = Captured(order_id=1), Captured(order_id=2)


def test_it_says_what_it_is_about() -> None:
    ctx = context(envelope := cause())

    assert (ctx.envelope, ctx.attempt, ctx.service, ctx.handler, ctx.state) == (
        envelope, 2, "payments", "capture", "state",
    )  # fmt: skip


async def test_a_follow_up_comes_from_the_service_and_is_returned_as_it_was_sent() -> None:
    sent = Sent()

    envelope = await context(sent=sent).publish(ONE, subject="order 1", delay=timedelta(minutes=1))

    assert sent.envelopes == [envelope]
    assert sent.delays == [timedelta(minutes=1)]
    assert (envelope.source, envelope.type, envelope.subject) == ("/services/payments", "captured.v1", "order 1")
    assert envelope.event(Captured) == ONE


async def test_a_handler_that_runs_again_publishes_the_same_ids() -> None:
    events = [ONE, TWO, ONE, ONE, Declined(order_id=1)]

    assert await ids(context(), *events) == await ids(context(), *events)


async def test_equal_events_of_one_run_are_told_apart_by_their_order() -> None:
    first, second, third = await ids(context(), ONE, ONE, ONE)

    assert len({first, second, third}) == 3


async def test_what_is_published_in_between_does_not_change_an_id() -> None:
    _, after = await ids(context(), TWO, ONE)

    assert [after] == await ids(context(), ONE)


async def test_the_order_in_which_different_events_are_sent_side_by_side_does_not_matter() -> None:
    ctx = context()
    forth = await asyncio.gather(ctx.publish(ONE), ctx.publish(TWO))
    ctx = context()
    back = await asyncio.gather(ctx.publish(TWO), ctx.publish(ONE))

    assert [e.id for e in forth] == [e.id for e in reversed(back)]


async def test_an_id_depends_on_all_that_it_is_derived_from() -> None:
    runs = [
        context(),
        context(cause(id="2")),
        context(cause(source="/other")),
        context(service="other"),
        context(handler="other"),
    ]
    derived = [(await run.publish(ONE)).id for run in runs]
    derived += await ids(context(), TWO, Declined(order_id=1))

    assert len(set(derived)) == len(derived)


@given(st.tuples(st.text(min_size=1), st.text(min_size=1)), st.tuples(st.text(min_size=1), st.text(min_size=1)))
def test_service_and_handler_do_not_run_together(one: tuple[str, str], other: tuple[str, str]) -> None:
    def derived(identity: tuple[str, str]) -> str:
        ctx = Context(cause(), attempt=1, identity=(*identity, "/x"), state=None, publish=Sent())
        return asyncio.run(ctx.publish(ONE)).id

    assert (derived(one) == derived(other)) == (one == other)


async def test_a_derived_id_is_a_uuid_and_stays_what_it_is() -> None:
    (derived,) = await ids(context(), ONE)

    assert str(UUID(derived)) == derived
    # Written down: a new release that derived other ids would make a redelivery across the upgrade publish twice.
    assert derived == "e6db1dcf-f21f-55e1-a058-b4dab532451b"


async def test_an_id_that_is_given_is_kept() -> None:
    envelope = await context().publish(ONE, id="mine")

    assert envelope.id == "mine"


async def test_an_empty_id_is_refused_and_not_replaced() -> None:
    with pytest.raises(EnvelopeError, match="'id' is empty"):
        await context().publish(ONE, id="")


async def test_the_first_event_correlates_all_and_each_names_its_cause() -> None:
    placed = cause(id="placed")
    captured = await context(placed).publish(ONE)
    shipped = await context(captured, service="shipping").publish(TWO)

    assert captured.extensions == {"correlationid": "placed", "causationid": "placed"}
    assert shipped.extensions == {"correlationid": "placed", "causationid": captured.id}


async def test_extensions_are_added_and_may_say_otherwise() -> None:
    envelope = await context().publish(ONE, extensions={"tenant": "eu", "correlationid": "basket 7"})

    assert envelope.extensions == {"correlationid": "basket 7", "causationid": "1", "tenant": "eu"}


async def test_an_envelope_keeps_its_id_its_source_and_its_extensions() -> None:
    foreign = cause(id="theirs", source="/them", extensions={"tenant": "eu", "correlationid": "theirs too"})

    envelope = await context().publish(foreign)

    assert (envelope.id, envelope.source, envelope.type, envelope.data) == (
        "theirs", "/them", foreign.type, foreign.data,
    )  # fmt: skip
    assert envelope.extensions == {"tenant": "eu", "correlationid": "theirs too", "causationid": "1"}


async def test_an_envelope_can_be_given_another_id_and_subject() -> None:
    envelope = await context().publish(cause(subject="a"), id="new", subject="b", extensions={"x": 1})

    assert (envelope.id, envelope.subject, envelope.extensions["x"]) == ("new", "b", 1)


async def test_what_is_no_event_is_refused() -> None:
    with pytest.raises(EnvelopeError, match="dict is neither an Event nor an Envelope: subclass"):
        await context().publish({"order_id": 1})  # type: ignore[arg-type]
