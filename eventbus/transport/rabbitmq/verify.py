"""Whether a live broker keeps what the topology relies on. Pure: what was read of it in, findings out.

A finding says what is wrong, where, and what to do. `error` is what loses, blocks or misroutes; `warning` what may, or
what nobody takes care of; `info` is for knowing. Reading is done elsewhere: `asking` over AMQP, `management` over HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from eventbus.topology import ArgumentValue, Binding, Exchange, Names, Queue, Topology
from eventbus.transport.rabbitmq.bugs import OLDEST_WITH_FIXES, Bug, bugs_of, version_of

Severity = Literal["error", "warning", "info"]
SEVERITIES: Final = ("error", "warning", "info")

# Without the first two, queues of 3.10 and 3.11 dead-letter at most once, without a word.
NEEDED_FLAGS: Final = ("quorum_queue", "stream_queue")
# What a policy may not say about our queues: each loses messages, or stops the delay tree for everybody.
POLICY_HARM: Final = {
    "max-length": "a full queue refuses what retries bring, which stops the delay tree for every service",
    "max-length-bytes": "a full queue refuses what retries bring, which stops the delay tree for every service",
    "message-ttl": "messages leave the queue before anybody has handled them",
    "expires": "an unused queue is deleted with all that is in it",
    "delivery-limit": "messages are taken away after that many returns, looking at them included",
    "overflow": "dead-lettering is at-least-once with reject-publish only",
}
# A handler may take 25 minutes.
SHORTEST_CONSUMER_TIMEOUT_MS: Final = 26 * 60 * 1000
# The dead-lettering window: so many that cannot go on hold up everything behind them.
DLX_WINDOW: Final = 32
GROUP_SIZE: Final = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """What is not as it should be. `check` names the rule that found it, for scripts."""

    severity: Severity
    check: str
    where: str
    what: str
    remedy: str


# ── what was read ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Standing:
    """What AMQP alone tells of a queue: exact, and of this moment."""

    ready: int
    consumers: int


@dataclass(frozen=True, slots=True)
class SeenQueue:
    """What the management API tells of a queue."""

    type: str = "quorum"
    durable: bool = True
    arguments: Mapping[str, object] = field(default_factory=dict)
    policy: Mapping[str, object] = field(default_factory=dict)  # the effective one, the operator's included
    state: str = "running"
    members: int = 1
    online: int = 1
    messages: int = 0
    unacked: int = 0
    dlx: int = 0  # given up by the queue, and not yet taken by their dead-letter target


@dataclass(frozen=True, slots=True)
class SeenExchange:
    """What the management API tells of an exchange."""

    type: str
    durable: bool = True
    arguments: Mapping[str, object] = field(default_factory=dict)
    policy: str | None = None


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    running: bool = True
    partitions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    definition: Mapping[str, object]
    is_operators: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Managed:
    """What the management API told. None: it did not; `unread` says why."""

    queues: Mapping[str, SeenQueue] | None = None
    exchanges: Mapping[str, SeenExchange] | None = None
    bindings: frozenset[Binding] | None = None
    policies: tuple[Policy, ...] | None = None
    nodes: tuple[Node, ...] | None = None
    feature_flags: Mapping[str, str] | None = None
    alarms: tuple[str, ...] | None = None
    unread: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A broker as it was found. `exchanges` and `queues` over AMQP: what is not in them does not exist."""

    version: str
    exchanges: frozenset[str]
    queues: Mapping[str, Standing]
    managed: Managed


# ── what is found ───────────────────────────────────────────────────────────────────────────────────


