"""`eventbus topology`: what services need on the broker, as data, declared, verified and removed."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from eventbus.cli import output
from eventbus.cli.connection import (
    ManagementUrl,
    Namespace,
    Place,
    Url,
    complete,
    connected,
    find,
    management,
    read_settings,
)
from eventbus.cli.output import WrongUsage
from eventbus.errors import TransportError

if TYPE_CHECKING:
    from rich.tree import Tree

    from eventbus.topology import Binding, Names, Topology
    from eventbus.transport.rabbitmq.removal import Removal, Removed
    from eventbus.transport.rabbitmq.verify import Finding, Managed, Seen, Standing

app = typer.Typer(help="Exchanges, queues and bindings: show, declare, verify, remove them.")

Services = Annotated[
    list[str],
    typer.Argument(metavar="MODULE:SERVICE", help="Whose; MODULE alone: every service in it.", show_default=False),
]


@app.callback(invoke_without_command=True)
def topology(context: typer.Context) -> None:
    output.show_help_alone(context)


@app.command("show", epilog="Example: eventbus topology show shop.payments:service --json")
def show(services: Services, namespace: Namespace = None, as_json: output.Json = False) -> None:
    """Show what the services need. No broker is asked."""
    from eventbus.topology import Names

    names = Names(namespace or read_settings().namespace)
    found = _topology(names, services)
    if as_json:
        output.say_json(found.to_json())
    else:
        output.console().print(_tree(names, found))


@app.command("apply", epilog="Example: eventbus topology apply shop.payments shop.mails --wait 60")
def apply(
    services: Services,
    url: Url = None,
    namespace: Namespace = None,
    wait: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", min=0, help="Wait so long for a broker that is starting.")
    ] = 0,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune",
            help="Remove what else leads to these services' queues (bindings of subscriptions that are gone), and bind "
            "again what all services share. Needs the management interface. An older worker of the same service that "
            "still runs gets what it subscribes to no more.",
        ),
    ] = False,
    management_url: ManagementUrl = None,
    as_json: output.Json = False,
) -> None:
    """Declare what the services need, before they start.

    What is there already stays; a queue that is there with other arguments is an error. Do it before anything is
    published: an event finds the queues that exist.
    """
    place = find(url, namespace)
    found = _topology(place.names, services)
    complete(_apply(place, found, wait))
    pruned = complete(_prune(place, found, management_url)) if prune else []
    if as_json:
        output.say_json(found.to_json() | ({"pruned": [_binding(b) for b in pruned]} if prune else {}))
        return
    for queue in found.queues:
        if not queue.is_shared:
            output.say(f"declared {queue.name}")
    output.say(f"declared what all services of namespace {place.names.namespace} share")
    for binding in pruned:
        output.say(f"removed  {_short(binding.routing_key)} from {binding.source} to {binding.destination}")


@app.command("verify", epilog="Example: eventbus topology verify shop.payments shop.mails --json")
def verify(
    services: Services,
    url: Url = None,
    namespace: Namespace = None,
    management_url: ManagementUrl = None,
    as_json: output.Json = False,
) -> int:
    """Compare a live broker with what the services need.

    Looks at its version and feature flags, alarms, nodes, queues, exchanges, bindings, policies and consumers, and
    changes nothing. Exit code 3 if there are errors, 0 if there are none, 1 if it could not look. Without the
    management interface it sees what exists and who consumes, and says what it did not check. Figures and policies
    that the management interface tells may be ten seconds old.
    """
    place = find(url, namespace)
    wanted = _topology(place.names, services)
    seen = complete(_look(place, wanted, management_url))
    from eventbus.transport.rabbitmq.verify import verify

    findings = verify(place.names, wanted, seen)
    _print_findings(seen.version, findings, as_json=as_json)
    return output.FOUND_PROBLEMS if any(finding.severity == "error" for finding in findings) else output.DONE


@app.command("remove", epilog="Example: eventbus topology remove mails --wait 3600")
def remove(
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="Its name.", show_default=False)],
    url: Url = None,
    namespace: Namespace = None,
    management_url: ManagementUrl = None,
    wait: Annotated[
        float,
        typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for the delay tree, at most."),
    ] = 900,
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="Delete its dead letters, too. Otherwise their queue is kept.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: output.Json = False,
) -> None:
    """Remove a service that is no more, with what still waits in its queues.

    It gets no fresh events from the start. Its queues are deleted once the delay tree holds nothing for it any more:
    a level counts as clear when it is empty, or when the time that a message stays there has passed, whatever other
    services put in meanwhile. What comes later nevertheless goes to the undeliverable messages. If the wait ends
    before, nothing is deleted, and the same command goes on later. Refused while the service is consumed. Needs the
    management interface.
    """
    from eventbus.service import check_service_name

    check_service_name(service)
    if not (yes or sys.stdin.isatty()):
        raise WrongUsage(f"this deletes what waits for {service}, and nobody is here to ask: add --yes")
    place = find(url, namespace)
    holds = complete(_holdings(place, service, management_url))
    if not yes and not _agreed(place.names, service, holds, dead_letters=dead_letters):
        return
    removed = complete(_remove(place, service, management_url, wait, dead_letters=dead_letters))
    if as_json:
        output.say_json({"deleted": removed.deleted, "kept": removed.kept, "discarded": removed.discarded})
        return
    for name in removed.deleted:
        output.say(f"deleted {name}")
    for name in removed.kept:
        output.say(f"kept    {name}: it holds dead letters (--dead-letters deletes them)")


def _topology(names: Names, targets: list[str]) -> Topology:
    from eventbus.cli import load
    from eventbus.service import check_all
    from eventbus.worker import topology_of

    return topology_of(names, check_all(load.services(targets)))


async def _apply(place: Place, topology: Topology, wait_s: float) -> None:
    import asyncio

    from eventbus.transport.rabbitmq.refusals import LoginRefused

    deadline = time.monotonic() + wait_s
    while True:
        try:
            async with connected(place, topology, "apply"):
                return
        # A broker that is only just starting does not know its users yet.
        except (TransportError, LoginRefused) as error:
            if time.monotonic() >= deadline:
                raise
            output.note(f"waiting for the broker: {error}")
        await asyncio.sleep(1)


async def _prune(place: Place, wanted: Topology, url: str | None) -> list[Binding]:
    from eventbus.transport.rabbitmq.asking import asking
    from eventbus.transport.rabbitmq.verify import leftover, missing_shared

    broker = management(place, url)
    async with asking(place.url) as desk:
        broker.check_is_of(desk.cluster)
    bindings = broker.bindings()
    unwanted = leftover(wanted, bindings)
    broker.unbind(unwanted)
    for binding in missing_shared(wanted, bindings):
        broker.bind(binding)
    return unwanted


def _binding(binding: Binding) -> dict[str, str]:
    return {"source": binding.source, "destination": binding.destination, "routing_key": binding.routing_key}


# ── verify ──────────────────────────────────────────────────────────────────────────────────────────


async def _look(place: Place, wanted: Topology, management_url: str | None) -> Seen:
    from eventbus.transport.rabbitmq.asking import asking
    from eventbus.transport.rabbitmq.verify import Seen

    async with asking(place.url) as desk:
        return Seen(
            version=desk.version,
            exchanges=await desk.exchanges(exchange.name for exchange in wanted.exchanges),
            queues=await desk.queues(queue.name for queue in wanted.queues),
            managed=_managed(place, management_url, desk.cluster),
        )


def _managed(place: Place, url: str | None, cluster: str) -> Managed:
    """What the management interface tells. One that nobody named may be missing; one that was named must answer."""
    from eventbus.transport.rabbitmq.management import NotTold
    from eventbus.transport.rabbitmq.verify import Managed

    try:
        broker = management(place, url)
        broker.check_is_of(cluster)
        return broker.read()
    except NotTold as error:
        if url or place.settings.management_url:
            raise
        return Managed(unread={what: str(error) for what in NEEDS_MANAGEMENT})


NEEDS_MANAGEMENT = ("queues' types, arguments and policies", "exchanges' arguments", "bindings", "alarms, nodes, flags")
_COLOURS = {"error": "bold red", "warning": "yellow", "info": "dim"}


def _print_findings(version: str, findings: list[Finding], *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        output.say_json({"version": version, "findings": [asdict(finding) for finding in findings]})
        return
    from rich.text import Text

    console = output.console()
    for finding in findings:
        what = output.printable(f"{finding.where}: {finding.what}")
        console.print(Text.assemble((f"{finding.severity:<8}", _COLOURS[finding.severity]), what))
        console.print(Text.assemble("        ", (f"-> {output.printable(finding.remedy)}", "dim")))
    counts = [
        f"{count} {severity if severity == 'info' or count == 1 else severity + 's'}"
        for severity in _COLOURS
        if (count := sum(finding.severity == severity for finding in findings))
    ]
    console.print(f"RabbitMQ {version}: {', '.join(counts) or 'all is as the services need it'}")


# ── remove ──────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _removal(place: Place, service: str, management_url: str | None) -> AsyncIterator[Removal]:
    from eventbus.transport.rabbitmq.asking import asking
    from eventbus.transport.rabbitmq.removal import Removal

    broker = management(place, management_url)
    async with asking(place.url) as desk:
        broker.check_is_of(desk.cluster)
        yield Removal(place.names, service, desk, broker)


async def _holdings(place: Place, service: str, management_url: str | None) -> Mapping[str, Standing]:
    async with _removal(place, service, management_url) as removal:
        return await removal.look()


async def _remove(
    place: Place, service: str, management_url: str | None, wait_s: float, *, dead_letters: bool
) -> Removed:
    async with _removal(place, service, management_url) as removal:
        await removal.look()
        await removal.unbind()
        await removal.drain(wait_s, output.note)
        return await removal.delete(dead_letters=dead_letters)


def _agreed(names: Names, service: str, holds: Mapping[str, Standing], *, dead_letters: bool) -> bool:
    dead = names.dead_queue(service)
    waiting = sum(standing.ready for name, standing in holds.items() if name != dead)
    what = f"{service} with the {waiting} that wait in its queues"
    if dead_letters and dead in holds:
        what += f" and its {holds[dead].ready} dead letters"
    return typer.confirm(f"Remove {what}?", err=True)


# ── show ────────────────────────────────────────────────────────────────────────────────────────────


def _tree(names: Names, topology: Topology) -> Tree:
    """The services' queues with what leads to them; of what is shared, a line."""
    from rich.text import Text
    from rich.tree import Tree

    root = Tree(Text.assemble(("namespace ", "dim"), names.namespace))
    for queue in topology.queues:
        if queue.is_shared:
            continue
        limit = f"  delivery limit {queue.arguments['x-delivery-limit']:,}, then {_dead_letter_to(queue.arguments)}"
        branch = root.add(Text.assemble((queue.name, "bold cyan"), (limit, "dim")))
        for binding in topology.bindings:
            if binding.destination == queue.name:
                branch.add(Text.assemble((f"{binding.source}  ", "dim"), _short(binding.routing_key)))
    shared = root.add(Text.assemble(("shared by all services", "dim")))
    levels = [e for e in topology.exchanges if e.name.startswith(f"{names.namespace}.delay.v1.")]
    for exchange in topology.exchanges:
        if exchange not in levels:
            shared.add(Text.assemble((exchange.name, "bold"), (f"  {exchange.type} exchange", "dim")))
    shared.add(Text.assemble((f"{levels[1].name} ...", "bold"), (f"  the delay tree: {len(levels)} exchanges", "dim")))
    return root


def _dead_letter_to(arguments: object) -> str:
    assert isinstance(arguments, dict)
    key = arguments.get("x-dead-letter-routing-key")
    return f"{arguments['x-dead-letter-exchange']}{f' ({key})' if key else ''}"


def _short(routing_key: str) -> str:
    """The delay tree's keys begin with a word for each of its levels; a person need not count them."""
    from eventbus.delay import LEVELS

    stars = ".".join("*" * LEVELS)
    return routing_key.replace(stars, f"({LEVELS} words)") if routing_key.startswith(stars) else routing_key
