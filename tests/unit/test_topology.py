"""The names and the arguments, spelled out: what a broker holds today must be what is declared tomorrow."""

from __future__ import annotations

import json

import pytest

from eventbus.errors import SetupError
from eventbus.topology import (
    Binding,
    Names,
    merge,
    of_service,
    shared,
)

NAMES = Names()
STARS = ".".join(["*"] * 24)


def arguments(queue: str) -> dict[str, object]:
    whole = merge([shared(NAMES), of_service(NAMES, "mail", ["order_placed.*"])])
    return dict(next(q for q in whole.queues if q.name == queue).arguments)


def bindings(*patterns: str) -> set[tuple[str, str, str, str]]:
    own = of_service(NAMES, "mail", patterns)
    return {(b.source, b.destination_type, b.destination, b.routing_key) for b in own.bindings}


# ── what every process of a namespace relies on ─────────────────────────────────────────────────────────────────────


def test_the_exchanges_are_those_of_the_contract() -> None:
    exchanges = {e.name: (e.type, dict(e.arguments)) for e in shared(NAMES).exchanges}

    to_undeliverable = {"alternate-exchange": "events.undeliverable"}
    assert exchanges == {
        "events": ("topic", {}),
        "events.dead": ("topic", to_undeliverable),
        "events.delay.v1.end": ("topic", to_undeliverable),
        "events.undeliverable": ("fanout", {}),
        **{f"events.delay.v1.{level:02d}": ("topic", {}) for level in range(24)},
    }


def test_what_nobody_could_take_waits_without_a_limit() -> None:
    assert arguments("events.undeliverable") == {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000_000}