def verify(names: Names, wanted: Topology, seen: Seen) -> list[Finding]:
    """All that is not as *wanted* (the services' topology) needs it, the worst first."""
    managed = seen.managed
    found = [
        *_version(seen.version, managed.nodes),
        *_feature_flags(managed.feature_flags or {}),
        *_alarms(managed.alarms or ()),
        *_nodes(managed.nodes or ()),
        *_exchanges(names, wanted, seen),
        *_queues(names, wanted, seen),
        *_bindings(names, wanted, seen),
        *_unread(managed.unread),
    ]
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def leftover(wanted: Topology, bindings: Iterable[Binding]) -> list[Binding]:
    """Which of *bindings* lead to a queue of *wanted*'s services without being wanted (any more)."""
    known = {_plain(binding) for binding in wanted.bindings}
    ours = {queue.name for queue in wanted.queues if not queue.is_shared}
    return sorted(
        (b for b in bindings if b.destination_type == "queue" and b.destination in ours and b not in known),
        key=lambda binding: (binding.destination, binding.source, binding.routing_key),
    )


def missing_shared(wanted: Topology, bindings: Iterable[Binding]) -> list[Binding]:
    """Which bindings of what all services share are not among *bindings*."""
    there = set(bindings)
    return [binding for binding in map(_plain, (b for b in wanted.bindings if b.is_shared)) if binding not in there]


def _plain(binding: Binding) -> Binding:
    """As a broker knows it, which is not told who shares it."""
    return Binding(binding.source, binding.destination, binding.destination_type, binding.routing_key)


def _version(text: str, nodes: tuple[Node, ...] | None) -> Iterator[Finding]:
    where, version = f"RabbitMQ {text}", version_of(text)
    if version < OLDEST_WITH_FIXES:
        yield Finding(
            "warning",
            "version",
            where,
            "this line gets no fixes any more; what was found since to lose messages in clusters is in it",
            "upgrade to the newest 4.x, feature flags first",
        )
    for bug in bugs_of(version):
        fixed = ".".join(map(str, bug.fixed))
        yield Finding(
            _severity_of(bug, nodes),
            "version",
            where,
            f"{bug.what} (RabbitMQ's {bug.source}{'; clusters only' if bug.needs_cluster else ''})",
            f"upgrade to {fixed} or newer",
        )


def _severity_of(bug: Bug, nodes: tuple[Node, ...] | None) -> Severity:
    if bug.needs_cluster and nodes is None:
        return "warning"
    if bug.needs_cluster and nodes is not None and len(nodes) < 2:
        return "info"
    return "error" if bug.loses else "warning"


def _feature_flags(flags: Mapping[str, str]) -> Iterator[Finding]:
    for flag in NEEDED_FLAGS:
        if flags.get(flag, "enabled") != "enabled":
            yield Finding(
                "error",
                "feature-flag",
                f"feature flag {flag}",
                f"it is {flags[flag]}: queues dead-letter at most once, whatever their arguments say",
                f"rabbitmqctl enable_feature_flag {flag}",
            )
    off = sorted(flag for flag, state in flags.items() if state != "enabled" and flag not in NEEDED_FLAGS)
    if off:
        yield Finding(
            "info",
            "feature-flag",
            "feature flags",
            f"not enabled: {', '.join(off)}",
            "rabbitmqctl enable_feature_flag all, before the next upgrade asks for it",
        )


def _alarms(alarms: Iterable[str]) -> Iterator[Finding]:
    for alarm in alarms:
        yield Finding(
            "error",
            "alarm",
            alarm,
            "the broker takes nothing from publishers, retries included",
            "free memory or disk space on that node, or raise its limit",
        )


def _nodes(nodes: tuple[Node, ...]) -> Iterator[Finding]:
    for node in nodes:
        if node.partitions:
            yield Finding(
                "error",
                "node",
                node.name,
                f"it is cut off from {', '.join(node.partitions)}",
                "mend the network; then restart the side whose changes may go",
            )
        elif not node.running:
            yield Finding(
                "warning",
                "node",
                node.name,
                "it is not running: one more failure may stop the queues",
                "start it, or remove it from the cluster (rabbitmqctl forget_cluster_node)",
            )


