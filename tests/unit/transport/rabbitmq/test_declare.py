"""The order in which a topology comes into being."""

from __future__ import annotations

from eventbus.topology import Binding, Exchange, Names, Queue, shared
from eventbus.transport.rabbitmq.declare import in_safe_order, shared_objects, some_of


def test_what_events_are_published_to_comes_last_when_every_binding_is_there() -> None:
    names = Names()
    topology = shared(names)

    order = in_safe_order(shared_objects(topology), topology.bindings)

    last_binding = max(place for place, part in enumerate(order) if isinstance(part, Binding))
    behind = [part.name for part in order[last_binding + 1 :] if isinstance(part, Exchange | Queue)]
    assert names.events in behind
    assert len(order) == len(topology.exchanges) + len(topology.queues) + len(topology.bindings)


def test_nothing_is_bound_before_it_exists() -> None:
    topology = shared(Names())
    exists: set[str] = set()

    for part in in_safe_order(shared_objects(topology), topology.bindings):
        if isinstance(part, Binding):
            assert {part.source, part.destination} <= exists
        else:
            exists.add(part.name)


def test_of_much_that_is_missing_a_line_names_some_and_counts_the_rest() -> None:
    exchanges = shared(Names()).exchanges

    assert some_of(exchanges[:2]) == f"exchange '{exchanges[0].name}', exchange '{exchanges[1].name}'"
    assert some_of(exchanges[:5]).count("exchange") == 5
    assert some_of(exchanges).endswith(f"exchange '{exchanges[4].name}' and {len(exchanges) - 5} more")
