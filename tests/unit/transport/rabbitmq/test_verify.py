"""What is found on a broker, as tables: one thing is not as it should be, and one finding says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any  # Any: the fields of Managed, replaced by name

import pytest

from eventbus.topology import Binding, Names, merge, of_service, shared
from eventbus.transport.rabbitmq.verify import (
    Finding,
    Managed,
    Node,
    Policy,
    Seen,
    SeenExchange,
    SeenQueue,
    Standing,
    leftover,
    missing_shared,
    short,
    verify,
)

NAMES = Names()
WANTED = merge([shared(NAMES), of_service(NAMES, "mails", ["order_placed.*"])])
NODE = Node("rabbit@one")


def plain(binding: Binding) -> Binding:
    return replace(binding, is_shared=False)


def seen(**managed: Any) -> Seen:
    """A broker on which all is well, but for *managed*."""
    well = Managed(
        queues={queue.name: SeenQueue(arguments=queue.arguments) for queue in WANTED.queues},
        exchanges={e.name: SeenExchange(e.type, arguments=e.arguments) for e in WANTED.exchanges},
        bindings=frozenset(map(plain, WANTED.bindings)),
        policies=(),
        nodes=(NODE,),
        feature_flags={"quorum_queue": "enabled", "stream_queue": "enabled"},
        alarms=(),
    )
    own = {"events.mails", "events.mails.retry"}
    return Seen(
        version="4.3.6",
        exchanges=frozenset(exchange.name for exchange in WANTED.exchanges),
        queues={queue.name: Standing(0, 1 if queue.name in own else 0) for queue in WANTED.queues},
        managed=replace(well, **managed),
    )


def with_queue(name: str, **changes: Any) -> Seen:
    queues = dict(seen().managed.queues or {})
    return seen(queues=queues | {name: replace(queues[name], **changes)})


def with_exchange(name: str, **changes: Any) -> Seen:
    exchanges = dict(seen().managed.exchanges or {})
    return seen(exchanges=exchanges | {name: replace(exchanges[name], **changes)})


def without_queue(name: str) -> Seen:
    kept = frozenset(b for b in map(plain, WANTED.bindings) if (b.destination_type, b.destination) != ("queue", name))
    queues = {known: standing for known, standing in seen().queues.items() if known != name}
    return replace(seen(bindings=kept), queues=queues)


def with_standing(name: str, standing: Standing) -> Seen:
    return replace(seen(), queues=dict(seen().queues) | {name: standing})


def without_binding(source: str, destination: str, key: str = "") -> Seen:
    gone = {
        b
        for b in map(plain, WANTED.bindings)
        if (b.source, b.destination) == (source, destination) and key in b.routing_key
    }
    assert len(gone) == 1
    return seen(bindings=frozenset(map(plain, WANTED.bindings)) - gone)


def with_binding(binding: Binding) -> Seen:
    return seen(bindings=frozenset([*map(plain, WANTED.bindings), binding]))


def found(broker: Seen) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.check, finding.where) for finding in verify(NAMES, WANTED, broker)]


def only(broker: Seen) -> Finding:
    (finding,) = verify(NAMES, WANTED, broker)
    return finding


def test_where_all_is_well_nothing_is_found() -> None:
    assert verify(NAMES, WANTED, seen()) == []


# ── queues ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "check", "said"),
    [
        ("events.mails", "missing", "what is published for it is not kept"),
        ("events.mails.retry", "missing", "is not kept"),
        ("events.mails.dead", "dead-letter-target", "dead letters go to events.undeliverable"),
        ("events.undeliverable", "dead-letter-target", "what nobody can take is lost"),
        ("events.delay.v1.07", "missing", "it is missing"),
    ],
)
def test_a_missing_queue_is_an_error(name: str, check: str, said: str) -> None:
    finding = only(without_queue(name))

    assert (finding.severity, finding.check, finding.where) == ("error", check, f"queue {name}")
    assert said in finding.what
    assert "eventbus topology apply" in finding.remedy


@pytest.mark.parametrize("type", ["classic", "stream"])
def test_a_queue_of_another_type_is_one_error_whatever_its_arguments(type: str) -> None:
    finding = only(with_queue("events.mails", type=type, arguments={}))

    assert (finding.severity, finding.check, finding.where) == ("error", "queue-type", "queue events.mails")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x-delivery-limit": 5}, "its x-delivery-limit is 5, and the bus wants 100"),
        ({"x-max-length": 10}, "its x-max-length is 10, and the bus wants nothing"),
        ({"x-dead-letter-exchange": "elsewhere"}, "its x-dead-letter-exchange is elsewhere, and the bus wants events"),
    ],
)
def test_another_argument_is_an_error_that_shows_both_sides(arguments: dict[str, object], said: str) -> None:
    ours = dict(next(queue.arguments for queue in WANTED.queues if queue.name == "events.mails"))

    finding = only(with_queue("events.mails", arguments=ours | arguments))

    assert (finding.severity, finding.check) == ("error", "queue-arguments")
    assert said in finding.what


def test_an_argument_that_is_not_there_is_an_error_too() -> None:
    finding = only(with_queue("events.undeliverable", arguments={"x-queue-type": "quorum"}))

    assert finding.what == "its x-delivery-limit is nothing, and the bus wants 1000000000"


@pytest.mark.parametrize(
    ("queue", "policy"),
    [
        ("events.mails", {"max-length": 1_000_000}),
        ("events.mails.retry", {"max-length-bytes": 1_000_000}),
        ("events.mails", {"message-ttl": 86_400_000}),
        ("events.mails.dead", {"message-ttl": 86_400_000}),
        ("events.mails", {"expires": 1_800_000}),
        ("events.mails", {"delivery-limit": 20}),
        ("events.mails.dead", {"delivery-limit": 20}),
        ("events.undeliverable", {"max-length": 1}),
        ("events.delay.v1.03", {"message-ttl": 1_000}),
        ("events.delay.v1.03", {"overflow": "drop-head"}),
    ],
)
def test_a_policy_that_breaks_the_design_is_an_error(queue: str, policy: dict[str, object]) -> None:
    (key,) = policy
    broker = with_queue(queue, policy=policy)
    named = replace(broker, managed=replace(broker.managed, policies=(Policy("limits", policy),)))

    finding = only(named)

    assert (finding.severity, finding.check, finding.where) == ("error", "policy", f"queue {queue}")
    assert f"the policy 'limits' sets {key} to" in finding.what
    assert "rabbitmqctl clear_policy -p VHOST limits" in finding.remedy


def test_an_operators_policy_is_cleared_otherwise() -> None:
    broker = with_queue("events.mails", policy={"max-length": 5})
    limits = Policy("limits", {"max-length": 5}, is_operators=True)

    finding = only(replace(broker, managed=replace(broker.managed, policies=(limits,))))

    assert "the operator policy 'limits'" in finding.what
    assert "clear_operator_policy -p VHOST limits" in finding.remedy


@pytest.mark.parametrize(
    ("queue", "policy"),
    [
        ("events.mails", {"delivery-limit": 100}),
        ("events.mails", {"delivery-limit": -1}),
        ("events.mails", {"overflow": "reject-publish"}),
        ("events.delay.v1.03", {"message-ttl": 2_000}),
        ("events.mails", {"queue-leader-locator": "balanced"}),
        ("events.mails", {"consumer-timeout": 1_800_000}),
    ],
)
def test_a_policy_that_changes_nothing_for_us_is_fine(queue: str, policy: dict[str, object]) -> None:
    assert found(with_queue(queue, policy=policy)) == []


def test_a_short_consumer_timeout_is_a_warning() -> None:
    finding = only(with_queue("events.mails", policy={"consumer-timeout": 60_000}))

    assert (finding.severity, finding.check) == ("warning", "policy")
    assert "after 60 s" in finding.what


@pytest.mark.parametrize(
    ("queue", "standing", "severity", "check"),
    [
        ("events.mails", Standing(3, 0), "warning", "no-consumer"),
        ("events.mails.retry", Standing(0, 0), "warning", "no-consumer"),
        ("events.delay.v1.02", Standing(0, 1), "error", "consumer"),
        ("events.undeliverable", Standing(2, 0), "warning", "undeliverable"),
        ("events.mails.dead", Standing(2, 0), "info", "dead-letters"),
    ],
)
def test_who_consumes_and_what_waits(queue: str, standing: Standing, severity: str, check: str) -> None:
    assert found(with_standing(queue, standing)) == [(severity, check, f"queue {queue}")]


@pytest.mark.parametrize(
    ("changes", "severity", "check"),
    [
        ({"members": 3, "online": 2}, "warning", "members"),
        ({"members": 3, "online": 1}, "error", "members"),
        ({"members": 2, "online": 1}, "error", "members"),
        ({"state": "down"}, "error", "members"),
        ({"dlx": 32}, "warning", "dead-lettering"),
    ],
)
def test_how_a_queue_is(changes: dict[str, object], severity: str, check: str) -> None:
    assert found(with_queue("events.delay.v1.02", **changes)) == [(severity, check, "queue events.delay.v1.02")]


def test_a_queue_on_one_of_three_nodes_is_a_warning() -> None:
    three = (NODE, Node("rabbit@two"), Node("rabbit@three"))
    queues = {name: replace(queue, members=3, online=3) for name, queue in (seen().managed.queues or {}).items()}
    queues["events.mails"] = replace(queues["events.mails"], members=1, online=1)

    assert found(seen(nodes=three, queues=queues)) == [("warning", "members", "queue events.mails")]


# ── exchanges and bindings ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "check"), [("events", "missing"), ("events.dead", "dead-letter-target"), ("events.delay.v1.end", None)]
)
def test_a_missing_exchange_is_an_error(name: str, check: str | None) -> None:
    broker = replace(seen(), exchanges=seen().exchanges - {name})

    assert found(broker) == [("error", check or "dead-letter-target", f"exchange {name}")]


@pytest.mark.parametrize(
    ("name", "changes", "check"),
    [
        ("events", {"type": "direct"}, "exchange-type"),
        ("events", {"durable": False}, "exchange-type"),
        ("events", {"arguments": {"alternate-exchange": "x"}}, "exchange-arguments"),
        ("events.dead", {"arguments": {}}, "exchange-arguments"),
    ],
)
def test_another_exchange_is_an_error(name: str, changes: dict[str, object], check: str) -> None:
    assert found(with_exchange(name, **changes)) == [("error", check, f"exchange {name}")]


def test_a_policy_that_hides_what_is_unroutable_is_an_error() -> None:
    policy = Policy("catch-all", {"alternate-exchange": "unrouted"})
    broker = with_exchange("events", policy="catch-all")

    finding = only(replace(broker, managed=replace(broker.managed, policies=(policy,))))

    assert (finding.check, finding.where) == ("policy", "exchange events")


@pytest.mark.parametrize(
    ("source", "destination", "key", "check", "remedy"),
    [
        ("events", "events.mails", "", "missing-binding", "eventbus topology apply"),
        ("events.delay.v1.end", "events.mails.retry", "", "missing-binding", "eventbus topology apply"),
        ("events.delay.v1.end", "events.mails", "", "missing-binding", "eventbus topology apply"),
        ("events.dead", "events.mails.dead", "", "dead-letter-target", "eventbus topology apply"),
        ("events.delay.v1.04", "events.delay.v1.04", "1.#", "missing-binding", "eventbus topology apply --prune"),
        ("events.undeliverable", "events.undeliverable", "", "missing-binding", "eventbus topology apply --prune"),
    ],
)
def test_a_missing_binding_is_an_error(source: str, destination: str, key: str, check: str, remedy: str) -> None:
    finding = only(without_binding(source, destination, key))

    assert (finding.severity, finding.check, finding.where) == ("error", check, f"queue {destination}")
    assert f"not bound to {source}" in finding.what
    assert "*.*" not in finding.what
    assert finding.remedy == remedy


def test_a_leftover_binding_is_a_warning() -> None:
    finding = only(with_binding(Binding("events", "events.mails", "queue", "order_cancelled.*")))

    assert (finding.severity, finding.check, finding.where) == ("warning", "leftover-binding", "queue events.mails")
    assert "'order_cancelled.*' from events" in finding.what
    assert "--prune" in finding.remedy


def test_another_services_bindings_are_its_own() -> None:
    assert found(with_binding(Binding("events", "events.audit", "queue", "#"))) == []


def test_a_way_out_of_the_delay_tree_into_an_exchange_is_an_error() -> None:
    broker = with_binding(Binding("events.delay.v1.end", "events", "exchange", "#"))

    assert found(broker) == [("error", "leftover-binding", "exchange events.delay.v1.end")]


def test_what_prune_removes_and_binds_again() -> None:
    old = Binding("events", "events.mails", "queue", "old.*")
    there = [old, *(plain(b) for b in WANTED.bindings if b.source != "events.undeliverable")]

    assert leftover(WANTED, there) == [old]
    assert missing_shared(WANTED, there) == [Binding("events.undeliverable", "events.undeliverable", "queue", "")]


# ── the broker ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("flag", ["quorum_queue", "stream_queue"])
def test_a_flag_without_which_dead_letters_are_lost_is_an_error(flag: str) -> None:
    finding = only(seen(feature_flags={flag: "disabled"}))

    assert (finding.severity, finding.check) == ("error", "feature-flag")
    assert finding.remedy == f"rabbitmqctl enable_feature_flag {flag}"


def test_another_flag_is_for_knowing() -> None:
    assert found(seen(feature_flags={"khepri_db": "disabled"})) == [("info", "feature-flag", "feature flags")]


@pytest.mark.parametrize(
    ("managed", "severity", "check"),
    [
        ({"alarms": ("memory alarm on rabbit@one",)}, "error", "alarm"),
        ({"nodes": (Node("rabbit@one", partitions=("rabbit@two",)),)}, "error", "node"),
        ({"nodes": (Node("rabbit@one", running=False),)}, "warning", "node"),
    ],
)
def test_how_the_broker_is(managed: dict[str, object], severity: str, check: str) -> None:
    finding = only(seen(**managed))

    assert (finding.severity, finding.check) == (severity, check)
    assert "rabbit@one" in finding.where


@pytest.mark.parametrize(
    ("version", "nodes", "severities"),
    [
        ("4.3.6", 3, set()),
        ("3.10.8", 1, {"warning"}),
        ("4.0.5", 1, {"info"}),
        ("4.0.5", 3, {"error", "warning"}),
        ("4.0.5", None, {"warning"}),
        ("4.3.4", 1, {"error"}),
    ],
)
def test_versions_that_lose_are_errors_where_they_can(version: str, nodes: int | None, severities: set[str]) -> None:
    cluster = None if nodes is None else tuple(Node(f"rabbit@{number}") for number in range(nodes))
    members = {n: replace(q, members=nodes or 1, online=nodes or 1) for n, q in (seen().managed.queues or {}).items()}
    broker = replace(seen(nodes=cluster, queues=members), version=version)

    findings = verify(NAMES, WANTED, broker)

    assert {finding.severity for finding in findings} == severities
    assert {finding.check for finding in findings} <= {"version"}
    assert all("upgrade to" in finding.remedy for finding in findings)


# ── what was not seen ───────────────────────────────────────────────────────────────────────────────


def test_over_amqp_alone_what_exists_and_who_consumes_is_checked_and_the_rest_is_named() -> None:
    nothing = Managed(unread={"bindings": "no management interface answers"})
    queues = {name: standing for name, standing in seen().queues.items() if name != "events.mails"}

    findings = verify(NAMES, WANTED, replace(seen(), queues=queues, managed=nothing))

    assert [(f.severity, f.check, f.where) for f in findings] == [
        ("error", "missing", "queue events.mails"),
        ("info", "not-checked", "bindings"),
    ]
    assert "no management interface answers" in findings[1].what


def test_the_worst_comes_first() -> None:
    broker = replace(seen(alarms=("disk alarm on rabbit@one",), feature_flags={"khepri_db": "disabled"}))
    broker = replace(broker, queues=dict(broker.queues) | {"events.mails": Standing(0, 0)})

    assert [finding.severity for finding in verify(NAMES, WANTED, broker)] == ["error", "warning", "info"]


@pytest.mark.parametrize(
    ("key", "shown"),
    [("*.*.*.*.publish.order_placed.*", "(4 words).publish.order_placed.*"), ("order_placed.*", "order_placed.*"),
     ("*.*", "*.*"), ("#", "#")],
)  # fmt: skip
def test_leading_stars_are_counted(key: str, shown: str) -> None:
    assert short(key) == shown