# ── exchanges ───────────────────────────────────────────────────────────────────────────────────────


def _exchanges(names: Names, wanted: Topology, seen: Seen) -> Iterator[Finding]:
    targets = _dead_letter_exchanges(wanted)
    for exchange in wanted.exchanges:
        if exchange.name not in seen.exchanges:
            is_target = exchange.name in targets
            yield Finding(
                "error",
                "dead-letter-target" if is_target else "missing",
                f"exchange {exchange.name}",
                "it is missing: what is dead-lettered to it stays where it is, and holds up the rest"
                if is_target
                else "it is missing",
                "eventbus topology apply",
            )
        elif seen.managed.exchanges is not None and exchange.name in seen.managed.exchanges:
            yield from _exchange(names, exchange, seen.managed.exchanges[exchange.name], seen.managed.policies or ())


def _dead_letter_exchanges(wanted: Topology) -> set[object]:
    return {queue.arguments.get("x-dead-letter-exchange") for queue in wanted.queues}


def _exchange(names: Names, wanted: Exchange, found: SeenExchange, policies: tuple[Policy, ...]) -> Iterator[Finding]:
    where, anew = f"exchange {wanted.name}", "stop the services, delete it, and run eventbus topology apply"
    if found.type != wanted.type or not found.durable:
        kind = f"{'durable' if found.durable else 'transient'} {found.type}"
        yield Finding(
            "error", "exchange-type", where, f"it is a {kind} exchange, not a durable {wanted.type} one", anew
        )
    for text in _differences(wanted.arguments, found.arguments):
        yield Finding("error", "exchange-arguments", where, text, anew)
    for policy in policies:
        if policy.name == found.policy and "alternate-exchange" in policy.definition and wanted.name == names.events:
            yield Finding(
                "error",
                "policy",
                where,
                f"policy '{policy.name}' gives it an alternate exchange: publishers no longer learn that no queue took "
                "an event",
                f"narrow the policy's pattern, or remove it: rabbitmqctl clear_policy -p VHOST {policy.name}",
            )


def _differences(wanted: Mapping[str, ArgumentValue], found: Mapping[str, object]) -> Iterator[str]:
    for name in sorted({*wanted, *found}):
        if wanted.get(name) != found.get(name):
            there, ours = (str(side[name]) if name in side else "nothing" for side in (found, wanted))
            yield f"its {name} is {there}, and the bus wants {ours}"


# ── queues ──────────────────────────────────────────────────────────────────────────────────────────


def _queues(names: Names, wanted: Topology, seen: Seen) -> Iterator[Finding]:
    for queue in wanted.queues:
        standing = seen.queues.get(queue.name)
        if standing is None:
            yield _missing_queue(names, queue)
            continue
        yield from _consumers(queue, standing)
        found = (seen.managed.queues or {}).get(queue.name)
        if found is not None:
            yield from _queue(queue, found)
            yield from _policy(queue, found, seen.managed.policies or ())
            yield from _members(queue, found, seen.managed.nodes or ())
        yield from _contents(names, queue, max(standing.ready, found.messages if found else 0), found)


def _missing_queue(names: Names, queue: Queue) -> Finding:
    where = f"queue {queue.name}"
    if queue.name == names.undeliverable:
        return Finding(
            "error",
            "dead-letter-target",
            where,
            "it is missing: what nobody can take is lost, or holds up the rest",
            "eventbus topology apply",
        )
    if queue.name.endswith(".dead") and not queue.is_shared:
        return Finding(
            "error",
            "dead-letter-target",
            where,
            f"it is missing: dead letters go to {names.undeliverable} instead",
            "eventbus topology apply, then eventbus undeliverable replay",
        )
    return Finding(
        "error", "missing", where, "it is missing: what is published for it is not kept", "eventbus topology apply"
    )