@pytest.mark.parametrize(
    ("level", "ttl_ms", "below"),
    [
        (0, 250, "events.delay.v1.end"),
        (1, 500, "events.delay.v1.00"),
        (2, 1_000, "events.delay.v1.01"),
        (10, 256_000, "events.delay.v1.09"),
        (23, 2_097_152_000, "events.delay.v1.22"),
    ],
)
def test_a_level_of_the_delay_tree_holds_a_message_twice_as_long_as_the_one_below(
    level: int, ttl_ms: int, below: str
) -> None:
    assert arguments(f"events.delay.v1.{level:02d}") == {
        "x-queue-type": "quorum",
        "x-delivery-limit": 1_000_000_000,
        "x-message-ttl": ttl_ms,
        "x-dead-letter-exchange": below,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


@pytest.mark.parametrize(
    ("level", "waits", "falls", "below"),
    [
        (23, "1.#", "0.#", "events.delay.v1.22"),
        (22, "*.1.#", "*.0.#", "events.delay.v1.21"),
        (0, "*." * 23 + "1.#", "*." * 23 + "0.#", "events.delay.v1.end"),
    ],
)
def test_a_level_keeps_what_has_its_bit_and_passes_on_what_has_not(
    level: int, waits: str, falls: str, below: str
) -> None:
    here = f"events.delay.v1.{level:02d}"

    assert {b for b in shared(NAMES).bindings if b.source == here} == {
        Binding(here, here, "queue", waits, is_shared=True),
        Binding(here, below, "exchange", falls, is_shared=True),
    }


def test_there_are_twenty_four_levels_and_no_other_shared_queue_but_one() -> None:
    assert {queue.name for queue in shared(NAMES).queues} == {
        "events.undeliverable",
        *(f"events.delay.v1.{level:02d}" for level in range(24)),
    }
    assert all(queue.is_shared for queue in shared(NAMES).queues)
    assert all(binding.is_shared for binding in shared(NAMES).bindings)


# ── a service's own ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("queue", ["events.mail", "events.mail.retry"])
def test_a_services_queues_dead_letter_to_its_own_dead_queue(queue: str) -> None:
    assert arguments(queue) == {
        "x-queue-type": "quorum",
        "x-delivery-limit": 100,
        "x-dead-letter-exchange": "events.dead",
        "x-dead-letter-routing-key": "mail",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def test_dead_letters_are_kept_for_ever() -> None:
    assert arguments("events.mail.dead") == {
        "x-queue-type": "quorum",
        "x-delivery-limit": 1_000_000_000,
        "x-dead-letter-exchange": "events.undeliverable",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def test_a_service_has_three_queues_of_its_own() -> None:
    own = of_service(NAMES, "mail", ["#"])

    assert {queue.name for queue in own.queues} == {"events.mail", "events.mail.retry", "events.mail.dead"}
    assert not own.exchanges
    assert not any(queue.is_shared for queue in own.queues)
    assert not any(binding.is_shared for binding in own.bindings)


@pytest.mark.parametrize("pattern", ["order_placed.*", "order_placed.v1", "payments.#", "#"])
def test_each_subscription_is_bound_to_fresh_and_to_delayed_events(pattern: str) -> None:
    assert bindings(pattern) == {
        ("events", "queue", "events.mail", pattern),
        ("events.delay.v1.end", "queue", "events.mail", f"{STARS}.publish.{pattern}"),
        ("events.delay.v1.end", "queue", "events.mail.retry", f"{STARS}.retry.mail"),
        ("events.dead", "queue", "events.mail.dead", "mail"),
    }


def test_a_pattern_that_two_handlers_share_is_bound_once() -> None:
    assert bindings("a.*", "a.*") == bindings("a.*")
    assert len(of_service(NAMES, "mail", ["a.*", "a.*"]).bindings) == 4


def test_no_binding_of_the_end_begins_with_a_hash() -> None:
    # It would match keys of any length, and with them every retry and every delayed event.
    own = of_service(NAMES, "mail", ["#", "*.#"])

    assert all(b.routing_key.startswith(f"{STARS}.") for b in own.bindings if b.source == "events.delay.v1.end")


def test_a_namespace_is_in_front_of_every_name() -> None:
    whole = merge([shared(Names("shop-2")), of_service(Names("shop-2"), "mail", ["#"])])
    declared = [e.name for e in whole.exchanges] + [q.name for q in whole.queues]
    arguments = [e.arguments for e in whole.exchanges] + [q.arguments for q in whole.queues]
    led_to = [str(a[name]) for a in arguments for name in a if name.endswith("-exchange")]

    assert {name.partition(".")[0] for name in declared + led_to} == {"shop-2"}


# ── together ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_everything_can_be_declared_in_order() -> None:
    whole = merge([shared(NAMES), of_service(NAMES, "mail", ["#"]), of_service(NAMES, "stock", ["a.*"])])
    exchanges, queues = {e.name for e in whole.exchanges}, {q.name for q in whole.queues}

    for binding in whole.bindings:
        assert binding.source in exchanges
        assert binding.destination in (queues if binding.destination_type == "queue" else exchanges)


def test_what_two_services_share_is_there_once() -> None:
    whole = merge([shared(NAMES), of_service(NAMES, "a", ["#"]), shared(NAMES), of_service(NAMES, "b", ["#"])])

    names = [queue.name for queue in whole.queues]
    assert len(names) == len(set(names)) == 25 + 3 + 3
    assert len(whole.bindings) == len(set(whole.bindings))


def test_every_queue_is_a_quorum_queue_with_a_delivery_limit() -> None:
    whole = merge([shared(NAMES), of_service(NAMES, "mail", ["#"])])

    for queue in whole.queues:
        limit = queue.arguments["x-delivery-limit"]
        assert queue.arguments["x-queue-type"] == "quorum"
        assert isinstance(limit, int)
        assert limit > 0
        assert not {"x-max-length", "x-max-length-bytes", "x-expires"} & queue.arguments.keys()
        if "x-dead-letter-exchange" in queue.arguments:
            assert queue.arguments["x-dead-letter-strategy"] == "at-least-once"


def test_it_is_plain_json() -> None:
    told = json.loads(json.dumps(merge([shared(NAMES), of_service(NAMES, "mail", ["a.*"])]).to_json()))

    assert told["exchanges"][0] == {
        "name": "events.undeliverable", "type": "fanout", "arguments": {}, "durable": True,
    }  # fmt: skip
    assert {"name": "events.mail", "type": "quorum", "durable": True, "arguments": arguments("events.mail")} in told[
        "queues"
    ]
    assert {
        "source": "events", "destination": "events.mail", "destination_type": "queue", "routing_key": "a.*",
    } in told["bindings"]  # fmt: skip


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("namespace", ["", "Events", "ev.ents", "1", "e" * 101, "events\n"])
def test_a_bad_namespace_is_refused(namespace: str) -> None:
    with pytest.raises(SetupError, match="is no namespace"):
        Names(namespace)


def test_the_longest_names_still_fit_into_amqp() -> None:
    names = Names("n" * 100)
    own = of_service(names, "s" * 100, ["p" * 190])

    assert all(len(queue.name) <= 255 for queue in own.queues)
    assert all(len(binding.routing_key) <= 255 for binding in own.bindings)
