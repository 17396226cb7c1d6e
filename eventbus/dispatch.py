"""Which subscriptions want an event: looked up by its type, however many subscriptions there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from eventbus.service import Subscription

MOST_KNOWN: Final = 10_000  # types; foreign senders may use any number of them


class Dispatch:
    """The subscriptions of one service, in the order in which they were declared."""

    def __init__(self, subscriptions: Iterable[Subscription]) -> None:
        # All by their place. `order_placed.v1` and `order_placed.*` are found by what they say; a search through all,
        # for each new type, costs a service of a thousand a second.
        self._by_pattern: dict[str, dict[int, Subscription]] = {}
        self._others: dict[int, Subscription] = {}
        self._known: dict[str, tuple[Subscription, ...]] = {}
        for place, subscription in enumerate(subscriptions):
            for pattern in subscription.patterns:
                if _is_plain(pattern.removesuffix(".*")):
                    self._by_pattern.setdefault(pattern, {})[place] = subscription
                else:
                    self._others[place] = subscription

    def wanting(self, type_: str) -> tuple[Subscription, ...]:
        """Those that events of *type_* are for."""
        known = self._known.get(type_)
        if known is None:
            asked = self._others | self._by_pattern.get(type_, {}) | self._by_pattern.get(_any_version(type_), {})
            known = tuple(asked[place] for place in sorted(asked) if asked[place].wants(type_))
            if len(self._known) < MOST_KNOWN:
                self._known[type_] = known
        return known


def _is_plain(pattern: str) -> bool:
    return not {"*", "#"}.intersection(pattern.split("."))


def _any_version(type_: str) -> str:
    return type_.rpartition(".")[0] + ".*"