def _consumers(queue: Queue, standing: Standing) -> Iterator[Finding]:
    where = f"queue {queue.name}"
    if queue.is_shared or queue.name.endswith(".dead"):
        if standing.consumers:
            yield Finding(
                "error",
                "consumer",
                where,
                "somebody consumes it: what waits there is taken away",
                "end that consumer; to look, use eventbus dead or eventbus undeliverable",
            )
    elif not standing.consumers:
        yield Finding(
            "warning",
            "no-consumer",
            where,
            f"nobody consumes it; {_messages(standing.ready)} in it",
            "start the service, or remove it: eventbus topology remove SERVICE",
        )


def _messages(count: int) -> str:
    return "1 message waits" if count == 1 else f"{count:,} messages wait" if count else "nothing waits"


def _queue(wanted: Queue, found: SeenQueue) -> Iterator[Finding]:
    where, anew = f"queue {wanted.name}", "stop the services, drain and delete it, and run eventbus topology apply"
    if found.type != "quorum":
        yield Finding(
            "error",
            "queue-type",
            where,
            f"it is a {found.type} queue, not a quorum queue: a crash of one node loses what is in it",
            anew,
        )
        return  # its arguments differ then, too
    for text in _differences(wanted.arguments, found.arguments):
        yield Finding("error", "queue-arguments", where, text, anew)


def _policy(wanted: Queue, found: SeenQueue, policies: tuple[Policy, ...]) -> Iterator[Finding]:
    for key, value in sorted(found.policy.items()):
        if key in POLICY_HARM and not _is_harmless(key, value, wanted):
            names = [policy for policy in policies if policy.definition.get(key) == value]
            yield Finding(
                "error",
                "policy",
                f"queue {wanted.name}",
                f"{_named(names)} sets {key} to {value}: {POLICY_HARM[key]}",
                f"narrow its pattern so that it leaves {wanted.name} out{_how_to_clear(names)}",
            )
        elif key == "consumer-timeout" and isinstance(value, int) and value < SHORTEST_CONSUMER_TIMEOUT_MS:
            yield Finding(
                "warning",
                "policy",
                f"queue {wanted.name}",
                f"a policy ends consumers after {value // 1000} s: a handler may take 25 minutes",
                "leave consumer-timeout at its default, or keep the handlers' timeouts below it",
            )


def _is_harmless(key: str, value: object, queue: Queue) -> bool:
    """Whether the queue's own argument wins: of two numbers the smaller counts, and a negative one counts as none."""
    ours = queue.arguments.get(f"x-{key}")
    if key == "overflow":
        return value == "reject-publish"
    if key in ("delivery-limit", "message-ttl") and isinstance(value, int) and isinstance(ours, int):
        return value >= ours or (key == "delivery-limit" and value < 0)
    return False


def _named(policies: list[Policy]) -> str:
    named = [f"the {'operator ' if p.is_operators else ''}policy '{p.name}'" for p in policies]
    return " or ".join(named) or "a policy"


def _how_to_clear(policies: list[Policy]) -> str:
    commands = [f"rabbitmqctl clear_{'operator_' if p.is_operators else ''}policy -p VHOST {p.name}" for p in policies]
    return f", or remove it: {', '.join(commands)}" if commands else ""


def _members(wanted: Queue, found: SeenQueue, nodes: tuple[Node, ...]) -> Iterator[Finding]:
    where = f"queue {wanted.name}"
    # 3.10: `running` whatever is missing; 4.x: `minority`, `down`, and others.
    if found.type == "quorum" and found.online * 2 <= found.members:
        yield Finding(
            "error",
            "members",
            where,
            f"{found.online} of its {found.members} members are up: it takes nothing",
            "start the missing nodes",
        )
    elif found.online < found.members:
        yield Finding(
            "warning",
            "members",
            where,
            f"{found.online} of its {found.members} members are up",
            "start the missing nodes before another one fails",
        )
    elif found.state not in ("running", "idle", "flow"):
        yield Finding("error", "members", where, f"it is {found.state}", "see the broker's log")
    if found.type == "quorum" and found.members < min(GROUP_SIZE, len(nodes)):
        yield Finding(
            "warning",
            "members",
            where,
            f"it has {found.members} member(s) on {len(nodes)} nodes: a crash may stop it",
            "rabbitmq-queues grow NODE all",
        )


