"""Which subscriptions want an event."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from eventbus import dispatch
from eventbus.dispatch import Dispatch
from eventbus.message import matches


class Subscribed(SimpleNamespace):
    """As much of a subscription as matters here, and what it was asked."""

    def __init__(self, *patterns: str) -> None:
        super().__init__(patterns=patterns, asked=[])

    def wants(self, type_: str) -> bool:
        self.asked.append(type_)
        return any(matches(pattern, type_) for pattern in self.patterns)


def keys(*words: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(["", "a", "b", "v1", "a*", *words]), max_size=4).map(".".join)


@given(
    subscribed=st.lists(st.lists(keys("*", "#"), min_size=1, max_size=3), max_size=6),
    types=st.lists(keys(), max_size=8),
)
def test_those_are_found_whose_patterns_match_in_their_order(subscribed: list[list[str]], types: list[str]) -> None:
    subscriptions: Any = [Subscribed(*patterns) for patterns in subscribed]
    found = Dispatch(subscriptions)

    for type_ in types * 2:
        assert found.wanting(type_) == tuple(s for s in subscriptions if s.wants(type_))


def test_of_a_thousand_subscriptions_only_those_are_asked_that_may_want_it() -> None:
    subscriptions: Any = [Subscribed(f"com.shop.placed_{n}.{version}") for n in range(1000) for version in ("v1", "*")]
    subscriptions.append(Subscribed("com.#.v2"))
    found = Dispatch(subscriptions)

    for _ in range(3):
        assert found.wanting("com.shop.placed_7.v1") == (subscriptions[14], subscriptions[15])

    assert [s for s in subscriptions if s.asked] == [subscriptions[14], subscriptions[15], subscriptions[-1]]
    assert subscriptions[14].asked == ["com.shop.placed_7.v1"]  # and once only


def test_types_without_end_are_remembered_up_to_a_bound(monkeypatch: Any) -> None:
    monkeypatch.setattr(dispatch, "MOST_KNOWN", 2)
    subscriptions: Any = [Subscribed("#")]
    found = Dispatch(subscriptions)

    for type_ in ("a", "b", "c", "a", "c"):
        assert found.wanting(type_) == tuple(subscriptions)

    assert subscriptions[0].asked == ["a", "b", "c", "c"]
