"""Which subscriptions want an event, and how each takes it. What it reads and its keys: test_service.py."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

from eventbus import Envelope, Event, Service, SetupError, dispatch
from eventbus.dispatch import Dispatch, Interest
from eventbus.errors import EnvelopeError
from eventbus.message import matches
from eventbus.service import Reads


class Subscribed(SimpleNamespace):
    """As much of a subscription as matters here, and what it was asked."""

    def __init__(self, *patterns: str) -> None:
        super().__init__(
            patterns=patterns, asked=[], handler="handle", function=None, takes_context=False,
            timeout=timedelta(seconds=1), reads=Reads(envelope=True), key=None,
        )  # fmt: skip

    def wants(self, type_: str) -> bool:
        self.asked.append(type_)
        return any(matches(pattern, type_) for pattern in self.patterns)


def wanting(found: Dispatch, type_: str) -> list[Any]:
    interests = found.wanting(type_)
    assert {interest.type for interest in interests} <= {type_}
    return [interest.subscription for interest in interests]


def keys(*words: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(["", "a", "b", "v1", "a*", *words]), max_size=4).map(".".join)


@given(
    subscribed=st.lists(st.lists(keys("*", "#"), min_size=1, max_size=3), max_size=6),
    types=st.lists(keys(), max_size=8),
)
def test_those_are_found_whose_patterns_match_in_their_order(subscribed: list[list[str]], types: list[str]) -> None:
    subscriptions: Any = [Subscribed(*patterns) for patterns in subscribed]
    found = Dispatch("shop", subscriptions)

    for type_ in types * 2:
        assert wanting(found, type_) == [s for s in subscriptions if s.wants(type_)]


def test_of_a_thousand_subscriptions_only_those_are_asked_that_may_want_it() -> None:
    subscriptions: Any = [Subscribed(f"com.shop.placed_{n}.{version}") for n in range(1000) for version in ("v1", "*")]
    subscriptions.append(Subscribed("com.#.v2"))
    found = Dispatch("shop", subscriptions)

    for _ in range(3):
        assert wanting(found, "com.shop.placed_7.v1") == [subscriptions[14], subscriptions[15]]

    assert [s for s in subscriptions if s.asked] == [subscriptions[14], subscriptions[15], subscriptions[-1]]
    assert subscriptions[14].asked == ["com.shop.placed_7.v1"]  # and once only


def test_types_without_end_are_remembered_up_to_a_bound(monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, "MOST_KNOWN", 2)
    subscriptions: Any = [Subscribed("#")]
    found = Dispatch("shop", subscriptions)

    for type_ in ("a", "b", "c", "a", "c"):
        assert wanting(found, type_) == subscriptions

    assert subscriptions[0].asked == ["a", "b", "c", "c"]


# ── how each takes it ───────────────────────────────────────────────────────────────────────────────────────────────


class Placed(Event, name="order_placed"):
    order_id: int


def interest_in(event_class: type[Event]) -> Interest:
    async def handle(event: event_class) -> None: ...  # type: ignore[valid-type]  # a variable

    handle.__annotations__["event"] = event_class
    service = Service("shop", timeout=timedelta(seconds=7))
    service.on(event_class)(handle)
    (interest,) = Dispatch("shop", service.subscriptions()).wanting(event_class.event_type)
    return interest


def envelope_of(data: bytes, content_type: str | None = "application/json") -> Envelope:
    now = datetime.now(UTC)
    return Envelope(id="1", source="/x", type="order_placed.v1", time=now, datacontenttype=content_type, data=data)


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "a/b+json", None])
def test_json_is_read_whatever_it_is_called(content_type: str | None) -> None:
    assert interest_in(Placed).read(envelope_of(b'{"order_id": 7}', content_type)) == Placed(order_id=7)


@pytest.mark.parametrize(
    ("envelope", "problem"),
    [
        (envelope_of(b'{"order_id": "x"}'), r"does not fit Placed \(order_placed.v1\): order_id: int_parsing"),
        (envelope_of(b"{"), "no JSON"),
        (envelope_of(b'{"order_id": 7}', "text/plain"), "the data are 'text/plain', and only JSON can be read"),
    ],
)
def test_what_does_not_fit_is_told_as_an_envelope_tells_it(envelope: Envelope, problem: str) -> None:
    with pytest.raises(EnvelopeError, match=problem) as raised:
        interest_in(Placed).read(envelope)

    assert raised.value.reason == "invalid-data"
    assert raised.value.__context__ is None


def test_a_validator_that_fails_is_told_as_an_envelope_tells_it() -> None:
    class Checked(Event, name="order_placed"):
        order_id: int

        @field_validator("order_id")
        @classmethod
        def check(cls, _: int) -> int:
            raise KeyError("a secret")

    with pytest.raises(EnvelopeError, match="KeyError in ") as raised:
        interest_in(Checked).read(envelope_of(b'{"order_id": 7}'))

    assert "a secret" not in str(raised.value)


class Unfinished(Event, name="order_placed"):
    order: Later  # type: ignore[name-defined]  # noqa: F821  # not there yet


def test_a_class_that_is_not_fully_defined_is_asked_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = SimpleNamespace(events={"order_placed.v1": Unfinished}, model=None, envelope=False)
    subscribed: Any = Subscribed("order_placed.v1")
    subscribed.reads = reads
    interest = Interest("shop", subscribed, "order_placed.v1")
    envelope = envelope_of(b'{"order": {"number": 1}}')

    with pytest.raises(SetupError, match=r"Unfinished is not fully defined"):
        interest.read(envelope)

    class Later(BaseModel):
        number: int

    monkeypatch.setitem(globals(), "Later", Later)
    Unfinished.model_rebuild()

    assert interest.read(envelope) == Unfinished(order=Later(number=1))


def test_a_retry_finds_its_handler_by_name_whatever_the_type() -> None:
    subscriptions: Any = [Subscribed("a"), Subscribed("b")]
    subscriptions[0].handler = "first"
    found = Dispatch("shop", subscriptions)

    interest = found.of("first", "renamed")

    assert interest is not None
    assert (interest.subscription, interest.type) == (subscriptions[0], "renamed")
    assert found.of("gone", "a") is None


def test_what_is_the_same_for_all_events_of_a_type_is_worked_out_once() -> None:
    subscriptions: Any = [Subscribed("#")]
    found = Dispatch("shop", subscriptions)

    assert found.wanting("a") is found.wanting("a")
    assert found.wanting("a")[0].timeout_s == 1


def test_data_are_validated_once_also_where_they_do_not_fit() -> None:
    seen = list[int]()

    class Checked(Event, name="order_placed"):
        order_id: int

        @field_validator("order_id")
        @classmethod
        def check(cls, order_id: int) -> int:
            seen.append(order_id)
            raise ValueError("never")

    with pytest.raises(EnvelopeError, match="order_id: value_error"):
        interest_in(Checked).read(envelope_of(b'{"order_id": 7}'))

    assert seen == [7]