def _contents(names: Names, queue: Queue, messages: int, found: SeenQueue | None) -> Iterator[Finding]:
    where = f"queue {queue.name}"
    if queue.name == names.undeliverable and messages:
        yield Finding(
            "warning",
            "undeliverable",
            where,
            f"{_messages(messages)} in it, which no queue took",
            "eventbus undeliverable list, mend what is missing, eventbus undeliverable replay",
        )
    elif queue.name.endswith(".dead") and messages:
        service = queue.name.removeprefix(f"{names.namespace}.").removesuffix(".dead")
        yield Finding("info", "dead-letters", where, f"{_messages(messages)} in it", f"eventbus dead list {service}")
    if found is not None and found.dlx >= DLX_WINDOW:
        yield Finding(
            "warning",
            "dead-lettering",
            where,
            f"{found.dlx:,} messages have left it and arrived nowhere yet",
            "look again in a minute; if there are no fewer, restart the node of the queue's leader",
        )


# ── bindings ────────────────────────────────────────────────────────────────────────────────────────


def _bindings(names: Names, wanted: Topology, seen: Seen) -> Iterator[Finding]:
    bindings = seen.managed.bindings
    if bindings is None:
        return
    for binding in wanted.bindings:
        # Without its ends it cannot be there, and they are named as missing already.
        destinations = seen.queues if binding.destination_type == "queue" else seen.exchanges
        has_ends = binding.source in seen.exchanges and binding.destination in destinations
        if _plain(binding) not in bindings and has_ends:
            yield _missing_binding(names, binding)
    for binding in leftover(wanted, bindings):
        yield Finding(
            "warning",
            "leftover-binding",
            f"queue {binding.destination}",
            f"it still gets '{short(binding.routing_key)}' from {binding.source}, which no subscription wants",
            "eventbus topology apply --prune MODULE:SERVICE, once no older worker of it runs",
        )
    for binding in sorted(bindings, key=lambda binding: binding.destination):
        if binding.source == names.delay_end and binding.destination_type == "exchange":
            yield Finding(
                "error",
                "leftover-binding",
                f"exchange {binding.source}",
                f"it leads to the exchange {binding.destination}: what finds no queue there stops the delay tree",
                "remove that binding in the management interface",
            )


def _missing_binding(names: Names, binding: Binding) -> Finding:
    is_dead = binding.source == names.dead_exchange
    lost = f"dead letters go to {names.undeliverable} instead" if is_dead else "what it should bring does not arrive"
    return Finding(
        "error",
        "dead-letter-target" if is_dead else "missing-binding",
        f"{binding.destination_type} {binding.destination}",
        f"it is not bound to {binding.source} by '{short(binding.routing_key)}': {lost}",
        # Without it, apply takes the bindings of what is shared to exist when the queues and exchanges do.
        "eventbus topology apply --prune" if binding.is_shared else "eventbus topology apply",
    )


def short(routing_key: str) -> str:
    """The delay tree's keys begin with a word for each of its levels; a person need not count them."""
    stars = 0
    words = routing_key.split(".")
    while stars < len(words) and words[stars] == "*":
        stars += 1
    return ".".join([f"({stars} words)", *words[stars:]]) if stars > 2 else routing_key


def _unread(unread: Mapping[str, str]) -> Iterator[Finding]:
    for what, why in unread.items():
        yield Finding(
            "info",
            "not-checked",
            what,
            f"not checked: {why}",
            "give --management URL, with a user tagged 'monitoring' or 'administrator'",
        )
