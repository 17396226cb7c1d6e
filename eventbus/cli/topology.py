"""`eventbus topology`: what services need on the broker, as data and declared."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from eventbus.cli import output
from eventbus.cli.connection import Namespace, Place, Url, complete, connected, find, read_settings
from eventbus.errors import TransportError

if TYPE_CHECKING:
    from rich.tree import Tree

    from eventbus.topology import Names, Topology

app = typer.Typer(help="Exchanges, queues and bindings: show them, declare them.")

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
    as_json: output.Json = False,
) -> None:
    """Declare what the services need, before they start.

    What is there already stays; a queue that is there with other arguments is an error. Do it before anything is
    published: an event finds the queues that exist.
    """
    place = find(url, namespace)
    found = _topology(place.names, services)
    complete(_apply(place, found, wait))
    if as_json:
        output.say_json(found.to_json())
        return
    for queue in found.queues:
        if not queue.is_shared:
            output.say(f"declared {queue.name}")
    output.say(f"declared what all services of namespace {place.names.namespace} share")


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
